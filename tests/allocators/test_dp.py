"""The oracle itself: dynamic programming against every combination."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.knapsack import by_dynamic_programming, cheapest


@pytest.mark.parametrize("seed", range(40))
def test_dynamic_programming_is_as_good_as_every_combination(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, rng.integers(1, 6)).tolist()
    costs = [rng.uniform(-1, 1, size).tolist() for size in sizes]
    amounts = [rng.integers(0, 30, size).tolist() for size in sizes]
    bound = int(rng.integers(-5, 80))
    found, wanted = by_dynamic_programming(costs, amounts, bound), cheapest(costs, [(amounts, bound)])
    assert (found is None) == (wanted is None)
    if found is not None:
        assert sum(row[pick] for row, pick in zip(amounts, found, strict=True)) <= bound
        assert sum(row[pick] for row, pick in zip(costs, found, strict=True)) == pytest.approx(wanted, abs=1e-12)


def test_nothing_fits() -> None:
    assert by_dynamic_programming([[1.0], [1.0]], [[3], [3]], 5) is None
    assert by_dynamic_programming([[1.0]], [[0]], -1) is None
    assert by_dynamic_programming([], [], 0) == []
