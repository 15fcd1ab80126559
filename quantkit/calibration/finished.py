"""Statistics of layers as entries of a store, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.cache import Entry
from quantkit.calibration.accumulators import Distribution
from quantkit.types import Array, LayerStats

ARRAYS = ("abs_mean", "mean", "square_mean", "gram", "rows", "abs_max")
PLAIN = ("num_tokens", "low", "high")


def statistics_entry(layers: Sequence[LayerStats]) -> Entry:
    """One entry for statistics that were collected together."""
    arrays: dict[str, Array] = {}
    facts = []
    for number, layer in enumerate(layers):
        there = {name: getattr(layer, name) for name in ARRAYS if getattr(layer, name) is not None}
        arrays |= {f"{number}.{name}": array for name, array in there.items()}
        shapes = [[list(shape), count] for shape, count in layer.data_shapes.items()]
        facts.append({**{name: getattr(layer, name) for name in PLAIN}, "data_shapes": shapes})
    return Entry(arrays, {"layers": facts})


def statistics_of(entry: Entry) -> list[LayerStats]:
    """The inverse of `statistics_entry`."""
    found = []
    for number, facts in enumerate(entry.facts["layers"]):
        arrays: dict[str, Any] = {name: entry.arrays.get(f"{number}.{name}") for name in ARRAYS}
        shapes = {tuple(shape): count for shape, count in facts["data_shapes"]}
        plain: dict[str, Any] = {name: facts[name] for name in PLAIN}
        found.append(LayerStats(**plain, **arrays, data_shapes=shapes))
    return found


def distributions_entry(groups: Mapping[str, Distribution]) -> Entry:
    """One entry for the distributions of all groups."""
    arrays: dict[str, Array] = {}
    facts = []
    for number, (group, seen) in enumerate(groups.items()):
        arrays |= {f"{number}.counts": seen.counts, f"{number}.edges": seen.edges}
        facts.append([group, seen.low, seen.high, seen.zeros])
    return Entry(arrays, {"groups": facts})


def distributions_of(entry: Entry) -> dict[str, Distribution]:
    """The inverse of `distributions_entry`."""
    return {
        group: Distribution(entry.arrays[f"{number}.counts"], entry.arrays[f"{number}.edges"], *rest)
        for number, (group, *rest) in enumerate(entry.facts["groups"])
    }
