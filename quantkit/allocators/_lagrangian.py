"""Choose one option per unit for tens of thousands of units: one price for all limits, then what still fits.

At a price p every unit takes the option of least cost + p * amount; the smallest price at which the limits hold is
found by bisection. That answer lies on the lower convex hull, so up to one step of one unit is left over, and ties may
leave more: the rest is filled by the steps that gain most for what they use.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from quantkit.types import Array

Choice = npt.NDArray[np.int64]
_BISECTIONS = 200
_ROUNDING = 1e-12


def choose_many(costs: Array, amounts: Sequence[Array], bounds: Sequence[float]) -> Choice | None:
    """[U] option of every unit; None when even the least amounts exceed a limit.

    Args:
        costs: [U, L], infinite where a unit has no such option.
        amounts: for each limit [U, L], at least 0.
        bounds: for each limit, what the chosen amounts may add up to.
    """
    units = np.arange(len(costs))
    usable = np.isfinite(costs)

    def total(picked: Choice) -> list[float]:
        return [float(amount[units, picked].sum()) for amount in amounts]

    def fits(picked: Choice) -> bool:
        return all(used <= bound * (1 + _ROUNDING) for used, bound in zip(total(picked), bounds, strict=True))

    free: Choice = np.where(usable, costs, np.inf).argmin(axis=1)
    if fits(free):
        return free
    together = sum(amount / max(bound, 1e-300) for amount, bound in zip(amounts, bounds, strict=True))
    least: Choice = np.where(usable, together, np.inf).argmin(axis=1)
    if not fits(least):
        return None

    def at(price: float) -> Choice:
        picked: Choice = np.where(usable, costs + price * together, np.inf).argmin(axis=1)
        return picked

    best = least
    spread = float(np.where(usable, costs, 0).max()) or 1.0
    low, high = 0.0, spread
    while not fits(at(high)) and high < spread * 1e18:
        low, high = high, high * 16
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if fits(at(middle)):
            high = middle
        else:
            low = middle
    if fits(at(high)):
        best = at(high)
    return fill(best, np.where(usable, costs, np.inf), amounts, bounds)


def fill(picked: Choice, costs: Array, amounts: Sequence[Array], bounds: Sequence[float]) -> Choice:
    """Further steps that lower the cost and fit, those that gain most for what they use first, until none is left."""
    picked = picked.copy()
    units = np.arange(len(costs))
    room = [
        bound * (1 + _ROUNDING) - amount[units, picked].sum() for amount, bound in zip(amounts, bounds, strict=True)
    ]
    while True:
        gain = costs[units, picked][:, None] - costs
        steps = [amount - amount[units, picked][:, None] for amount in amounts]
        allowed = gain > 0
        for step, left in zip(steps, room, strict=True):
            allowed &= step <= left
        rows, options = np.nonzero(allowed)
        if not rows.size:
            return picked
        used = sum(
            np.maximum(step[rows, options], 0) / max(bound, 1e-300) for step, bound in zip(steps, bounds, strict=True)
        )
        order = np.argsort(-gain[rows, options] / np.maximum(used, 1e-300), kind="stable")
        changed = np.zeros(len(costs), dtype=np.bool_)
        for row, option in zip(rows[order].tolist(), options[order].tolist(), strict=True):
            if not changed[row] and all(step[row, option] <= left for step, left in zip(steps, room, strict=True)):
                room = [left - step[row, option] for step, left in zip(steps, room, strict=True)]
                picked[row], changed[row] = option, True
