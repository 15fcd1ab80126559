"""The smallest choice that keeps an accuracy: by how much, and what is measured to find it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from quantkit.allocators._drop import keeps, smallest_within_drop
from quantkit.allocators._table import Point
from quantkit.budget import Budget
from quantkit.types import AllocationProblem, Measurement, QuantSpec
from tests.allocators.test_table import make


def points(count: int) -> list[Point]:
    return [Point(100 + 10 * place, 2.0, 1.0 / (place + 1), {"a": QuantSpec(8, place + 1)}) for place in range(count)]


def dropping(drops: Sequence[float], limit: float, error: float = 0.0) -> tuple[AllocationProblem, list[int]]:
    """Point i loses drops[i], known to `error`; which points were measured, in order."""
    asked: list[int] = []

    def evaluate(specs: Mapping[str, QuantSpec], name: str = "") -> Measurement:
        asked.append(specs["a"].group_size - 1)
        return Measurement(0, 0.0, drops[asked[-1]], 1.0, drop_error=error)

    return make(Budget(max_drop=limit), evaluate=evaluate), asked


@pytest.mark.parametrize("count", [1, 2, 3, 7, 24])
def test_the_smallest_point_that_keeps_the_accuracy(count: int) -> None:
    front_ = points(count)
    for first in range(count + 1):
        made, asked = dropping([0.5 if place < first else 0.001 for place in range(count)], 0.01)
        found = smallest_within_drop(made, front_, {"none": QuantSpec(8)})
        assert found == ({"none": QuantSpec(8)} if first == count else front_[first].specs)
        assert len(asked) == len(set(asked)) <= math.ceil(math.log2(count + 1)) + 2


def test_the_bound_itself_is_kept() -> None:
    made, _ = dropping([0.02, 0.01, 0.0], 0.01)
    assert smallest_within_drop(made, points(3), {}) == points(3)[1].specs


def test_a_smaller_neighbour_that_keeps_it_too_is_found() -> None:
    """The drop is not monotone: the second point is better than the third and the fourth."""
    made, asked = dropping([0.5, 0.5, 0.5, 0.002, 0.02, 0.002, 0.001, 0.001], 0.01)
    assert smallest_within_drop(made, points(8), {}) == points(8)[3].specs
    assert len(asked) <= 6


def test_an_empty_front_falls_back() -> None:
    made, asked = dropping([], 0.01)
    assert smallest_within_drop(made, [], {"a": QuantSpec(3)}) == {"a": QuantSpec(3)} and asked == []


def test_a_standard_error_is_left_where_anything_leaves_it() -> None:
    drops = [0.03, 0.009, 0.008, 0.004, 0.001]
    found = [smallest_within_drop(dropping(drops, 0.01, error)[0], points(5), {}) for error in (0.0, 0.005, 0.0095)]
    assert found == [points(5)[1].specs, points(5)[3].specs, points(5)[1].specs]  # the last: nothing leaves 0.95 points
    made, _ = dropping([0.02, 0.03], 0.01, 0.005)
    assert smallest_within_drop(made, points(2), {"none": QuantSpec(8)}) == {"none": QuantSpec(8)}


def test_the_lucky_point_is_not_taken() -> None:
    """Drops are measured with errors: how often the choice truly loses more than asked for."""
    rng = np.random.default_rng(3)
    truth, error = [0.04, 0.03, 0.022, 0.017, 0.013, 0.011, 0.008, 0.004, 0.002, 0.0], 0.004
    broken = {0.0: 0, error: 0}
    for _ in range(200):
        seen = (np.array(truth) + error * rng.standard_normal(len(truth))).tolist()
        for told in broken:
            found = smallest_within_drop(dropping(seen, 0.01, told)[0], points(len(truth)), {})
            broken[told] += truth[found["a"].group_size - 1] > 0.01
    assert broken[0.0] > 80 and broken[error] < 40, broken


def test_what_keeps_a_budget() -> None:
    made = make(Budget(max_drop=0.01))
    found = Measurement(0, 0.0, 0.006, 1.0, drop_error=0.003)
    assert [keeps(made, found, errors) for errors in (0.0, 1.0, 2.0)] == [True, True, False]
    assert keeps(make(Budget()), found, 100.0)
