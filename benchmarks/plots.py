"""PNG plots of the kernels' results: speed-up against rows, share of the copy bandwidth, roofline.

python -m benchmarks.plots results.jsonl --folder plots
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Record, read_records

BENCHMARK = "kernels"
REFERENCE = "cuBLAS"
WIDTH, HEIGHT, DOTS = 7.0, 4.2, 130
COLOURS = {
    "quantkit": "#d1495b",
    "cuBLAS": "#444444",
    "torch int4": "#00798c",
    "gemlite": "#edae49",
    "torchao": "#66a182",
    "hqq": "#8d6a9f",
    "bitsandbytes": "#2e4057",
}
STYLES = {2: ":", 3: "-.", 4: "-", 8: "--"}


def measured(records: Iterable[Record]) -> list[Record]:
    """Rows of this benchmark that have times; the newest of each contestant and case."""
    rows: dict[tuple[str, str, str], Record] = {}
    for record in records:
        if record.benchmark == BENCHMARK and not record.error:
            rows[record.model, record.provider, record.setting] = record
    return list(rows.values())


def models_of(records: Sequence[Record]) -> list[tuple[str, str]]:
    """(NxK, dtype) in order of first appearance."""
    return list(dict.fromkeys((record.model, str(record.details["dtype"])) for record in records))


def lines_of(records: Sequence[Record], model: str, dtype: str) -> dict[tuple[str, int, int], list[Record]]:
    """(provider, bits, group) -> its rows by M; half precision is one line whatever it was compared with."""
    lines: dict[tuple[str, int, int], dict[int, Record]] = {}
    for record in records:
        if (record.model, record.details["dtype"]) != (model, dtype):
            continue
        plain = record.provider == REFERENCE
        key = (record.provider, 16, 0) if plain else (record.provider, *_packing(record))
        lines.setdefault(key, {})[int(record.details["M"])] = record
    return {key: [rows[m] for m in sorted(rows)] for key, rows in lines.items()}


def _packing(record: Record) -> tuple[int, int]:
    return int(record.details["bits"]), int(record.details["group_size"])


def label_of(key: tuple[str, int, int]) -> str:
    provider, bits, group = key
    return provider if provider == REFERENCE else f"{provider} W{bits} g{group}"


def draw(records: Iterable[Record], folder: Path) -> list[Path]:
    """All plots, one set for each weight.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    rows = measured(records)
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for model, dtype in models_of(rows):
        lines = lines_of(rows, model, dtype)
        name = f"{model}-{dtype}"
        made += [
            _speed_up(lines, f"{model}, {dtype}", folder / f"speed-{name}.png"),
            _bandwidth(lines, f"{model}, {dtype}", folder / f"bandwidth-{name}.png"),
            _roofline(lines, f"{model}, {dtype}", folder / f"roofline-{name}.png"),
        ]
    return made


def _axes(title: str, x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DOTS, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(visible=True, which="major", linewidth=0.4, alpha=0.6)
    return figure, axes


def _saved(figure: Any, axes: Any, path: Path) -> Path:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)
    figure.savefig(path, metadata={"Software": None})  # the same rows make the same bytes
    return path


def _look(key: tuple[str, int, int]) -> dict[str, Any]:
    provider, bits, _ = key
    return {
        "color": COLOURS.get(provider, "#999999"),
        "linestyle": STYLES.get(bits, "-"),
        "marker": "o",
        "markersize": 3,
        "linewidth": 1.4,
        "label": label_of(key),
    }


def _rows_axis(axes: Any, lines: dict[tuple[str, int, int], list[Record]]) -> None:
    ticks = sorted({int(record.details["M"]) for line in lines.values() for record in line})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)


def _speed_up(lines: dict[tuple[str, int, int], list[Record]], title: str, path: Path) -> Path:
    figure, axes = _axes(f"Speed over half precision, {title}", "rows of x", "times as fast (20 to 80 %)")
    for key, rows in lines.items():
        places = [int(record.details["M"]) for record in rows]
        if key[0] == REFERENCE:
            axes.axhline(1.0, color=COLOURS[REFERENCE], linewidth=1, label=REFERENCE)
            continue
        axes.plot(places, [record.speed[0].median for record in rows], **_look(key))
        low, high = ([getattr(record.speed[0], name) for record in rows] for name in ("p20", "p80"))
        axes.fill_between(places, low, high, color=_look(key)["color"], alpha=0.15, linewidth=0)
    _rows_axis(axes, lines)
    axes.set_ylim(bottom=0)
    return _saved(figure, axes, path)


def _bandwidth(lines: dict[tuple[str, int, int], list[Record]], title: str, path: Path) -> Path:
    figure, axes = _axes(f"Bytes per second, {title}", "rows of x", "% of a copy on the device")
    for key, rows in lines.items():
        shares = [100 * float(record.details["share of copy bandwidth"]) for record in rows]
        axes.plot([int(record.details["M"]) for record in rows], shares, **_look(key))
    _rows_axis(axes, lines)
    axes.axhline(100, color="#999999", linewidth=0.8)
    axes.set_ylim(bottom=0)
    return _saved(figure, axes, path)


def _roofline(lines: dict[tuple[str, int, int], list[Record]], title: str, path: Path) -> Path:
    """Operations per second against operations per byte, under what the device was measured to do."""
    figure, axes = _axes(f"Roofline, {title}", "operations per byte moved", "10^12 operations per second")
    every = [record for line in lines.values() for record in line]
    bandwidth = max(float(record.details["copy bandwidth"]) for record in every)
    peak = max(float(record.details["peak flops"]) for record in every)
    intensities = []
    for key, rows in lines.items():
        found = [float(record.details["flops"]) / float(record.details["bytes per second"]) for record in rows]
        intensities += found
        axes.plot(found, [float(record.details["flops"]) / 1e12 for record in rows], **_look(key))
    ends = [min(intensities) / 2, peak / bandwidth, max(*intensities, peak / bandwidth) * 2]
    axes.plot(ends, [min(peak, bandwidth * end) / 1e12 for end in ends], color="#999999", linewidth=1, label="device")
    axes.set_xscale("log")
    axes.set_yscale("log")
    return _saved(figure, axes, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSONL files")
    parser.add_argument("--folder", type=Path, default=Path("plots"))
    args = parser.parse_args(arguments)
    try:
        made = draw([record for path in args.results for record in read_records(path)], args.folder)
    except ModuleNotFoundError as error:
        print(f"plots need {error.name}: pip install {error.name}", file=sys.stderr)
        raise SystemExit(2) from error
    print("\n".join(map(str, made)))


if __name__ == "__main__":
    main()
