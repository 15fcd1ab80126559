"""What the figures of the HTML report share: axes that suit their data, and restraint where there is too much of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

Spec = dict[str, Any]

MOST_POINTS = 300
DECADES = 6
MANY = 250  # layers, beyond which figures leave out what would only cover the rest
HOVER = {"name": "hover", "select": {"type": "point", "fields": ["key"], "on": "pointerover", "clear": "pointerout"}}


def logarithmic(values: Iterable[float | None], field: str) -> Spec:
    """A logarithmic y channel over whole decades, with a tick on each of at most six."""
    known = [value for value in values if value is not None and value > 0]
    low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
    high = max(high, low + 1)
    step = math.ceil((high - low) / DECADES)
    ticks = [10.0**power for power in range(low, high + 1, step)]
    axis = {"values": ticks, "format": ".6~g"}
    return {
        "field": field,
        "type": "quantitative",
        "scale": {"type": "log", "domain": [10.0**low, 10.0**high], "nice": False},
        "axis": axis,
    }


def both_signs(ends: Iterable[Sequence[float]]) -> tuple[Spec, list[float]]:
    """A scale that is linear up to about the smallest range and logarithmic beyond, and its ticks."""
    ranges = [max(pair) for pair in ends if max(pair) > 0] or [1.0]
    high = math.ceil(math.log10(max(ranges)))
    low = max(math.floor(math.log10(min(ranges))), high - DECADES)
    step = math.ceil((high - low + 1) / 3)
    powers = [10.0**power for power in range(high, low - 1, -step)]
    ticks = sorted({*powers, *(-power for power in powers), 0.0})
    return {"type": "symlog", "constant": 10.0**low}, ticks


def near_points(encoding: Spec) -> Spec:
    """Points that tell their figures when the pointer is nearer to them than to others."""
    select = {"type": "point", "on": "pointerover", "nearest": True}
    return {
        "mark": {"type": "point", "filled": True, "opacity": 1},
        "params": [{"name": "near", "select": select}],
        "encoding": encoding,
    }


def thinned(rows: Sequence[Any]) -> list[Any]:
    """At most so many, the first and the last among them."""
    if len(rows) <= MOST_POINTS:
        return list(rows)
    return [rows[round(at * (len(rows) - 1) / (MOST_POINTS - 1))] for at in range(MOST_POINTS)]
