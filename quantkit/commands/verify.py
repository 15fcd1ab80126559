"""quantkit verify: a quantized file against the float model, in the runtime."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from typing import TYPE_CHECKING

from quantkit.commands import _common
from quantkit.commands.compress import add_evaluation, evaluation_of
from quantkit.errors import InputError

if TYPE_CHECKING:
    from quantkit.calibration.data import CalibrationData
    from quantkit.calibration.request import CalibrationRequest

HELP = "compare a quantized file with its float model"
USAGE = "quantkit verify OUT --against MODEL [--calib SRC] [--eval SRC --metric M] [options]"


def add(parser: ArgumentParser) -> None:
    parser.add_argument("quantized", metavar="OUT", help="the quantized .onnx file")
    parser.add_argument("--against", metavar="MODEL", required=True, help="the float .onnx file")
    _common.add_data(parser)
    add_evaluation(parser)
    group = parser.add_argument_group("run")
    group.add_argument("--threads", metavar="N", type=int, default=1, help="onnxruntime threads, 0 = all (default: 1)")
    group.add_argument("--seed", metavar="N", type=int, default=0, help="of made-up inputs (default: 0)")
    _common.add_output(parser)


def run(args: Namespace) -> int:
    quantized, reference = _common.existing_file(args.quantized), _common.existing_file(args.against)
    _common.check_run(args)
    request, evaluation = _common.calibration_of(args), evaluation_of(args)
    if request is None and evaluation is None and not args.random_calibration:
        raise InputError("verify needs data to run both models on: give --calib, --eval or --random-calibration")

    from rich.text import Text

    from quantkit.calibration.data import random_calibration
    from quantkit.comparison import compare_files
    from quantkit.report.console import NAME_WIDTH, plain_table, short_bytes, shorten
    from quantkit.runtime.ort import make_session
    from quantkit.verify import session_inputs

    data: CalibrationRequest | CalibrationData | None = request
    if request is None and evaluation is None:
        data = random_calibration(session_inputs(make_session(reference, threads=args.threads)), seed=args.seed)
    found = compare_files(quantized, reference, calibration=data, evaluation=evaluation, threads=args.threads)
    fidelity = found.fidelity
    table = plain_table("quantized against float", ("what", "result"))
    table.add_row("signal to noise", f"{fidelity.sqnr:.1f} dB")
    table.add_row("cosine", f"{fidelity.cosine:.6f}")
    if fidelity.top1_agreement is not None:
        table.add_row("top-1 agreement", f"{fidelity.top1_agreement:.2%}")
    if found.accuracy is not None:
        figures = found.accuracy
        error = f" +- {found.drop_error:.2g}" if found.drop_error else ""
        change = f"{figures.before:.6g} > {figures.after:.6g} (drop {figures.before - figures.after:.4g}{error})"
        if figures.samples != found.samples:  # of --eval, where the others are of --calib
            change += f" on {figures.samples} samples"
        table.add_row(Text(shorten(figures.metric, NAME_WIDTH)), change)
    table.add_row("samples", str(found.samples))
    table.add_row("size", f"{short_bytes(found.reference_size)} > {short_bytes(found.size)}")
    for timing in found.timings:
        shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in timing.shapes.items())
        table.add_row(
            f"speed at {shapes}", f"{timing.speedup:.2f}x ({timing.float_ms:.3f} > {timing.quantized_ms:.3f} ms)"
        )
    _common.console_of(args).print(table)
    if args.json:
        times = [{**asdict(timing), "speedup": timing.speedup} for timing in found.timings]
        _common.print_json({**asdict(found), "timings": times})
    return 0
