"""A report as tables that fit 80 columns, on the terminal."""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from quantkit.report.types import LayerRow, Report, ScaleRow

LAYER_LIMIT = 60
UNTOUCHED_LIMIT = 12
NAME_WIDTH = 22


class ErrorConsole(Console):
    """Standard error; a reader that went away ends the tables, not the run."""

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__(stderr=True, quiet=quiet, highlight=False, emoji=False, markup=False)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, self.file.fileno())


def print_report(report: Report, console: Console, *, all_layers: bool = False) -> None:
    """Layers, untouched nodes, contenders, totals, notes; long lists are cut unless `all_layers`."""
    name_width = NAME_WIDTH + max(0, console.width - 80) // 2
    print_layers(report, console, name_width=name_width, all_layers=all_layers)
    print_untouched(report.untouched, console, all_rows=all_layers)
    print_scales(report.scales, console, all_rows=all_layers)
    if report.contenders:
        console.print(_contender_table(report))
    console.print(_totals_table(report))
    for note in report.notes:
        console.print(Text(f"note: {note}"))
    for sentence in report.unmet:
        console.print(Text(f"not met: {sentence}", style="bold red"))


# What the forms in the table mean; the plan has every layer's own reason.
FORMS = MappingProxyType(
    {
        "qdq": "integer kernel, activation ranges fixed by calibration",
        "dynamic": "integer product, activation ranges taken at run time",
        "matmulnbits": "weights stay packed at run time, activations are rounded per block",
        "gather": "rows are dequantized as they are looked up",
        "packed": "packed in the file, float at run time: most accurate, at float speed",
    }
)


