"""What was measured on a GPU, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import plots
from benchmarks.harness import Record
from benchmarks.markdown import markdown_table


def kernels(records: Sequence[Record]) -> str:
    """One table for each weight: times as fast as half precision, and the share of the copy bandwidth."""
    rows = plots.measured(records)
    parts = []
    for model, dtype in plots.models_of(rows):
        lines = plots.lines_of(rows, model, dtype)
        places = sorted({int(record.details["M"]) for line in lines.values() for record in line})
        header = ["made by", "codes", *(f"M={place}" for place in places)]
        table = []
        for (provider, bits, group), line in lines.items():
            cells = {int(record.details["M"]): _kernel_cell(record) for record in line}
            codes = "" if provider == plots.REFERENCE else f"W{bits} g{group}"
            table.append([provider, codes, *(cells.get(place, "") for place in places)])
        parts.append(f"{model}, {dtype}: speed over {plots.REFERENCE} (share of copy bandwidth)\n\n")
        parts[-1] += markdown_table(header, table)
    failed = [f"- {item.model} {item.setting}, {item.provider}: {item.error}" for item in records if item.error]
    return "\n\n".join([*parts, *(["Failed:\n\n" + "\n".join(failed)] if failed else [])])


def _kernel_cell(record: Record) -> str:
    share = f"{100 * float(record.details['share of copy bandwidth']):.0f} %"
    if record.provider == plots.REFERENCE:
        return f"{float(record.details['microseconds']):.1f} us ({share})"
    return f"{record.speed[0].median:.2f}x ({share})"


def networks(records: Sequence[Record]) -> str:
    """One row for each side and shape."""
    header = ["network", "made by", "setting", "tokens per second", "speed", "peak MB", "weights MB", "SQNR to float16"]
    rows = []
    for record in records:
        details, error = record.details, record.accuracy.get("to float16 dB")
        low, middle, high = (float(details[f"tokens per second{name}"]) for name in (" p20", "", " p80"))
        rows.append(
            [
                record.model,
                record.provider,
                record.setting,
                f"{middle:,.0f} ({low:,.0f} to {high:,.0f})",
                f"{record.speed[0].median:.2f}x ({record.speed[0].p20:.2f} to {record.speed[0].p80:.2f})",
                f"{float(details['peak MB on the device']):,.0f}",
                "" if record.size_bytes is None else f"{record.size_bytes / 1e6:,.0f}",
                "" if error is None else f"{error:.1f} dB",
            ]
        )
    return markdown_table(header, rows)
