"""Weight quantizers layer by layer: error of the layer's output on real Grams, time, memory, cost against the width.

python -m benchmarks.quantizers errors --data ../shared --model resnet20 --out results.jsonl
python -m benchmarks.quantizers errors --data ../shared --model minilm --every 7 --minilm minilm.onnx --tokenizer FOLDER
python -m benchmarks.quantizers time   --data ../shared --model minilm --minilm minilm.onnx --tokenizer FOLDER
python -m benchmarks.quantizers width

`errors`: every layer at 2, 3, 4 and 8 bits, symmetric and not, in groups of 32, 64, 128 and whole rows. The error of a
row is d H d^T in float64 with H undamped, relative to w H w^T; a layer's is that of all its rows. Rows share nothing
but H, so that `--rows` takes some of each matrix, evenly spread, and the quantizers see no others.
`time`: statistics, AWQ's scales folded into the graph, then GPTQ of all layers, one process for each core.
`width`: GPTQ of square random matrices on Grams with a spectrum that falls like 1 / k.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.contest import say
from benchmarks.data import cifar10_calibration, write_calibration_text
from benchmarks.harness import Record, append_records, environment, run_isolated
from quantkit.calibration.request import CalibrationRequest
from quantkit.candidate import Context
from quantkit.options import make_options
from quantkit.parallel import Task, quantize_all, worker_count
from quantkit.pipeline import Run, prepare
from quantkit.quantizers.awq import AWQ
from quantkit.quantizers.gptq import GPTQ
from quantkit.quantizers.rtn import RTN
from quantkit.quantizers.slim import Slim
from quantkit.report.progress import SilentProgress
from quantkit.types import Array, FloatArray, LayerStats, QuantizedWeight, QuantSpec, WeightQuantizer

BITS = (2, 3, 4, 8)
GROUPS = (32, 64, 128, -1)
SLIM_BITS = (2, 3, 4)
WIDTHS = {1024: 1024, 2048: 2048, 4096: 4096, 8192: 512}  # K: rows that are quantized, of K
POLL_SECONDS = 0.2
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Layer:
    """One matrix and what calibration saw."""

    name: str
    weight: FloatArray
    stats: LayerStats


def network(args: Namespace, folder: Path, **settings: object) -> Run:
    """The network with its calibration data, opened as the command opens it."""
    if args.model == "resnet20":
        path = args.data / "models/resnet20_cifar10.onnx"
        request = CalibrationRequest(cifar10_calibration(args.data), preprocess="cifar10")
    else:
        path = args.minilm
        request = CalibrationRequest(str(write_calibration_text(args.data, folder)), tokenizer=str(args.tokenizer))
    chosen = {"activations": "none", "quantizer": "gptq", "threads": 1, **settings}
    options = make_options({**chosen, "ignore": ("re:node_embedding.*",)} if args.model == "minilm" else chosen)
    return prepare(path, request, None, options, frozenset({"gram", "abs_mean", "square_mean"}), SilentProgress())


def layers_of(context: Context, rows: int | None) -> Iterator[Layer]:
    """Every layer that has a Gram, with at most `rows` of its rows, evenly from each convolution group."""
    for name, target in context.targets.items():
        stats = context.stats[name]
        assert stats.gram is not None
        weight = target.load()
        each = len(weight) // len(stats.gram)
        taken = np.linspace(0, each - 1, min(each, rows or each)).astype(np.int64)
        picked = (np.arange(len(stats.gram))[:, None] * each + taken).reshape(-1)
        yield Layer(name, np.ascontiguousarray(weight[picked]), stats)


def row_errors(layer: Layer, values: Array) -> Array:
    """[N] d H d^T of every row, float64."""
    assert layer.stats.gram is not None
    delta = (values.astype(np.float64) - layer.weight).reshape(len(layer.stats.gram), -1, values.shape[1])
    return np.asarray(((delta @ layer.stats.gram) * delta).sum(axis=2).reshape(-1))


@dataclass
class Tally:
    """What one quantizer did at one setting, over all layers.

    Attributes:
        errors, reference: of the output of each layer, relative to its mean square: this quantizer's and RTN's.
        worse_layers, worse_rows: where this quantizer's exceeds RTN's.
    """

    errors: list[float]
    reference: list[float]
    worse_layers: int = 0
    worse_rows: int = 0

    def add(self, found: Array, plain: Array, size: float) -> None:
        """Errors [N] of a layer's rows."""
        self.errors.append(float(found.sum()) / size)
        self.reference.append(float(plain.sum()) / size)
        self.worse_layers += bool(found.sum() > plain.sum())
        self.worse_rows += int((found > plain).sum())

    def accuracy(self) -> dict[str, float]:
        shares = np.array(self.errors) / np.maximum(self.reference, np.finfo(float).tiny)
        return {
            "relative error": float(np.mean(self.errors)),
            "rtn's": float(np.mean(self.reference)),
            "share of rtn's": float(shares.mean()),
            "worst share": float(shares.max()),
            "layers worse": float(self.worse_layers),
            "rows worse": float(self.worse_rows),
        }


