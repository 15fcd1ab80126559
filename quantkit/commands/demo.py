"""quantkit demo: train a small model, compress it to 8 and to 4 bits, compare."""

from __future__ import annotations

import tempfile
from argparse import ArgumentParser, Namespace
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from quantkit.commands import _common

HELP = "train a small model, compress it, compare (under a minute)"
USAGE = "quantkit demo [--keep DIR] [options]"


def add(parser: ArgumentParser) -> None:
    parser.add_argument("--keep", metavar="DIR", help="keep the models and plans in this folder")
    _common.add_output(parser)


def run(args: Namespace) -> int:
    from rich.text import Text

    from quantkit.demo import run_demo
    from quantkit.report.console import plain_table, short_bytes

    if args.keep:
        Path(args.keep).mkdir(parents=True, exist_ok=True)
    with nullcontext(args.keep) if args.keep else tempfile.TemporaryDirectory(prefix="quantkit-demo-") as folder:
        rows = run_demo(Path(folder), progress=_common.progress_of(args))
    table = plain_table("handwritten digits, held-out test images", ("model",))
    for heading in ("size", "smaller", "accuracy", "ms per run", "speed"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            Text(row.name),
            short_bytes(row.size),
            f"{rows[0].size / row.size:.2f}x",
            f"{row.accuracy:.2%}",
            f"{row.milliseconds:.3f}",
            f"{rows[0].milliseconds / row.milliseconds:.2f}x",
        )
    console = _common.console_of(args)
    console.print(table)
    for row in rows:
        for sentence in row.unmet:
            console.print(Text(f"{row.name}: not met: {sentence}"))
    if args.keep:
        console.print(Text(f"models and plans are in {args.keep}"))
    if args.json:
        _common.print_json([asdict(row) for row in rows])
    return 0
