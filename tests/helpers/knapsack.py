"""Oracles for the solver: dynamic programming over one whole-number limit, and every combination."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

Rows = Sequence[Sequence[float]]


def by_dynamic_programming(costs: Rows, amounts: Sequence[Sequence[int]], bound: int) -> list[int] | None:
    """The cheapest choice whose amounts (whole, at least 0) add up to at most `bound`; None when there is none.

    reach[b] is the least cost of the units so far with amounts of at most b: O(units * options * bound).
    """
    if bound < 0:
        return None
    reach, taken = np.zeros(bound + 1), []
    for options, sizes in zip(costs, amounts, strict=True):
        moved = np.full((len(options), bound + 1), np.inf)
        for index, (cost, size) in enumerate(zip(options, sizes, strict=True)):
            if size <= bound:
                moved[index, size:] = reach[: bound + 1 - size] + cost
        taken.append(moved.argmin(axis=0))
        reach = moved.min(axis=0)
    if not np.isfinite(reach[bound]):
        return None
    choice, left = [], bound
    for best, sizes in zip(reversed(taken), reversed(amounts), strict=True):
        choice.append(int(best[left]))
        left -= sizes[choice[-1]]
    return choice[::-1]


def every_choice(sizes: Sequence[int]) -> np.ndarray:
    """[choices, units]."""
    return np.array(list(itertools.product(*map(range, sizes))), dtype=np.int64).reshape(-1, len(sizes))


def totals(amounts: Rows, choices: np.ndarray) -> np.ndarray:
    """[choices] sums of the chosen amounts."""
    return sum((np.asarray(row)[choices[:, unit]] for unit, row in enumerate(amounts)), np.zeros(len(choices)))


def cheapest(costs: Rows, limits: Sequence[tuple[Rows, float]]) -> float | None:
    """By trying every choice; None when nothing fits."""
    choices = every_choice([len(row) for row in costs])
    fits = np.ones(len(choices), np.bool_)
    for amounts, bound in limits:
        fits &= totals(amounts, choices) <= bound
    return float(totals(costs, choices)[fits].min()) if fits.any() else None
