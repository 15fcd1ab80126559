"""Thousands of units at one price: within the limits, near the optimum, nothing that fits left over."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from quantkit.allocators._ilp import Limit, choose
from quantkit.allocators._lagrangian import choose_many
from quantkit.types import Array


def instance(units: int, options: int, seed: int) -> tuple[Array, Array]:
    """Costs that fall and amounts that rise, with a few options missing."""
    rng = np.random.default_rng(seed)
    amounts = np.cumsum(rng.integers(1, 20, (units, options)), axis=1).astype(float)
    costs = rng.lognormal(0, 2, (units, 1)) * 4.0 ** -np.arange(options) * rng.uniform(0.5, 1.5, (units, options))
    costs[rng.random(costs.shape) < 0.1] = np.inf
    costs[:, 1] = np.where(np.isfinite(costs[:, 1]), costs[:, 1], 1.0)
    return costs, amounts


def total(table: Array, picked: Array) -> float:
    return float(table[np.arange(len(picked)), picked].sum())


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_within_a_percent_of_the_optimum(seed: int, share: float) -> None:
    costs, amounts = instance(150, 4, seed)
    usable = np.where(np.isfinite(costs), amounts, np.nan)
    low, high = np.nanmin(usable, axis=1).sum(), np.nanmax(usable, axis=1).sum()
    bound = float(low + share * (high - low))
    picked = choose_many(costs, [amounts], [bound])
    assert picked is not None and total(amounts, picked) <= bound
    kept = [np.flatnonzero(np.isfinite(row)) for row in costs]
    rows = [row[index].tolist() for row, index in zip(costs, kept, strict=True)]
    limit = Limit([row[index].tolist() for row, index in zip(amounts, kept, strict=True)], bound)
    best = choose(rows, [limit])
    assert best is not None
    least = sum(row[index] for row, index in zip(rows, best, strict=True))
    assert least * (1 - 1e-9) <= total(costs, picked) <= least * 1.01


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
def test_nothing_that_helps_and_fits_is_left(scale: float) -> None:
    costs, amounts = instance(300, 5, 7)
    other = amounts[:, ::-1].cumsum(axis=1)[:, ::-1] / 3 + amounts
    bounds = [float(amounts[:, 2].sum()), float(other[:, 1].sum())]
    picked = choose_many(costs * scale, [amounts, other], bounds)
    assert picked is not None
    room = [bound - total(table, picked) for table, bound in zip((amounts, other), bounds, strict=True)]
    assert min(room) >= 0
    for unit, option in itertools.product(range(300), range(5)):
        if costs[unit, option] < costs[unit, picked[unit]]:
            steps = [table[unit, option] - table[unit, picked[unit]] for table in (amounts, other)]
            assert any(step > left for step, left in zip(steps, room, strict=True))


def test_limits_that_cannot_be_met_and_limits_that_do_not_matter() -> None:
    costs, amounts = np.array([[2.0, 1.0], [5.0, 3.0]]), np.array([[1.0, 2.0], [1.0, 3.0]])
    assert choose_many(costs, [amounts], [1.9]) is None
    assert choose_many(costs, [amounts], [2.0]) is not None
    free = choose_many(costs, [amounts], [100.0])
    assert free is not None and free.tolist() == [1, 1]
    none = choose_many(costs, [], [])
    assert none is not None and none.tolist() == [1, 1]


def test_equal_units_share_what_there_is() -> None:
    """Every unit asks the same price: half of them can be served, and half of them are."""
    costs, amounts = np.tile([4.0, 1.0], (1000, 1)), np.tile([2.0, 3.0], (1000, 1))
    picked = choose_many(costs, [amounts], [2500.0])
    assert picked is not None and int(picked.sum()) == 500
