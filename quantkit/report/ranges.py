"""Activation ranges of the integer part: what calibration saw, and where the 256 codes end."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from quantkit.calibration.accumulators import Distribution
from quantkit.graph.emit import Emission
from quantkit.report.types import ActivationRow
from quantkit.types import Target

BINS = 40


def activation_rows(
    emission: Emission, targets: Mapping[str, Target], histograms: Mapping[str, Distribution]
) -> tuple[ActivationRow, ...]:
    """One row for every scale and zero point in the file, in the order in which layers read them; others last."""
    groups = emission.regions.groups
    readers: dict[str, list[str]] = {}
    for name, target in targets.items():
        if name in emission.layers and emission.layers[name].form == "qdq":
            for group in dict.fromkeys(groups.get(str(use.data.name), "") for use in target.uses):
                readers.setdefault(group, []).append(name)
    rows: list[ActivationRow] = []
    ordered = [name for name in readers if name in emission.activations]
    for group in dict.fromkeys([*ordered, *emission.activations]):
        act = emission.activations[group]
        names = (group, *emission.regions.members(group))
        seen = next((histograms[name] for name in names if name in histograms), None)
        row = ActivationRow(
            name=group,
            layers=tuple(readers.get(group, ())),
            least=None if seen is None else seen.low,
            greatest=None if seen is None else seen.high,
            low=act.low,
            high=act.high,
            scale=act.scale,
            zero_point=act.zero_point,
            clipped=None if seen is None else _outside(seen, act.low, act.high),
            shares=() if seen is None else _shares(seen),
        )
        rows.append(row)
    return tuple(rows)


def _below(seen: Distribution, values: np.ndarray) -> np.ndarray:
    """Share of what was seen below each value, as if even within a bin."""
    total = np.concatenate([[0.0], np.cumsum(seen.counts)])
    return np.asarray(np.interp(values, seen.edges, total / max(total[-1], 1.0)))


def _outside(seen: Distribution, low: float, high: float) -> float:
    """Half a step beyond an end still rounds to it."""
    half = (high - low) / 255 / 2
    below, upto = _below(seen, np.array([low - half, high + half]))
    return float(np.clip(below + 1 - upto, 0.0, 1.0))


def _shares(seen: Distribution) -> tuple[float, ...]:
    if seen.low == seen.high:
        return (1.0,)
    found = np.diff(_below(seen, np.linspace(seen.low, seen.high, BINS + 1)))
    return tuple(float(f"{share:.4g}") for share in found)
