"""One picture of the committed results: size against what is left of the model, ours and the peers', three models.

python -m benchmarks.picture --out docs/front.png
"""

from __future__ import annotations

import re
from argparse import ArgumentParser
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Record, read_records

RESULTS = Path(__file__).parent / "results"
DOTS = 130
OURS = "quantkit"
MEGABYTE = 1e6
LOOKS: dict[str, dict[str, Any]] = {
    OURS: {"color": "#d1495b", "marker": "o", "linewidth": 2.2, "zorder": 3},
    "round-to-nearest, one width": {"color": "#8a8a8a", "marker": "s", "linestyle": "--"},
    "onnxruntime": {"color": "#00798c", "marker": "D", "linestyle": "none"},
    "onnxruntime RTN": {"color": "#00798c", "marker": "D", "linestyle": "--"},
    "onnxruntime HQQ": {"color": "#edae49", "marker": "v", "linestyle": "--"},
    "onnxruntime k_quant": {"color": "#66a182", "marker": "^", "linestyle": "--"},
    "GPTQ as published": {"color": "#8d6a9f", "marker": "P", "linestyle": "--"},
}
LOWBIT = {"rtn": "onnxruntime RTN", "hqq": "onnxruntime HQQ", "k_quant": "onnxruntime k_quant"}
LOWBIT |= {"gptq_repaired": "GPTQ as published"}


@dataclass(frozen=True)
class Panel:
    """One model.

    Attributes:
        file: of results.
        figure: name of the accuracy.
        least: lower end of the axis: what lies below is of no use to anybody.
    """

    file: str
    title: str
    figure: str
    label: str
    least: float


PANELS = (
    Panel("resnet20", "ResNet-20, CIFAR-10", "top-1", "top-1", 0.75),
    Panel("squeezenet", "SqueezeNet 1.1, ImageNet", "agreement", "same class as float", 0.15),
    Panel("lowbit", "MiniLM-L6, weights, groups of 32", "cosine", "cosine to float", 0.5),
)


def lines(records: Iterable[Record], panel: Panel) -> dict[str, list[tuple[float, float]]]:
    """Contestant -> (MB, accuracy), by size; of a setting that was measured again the newest."""
    newest: dict[tuple[str, str], Record] = {}
    for record in records:
        if not record.error and record.size_bytes and panel.figure in record.accuracy:
            newest[record.provider, record.setting] = record
    found: dict[str, list[tuple[float, float]]] = {}
    for record in newest.values():
        name = contestant(record, panel)
        if name is not None:
            found.setdefault(name, []).append(((record.size_bytes or 0) / MEGABYTE, record.accuracy[panel.figure]))
    return {name: sorted(points) for name, points in found.items()}


def contestant(record: Record, panel: Panel) -> str | None:
    """Whose line a row belongs to; None for rows that are no part of the picture."""
    if panel.file == "lowbit":
        if not re.search(r"g32(,|$)", record.setting) or "embeddings" in record.setting:
            return None
        return OURS if record.provider == OURS else LOWBIT.get(record.setting.split()[0])
    if record.provider == "onnxruntime":
        return "onnxruntime"
    if record.provider != OURS or "weights only" in record.setting:
        return None
    if record.setting.endswith("rtn uniform"):
        return "round-to-nearest, one width"
    return OURS if re.fullmatch(r"\d bits(, auto)?", record.setting) else None


def draw(path: Path, panels: Sequence[Panel] = PANELS) -> None:
    """Write the picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 4.3), dpi=DOTS, layout="constrained")
    axes: Any = figure.subplots(1, len(panels))
    for axis, panel in zip(axes, panels, strict=True):
        found = lines(read_records(RESULTS / f"{panel.file}.jsonl"), panel)
        for name, look in LOOKS.items():
            if name in found:
                sizes, values = zip(*found[name], strict=True)
                axis.plot(sizes, values, label=name, markersize=6, **look)
        axis.set_ylim(panel.least, 1.01 if panel.figure != "top-1" else 0.9)
        axis.set_title(panel.title, fontsize=11)
        axis.set_xlabel("size of the file, MB (smaller is better)")
        axis.set_ylabel(f"{panel.label} (higher is better)")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False, loc="lower right")
    figure.savefig(path, metadata={"Software": None})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    draw(parser.parse_args(arguments).out)


if __name__ == "__main__":
    main()
