"""The knapsack against trying every combination, at any magnitude of costs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from quantkit.allocators._ilp import Limit, choose, total


def brute_force(costs: list[list[float]], limits: list[Limit]) -> float | None:
    best = None
    for choice in itertools.product(*(range(len(options)) for options in costs)):
        if all(total(limit.amounts, choice) <= limit.bound for limit in limits):
            cost = total(costs, choice)
            best = cost if best is None else min(best, cost)
    return best


def instance(seed: int, scale: float) -> tuple[list[list[float]], list[Limit]]:
    """Up to 5 units of 1 to 4 options; two limits somewhere between impossible and free."""
    rng = np.random.default_rng(seed)
    sizes = [int(size) for size in rng.integers(1, 5, rng.integers(2, 6))]
    costs = [[float(cost) for cost in rng.uniform(0, 1, size) * scale] for size in sizes]
    limits = []
    for _ in range(2):
        amounts = [[float(amount) for amount in rng.uniform(0, 1, size)] for size in sizes]
        least, most = sum(min(row) for row in amounts), sum(max(row) for row in amounts)
        limits.append(Limit(amounts, float(rng.uniform(least - 0.1, most))))
    return costs, limits


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6, 1e-9, 1e6])
def test_the_choice_is_the_cheapest_at_every_scale(scale: float) -> None:
    infeasible = 0
    for seed in range(25):
        costs, limits = instance(seed, scale)
        wanted, found = brute_force(costs, limits), choose(costs, limits)
        if wanted is None:
            infeasible += 1
            assert found is None
        else:
            assert found is not None
            assert all(total(limit.amounts, found) <= limit.bound for limit in limits)
            assert total(costs, found) == pytest.approx(wanted, rel=1e-9)
    assert 0 < infeasible < 20


@pytest.mark.parametrize("spread", [1e-4, 1e-8, 1e-12])
def test_small_differences_count_beside_a_large_cost(spread: float) -> None:
    """One hopeless option must not hide what the others cost: HiGHS stops at differences of 1e-6."""
    rng = np.random.default_rng(0)
    costs = [[float(cost) for cost in rng.permutation([1.0, 2.0, 3.0]) * spread] + [1.0] for _ in range(6)]
    amounts = [[3.0, 2.0, 1.0, 0.0] for _ in costs]
    limits = [Limit(amounts, 11.0)]
    found = choose(costs, limits)
    assert found is not None
    assert total(costs, found) == pytest.approx(brute_force(costs, limits), rel=1e-9)


def test_costs_below_zero() -> None:
    costs = [[-5.0, 1.0], [2.0, -3.0]]
    limits = [Limit([[1.0, 0.0], [0.0, 1.0]], 1.0)]
    assert choose(costs, limits) == [0, 0]
    assert choose(costs) == [0, 1]


@pytest.mark.parametrize("bound", [1e-9, 1.0, 1e12])
def test_a_limit_that_fits_exactly(bound: float) -> None:
    amounts = [[bound / 2, bound], [bound / 2, bound]]
    assert choose([[1.0, 0.0], [1.0, 0.0]], [Limit(amounts, bound)]) == [0, 0]
    just_below = bound * (1 - 1e-7)
    assert choose([[1.0, 0.0], [1.0, 0.0]], [Limit(amounts, just_below)]) is None


def test_nothing_fits() -> None:
    assert choose([[1.0], [2.0]], [Limit([[1.0], [1.0]], 1.5)]) is None
    assert choose([[1.0, 0.0]], [Limit([[0.0, 9.0]], 5.0), Limit([[9.0, 0.0]], 5.0)]) is None


def test_nothing_to_choose() -> None:
    assert choose([]) == []
    assert choose([[0.0], [0.0]], [Limit([[0.0], [0.0]], 0.0)]) == [0, 0]


def test_the_same_input_gives_the_same_choice() -> None:
    costs = [[1.0, 1.0, 1.0] for _ in range(8)]
    limits = [Limit([[1.0, 2.0, 3.0] for _ in costs], 16.0)]
    assert choose(costs, limits) == choose(costs, limits)
