"""Means of random draws, drawn until a confidence interval is narrow enough.

A trace is the mean of v^T H v over vectors of random signs (Hutchinson), or of |J^T A e|^2 for H = J^T A A^T J.
Stopping when two successive running means agree stops by luck: they differ by 1/R whatever the error. Here the draws'
own variance decides, looked at after 4, 8, 16, ... draws; each look has its share of the 5 %, so that all the
intervals hold together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from quantkit.types import Array

FIRST = 4
DOUBT = 0.05
"""Probability that an interval does not hold the true mean."""

Draw = Callable[[Sequence[str], range], Mapping[str, Array]]
"""(names, which draws) -> name -> [B, draws] of each of B batches, which add up; all draws independent."""


@dataclass(frozen=True)
class Estimate:
    """A mean and half the width of its 95 % interval, after so many draws."""

    mean: float
    half_width: float
    draws: int

    def within(self, tolerance: float) -> bool:
        return self.half_width <= tolerance * abs(self.mean)


def looks(most: int) -> list[int]:
    """Numbers of draws after which to look."""
    found = [min(FIRST, most)]
    while found[-1] < most:
        found.append(min(2 * found[-1], most))
    return found


def interval(draws: Array, doubt: float) -> Estimate:
    """The sum over batches of the means, and its interval.

    Args:
        draws: [B, R], R at least 2; batches may differ in mean and variance, so that each has its own (Welch).
        doubt: probability that the interval misses.
    """
    count = draws.shape[1]
    mean = float(draws.mean(axis=1).sum())
    parts = draws.var(axis=1, ddof=1) / count
    variance = float(parts.sum())
    if variance == 0:
        return Estimate(mean, 0.0, count)
    freedom = variance**2 / float((np.square(parts) / (count - 1)).sum())
    return Estimate(mean, float(stats.t.ppf(1 - doubt / 2, freedom)) * variance**0.5, count)


def estimate(
    draw: Draw, names: Sequence[str], tolerance: float, most: int, advance: Callable[[int], None] = lambda count: None
) -> dict[str, Estimate]:
    """The mean of every name, each drawn until its interval is within `tolerance` of it, at most `most` times.

    Args:
        advance: called with the number of names that are done.
    """
    found: dict[str, Estimate] = {}
    held: dict[str, list[Array]] = {name: [] for name in names}
    open_names, drawn = list(names), 0
    places = looks(most)
    for place in places:
        if not open_names:
            break
        made = draw(open_names, range(drawn, place))
        drawn = place
        for name in open_names:
            held[name].append(np.asarray(made[name], np.float64))
            found[name] = interval(np.concatenate(held[name], axis=1), DOUBT / len(places))
        still = [name for name in open_names if not found[name].within(tolerance)]
        advance(len(open_names) - len(still))
        open_names = still
    advance(len(open_names))
    return found
