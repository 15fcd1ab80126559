"""Pictures: what each layer would lose at each width, and losses against sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.errors import InputError
from quantkit.files import write_bytes
from quantkit.methods import missing_extra
from quantkit.report.console import shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from quantkit.ranking import Sensitivity

NAME_WIDTH = 40
ROW_INCHES = 0.22
DOTS_PER_INCH = 120
MARKERS = "osD^vPX<>hp"
"""Eleven, for ten colours: no two curves look alike before the hundred and tenth."""


def plot_sensitivity(found: Sensitivity, at: int, path: Path) -> None:
    """One row for each unit in graph order, one dot for each width, on a logarithmic axis.

    Args:
        at: the width whose dots are large: the one that ranks.
        path: .png or .svg.

    Raises:
        InputError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    first = found.estimators[0]
    widths = sorted({bits for row in found.rows for bits in row.bits})
    figure = new_figure(8.0, 1.5 + ROW_INCHES * len(found.rows))
    axes = figure.add_subplot()
    places = range(len(found.rows))
    for bits in widths:
        points = [
            (row.losses[first.name][row.bits.index(bits)], place)
            for place, row in zip(places, found.rows, strict=True)
            if bits in row.bits and row.losses[first.name][row.bits.index(bits)] > 0
        ]
        size = 60 if bits == at else 18
        axes.scatter([x for x, _ in points], [y for _, y in points], s=size, label=f"{bits} bit", zorder=3)
    axes.set_xscale("log")
    axes.set_yticks(list(places), [shorten(row.layers[0], NAME_WIDTH) for row in found.rows], fontsize=7)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(f"{first.quantity} ({first.name})")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    write_figure(figure, path)


def plot_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str, title: str, path: Path, log: bool = True
) -> None:
    """Lines of points (x, y), one for each name; the last one, thick and black, is the one that matters.

    Raises:
        InputError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    figure = new_figure(8.0, 5.0)
    axes = figure.add_subplot()
    for place, (name, points) in enumerate(curves.items()):
        ordered = sorted(points)
        last = place == len(curves) - 1
        axes.plot(
            [point[0] for point in ordered],
            [point[1] for point in ordered],
            marker=MARKERS[place % len(MARKERS)],
            markersize=5,
            color="black" if last else f"C{place % 10}",
            linewidth=2.0 if last else 1.0,
            label=name,
        )
    if log:
        axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    write_figure(figure, path)


def new_figure(width: float, height: float) -> Figure:
    """An empty picture of so many inches, without any window system.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise missing_extra(error) or error from error
    return Figure(figsize=(width, height), layout="constrained")


def write_figure(figure: Figure, path: Path) -> None:
    """The final name appears only when the file is whole; the same picture gives the same bytes."""
    if path.suffix not in (".png", ".svg"):
        raise InputError(f"a picture must end in .png or .svg, got {path}")
    content = BytesIO()
    metadata = {"Software": None} if path.suffix == ".png" else {"Date": None}
    figure.savefig(content, format=path.suffix[1:], dpi=DOTS_PER_INCH, metadata=metadata)
    write_bytes(path, content.getvalue())
