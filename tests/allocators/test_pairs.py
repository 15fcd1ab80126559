"""Pair terms against trying every combination; local search and its bound; never worse than without the terms."""

from __future__ import annotations

import numpy as np
import pytest

from quantkit.allocators import _pairs
from quantkit.allocators._ilp import Limit, choose, total
from quantkit.allocators._pairs import choose_pairs, cost_of
from quantkit.types import Array
from tests.helpers.knapsack import every_choice, totals

Terms = dict[tuple[int, int], Array]
SCALES = (1.0, 1e-3, 1e-6, 1e-9)


def instance(
    seed: int, units: int, options: int, scale: float = 1.0, window: int = 2
) -> tuple[list[list[float]], Terms, list[Limit]]:
    """Terms of both signs, about half as large as the costs; one limit in whole numbers, one not."""
    rng = np.random.default_rng(seed)
    costs = (rng.uniform(0, 1, (units, options)) * scale).tolist()
    terms = {
        (u, v): rng.normal(0, 0.4, (options, options)) * scale
        for u in range(units)
        for v in range(u + 1, min(u + 1 + window, units))
    }
    limits = []
    for amounts in (rng.integers(0, 1000, (units, options)).astype(np.float64), rng.uniform(0, 1, (units, options))):
        low, high = amounts.min(axis=1).sum(), amounts.max(axis=1).sum()
        limits.append(Limit(amounts.tolist(), float(low + rng.uniform(0.2, 0.8) * (high - low))))
    return costs, terms, limits


def brute_force(costs: list[list[float]], terms: Terms, limits: list[Limit]) -> float | None:
    choices = every_choice([len(row) for row in costs])
    found = totals(costs, choices)
    for (u, v), block in terms.items():
        found = found + block[choices[:, u], choices[:, v]]
    fits = np.ones(len(choices), np.bool_)
    for limit in limits:
        fits &= totals(limit.amounts, choices) <= limit.bound
    return float(found[fits].min()) if fits.any() else None


@pytest.mark.parametrize("seed", range(24))
def test_the_choice_is_the_cheapest_at_every_scale(seed: int) -> None:
    scale = SCALES[seed % len(SCALES)]
    costs, terms, limits = instance(seed, 5, 3, scale, window=1 + seed % 4)
    found, wanted = choose_pairs(costs, terms, limits), brute_force(costs, terms, limits)
    assert (found is None) == (wanted is None)
    if found is not None:
        assert found.status == "optimal"
        assert found.cost == pytest.approx(wanted, abs=1e-8 * scale)
        assert found.cost == cost_of(costs, terms, found.choice)
        assert all(total(limit.amounts, found.choice) <= limit.bound for limit in limits)


@pytest.mark.parametrize("seed", range(16))
def test_local_search_is_near_and_its_bound_holds(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pairs, "EXACT_UNITS", 0)
    costs, terms, limits = instance(seed, 6, 3, SCALES[seed % len(SCALES)])
    found, wanted = choose_pairs(costs, terms, limits), brute_force(costs, terms, limits)
    assert (found is None) == (wanted is None)
    if found is not None and wanted is not None:
        scale = SCALES[seed % len(SCALES)]
        assert found.bound - 1e-9 * scale <= wanted <= found.cost + 1e-9 * scale
        assert found.cost <= wanted + 0.05 * scale
        assert all(total(limit.amounts, found.choice) <= limit.bound for limit in limits)


@pytest.mark.parametrize("units", [12, 60])
def test_never_worse_than_without_the_terms(units: int) -> None:
    costs, terms, limits = instance(1, units, 5)
    found, alone = choose_pairs(costs, terms, limits), choose(costs, limits)
    assert found is not None and alone is not None
    assert found.cost < 0.9 * cost_of(costs, terms, alone)
    assert found.bound <= found.cost
    assert found.status == ("optimal" if units == 12 else "feasible")
    assert found.gap <= (1e-8 if units == 12 else 0.2)
    assert choose_pairs(costs, terms, limits) == found  # the same seed, the same answer


def test_two_units_change_together() -> None:
    """Neither gains alone: one move of one unit costs, and the limit lets no other unit grow."""
    costs = [[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]
    terms = {(0, 1): np.array([[0.0, 0.0], [0.0, -5.0]])}
    found = choose_pairs(costs, terms, [Limit([[0.0, 1.0]] * 3, 2.0)])
    assert found is not None and found.choice == (1, 1, 0) and found.cost == -3.0


@pytest.mark.parametrize("units", [0, 40])
def test_a_move_of_two_units_is_found_by_local_search(units: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pairs, "EXACT_UNITS", units)
    monkeypatch.setattr(_pairs, "STARTS", 1)
    costs = [[0.0, 1.0], [0.0, 1.0], [0.0, 0.5]]
    terms = {(0, 1): np.array([[0.0, 0.0], [0.0, -5.0]])}
    found = choose_pairs(costs, terms, [Limit([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], 1.0)])
    assert found is not None and found.choice == (1, 1, 0)


def test_without_terms_it_is_the_knapsack() -> None:
    costs, _, limits = instance(3, 8, 4)
    found = choose_pairs(costs, {}, limits)
    assert found is not None and list(found.choice) == choose(costs, limits)


def test_terms_of_units_with_different_numbers_of_options() -> None:
    costs = [[0.0, 1.0], [0.0, 1.0, 2.0], [3.0]]
    terms = {(0, 1): np.array([[9.0, 9.0, 9.0], [9.0, 9.0, -9.0]]), (1, 2): np.array([[0.0], [0.0], [1.0]])}
    found = choose_pairs(costs, terms)
    assert found is not None and found.choice == (1, 2, 0) and found.cost == pytest.approx(-2.0, abs=1e-12)


def test_nothing_fits() -> None:
    assert choose_pairs([[1.0], [1.0]], {(0, 1): np.ones((1, 1))}, [Limit([[1.0], [1.0]], 1.0)]) is None
