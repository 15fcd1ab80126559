"""quantkit bench: several models timed alternately in one process, so that all share the machine's moods."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.commands import _common
from quantkit.errors import InputError

if TYPE_CHECKING:
    from quantkit.calibration.data import CalibrationData, InputSpec

HELP = "time models against each other"
USAGE = "quantkit bench MODEL... [--calib SRC] [--shape NAME=1x3x224x224] [options]"


def add(parser: ArgumentParser) -> None:
    parser.add_argument("models", metavar="MODEL", nargs="+", help=".onnx files; ratios are to the first")
    _common.add_data(parser)
    group = parser.add_argument_group("run")
    group.add_argument("--shape", metavar="NAME=DIMS", action="append", help="an input's shape, such as x=1x3x224x224")
    group.add_argument("--threads", metavar="N", type=int, default=1, help="onnxruntime threads, 0 = all (default: 1)")
    group.add_argument("--plot", metavar="FILE", help="write a picture of the times, as .png or .svg")
    group.add_argument("--seconds", metavar="S", type=float, default=3.0, help="how long to measure (default: 3)")
    _common.add_output(parser)


def run(args: Namespace) -> int:
    models = [_common.existing_file(text) for text in args.models]
    shapes = parse_shapes(args.shape or [])
    if not 0 < args.seconds <= 3600:
        raise InputError(f"--seconds must be above 0 and at most 3600, got {args.seconds:g}")
    _common.check_run(args)
    plot = _common.plot_path(args.plot)
    _common.check_writable({"--plot": plot}, {f"model {path}": path for path in models} | _common.data_sources(args))
    calibration = _common.calibration_of(args)
    if calibration is not None and shapes:
        raise InputError("--shape and --calib both say what the inputs look like; give one of them")

    from rich.text import Text

    from quantkit.report.console import plain_table, shorten
    from quantkit.runtime.ort import make_session, time_sessions
    from quantkit.verify import open_data, representative_feeds, session_inputs

    sessions = [make_session(path, threads=args.threads) for path in models]
    for path, session in zip(models, sessions, strict=True):
        if session.input_names != sessions[0].input_names:
            wanted = ", ".join(sessions[0].input_names)
            raise InputError(f"{path} has the inputs {', '.join(session.input_names)}, but {models[0]} has {wanted}")
    specs = session_inputs(sessions[0])
    data = made_up(specs, shapes) if calibration is None else open_data(calibration, specs)
    feeds = representative_feeds(list(data))
    table = plain_table("median time of one run", ("model", "shapes"))
    table.add_column("ms", justify="right")
    table.add_column("speed", justify="right")
    rows: list[dict[str, Any]] = []
    for feed in feeds:
        sizes = {name: value.shape for name, value in feed.items()}
        medians = time_sessions(sessions, feed, seconds=args.seconds / len(feeds))
        for path, median in zip(models, medians, strict=True):
            speedup = medians[0] / median
            rows.append({"model": path, "shapes": sizes, "median_ms": median, "speedup": speedup})
            table.add_row(Text(shorten(str(path), 34)), Text(_shapes(sizes)), f"{median:.3f}", f"{speedup:.2f}x")
    _common.console_of(args).print(table)
    if plot is not None:
        plot_times(rows, plot)
    if args.json:
        _common.print_json({"threads": args.threads, "seconds": args.seconds, "rows": rows})
    return 0


def plot_times(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One bar for each model and shape, in milliseconds.

    Raises:
        InputError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    from quantkit.report.console import shorten
    from quantkit.report.plots import new_figure, write_figure

    figure = new_figure(8.0, 1.2 + 0.4 * len(rows))
    axes = figure.add_subplot()
    labels = [f"{shorten(str(row['model']), 40)}\n{_shapes(row['shapes'])}" for row in rows]
    bars = axes.barh(range(len(rows)), [row["median_ms"] for row in rows])
    axes.bar_label(bars, [f"{row['speedup']:.2f}x" for row in rows], padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("median time of one run, ms")
    write_figure(figure, path)


def _shapes(shapes: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())


def made_up(specs: Sequence[InputSpec], shapes: Mapping[str, tuple[int, ...]]) -> CalibrationData:
    """One random batch of the shapes asked for; times hardly depend on the values."""
    from quantkit.calibration.data import InputSpec, random_calibration

    names = [spec.name for spec in specs]
    unknown = sorted(set(shapes) - set(names))
    if unknown:
        raise InputError(f"--shape: the model has no input {', '.join(unknown)}; it has {', '.join(names)}")
    wanted = []
    for spec in specs:
        shape = shapes.get(spec.name, spec.shape)
        fixed = [(dim, size) for dim, size in zip(spec.shape, shape, strict=False) if isinstance(dim, int)]
        if len(shape) != len(spec.shape) or any(dim != size for dim, size in fixed):
            raise InputError(f"--shape {spec.name}={'x'.join(map(str, shape))}: the model wants {spec.wants}")
        wanted.append(InputSpec(spec.name, spec.dtype, shape))
    batches = {shape[0] for shape in shapes.values() if shape}
    if len(batches) > 1:
        raise InputError(f"--shape: all inputs need the same batch, got {', '.join(map(str, sorted(batches)))}")
    return random_calibration(wanted, samples=max(batches, default=1))


def parse_shapes(items: list[str]) -> dict[str, tuple[int, ...]]:
    """`x=1x3x224x224` -> {"x": (1, 3, 224, 224)}; the name may hold an `=`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for item in items:
        name, equals, dims = item.rpartition("=")
        sizes = dims.split("x")
        if not equals or not name or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise InputError(f"--shape must be NAME=DIMS such as x=1x3x224x224, got {item!r}")
        if name in shapes:
            raise InputError(f"--shape for {name!r} is given twice")
        shapes[name] = tuple(int(size) for size in sizes)
    return shapes
