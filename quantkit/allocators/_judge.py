"""Which estimator to believe: random assignments near the budget are really tried, and each estimator predicts them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from quantkit.allocators._ilp import Limit, choose, total
from quantkit.allocators._table import Unit, joined, limits, losses, sizes, weights_of
from quantkit.types import AllocationProblem, Array, Measurement

SPREAD = 64.0
"""Random sensitivities lie between 1 and this."""
FALL = 4.0
"""How much less a bit more is taken to lose, in random tables: the square of a step half as wide."""
LEAST = 1e-12
ENOUGH = 3
"""Assignments below which nothing can be judged."""


@dataclass(frozen=True)
class Verdict:
    """How well one estimator predicted the assignments that were tried.

    Attributes:
        rank: Spearman's correlation of predicted and true losses.
        error: root mean square of log(true / predicted), predicted without the assignment in question (leave one out);
            infinite where the assignments do not allow a verdict.
        ratio: median of predicted over true; 1 only for figures that are in nats and add up.
        scale: what brings its figures to nats; not a number where no assignment tells.
    """

    rank: float
    error: float
    ratio: float
    scale: float

    @property
    def judged(self) -> bool:
        """Whether there were assignments enough, which losses tell apart."""
        return math.isfinite(self.error)


def assignments(problem: AllocationProblem, units: Sequence[Unit], count: int) -> list[list[int]]:
    """Different choices that use the budget up, each the best one for made-up sensitivities."""
    rng = np.random.Generator(np.random.PCG64(problem.seed))
    bounds = limits(problem, units)
    found = _drawn(units, count, bounds, rng) if bounds else []
    if len(found) >= ENOUGH:
        return found
    # Where the budgets leave next to nothing to choose, half of the size does.
    return max(found, _drawn(units, count, [*bounds, _half(problem, units)], rng), key=len)


def _drawn(units: Sequence[Unit], count: int, bounds: Sequence[Limit], rng: np.random.Generator) -> list[list[int]]:
    found: dict[tuple[int, ...], list[int]] = {}
    for _ in range(2 * count):
        weights = np.exp(rng.uniform(0, math.log(SPREAD), len(units)))
        table = [
            [float(weight * FALL ** -unit.bits(option)) for option in range(len(unit.options))]
            for weight, unit in zip(weights, units, strict=True)
        ]
        picked = choose(table, bounds)
        if picked is None:
            break
        found.setdefault(tuple(picked), picked)
        if len(found) == count:
            break
    return list(found.values())


def _half(problem: AllocationProblem, units: Sequence[Unit]) -> Limit:
    """Half way between the smallest and the largest file."""
    size = sizes(problem, units)
    return Limit(size, sum((min(row) + max(row)) / 2 for row in size))


def true_losses(problem: AllocationProblem, units: Sequence[Unit], choices: Sequence[Sequence[int]]) -> Array:
    """Nats per held-out sample of each choice, activations float."""
    assert problem.network is not None
    found = []
    with problem.progress.task("trying random assignments", total=len(choices)) as advance:
        for choice in choices:
            found.append(problem.network.held_out.loss(weights_of(problem, joined(units, choice))))
            advance(1)
    return np.array(found)


def judge(
    units: Sequence[Unit],
    raw: Mapping[str, Sequence[float]],
    choices: Sequence[Sequence[int]],
    truth: Array,
) -> Verdict:
    """Compare an estimator's sums with what was measured; fewer than three different choices allow no verdict."""
    sums = predicted(losses(units, raw), choices)
    usable = np.isfinite(truth) & (truth > 0)
    first, second = np.log(np.maximum(sums[usable], LEAST)), np.log(np.maximum(truth[usable], LEAST))
    told = len(first) > 0 and bool((sums[usable] > LEAST).all())
    scale = float(np.exp(np.mean(second - first))) if told else math.nan
    if len(first) < ENOUGH or np.ptp(first) == 0 or np.ptp(second) == 0:
        return Verdict(0.0, math.inf, math.nan, scale)
    rank = float(stats.spearmanr(first, second).statistic)
    ratio = float(np.exp(np.median(first - second)))
    return Verdict(0.0 if math.isnan(rank) else rank, _left_out(first, second), ratio, scale)


def _left_out(first: Array, second: Array) -> float:
    """RMS error of the line through all points but one, at that one; slopes below 0 count as 0."""
    errors = []
    for index in range(len(first)):
        x, y = np.delete(first, index), np.delete(second, index)
        spread = float(np.square(x - x.mean()).sum())
        slope = max(float(((x - x.mean()) * (y - y.mean())).sum()) / spread, 0.0) if spread > 0 else 0.0
        errors.append(second[index] - (y.mean() + slope * (first[index] - x.mean())))
    return float(np.sqrt(np.mean(np.square(errors))))


def clearly_better(one: Measurement, other: Measurement) -> bool:
    """Whether one loses less by more than the standard error of the difference, taken sample by sample."""
    first, second = one.sample_losses, other.sample_losses
    if len(first) != len(second) or len(first) < 2 or not math.isfinite(one.loss + other.loss):
        return one.loss < other.loss
    gains = np.subtract(second, first)
    return bool(gains.mean() > gains.std(ddof=1) / math.sqrt(len(gains)))


def predicted(table: Sequence[Sequence[float]], choices: Sequence[Sequence[int]]) -> Array:
    """Total loss of each choice."""
    return np.array([total(table, choice) for choice in choices])
