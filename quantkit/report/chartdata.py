"""The rows of the HTML report's figures and of its table: plain numbers and names, None where nothing was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from quantkit.report.console import shorten
from quantkit.report.scales import thinned
from quantkit.report.types import LayerRow, Report, SensitivityRow

LABEL = 26
SHAPES = MappingProxyType({"predicted": "circle", "measured": "square", "chosen": "diamond"})
USUAL_WIDTH = 4  # sensitivities are compared at this width, where every layer has a figure for it


def layer_data(report: Report) -> list[dict[str, Any]]:
    """One object for each layer in graph order, for the figures and the table; None where nothing was measured."""
    losses, width = sensitivity_of(report)
    rows = []
    for index, row in enumerate(report.layers):
        found = losses.get(row.name)
        loss = None if found is None else found.losses.get(width)
        rows.append(
            {
                "index": index,
                "name": row.name,
                "key": f"{index}|{shorten(row.name, LABEL)}",
                "op": row.op,
                "shape": f"{row.shape[0]} x {row.shape[1]}",
                "bits": 32 if row.bits is None else row.bits,
                "width": width_name(row),
                "group": row.group_size,
                "sens": finite(loss),
                "error": percent(row.sqnr),
                "db": finite(row.sqnr),
                "share": None if row.time_share is None else finite(100 * row.time_share),
                "before": row.bytes_before,
                "after": row.bytes_after,
                "form": row.form or "float",
                "kernel": row.kernel,
                "reason": row.reason,
            }
        )
    return rows


def activation_data(report: Report) -> list[dict[str, Any]]:
    """One object for each range, in order; shares in thousandths."""
    rows = []
    for index, row in enumerate(report.activations):
        rows.append(
            {
                "index": index,
                "key": str(index),
                "name": row.name,
                "readers": ", ".join(shorten(name, 2 * LABEL) for name in row.layers[:4]),
                "least": finite(row.least),
                "greatest": finite(row.greatest),
                "low": finite(row.low),
                "high": finite(row.high),
                "scale": finite(row.scale),
                "zero": row.zero_point,
                "clipped": None if row.clipped is None else finite(100 * row.clipped),
                "shares": [round(1000 * share, 1) for share in row.shares],
            }
        )
    return rows


def plan_data(report: Report, by: str) -> list[dict[str, Any]]:
    """One object for each plan: what the planner expected, what was measured, and last the one that was chosen.

    Args:
        by: what the loss is shown against, `size` in MB or `time` relative to float; `best` marks the plans that no
            other measured one beats in both.
    """
    rows: list[dict[str, Any]] = []
    for point in thinned(report.front) if expects(report) else ():
        name = f"{point.average_bits:.2f} bits per weight"
        figures = {"size": finite(point.estimated_size / 1e6), "time": point.time, "loss": finite(point.loss)}
        rows.append({"kind": "predicted", "name": name, **figures})
    for plan in report.contenders:
        figures = {"size": finite(plan.size / 1e6), "time": finite(plan.latency), "loss": finite(plan.loss)}
        rows.append({"kind": "chosen" if plan.chosen else "measured", "name": plan.name, **figures})
    rows = [row for row in rows if (row["loss"] or 0) > 0 and row[by] is not None]
    rows.sort(key=lambda row: list(SHAPES).index(row["kind"]))
    measured = [row for row in rows if row["kind"] != "predicted"]
    for row in measured:
        row["best"] = not any(_beats(other, row, by) for other in measured)
    return rows if measured else []


def expects(report: Report) -> bool:
    """Whether the front is in the unit that losses are measured in: only then both stand on one axis."""
    return bool(report.front) and all(row.nats for row in report.front)


def _beats(row: Mapping[str, Any], other: Mapping[str, Any], by: str) -> bool:
    """No worse in either, and better in one."""
    better = row[by] < other[by] or row["loss"] < other["loss"]
    return bool(row[by] <= other[by] and row["loss"] <= other["loss"] and better)


def depth_data(report: Report) -> list[dict[str, Any]]:
    """One object for each value that was compared, errors in percent."""
    own = {row.name: row for row in report.layers}
    rows = []
    for place, row in enumerate(report.depth):
        layer = own.get(row.layer or "")
        rows.append(
            {
                "place": place + 1,
                "layer": "-" if layer is None else shorten(layer.name, 2 * LABEL),
                "value": shorten(row.name, 3 * LABEL),
                "error": percent(row.sqnr),
                "alone": None if layer is None else percent(layer.sqnr),
                "width": "output" if layer is None else width_name(layer),
                "what": "output of the model" if row.output else "layer",
            }
        )
    return [row for row in rows if row["error"] is not None]


def sensitivity_of(report: Report) -> tuple[dict[str, SensitivityRow], int]:
    """Layer -> its row, and the width that layers are compared at."""
    rows = report.sensitivities
    common = set.intersection(*(set(row.losses) for row in rows)) if rows else set()
    width = USUAL_WIDTH if USUAL_WIDTH in common else min(common, default=USUAL_WIDTH)
    return {name: row for row in rows for name in row.layers}, width


def speaks_nats(report: Report) -> bool:
    """Whether sensitivities are in nats per sample."""
    return all(row.nats for row in report.sensitivities)


def width_name(row: LayerRow) -> str:
    """The whole width that a layer is counted under."""
    return "float" if row.bits is None else str(min(max(round(row.bits), 1), 8))


def percent(sqnr: float | None) -> float | None:
    """dB -> relative error in percent; None beyond what float rounding leaves."""
    return None if sqnr is None or not -60 < sqnr < 190 else finite(100 * 10 ** (-sqnr / 20))


def finite(value: float | None) -> float | None:
    """Five digits, None for what JSON does not have."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")
