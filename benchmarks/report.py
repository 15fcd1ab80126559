"""Results as Markdown tables, and plots of those of the GPU kernels.

python -m benchmarks.report results.jsonl [--plots FOLDER]
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks import gpu_tables, plots
from benchmarks.harness import Environment, Record, read_records
from benchmarks.markdown import markdown_table

# What tells integer from float execution; other operators are left to the JSON lines.
KERNELS = (
    "QLinearConv",
    "FusedConv",
    "Conv",
    "DynamicQuantizeMatMul",
    "MatMulIntegerToFloat",
    "MatMulInteger",
    "QGemm",
    "MatMulNBits",
    "MatMul",
    "FusedMatMul",
    "Gemm",
    "FusedGemm",
)
SHARES = ("top-1", "agreement", "same neighbour")
TABLES = {"kernels": gpu_tables.kernels, "e2e": gpu_tables.networks}
"""Benchmarks whose rows are shown in another way."""


def newest(records: Iterable[Record]) -> list[Record]:
    """The last record of each contestant, in the order of their first appearance."""
    rows: dict[tuple[str, str, str, str], Record] = {}
    for record in records:
        rows[record.benchmark, record.model, record.provider, record.setting] = record
    return list(rows.values())


def benchmark_table(records: Sequence[Record]) -> str:
    """All contestants of one benchmark."""
    figures = _in_order(name for record in records for name in record.accuracy)
    shapes = _in_order(speed.shape for record in records for speed in record.speed)
    header = [
        *("made by", "setting", *figures, "bytes", "beside codes", "bits with scales"),
        *(f"speed {shape}" for shape in shapes),
        *("operators run", "peak MB", "seconds"),
    ]
    return markdown_table(header, [_row(record, figures, shapes) for record in records])


def _row(record: Record, figures: Sequence[str], shapes: Sequence[str]) -> list[str]:
    if record.error:
        blank = [""] * (len(figures) + len(shapes) + 3)
        return [record.provider, record.setting, *blank, f"failed: {record.error}", *_cost(record)]
    speeds = {
        speed.shape: f"{speed.median:.2f}x ({speed.p20:.2f} to {speed.p80:.2f})"
        for speed in record.speed
        if record.provider != "float"
    }
    stored, codes = record.details.get("stored_bits"), record.details.get("code_bytes")
    return [
        record.provider,
        record.setting,
        *(_figure(name, record.accuracy.get(name)) for name in figures),
        "" if record.size_bytes is None else f"{record.size_bytes:,}",
        "" if codes is None or record.size_bytes is None else f"{record.size_bytes - codes:,}",
        "" if stored is None else f"{stored:.2f}",
        *(speeds.get(shape, "") for shape in shapes),
        kernels_text(record.kernels),
        *_cost(record),
    ]


def _cost(record: Record) -> list[str]:
    return [
        "" if record.peak_rss_mb is None else f"{record.peak_rss_mb:.0f}",
        "" if record.seconds is None else f"{record.seconds:.0f}",
    ]


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name in SHARES:
        return f"{100 * value:.2f} %"
    return f"{value:.1f}" if name.endswith("dB") else f"{value:.4f}"


def kernels_text(kernels: Mapping[str, int]) -> str:
    """`19 QLinearConv, 1 Gemm`."""
    return ", ".join(f"{kernels[name]} {name}" for name in KERNELS if name in kernels)


def environment_text(environments: Iterable[Environment]) -> str:
    """One line for each way that records of a benchmark were taken."""
    lines = _in_order(
        f"{', '.join(f'{name} {number}' for name, number in item.versions.items())}; {item.cpu}; "
        f"{item.gpu + '; ' if item.gpu else ''}{item.threads} thread{'' if item.threads == 1 else 's'}; "
        f"{item.date[:10]}; commit {item.commit}"
        for item in environments
    )
    return "\n".join(lines)


def _in_order(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))


def render(records: Sequence[Record]) -> str:
    """Every benchmark with its table and the conditions it was measured under."""
    rows = newest(records)
    parts = []
    for name in _in_order(record.benchmark for record in rows):
        chosen = [record for record in rows if record.benchmark == name]
        conditions = environment_text(record.environment for record in chosen)
        tables = TABLES.get(name, benchmark_table)(chosen)
        parts.append(f"### {name}\n\n{tables}\n\n{conditions}\n")
    return "\n".join(parts)


def main() -> None:
    parser = ArgumentParser(description="Markdown tables of benchmark results")
    parser.add_argument("results", type=Path, nargs="+", help="JSONL files")
    parser.add_argument("--plots", type=Path, help="folder for plots of the GPU kernels (needs matplotlib)")
    args = parser.parse_args()
    records = [record for path in args.results for record in read_records(path)]
    print(render(records))
    if args.plots is not None:
        print("\n".join(f"![{path.stem}]({path})" for path in plots.draw(records, args.plots)))


if __name__ == "__main__":
    main()
