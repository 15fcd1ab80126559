"""The loop: what is tried first, when it ends, what it refuses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from quantkit.errors import InputError
from quantkit.tuners.grid import Grid
from quantkit.tuners.random import Random
from quantkit.tuning.search import Limits, Others, Outcome, Proposal, State, search
from quantkit.tuning.space import Dimension, Point, Space
from tests.tuning.tables import SPACE, bumpy, run, start

FIRST: list[Point] = [(0, 0, 0, 0), (3, 2, 1, 1)]


@dataclass(frozen=True)
class Fixed:
    """Proposes one point, with an opinion of its gain."""

    point: Point
    gain: float | None = None

    def propose(self, state: State, count: int) -> Proposal:
        return Proposal((self.point,), self.gain)


@dataclass(frozen=True)
class Weary:
    """Grid search that expects less and less."""

    def propose(self, state: State, count: int) -> Proposal:
        return Proposal(Grid().propose(state, count).points, 1.0 / (1 + len(state.points)))


def test_first_points_come_first_and_once() -> None:
    first = [(3, 2, 1, 1), (0, 0, 0, 0), (3, 2, 1, 1)]
    found = run(Grid(), bumpy(0), Limits(5), first=first)
    assert found.points == ((3, 2, 1, 1), (0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 0, 1, 1))
    assert found.ended == "5 trials were asked for"
    assert found.best == int(np.argmin([bumpy(0)(point) for point in found.points]))


def test_batches_are_measured_together() -> None:
    sizes: list[int] = []

    def measure(points: Sequence[Point]) -> list[Outcome]:
        sizes.append(len(points))
        return [Outcome(0.0) for _ in points]

    search(start(), Random(), measure, Limits(10, batch=4), first=[(0, 0, 0, 0)])
    assert sizes == [1, 4, 4, 1]


def test_it_ends_when_everything_was_tried() -> None:
    found = run(Random(), bumpy(0), Limits(1000))
    assert sorted(found.points) == sorted(SPACE)
    assert found.ended == "every point within the budget was tried"


def test_it_ends_when_nothing_is_within_the_budget() -> None:
    outside = start(allowed=lambda point: False)
    found = search(outside, Grid(), lambda points: [Outcome(1.0, feasible=False)] * len(points), Limits(9), FIRST)
    assert found.points == tuple(FIRST) and found.best is None
    assert found.ended == "no point that was tried is within the budget, and no other is expected to be"
    found = search(outside, Grid(), lambda points: [Outcome(1.0)] * len(points), Limits(9), FIRST)
    assert found.ended == "every point within the budget was tried"


def test_it_ends_when_nothing_is_expected() -> None:
    found = run(Weary(), bumpy(0), Limits(1000, noise=0.1))
    assert len(found.points) == 12  # the expectations 1/11, 1/12 and 1/13 are below the noise
    assert found.ended == "no gain above the noise is expected any more"


def test_it_ends_when_it_is_good_enough() -> None:
    least = min(bumpy(0)(point) for point in SPACE)
    found = run(Grid(), bumpy(0), Limits(1000, enough=least))
    assert found.outcomes[-1].value == least and found.best == len(found.points) - 1
    assert found.ended == f"a trial reached {least:.4g}"


def test_the_best_is_feasible_and_the_first_of_equals() -> None:
    outcomes = iter([Outcome(1.0), Outcome(-9.0, feasible=False), Outcome(0.5), Outcome(0.5), Outcome(math.inf)])
    found = search(start(), Grid(), lambda points: [next(outcomes) for _ in points], Limits(5))
    assert found.best == 2
    outcomes = iter([Outcome(1.0, feasible=False), Outcome(math.inf)])
    assert search(start(), Grid(), lambda points: [next(outcomes) for _ in points], Limits(2)).best is None


def test_a_tuner_that_repeats_itself_is_stopped() -> None:
    with pytest.raises(AssertionError, match=r"the tuner proposed \[\(0, 0, 0, 0\)\] again"):
        run(Fixed((0, 0, 0, 0)), bumpy(0), Limits(3))


def test_candidates_of_a_large_space_include_the_neighbourhood_of_the_best() -> None:
    space = Space(tuple(Dimension(f"d{index}", tuple(range(9)), ordered=True) for index in range(6)))
    state = State(space, ((4,) * 6,), (Outcome(0.0),), space.encode, lambda point: point[0] != 0, None, 3)
    found = state.candidates(state.generator())
    assert len(found) > 500 and len(found) == len(set(found)) and (4,) * 6 not in found
    assert all(point[0] != 0 for point in found)
    assert set(space.neighbours((4,) * 6)) - set(found) == {(0, 4, 4, 4, 4, 4)}


def test_others_are_made_comparable() -> None:
    """Centred, and with the median of their deviations; what tells nothing is left out."""
    columns = np.arange(6.0)[:, None]
    found = Others.of(
        [
            (columns[:3], np.array([1.0, 2.0, 3.0])),
            (columns[:3], np.array([10.0, 20.0, 30.0])),
            (columns[:3], np.array([100.0, 200.0, 300.0])),
            (columns[:2], np.array([5.0, 5.0])),
            (columns[:1], np.array([5.0])),
            (columns[:2], np.array([5.0, math.inf])),
        ]
    )
    assert found is not None
    for owner in range(3):
        assert found.values[found.owners == owner] == pytest.approx([-10.0, 0.0, 10.0], abs=1e-12)
    assert set(found.owners) == {0, 1, 2} and found.features.shape == (9, 1)
    assert Others.of([(columns[:1], np.array([5.0]))]) is None


def test_wrong_limits() -> None:
    with pytest.raises(InputError, match="trials must be at least 1, got 0"):
        Limits(0)
    with pytest.raises(InputError, match="batch must be at least 1, got -1"):
        Limits(1, batch=-1)
