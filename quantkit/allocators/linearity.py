"""Sensitivity by the linearity theorem of HIGGS (arXiv 2411.17525): a unit's loss is alpha t^2.

    t^2 = |Q(W) - W|^2 / |W|^2,   alpha fitted to the measured losses of W + theta (Q(W) - W), through the origin

The theorem holds for small errors whose direction is random, as after a rotation. Ordinary rounding has a direction
of its own, and alpha from Gaussian noise then misranks layers; so it is fitted with the error that one width really
makes, scaled down. Costs one forward pass for each theta and unit, whatever the number of widths.

At an average of 4 bits, slopes fitted with 3 bits rank random assignments best: Spearman 0.93 on ResNet-20 (4 bits:
0.79, `measured`: 0.93) and 0.94 on SqueezeNet (4 bits: 0.91).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from quantkit.allocators._table import Allocation, Scores, Unit, allocate_by, weights_of
from quantkit.errors import InputError
from quantkit.network import network_of
from quantkit.types import AllocationProblem, Allocator, FloatArray

LINEAR = 0.9


@dataclass(frozen=True)
class Linearity:
    """One slope for each unit, times the relative squared weight error of each width.

    Attributes:
        bits: width whose rounding error the slopes are fitted with: the narrowest option of at least so many bits.
        thetas: what the error is scaled by, each above 0.
    """

    bits: int = 3
    thetas: tuple[float, ...] = (0.5, 1.0)

    stats: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise InputError(f"linearity.bits must be 1 to 8, got {self.bits}")
        if not self.thetas or not all(0 < theta < math.inf for theta in self.thetas):
            raise InputError(f"linearity.thetas must be numbers above 0, at least one, got {list(self.thetas)}")

    def scores(self, problem: AllocationProblem, units: Sequence[Unit]) -> Scores:
        network = network_of(problem.network, problem.stats, "the allocator linearity")
        trials = {unit.members: partial(self._trials, problem, unit) for unit in units}
        found = network.calibration.losses(trials, problem.progress)
        raw: dict[str, tuple[float, ...]] = {}
        curved = []
        for unit, losses in zip(units, found, strict=True):
            errors = [relative_error(problem, unit, option) for option in range(len(unit.options))]
            squares = np.square(self.thetas) * errors[self._reference(unit)]
            slope, explained = fit_slope(squares, np.asarray(losses))
            raw[unit.name] = tuple(slope * error for error in errors)
            if explained < LINEAR:
                curved.append(unit.name)
        notes = []
        if curved:
            notes.append(
                f"the loss of {len(curved)} of {len(units)} units does not grow in proportion to t^2 "
                f"(R^2 below {LINEAR:g}), {curved[0]} for one"
            )
        return Scores(raw, "nats per sample", nats=True, notes=tuple(notes))

    def allocate(self, problem: AllocationProblem) -> Allocation:
        return allocate_by(problem, "linearity", self)

    def _reference(self, unit: Unit) -> int:
        """The option whose error is scaled."""
        wide = [option for option in range(len(unit.options)) if unit.bits(option) >= self.bits]
        return wide[0] if wide else len(unit.options) - 1

    def _trials(self, problem: AllocationProblem, unit: Unit) -> Iterator[Mapping[str, FloatArray]]:
        rounded = weights_of(problem, unit.options[self._reference(unit)])
        own = {name: problem.targets[name].load() for name in unit.members}
        for theta in self.thetas:
            yield {name: weight + np.float32(theta) * (rounded[name] - weight) for name, weight in own.items()}


def relative_error(problem: AllocationProblem, unit: Unit, option: int) -> float:
    """t^2: squared weight error over squared weights, of all members together."""
    error, whole = 0.0, 0.0
    for name, weight in weights_of(problem, unit.options[option]).items():
        own = problem.targets[name].load().astype(np.float64)
        error += float(np.square(weight - own).sum())
        whole += float(np.square(own).sum())
    return error / (whole or 1.0)


def fit_slope(squares: np.ndarray, losses: np.ndarray) -> tuple[float, float]:
    """(slope of the least-squares line through the origin, at least 0; the share of the losses' squares it explains).

    Losses that are not finite make an infinite slope.
    """
    energy = float(np.square(squares).sum())
    if energy == 0:
        return 0.0, 1.0
    if not np.isfinite(losses).all():
        return math.inf, 0.0
    slope = max(float(squares @ losses) / energy, 0.0)
    whole = float(np.square(losses).sum())
    return slope, 1.0 - float(np.square(losses - slope * squares).sum()) / whole if whole else 1.0


METHOD: type[Allocator] = Linearity
