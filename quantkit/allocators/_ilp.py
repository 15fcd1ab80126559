"""Choose one option per unit: the multiple-choice knapsack, solved exactly by HiGHS (scipy.optimize.milp)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp


@dataclass(frozen=True)
class Limit:
    """Sum of the chosen options' amounts must not exceed `bound`; amounts[u][k] belongs to option k of unit u."""

    amounts: Sequence[Sequence[float]]
    bound: float


def choose(costs: Sequence[Sequence[float]], limits: Sequence[Limit] = ()) -> list[int] | None:
    """The option of every unit that minimises the total cost within the limits; None when nothing fits.

    HiGHS stops at absolute tolerances, so every row is scaled to at most 1 first (with raw numbers of 1e-6 it
    reports "optimal" for answers that are not).
    """
    sizes = [len(options) for options in costs]
    if not sizes:
        return []
    flat = np.concatenate([np.asarray(options, np.float64) for options in costs])
    scale = np.abs(flat).max() or 1.0
    starts = np.concatenate([[0], np.cumsum(sizes)])
    one_each = np.zeros((len(sizes), flat.size))
    for unit, size in enumerate(sizes):
        one_each[unit, starts[unit] : starts[unit] + size] = 1
    constraints = [LinearConstraint(one_each, 1, 1)]
    for limit in limits:
        amounts = np.concatenate([np.asarray(options, np.float64) for options in limit.amounts])
        unit_size = max(np.abs(amounts).max(), abs(limit.bound)) or 1.0
        constraints.append(LinearConstraint(amounts[None] / unit_size, -np.inf, limit.bound / unit_size))
    found = milp(flat / scale, integrality=np.ones(flat.size), bounds=Bounds(0, 1), constraints=constraints)
    if found.x is None:
        return None
    return [int(np.argmax(found.x[starts[u] : starts[u + 1]])) for u in range(len(sizes))]


def total(amounts: Sequence[Sequence[float]], choice: Sequence[int]) -> float:
    """Sum of the chosen options' amounts."""
    return float(sum(options[index] for options, index in zip(amounts, choice, strict=True)))