def errors(args: Namespace) -> None:
    """Every quantizer on every layer at every setting."""
    with TemporaryDirectory(prefix="quantkit-benchmark-") as folder:
        run = network(args, Path(folder))
        layers = list(layers_of(run.context(run.original), args.rows))[:: args.every]
    for bits, symmetric, group in product(BITS, (False, True), GROUPS):
        spec = QuantSpec(bits, group, symmetric=symmetric)
        methods: dict[str, WeightQuantizer] = {"gptq": GPTQ(), "awq": AWQ()}
        if bits in SLIM_BITS and group > 0 and not symmetric:
            methods["slim"] = Slim()
        tallies = {name: Tally([], []) for name in methods}
        drift, start = 0.0, time.process_time()
        for layer in layers:
            size = float(row_errors(layer, np.zeros_like(layer.weight)).sum())
            plain = row_errors(layer, RTN().quantize(layer.weight, spec, None).dequantize())
            for name, method in methods.items():
                with threadpool_limits(limits=1):
                    made = method.quantize(layer.weight, spec, layer.stats)
                tallies[name].add(row_errors(layer, made.dequantize()), plain, size)
                if name == "slim":
                    drift = max(drift, abs(made.spec.average_bits(layer.weight.shape[1]) - bits))
        kind = f"{bits} bits {'symmetric' if symmetric else 'asymmetric'} {f'g{group}' if group > 0 else 'per row'}"
        details = {"layers": len(layers), "rows": args.rows, "CPU seconds": time.process_time() - start}
        for name, tally in tallies.items():
            extra = {"slim: largest drift of the average bits": drift} if name == "slim" else {}
            write(args, "quantizer errors", f"{name} {kind}", accuracy=tally.accuracy(), details={**details, **extra})


def write(args: Namespace, benchmark: str, setting: str, **figures: Any) -> None:
    record = Record(benchmark, args.model, "quantkit", setting, environment(1), **figures)
    append_records(args.out, [record])
    say(f"{benchmark}: {args.model} {setting}: {dict(record.accuracy)} {dict(record.details)}")


class Usage:
    """Processor time of this process and of those that it has started, and with `memory` their peak, from /proc."""

    def __init__(self, *, memory: bool = False) -> None:
        self.peak_mb = 0.0
        self._stop = Event()
        self._thread = Thread(target=self._watch, daemon=True) if memory else None
        self._start, self._cpu = time.perf_counter(), cpu_seconds()

    def __enter__(self) -> Usage:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds, self.cpu = time.perf_counter() - self._start, cpu_seconds() - self._cpu
        if self._thread is not None:
            self._stop.set()
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self.peak_mb = max(self.peak_mb, sum(map(_resident_mb, family())))


def family() -> list[int]:
    """This process and its living descendants."""
    found = [os.getpid()]
    for pid in found:
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            with suppress(OSError):  # gone since
                found += [int(child) for child in path.read_text().split()]
    return found