def print_layers(report: Report, console: Console, *, name_width: int, all_layers: bool) -> None:
    """One row per layer; beyond the limit only those with the largest error, and a line that sums up the rest."""
    rows = report.layers
    shown = rows if all_layers or len(rows) <= LAYER_LIMIT else _worst(rows, LAYER_LIMIT)
    table = plain_table(f"layers of {shorten(report.model, 50)}", ())
    table.add_column("layer", no_wrap=True)
    for heading in ("bits", "bytes", "less", "err dB"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("runs as", overflow="fold")
    for row in shown:
        table.add_row(
            Text(shorten(row.name, name_width)),
            bits_text(row),
            short_bytes(row.bytes_after),
            f"{row.bytes_before / row.bytes_after:.1f}x" if row.bytes_after else "-",
            "-" if row.sqnr is None else f"{row.sqnr:.1f}",
            Text(_way(row)),
        )
    console.print(table)
    for form in sorted({row.form for row in rows if row.form is not None} & set(FORMS)):
        console.print(f"{form}: {FORMS[form]}", soft_wrap=True)
    if len(shown) < len(rows):
        widths = Counter("float" if row.bits is None else f"{row.bits} bit" for row in rows)
        counts = ", ".join(f"{count} x {width}" for width, count in sorted(widths.items()))
        hidden = len(rows) - len(shown)
        console.print(f"{hidden} layers with less error are not shown (--all-layers); in all {counts}")


def print_untouched(untouched: Sequence[tuple[str, str, str]], console: Console, *, all_rows: bool) -> None:
    """Nodes with weights that stay as they are, with the reason."""
    if not untouched:
        return
    table = plain_table("not quantized", ("node", "op", "reason"))
    shown = untouched if all_rows else untouched[:UNTOUCHED_LIMIT]
    for name, op, reason in shown:
        table.add_row(Text(shorten(name, NAME_WIDTH)), Text(op), Text(reason))
    console.print(table)
    if len(shown) < len(untouched):
        console.print(f"{len(untouched) - len(shown)} more are not shown (--all-layers)")


def print_scales(scales: Sequence[ScaleRow], console: Console, *, all_rows: bool) -> None:
    """What transforms rescaled, then what they could not, with the reason."""
    if not scales:
        return
    done = [row for row in scales if row.spread is not None]
    rows = done + [row for row in scales if row.spread is None]
    shown = rows if all_rows else rows[:UNTOUCHED_LIMIT]
    table = plain_table(f"rescaled ({len(done)} groups, the float model computes the same)", ("by", "divided in"))
    table.add_column("layers", overflow="fold")
    table.add_column("spread", justify="right")
    table.add_column("", overflow="fold")
    for row in shown:
        layers = ", ".join(shorten(name, NAME_WIDTH) for name in row.layers)
        spread = "-" if row.spread is None else f"{row.spread:.3g}x"
        table.add_row(row.transform, Text(shorten(row.source, NAME_WIDTH)), Text(layers), spread, Text(row.reason))
    console.print(table)
    if len(shown) < len(rows):
        console.print(f"{len(rows) - len(shown)} more are not shown (--all-layers)")


def plain_table(title: str, headings: Sequence[str]) -> Table:
    """The look of every table."""
    table = Table(title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _contender_table(report: Report) -> Table:
    table = plain_table("measured candidates", ("", "plan"))
    foretold = any(row.predicted is not None for row in report.contenders)
    for heading in ("size", *(["predicted"] if foretold else []), "nats", "error dB", "time"):
        table.add_column(heading, justify="right")
    for row in report.contenders:
        mark = "*" if row.chosen else ""
        expected = ["-" if row.predicted is None else f"{row.predicted:.3g}"] if foretold else []
        nats = f"{row.loss:.3g}" if math.isfinite(row.loss) else "-"
        time = f"{row.latency:.2f}x" if math.isfinite(row.latency) else "-"
        decibels = "-" if math.isnan(row.sqnr) else f"{row.sqnr:.1f}"
        table.add_row(mark, Text(row.name), short_bytes(row.size), *expected, nats, decibels, time)
    return table


def loss_text(report: Report) -> str:
    """`predicted 0.0121 nats per sample, measured 0.0134`, as far as both are known; "" where the first is not."""
    if report.predicted is None:
        return ""
    measured = next((row.loss for row in report.contenders if row.chosen), math.inf)
    found = f", measured {measured:.3g}" if math.isfinite(measured) else ""
    return f"predicted {report.predicted:.3g} nats per sample from the weights alone{found}"


def _totals_table(report: Report) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    ratio = f"{report.ratio:.2f}x smaller" if report.size_after else "empty"
    table.add_row("size", f"{short_bytes(report.size_before)} > {short_bytes(report.size_after)} ({ratio})")
    table.add_row("bits per weight", f"{report.average_bits:.2f} ({report.stored_bits:.2f} with scales)")
    for timing in report.timings:
        shapes = Text(", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in timing.shapes.items()))
        change = f"{timing.speedup:.2f}x" if timing.quantized_ms else "?"
        table.add_row("speed", Text(f"{change} ({timing.float_ms:.3f} > {timing.quantized_ms:.3f} ms) at ") + shapes)
    expected = loss_text(report)
    if expected:
        table.add_row("loss", expected)
    fidelity = report.fidelity
    if fidelity is not None:
        agreement = "" if fidelity.top1_agreement is None else f", top-1 agreement {fidelity.top1_agreement:.1%}"
        table.add_row(
            "fidelity",
            f"{fidelity.sqnr:.1f} dB, cosine {fidelity.cosine:.5f}{agreement} on {fidelity.samples} samples",
        )
        table.add_row("parity", f"{fidelity.parity:.1f} dB against the planner's simulation")
    known = report.accuracy
    if known is not None:
        scores = f"{known.before:.4g} > {known.after:.4g}"
        table.add_row("accuracy", Text(f"{known.metric} {scores} on {known.samples} samples of --eval"))
    table.add_row("target", report.target)
    return table


def shorten(text: str, width: int) -> str:
    """Cut in the middle: the end of a path says more than its middle."""
    if len(text) <= width:
        return text
    head = (width - 1) // 3
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def short_bytes(count: int) -> str:
    """Three digits and a unit: `980 B`, `1.23 MB`."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB" if value < 999.5 else f"{value:.0f} GB"


def bits_text(row: LayerRow) -> str:
    """`4 g32` = 4 bits with a scale per 32 inputs, `8` = one scale per row, `float`."""
    if row.bits is None:
        return "float"
    return f"{row.bits} g{row.group_size}" if row.group_size and row.group_size > 0 else str(row.bits)


def _way(row: LayerRow) -> str:
    """`qdq > QLinearConv, 2.9x`: form, the kernel that runs, its measured speed; for a float layer, why it is one."""
    if row.form is None:
        return f"{row.op}: {row.reason}"
    kernel = f"{row.form} > {row.kernel}" if row.kernel else row.form
    return f"{kernel}, {1 / row.latency:.1f}x" if row.latency else kernel


def _worst(rows: Sequence[LayerRow], limit: int) -> list[LayerRow]:
    """The rows with the lowest signal-to-noise ratio, in the model's order; layers without one come last."""
    by_error = sorted(range(len(rows)), key=lambda at: (rows[at].sqnr is None, rows[at].sqnr or 0.0, at))
    return [rows[at] for at in sorted(by_error[:limit])]


def print_unmet(report: Report) -> None:
    """The sentences behind exit code 1, for a run whose tables are off."""
    for sentence in report.unmet:
        sys.stderr.write(f"quantkit: not met: {sentence}\n")
