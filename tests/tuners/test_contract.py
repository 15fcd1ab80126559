"""What every tuner found keeps to, and how good those that learn are on tables whose best point is known."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from quantkit.errors import InputError
from quantkit.methods import find, make
from quantkit.tuning.search import Limits, Others, Outcome, State, search
from quantkit.tuning.space import Dimension, Point, Space
from tests.tuning.tables import SPACE, bumpy, run, start

NAMES = find("tuners")
LEARNERS = ("additive", "quantune")
POINTS = list(SPACE)
LARGE = Space(tuple(Dimension(f"d{index}", tuple(range(8)), ordered=True) for index in range(5)))


def best_of(seed: int) -> float:
    return min(bumpy(seed)(point) for point in POINTS)


def trials_to_best(name: str, seed: int, **settings: Any) -> int:
    state = start(seed=seed)
    found = run(make("tuners", name, settings), bumpy(seed), Limits(len(POINTS), enough=best_of(seed)), state)
    return len(found.points)


def test_there_are_these() -> None:
    assert set(NAMES) == {"additive", "genetic", "grid", "quantune", "random"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 5])
def test_with_enough_trials_it_is_an_exhaustive_search(name: str, batch: int) -> None:
    found = run(make("tuners", name, {}), bumpy(1), Limits(1000, batch=batch), start(seed=1))
    assert len(found.points) == len(set(found.points)) == len(POINTS)
    assert found.best is not None and found.outcomes[found.best].value == best_of(1)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_tries_the_same_points(name: str) -> None:
    found = [run(make("tuners", name, {}), bumpy(2), Limits(14), start(seed=seed)).points for seed in (5, 5, 6)]
    assert found[0] == found[1]
    assert found[0] != found[2] or name == "grid"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, -3.5])
def test_constant_figures(name: str, value: float) -> None:
    found = run(make("tuners", name, {}), lambda point: value, Limits(20), start())
    assert len(set(found.points)) == 20 and found.best == 0


@pytest.mark.parametrize("name", NAMES)
def test_figures_that_are_not_known(name: str) -> None:
    """Half of the trials fail: the tuner goes on, and finds the best of the others."""

    def figure(point: Point) -> float:
        return math.inf if sum(point) % 2 else bumpy(3)(point)

    found = run(make("tuners", name, {}), figure, Limits(1000), start(seed=1))
    assert len(found.points) == len(POINTS)
    assert found.best is not None and found.outcomes[found.best].value == min(figure(point) for point in POINTS)


@pytest.mark.parametrize("name", NAMES)
def test_only_allowed_points(name: str) -> None:
    state = start(allowed=lambda point: point[0] != 3 and point[3] == 0)
    found = run(make("tuners", name, {}), bumpy(4), Limits(1000), state)
    assert set(found.points) == {point for point in POINTS if point[0] != 3 and point[3] == 0}
    nothing = run(make("tuners", name, {}), bumpy(4), Limits(10), start(allowed=lambda point: False))
    assert nothing.points == () and nothing.best is None


@pytest.mark.parametrize("name", NAMES)
def test_large_spaces(name: str) -> None:
    found = run(make("tuners", name, {}), lambda point: float(sum(point)), Limits(12, batch=3), start(space=LARGE))
    assert len(set(found.points)) == 12


def test_learners_need_far_fewer_trials_than_random_search() -> None:
    """48 points, one of them the best: 24.5 trials at random. Over 8 tables."""
    seeds = range(8)
    mean = {name: np.mean([trials_to_best(name, seed) for seed in seeds]) for name in ("random", *LEARNERS)}
    assert 16 < mean["random"] < 33
    for name in LEARNERS:
        assert mean[name] < 0.6 * 24.5, mean


def test_additive_tables_are_solved_within_twice_their_levels() -> None:
    levels = sum(len(dimension.values) for dimension in SPACE.dimensions)
    for name in LEARNERS:
        assert np.median([trials_to_best(name, seed) for seed in range(8)]) <= 2 * levels


def test_other_models_help_where_they_are_alike_and_do_no_harm_where_not() -> None:
    columns = SPACE.encode(POINTS).astype(np.float64)

    def mean(others: Others | None) -> float:
        counts = []
        for seed in range(4):
            state = start(seed=seed, others=others)
            limits = Limits(len(POINTS), enough=best_of(7))
            counts.append(len(run(make("tuners", "quantune", {"members": 4}), bumpy(7), limits, state).points))
        return float(np.mean(counts))

    alike = np.array([3 * bumpy(7)(point) + 100 for point in POINTS])
    opposite = -alike
    cold = mean(None)
    assert mean(Others.of([(columns, alike), (columns, alike + 0.1 * columns[:, 0])])) <= 2
    assert mean(Others.of([(columns, alike)])) < 0.7 * cold
    assert mean(Others.of([(columns, opposite)])) < len(POINTS) / 2  # no worse than random search


def test_points_that_break_a_budget_are_avoided() -> None:
    """Wide codes are the best and never feasible: what is tried moves away from them."""

    def measure(points: list[Point]) -> list[Outcome]:
        return [Outcome(-float(point[0]), feasible=point[0] < 2) for point in points]

    tuner = make("tuners", "quantune", {"epsilon": 0, "first": 6})
    found = search(start(seed=2), tuner, lambda points: measure(list(points)), Limits(24))
    early = [point[0] >= 2 for point in found.points[:6]]
    late = [point[0] >= 2 for point in found.points[12:]]
    assert any(early) and np.mean(late) < 0.3
    assert found.best is not None and found.points[found.best][0] == 1


def test_a_batch_is_diverse() -> None:
    """With diversity, the points of one batch agree in fewer settings than the best predictions alone would."""

    def agreement(diversity: float) -> float:
        tuner = make("tuners", "quantune", {"epsilon": 0, "diversity": diversity})
        known = tuple(POINTS[::5])
        state = State(
            SPACE, known, tuple(Outcome(bumpy(8)(point)) for point in known), SPACE.encode, lambda point: True, None, 1
        )
        points = np.array(tuner.propose(state, 6).points)
        pairs = [(points[a] == points[b]).mean() for a in range(6) for b in range(a)]
        return float(np.mean(pairs))

    assert agreement(1.0) < agreement(0.0)


def test_gain_falls_while_it_learns() -> None:
    tuner = make("tuners", "quantune", {"epsilon": 0})
    found = run(tuner, bumpy(9), Limits(40), start(seed=1))
    states = [
        State(SPACE, found.points[:count], found.outcomes[:count], SPACE.encode, lambda point: True, None, 1)
        for count in (4, 40)
    ]
    early, late = (tuner.propose(state, 1).gain for state in states)
    assert early is not None and late is not None and late < 0.5 * early
    greedy = make("tuners", "quantune", {"acquisition": "greedy", "epsilon": 0}).propose(states[1], 1)
    assert greedy.gain == late and make("tuners", "random", {}).propose(states[1], 1).gain is None


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("genetic", {"population": 1}, "genetic.population must be at least 2"),
        ("genetic", {"tournament": 0}, "genetic.tournament at least 1, got 8 and 0"),
        ("genetic", {"mutation": 1.5}, "genetic.mutation must be at least 0 and at most 1, got 1.5"),
        ("additive", {"strength": 0.0}, "additive.strength must be above 0, got 0.0"),
        ("quantune", {"acquisition": "ucb"}, "quantune.acquisition must be one of auto, ei, greedy, got 'ucb'"),
        ("quantune", {"epsilon": 2}, "quantune.epsilon must be at least 0 and at most 1, got 2"),
        ("quantune", {"diversity": -1}, "quantune.diversity must be at least 0 and at most 1, got -1"),
        ("quantune", {"members": 0}, "quantune.members must be at least 1, got 0"),
    ],
)
def test_wrong_settings(name: str, settings: Mapping[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        make("tuners", name, settings)