def _resident_mb(pid: int) -> float:
    """Resident memory in 10^6 bytes; what processes share is divided among them."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("Pss:")), 0.0)


def cpu_seconds() -> float:
    """Of this process, of its living descendants, and of the children that have ended."""
    own = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    total = sum(item.ru_utime + item.ru_stime for item in own)
    for pid in family()[1:]:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += sum(int(value) for value in fields[11:15]) / TICKS
    return total


def timing(args: Namespace) -> None:
    """Statistics, scales and codes of all layers, from the file on."""
    with TemporaryDirectory(prefix="quantkit-benchmark-") as folder, Usage(memory=True) as whole:
        run = network(args, Path(folder), group_size=args.group)
        with Usage() as scaling:
            changed = run.rescaled(("awq",), args.bits)
        with Usage() as reading:
            context = run.context(changed)
        spec = QuantSpec(args.bits, args.group)
        with Usage() as rounding:
            names = list(context.targets)
            tasks = [
                Task(name, context.targets[name].shape, context.targets[name].load, context.stats[name], (spec,))
                for name in names
            ]
            made = dict(quantize_all(GPTQ(), tasks, args.workers))
    found = [_relative(Layer(task.name, task.load(), task.stats), made[task.name][0]) for task in tasks if task.stats]
    steps = {"rescaling (awq)": scaling, "statistics": reading, "gptq": rounding, "whole": whole}
    details: dict[str, object] = {"layers": len(tasks), "processes": worker_count(args.workers)}
    for name, usage in steps.items():
        details |= {f"{name}: seconds": usage.seconds, f"{name}: CPU seconds": usage.cpu}
    write(
        args,
        "quantizer time",
        f"awq and gptq, {args.bits} bits g{args.group}",
        accuracy={"relative error": float(np.mean(found))},
        details=details,
        seconds=whole.seconds,
        peak_rss_mb=whole.peak_mb,
    )


def _relative(layer: Layer, made: QuantizedWeight) -> float:
    size = row_errors(layer, np.zeros_like(layer.weight)).sum()
    return float(row_errors(layer, made.dequantize()).sum() / size)


def width(args: Namespace) -> None:
    """GPTQ at each width, each in a process of its own."""
    if args.inputs:
        width_here(args)
        return
    for inputs, rows in WIDTHS.items():
        command = [
            sys.executable,
            "-m",
            "benchmarks.quantizers",
            "width",
            "--inputs",
            str(inputs),
            "--out",
            str(args.out),
        ]
        done = run_isolated([*command, "--rows", str(rows), "--bits", str(args.bits), "--group", str(args.group)])
        if done.status:
            raise SystemExit(done.last_line)
        say(done.last_line)


def width_here(args: Namespace) -> None:
    """GPTQ of one random matrix, in this process."""
    random = np.random.default_rng(0)
    size = args.inputs
    samples = random.standard_normal((2 * size, size), dtype=np.float32)
    samples *= (1 / np.sqrt(np.arange(1, size + 1))).astype(np.float32)
    mixed = samples @ np.linalg.qr(random.standard_normal((size, size), dtype=np.float32))[0]
    gram = (mixed.T @ mixed).astype(np.float64)[None] / len(mixed)
    del samples, mixed
    weight = random.standard_normal((args.rows, size), dtype=np.float32)
    spec = QuantSpec(args.bits, args.group)
    stats = LayerStats(num_tokens=2 * size, low=-1.0, high=1.0, gram=gram)
    start, cpu = time.perf_counter(), time.process_time()
    with threadpool_limits(limits=1):
        made = GPTQ().quantize(weight, spec, stats)
    details = {
        "inputs": size,
        "rows quantized": args.rows,
        "CPU seconds": time.process_time() - cpu,
        "rtn": _relative(Layer("", weight, stats), RTN().quantize(weight, spec, None)),
    }
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    accuracy = {"relative error": _relative(Layer("", weight, stats), made)}
    args.model = f"random {size} x {size}"
    setting = f"gptq, {args.bits} bits g{args.group}, {args.rows} of {size} rows"
    write(args, "quantizer width", setting, accuracy=accuracy, details=details, seconds=seconds, peak_rss_mb=peak)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("errors", "time", "width"))
    parser.add_argument("--data", type=Path, default=Path("../shared"), help="folder with models/ and data/")
    parser.add_argument("--out", type=Path, default=Path("results.jsonl"), help="file to append results to")
    parser.add_argument("--model", choices=("resnet20", "minilm"), default="resnet20")
    parser.add_argument("--minilm", type=Path, help="the exported sentence encoder")
    parser.add_argument("--tokenizer", type=Path, help="its tokenizer.json, or the folder that holds it")
    parser.add_argument("--rows", type=int, help="errors: at most so many rows of each convolution group or matrix")
    parser.add_argument("--every", type=int, default=1, help="errors: only every N-th layer")
    parser.add_argument("--bits", type=int, default=4, help="time, width")
    parser.add_argument("--group", type=int, default=32, help="time, width: group size")
    parser.add_argument("--workers", type=int, default=0, help="time: processes (0 = one for each core)")
    parser.add_argument("--inputs", type=int, help="width: only this one, in this process")
    args = parser.parse_args(arguments)
    {"errors": errors, "time": timing, "width": width}[args.part](args)


if __name__ == "__main__":
    main()
