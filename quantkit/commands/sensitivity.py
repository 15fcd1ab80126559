"""quantkit sensitivity: which layer hurts, at which width, and how much to believe it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from quantkit.commands import _common
from quantkit.commands._loss import add_loss, with_loss
from quantkit.commands.compress import parse_bits, parse_settings
from quantkit.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from quantkit.ranking import Sensitivity

HELP = "rank layers by what quantizing them would cost"
USAGE = "quantkit sensitivity MODEL --calib SRC [options]"
SHOWN = 30
FIGURE_WIDTH = 7  # 1.2e-05
EDGES = 6  # left, right, and the gaps behind name and weights


def add(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the .onnx file")
    _common.add_data(parser)
    group = parser.add_argument_group("what to find out")
    group.add_argument(
        "--estimators",
        metavar="LIST",
        default="measured",
        help="allocators that fill a table, such as measured,hawq,fisher (default: measured); the first one ranks",
    )
    group.add_argument(
        "--tries",
        metavar="N",
        type=int,
        default=0,
        help="judge the estimators on N random assignments (default: 0 = not)",
    )
    group.add_argument("--bits", metavar="LIST", help="widths to look at (default: 2,3,4,8)")
    group.add_argument("--at", metavar="B", type=int, help="rank at this width (default: the narrowest above 2)")
    group.add_argument("--quantizer", metavar="NAME", default="auto", help="auto, or one of `quantkit methods`")
    group.add_argument("--group-size", metavar="N", type=int, help="inputs per scale, -1 = one scale per output")
    group.add_argument("--ignore", metavar="PATTERN", action="append", help="keep layers float: a name or re:PATTERN")
    add_loss(group, "--estimators")
    group.add_argument("--set", metavar="M.S=VALUE", action="append", help="a method's setting; repeatable")
    group.add_argument("--plot", metavar="FILE", help="write a picture, as .png or .svg")
    group.add_argument("--all-layers", action="store_true", help="show every layer of a large model")
    _common.add_run(parser)
    _common.add_output(parser)


def run(args: Namespace) -> int:
    path = _common.existing_file(args.model)
    plot = _common.plot_path(args.plot)
    _common.check_writable({"--plot": plot}, {"input model": path, **_common.data_sources(args)})
    widths = parse_bits(args.bits) or (2, 3, 4, 8)
    at = args.at if args.at is not None else next((bits for bits in widths if bits > 2), widths[0])
    if at not in widths:
        raise InputError(f"--at must be one of the widths {', '.join(map(str, widths))}, got {at}")
    estimators = [name.strip() for name in args.estimators.split(",") if name.strip()]

    from quantkit.ranking import sensitivity

    found = sensitivity(
        path,
        calibration=_common.calibration_of(args),
        estimators=estimators,
        tries=args.tries,
        progress=_common.progress_of(args),
        bits=widths,
        quantizer=args.quantizer,
        group_size=args.group_size,
        ignore=tuple(args.ignore or ()),
        settings=with_loss(parse_settings(args.set or ()), args.loss, estimators, "--estimators"),
        **_common.run_options(args),
    )
    show(found, at, _common.console_of(args), all_rows=args.all_layers)
    if plot is not None:
        from quantkit.report.plots import plot_sensitivity

        plot_sensitivity(found, at, plot)
    if args.json:
        _common.print_json(found.to_dict())
    return 0


def _fitting(headings: Sequence[str], room: int) -> Iterator[list[int]]:
    """Places of the columns, as many at a time as fit side by side."""
    part: list[int] = []
    taken = 0
    for place, heading in enumerate(headings):
        width = max(len(heading), FIGURE_WIDTH) + 2
        if part and taken + width > room:
            yield part
            part, taken = [], 0
        part.append(place)
        taken += width
    yield part


def show(found: Sensitivity, at: int, console: Console, *, all_rows: bool) -> None:
    """Units by what they lose, worst first; one column for each width of the first estimator, one for each other."""
    from rich.text import Text

    from quantkit.ranking import loss_at
    from quantkit.report.console import NAME_WIDTH, plain_table, shorten

    first, *others = (row.name for row in found.estimators)
    widths = sorted({bits for row in found.rows for bits in row.bits})
    headings = [*(f"{bits} bit" for bits in widths), *others]
    ranked = found.ranking(first, at)
    shown = ranked if all_rows else ranked[:SHOWN]
    names = [
        shorten(row.layers[0], NAME_WIDTH) + (f" +{len(row.layers) - 1}" if len(row.layers) > 1 else "")
        for row in shown
    ]
    sizes = [f"{row.weights:,}" for row in shown]
    taken = max(map(len, [*names, "layer"])) + max(map(len, [*sizes, "weights"])) + EDGES
    title = f"what layers lose, by {first} at {at} bits"
    for part in _fitting(headings, console.width - taken):
        table = plain_table(title, ())
        table.add_column("layer", no_wrap=True)
        for heading in ("weights", *(headings[place] for place in part)):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, size, row in zip(names, sizes, shown, strict=True):
            known = dict(zip(row.bits, row.losses[first], strict=True))
            cells = [f"{known[bits]:.2g}" if bits in known else "-" for bits in widths]
            cells += [f"{loss_at(row, other, at):.2g}" for other in others]
            table.add_row(Text(name), size, *(cells[place] for place in part))
        console.print(table)
        title = "the same layers"
    if len(shown) < len(ranked):
        console.print(f"{len(ranked) - len(shown)} layers that lose less are not shown (--all-layers)")
    for item in found.estimators:
        judged = "" if item.rank is None else f"; predicts random assignments with rank correlation {item.rank:.2f}"
        judged += "" if item.error is None else f", typically off by {100 * item.error:.0f} %"
        judged += "" if item.ratio is None else f", predicted/true {item.ratio:.2f}"
        console.print(Text(f"{item.name}: {item.quantity}{judged}"))
        for note in item.notes:
            console.print(Text(f"note: {note}"))
    console.print(f"on {found.samples} calibration samples, one unit quantized at a time")
