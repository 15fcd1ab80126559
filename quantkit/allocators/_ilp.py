"""Choose one option per unit: the multiple-choice knapsack, solved exactly by HiGHS (scipy.optimize.milp)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

TOLERANCE = 4e-6
"""More than HiGHS lets a limit be exceeded, each row scaled to at most 1."""
ROUNDING = 1e-12
SHRINKING = 0.1
"""Solve again when the answer costs less than this share of the scale."""


@dataclass(frozen=True)
class Limit:
    """Sum of the chosen options' amounts must not exceed `bound`; amounts[u][k] belongs to option k of unit u."""

    amounts: Sequence[Sequence[float]]
    bound: float


def choose(costs: Sequence[Sequence[float]], limits: Sequence[Limit] = ()) -> list[int] | None:
    """The option of every unit that minimises the total cost within the limits; None when nothing fits.

    HiGHS stops at absolute tolerances of 1e-6, so costs count from each unit's cheapest option and are scaled. An
    option that alone costs more than a whole answer found is out: then the rest is scaled up and solved again.
    """
    if not costs:
        return []
    flat = np.concatenate([np.asarray(options, np.float64) - min(options) for options in costs])
    constraints = [LinearConstraint(_one_each([len(options) for options in costs]), 1, 1)]
    constraints += [_at_most(limit, slack=0.0) for limit in limits]
    best, scale = None, float(flat.max()) or 1.0
    while True:
        found = _solve(flat, scale, costs, constraints)
        if found is not None and any(total(limit.amounts, found) > limit.bound for limit in limits):
            tight = [constraints[0], *(_at_most(limit, slack=TOLERANCE) for limit in limits)]
            found = _solve(flat, scale, costs, tight) or _at_bound(found, limits)
        if found is None or (best is not None and total(costs, found) >= total(costs, best)):
            return best
        best = found
        spent = total(costs, best) - sum(min(options) for options in costs)
        if not 0 < spent < SHRINKING * scale:
            return best
        scale = spent


def _at_bound(choice: list[int], limits: Sequence[Limit]) -> list[int] | None:
    """The choice itself when it exceeds no limit by more than the rounding of its own sum."""
    exact = all(
        total(limit.amounts, choice) <= limit.bound + ROUNDING * max(np.abs(row).max() for row in limit.amounts)
        for limit in limits
    )
    return choice if exact else None


def _one_each(sizes: Sequence[int]) -> sparse.csr_array:
    """[units, options]: which options belong to which unit."""
    units = np.repeat(np.arange(len(sizes)), sizes)
    return sparse.csr_array((np.ones(units.size), (units, np.arange(units.size))))


def _at_most(limit: Limit, slack: float) -> LinearConstraint:
    """The limit with its largest number scaled to 1, lowered by `slack`."""
    amounts = np.concatenate([np.asarray(options, np.float64) for options in limit.amounts])
    size = max(np.abs(amounts).max(), abs(limit.bound)) or 1.0
    return LinearConstraint(amounts[None] / size, -np.inf, limit.bound / size - slack)


def _solve(
    flat: npt.NDArray[np.float64],
    scale: float,
    costs: Sequence[Sequence[float]],
    constraints: Sequence[LinearConstraint],
) -> list[int] | None:
    affordable = flat <= scale * (1 + TOLERANCE)
    found = milp(
        np.where(affordable, flat / scale, 1.0),
        integrality=np.ones(flat.size),
        bounds=Bounds(0, affordable.astype(np.float64)),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        return None
    ends = np.cumsum([len(options) for options in costs])
    return [int(np.argmax(part)) for part in np.split(found.x, ends[:-1])]


def total(amounts: Sequence[Sequence[float]], choice: Sequence[int]) -> float:
    """Sum of the chosen options' amounts."""
    return float(sum(options[index] for options, index in zip(amounts, choice, strict=True)))
