"""The front of choices, and what an allocator does around its table."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import pytest

from quantkit.allocators._ilp import total
from quantkit.allocators._table import (
    allocate_by,
    choice_of,
    front,
    joined,
    losses,
    solve,
    units_of,
)
from quantkit.budget import Budget
from quantkit.types import Measurement, QuantSpec
from tests.allocators.tables import (
    FIXED,
    SHAPES,
    WEIGHTS,
    Fixed,
    every_choice,
    file_bytes,
    make,
    table_of,
)


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_monotone_and_ends_at_the_best_choice(seed: int) -> None:
    made = make(Budget(avg_bits=5))
    units = units_of(made)
    table = losses(units, table_of(units, seed))
    points = front(made, units, table)
    assert len(points) >= 5
    for before, after in itertools.pairwise(points):
        assert before.size < after.size and before.loss > after.loss
    for point in points:
        choice = choice_of(units, point.specs)
        assert choice is not None
        assert point.size == FIXED + file_bytes(made, point.specs)
        assert point.loss == pytest.approx(total(table, choice), rel=1e-12)
        bits = sum(spec.bits * math.prod(SHAPES[name]) for name, spec in point.specs.items())
        assert point.average_bits == pytest.approx(bits / WEIGHTS) and point.average_bits <= 5
    assert {spec.bits for spec in points[0].specs.values()} == {2}
    assert points[-1].specs == joined(units, solve(made, units, table))
    # None of all choices is smaller and better than a point.
    for each in every_choice(units):
        bytes_, loss = FIXED + file_bytes(made, joined(units, each)), total(table, each)
        if bits_of(joined(units, each)) <= 5:
            assert not any(bytes_ <= point.size and loss < point.loss * (1 - 1e-9) for point in points)


def bits_of(specs: Mapping[str, QuantSpec]) -> float:
    return sum(spec.bits * math.prod(SHAPES[name]) for name, spec in specs.items()) / WEIGHTS


# --- All of it


def test_without_a_budget_everything_is_wide_and_nothing_is_estimated() -> None:
    estimator = Fixed()
    found = allocate_by(make(Budget()), "made", estimator)
    assert {spec.bits for spec in found.values()} == {8} and set(found) == set(SHAPES) and len(found) == 4
    assert estimator.asked == 0 and found.scores == {} and found.front == () and found.predicted is None


def test_without_candidates_nothing_is_allocated() -> None:
    found = allocate_by(make(Budget(avg_bits=4), widths=dict.fromkeys(SHAPES, ())), "made", Fixed())
    assert dict(found) == {}


@pytest.mark.parametrize("nats", [True, False])
def test_the_reasons_come_with_the_choice(nats: bool) -> None:
    made = make(Budget(avg_bits=4))
    found = allocate_by(made, "made", Fixed(nats=nats))
    units = units_of(made)
    table = losses(units, table_of(units))
    assert dict(found) == joined(units, solve(made, units, table)) == dict(found.front[-1].specs)
    assert found.units == units and found.notes == ("a note",) and found.scores["made"].raw == table_of(units)
    choice = choice_of(units, found)
    assert choice is not None
    assert found.predicted == (pytest.approx(total(table, choice)) if nats else None)
    assert {(point.estimator, point.quantity, point.nats) for point in found.front} == {("made", "made up", nats)}
    # Of any other plan too, where it is made of the units' options.
    other = [0] * len(units)
    assert found.expected(joined(units, other)) == (pytest.approx(total(table, other)) if nats else None)
    assert found.expected({name: QuantSpec(5, 16) for name in SHAPES}) is None


def test_a_front_that_is_asked_for_is_made_without_a_budget() -> None:
    made = make(Budget(), front=True)
    found = allocate_by(made, "made", Fixed())
    assert {spec.bits for spec in found.values()} == {8} and found.scores == {} and found.predicted is None
    assert len(found.front) >= 5 and found.notes == ("a note",)
    assert {spec.bits for spec in found.front[0].specs.values()} == {2}
    table = losses(units_of(made), table_of(units_of(made)))
    assert found.front[-1].loss == pytest.approx(sum(min(row) for row in table))


def test_a_table_is_made_once_for_all_budgets_of_a_run() -> None:
    estimator = Fixed()
    known: dict[str, Any] = {}
    first = allocate_by(make(Budget(avg_bits=4), known=known), "made", estimator)
    second = allocate_by(make(Budget(avg_bits=3), known=known), "made", estimator)
    assert estimator.asked == 1 and set(known) == {"made"}
    assert bits_of(second) < bits_of(first) <= 4


def test_an_accuracy_is_kept_by_measuring_points_of_the_front() -> None:
    asked: list[Mapping[str, QuantSpec]] = []

    def evaluate(specs: Mapping[str, QuantSpec], name: str = "") -> Measurement:
        asked.append(specs)
        return Measurement(0, 0.0, 0.05 if bits_of(specs) < 4.4 else 0.002, 1.0)

    made = make(Budget(avg_bits=6, max_drop=0.01), evaluate=evaluate)
    found = allocate_by(made, "made", Fixed())
    assert found.predicted == pytest.approx(next(p.loss for p in found.front if p.specs == found.specs))
    averages = [point.average_bits for point in found.front]
    assert bits_of(found) == pytest.approx(min(average for average in averages if average >= 4.4))
    assert 1 <= len(asked) <= math.ceil(math.log2(len(averages) + 1)) + 2
