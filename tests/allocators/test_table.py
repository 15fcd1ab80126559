"""Tables, budgets in bytes and the front: against enumeration on small problems."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from quantkit.allocators._ilp import Limit, Solution, solve_choice, total
from quantkit.allocators._judge import predicted
from quantkit.allocators._table import (
    CAP,
    DOUBT,
    Allocation,
    again,
    allocate_by,
    amounts,
    choice_of,
    code_bits,
    impossible,
    joined,
    limits,
    losses,
    predicted_ms,
    sizes,
    solve,
    units_of,
)
from quantkit.budget import Budget
from quantkit.types import AllocationProblem, QuantSpec, Target
from tests.allocators.tables import (
    FIXED,
    SHAPES,
    WEIGHTS,
    WIDTHS,
    Fixed,
    every_choice,
    file_bytes,
    make,
    size,
    table_of,
)


def test_every_target_is_a_unit_with_its_widths_from_narrow_to_wide() -> None:
    units = units_of(make(Budget()))
    assert [unit.name for unit in units] == list(SHAPES) and [unit.members for unit in units] == [(n,) for n in SHAPES]
    for unit in units:
        assert [unit.bits(option) for option in range(len(unit.options))] == list(WIDTHS)
        assert unit.options[0] == {unit.name: QuantSpec(2, 16)}


def test_members_share_an_option_for_every_width_that_one_of_them_has() -> None:
    widths = {"a": (2, 4, 8), "b": (3, 4), "c": (4,), "d": ()}
    units = units_of(make(Budget(), widths=widths, units={"a": ("a", "b"), "c": ("c",), "d": ("d",)}))
    assert [(unit.name, unit.members) for unit in units] == [("a", ("a", "b")), ("c", ("c",))]  # d stays float
    bits = [{name: spec.bits for name, spec in option.items()} for option in units[0].options]
    # The narrowest of at least this width, else the widest; 3 bits of a are 4.
    assert bits == [{"a": 2, "b": 3}, {"a": 4, "b": 3}, {"a": 4, "b": 4}, {"a": 8, "b": 4}]


def test_a_member_without_widths_is_left_out_of_its_unit() -> None:
    widths = {"a": (), "b": (3, 4), "c": (4,), "d": (2,)}
    units = units_of(make(Budget(), widths=widths, units={"a": ("a", "b"), "c": ("c", "d")}))
    assert [(unit.name, unit.members) for unit in units] == [("b", ("b",)), ("c", ("c", "d"))]


def test_options_that_are_equal_are_one() -> None:
    units = units_of(make(Budget(), widths={"a": (8,), "b": (2, 8), "c": (8,), "d": (8,)}, units={"a": ("a", "b")}))
    assert [{n: s.bits for n, s in option.items()} for option in units[0].options] == [
        {"a": 8, "b": 2},
        {"a": 8, "b": 8},
    ]


def test_a_choice_and_its_specs_tell_each_other() -> None:
    units = units_of(make(Budget(), units={"a": ("a", "c"), "b": ("b",), "d": ("d",)}))
    for choice in every_choice(units):
        specs = joined(units, choice)
        assert set(specs) == set(SHAPES) and specs["a"] == specs["c"]
        assert choice_of(units, specs) == list(choice)
    assert choice_of(units, {**joined(units, (0, 0, 0)), "c": QuantSpec(8, 16)}) is None
    assert choice_of(units, {**joined(units, (0, 0, 0)), "b": QuantSpec(5, 16)}) is None
    assert choice_of(units, {"a": QuantSpec(2, 16)}) is None


# --- Losses


def test_what_is_not_finite_counts_as_twice_the_largest_loss() -> None:
    units = units_of(make(Budget(), widths={"a": (2, 4), "b": (2, 4), "c": (2, 4), "d": (2, 4)}))
    raw = {"a": (math.inf, 0.5), "b": (math.nan, 3.0), "c": (-0.25, 1.0), "d": (-math.inf, 0.0)}
    assert losses(units, raw) == [[CAP * 3.0, 0.5], [CAP * 3.0, 3.0], [0.0, 1.0], [0.0, 0.0]]


def test_a_table_without_finite_losses_still_orders_nothing() -> None:
    units = units_of(make(Budget(), widths={"a": (2, 4), "b": (2, 4), "c": (), "d": ()}))
    assert losses(units, {"a": (math.inf, 0.0), "b": (math.inf, math.inf)}) == [[1.0, 0.0], [1.0, 1.0]]


def test_totals_of_choices() -> None:
    found = predicted([[1.0, 2.0], [10.0, 20.0]], [(0, 0), (1, 0), (1, 1)])
    np.testing.assert_array_equal(found, [11.0, 12.0, 22.0])


# --- Budgets


def test_amounts_add_up_over_members() -> None:
    made = make(Budget(), units={"a": ("a", "c"), "b": ("b",), "d": ("d",)})
    units = units_of(made)
    assert sizes(made, units)[0] == [
        size(made.targets["a"], QuantSpec(bits)) + size(made.targets["c"], QuantSpec(bits)) for bits in WIDTHS
    ]
    assert code_bits(made, units)[0] == [bits * (32 * 96 + 48 * 48) for bits in WIDTHS]
    assert amounts(units, lambda name, spec: 1.0) == [[2.0] * 5, [1.0] * 5, [1.0] * 5]


def bops(item: Target, spec: QuantSpec | None) -> int:
    return item.shape[0] * item.shape[1] * 10 * (32 * 32 if spec is None else 32 * spec.bits)


def milliseconds(item: Target, spec: QuantSpec | None) -> float:
    return item.shape[0] * item.shape[1] / 1000 * (1.0 if spec is None else spec.bits / 16)


BUDGETS: dict[str, tuple[Budget, Callable[[AllocationProblem, Mapping[str, QuantSpec]], bool]]] = {
    "average": (
        Budget(avg_bits=3.7),
        lambda made, specs: sum(spec.bits * math.prod(SHAPES[name]) for name, spec in specs.items()) <= 3.7 * WEIGHTS,
    ),
    "bytes": (Budget(max_size=4001), lambda made, specs: FIXED + file_bytes(made, specs) <= 4001),
    "share": (
        Budget(max_size=Fraction(1, 7)),
        lambda made, specs: FIXED + file_bytes(made, specs) <= made.float_size // 7,
    ),
    "operations": (
        Budget(max_bops=Fraction(1, 9)),
        lambda made, specs: sum(bops(made.targets[n], s) for n, s in specs.items()) <= WEIGHTS * 10 * 1024 / 9,
    ),
    "latency": (
        Budget(max_latency=0.6),
        lambda made, specs: (
            (made.model_ms or 0) - WEIGHTS / 1000 + sum(milliseconds(made.targets[n], s) for n, s in specs.items())
            <= 0.6 * (made.model_ms or 0) * (1 + 1e-9)
        ),
    ),
}
BUDGETS["all"] = (
    Budget(3.7, 4001, max_bops=Fraction(1, 8), max_latency=0.65),
    lambda made, specs: (
        BUDGETS["average"][1](made, specs)
        and BUDGETS["bytes"][1](made, specs)
        and sum(bops(made.targets[n], s) for n, s in specs.items()) <= WEIGHTS * 10 * 1024 / 8
        and (made.model_ms or 0) - WEIGHTS / 1000 + sum(milliseconds(made.targets[n], s) for n, s in specs.items())
        <= 0.65 * (made.model_ms or 0) * (1 + 1e-9)
    ),
)


@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("seed", range(4))
def test_the_best_choice_within_every_budget(name: str, seed: int) -> None:
    budget, keeps = BUDGETS[name]
    made = make(budget, bops=bops, milliseconds=milliseconds, model_ms=WEIGHTS / 1000 * 1.5)
    units = units_of(made)
    table = losses(units, table_of(units, seed))
    assert len(limits(made, units)) == (4 if name == "all" else 1)
    found = solve(made, units, table)
    assert keeps(made, joined(units, found))
    allowed = [choice for choice in every_choice(units) if keeps(made, joined(units, choice))]
    assert 1 < len(allowed) < 5**4
    best = min(total(table, choice) for choice in allowed)
    assert total(table, found) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("extra", "others"), [(None, 0), ("max_size", 1), ("avg_bits", 1), ("max_bops", 1)])
def test_times_of_any_order_and_what_no_layer_shows(seed: int, extra: str | None, others: int) -> None:
    """A wider kernel may be the faster one, and integer borders cost time of their own: against every choice."""
    rng = np.random.default_rng([seed, 9])
    factors = {(name, bits): float(rng.uniform(0.3, 1.2)) for name in SHAPES for bits in WIDTHS}
    floats = {name: float(rng.uniform(1, 5)) for name in SHAPES}

    def time(item: Target, spec: QuantSpec | None) -> float:
        return floats[item.name] * (1.0 if spec is None else factors[item.name, spec.bits])

    amount = {"max_size": 4001, "avg_bits": 4.5, "max_bops": Fraction(1, 7)}
    budget = Budget(max_latency=0.9, **({extra: amount[extra]} if extra else {}))  # type: ignore[arg-type]
    factor = 1.05
    made = make(budget, bops=bops, milliseconds=time, model_ms=sum(floats.values()) + 2, correction=factor)
    units = units_of(made)
    table = losses(units, table_of(units, seed))
    rows = limits(made, units)
    assert len(rows) == 1 + others

    def predicted_time(choice: Sequence[int]) -> float:
        specs = joined(units, choice)
        return factor * (2 + sum(time(made.targets[name], spec) for name, spec in specs.items()))

    assert predicted_ms(made, joined(units, (0, 1, 2, 3))) == pytest.approx(predicted_time((0, 1, 2, 3)))
    most = 0.9 * (made.model_ms or 0) * (1 + 1e-12)
    allowed = [
        choice
        for choice in every_choice(units)
        if predicted_time(choice) <= most and all(total(row.amounts, choice) <= row.bound for row in rows[:-1])
    ]
    assert 1 < len(allowed) < 5**4
    found = solve(made, units, table)
    assert predicted_time(found) <= most
    assert total(table, found) == pytest.approx(min(total(table, choice) for choice in allowed), rel=1e-9)


def test_a_time_that_cannot_be_kept_says_what_could_and_gives_way() -> None:
    made = make(Budget(max_latency=0.3), milliseconds=milliseconds, model_ms=WEIGHTS / 1000 * 1.5, correction=1.1)
    units = units_of(made)
    least = predicted_ms(made, joined(units, (0, 0, 0, 0)))
    assert least is not None and made.model_ms is not None
    (sentence,) = impossible(made)
    figure = re.fullmatch(r"--max-latency 0.3x cannot be met: the smallest predicted is (0\.\d+)x", sentence)
    assert figure is not None and float(figure[1]) == pytest.approx(least / made.model_ms, rel=1e-5)
    assert float(figure[1]) >= least / made.model_ms * (1 - 1e-12)
    assert impossible(replace(made, budget=Budget(max_latency=float(figure[1])))) == ()
    found = solve(made, units, losses(units, table_of(units)))
    taken = predicted_ms(made, joined(units, found))
    assert taken is not None and least < taken <= least + DOUBT * made.model_ms  # as fast as any, and no narrower


def test_a_time_gives_way_to_a_size() -> None:
    """Wide layers are the fast ones: both budgets together cannot be met, and bytes are certain."""

    def time(item: Target, spec: QuantSpec | None) -> float:
        return item.shape[0] * item.shape[1] / 1000 * (1.0 if spec is None else 1 - spec.bits / 16)

    both = make(Budget(max_size=3000, max_latency=0.55), milliseconds=time, model_ms=WEIGHTS / 1000)
    units = units_of(both)
    (sentence,) = impossible(both)
    assert "--max-size 3000 bytes and --max-latency 0.55x cannot be met together" in sentence
    found = joined(units, solve(both, units, losses(units, table_of(units))))
    assert FIXED + file_bytes(both, found) <= 3000
    slowest = both.model_ms
    taken = predicted_ms(both, found)
    assert taken is not None and slowest is not None and taken < 0.9 * slowest
    # And the size gives way to nothing.
    tight = replace(both, budget=Budget(max_size=1000, max_latency=0.55))
    assert solve(tight, units, losses(units, table_of(units))) == [0, 0, 0, 0]


def test_another_budget_by_the_same_table() -> None:
    made = make(Budget(avg_bits=5))
    found = allocate_by(made, "made", Fixed())
    narrow = replace(made, budget=Budget(avg_bits=3))
    assert again(narrow, found) == allocate_by(narrow, "made", Fixed()).specs != found.specs
    accurate = replace(made, budget=Budget(avg_bits=3, max_drop=0.1))
    assert again(accurate, found) is found.specs
    assert again(narrow, Allocation(found.specs)) is found.specs


def test_what_the_solver_does_not_prove_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(Budget(avg_bits=4))
    assert allocate_by(made, "made", Fixed()).notes == ("a note",)

    def unproven(costs: Sequence[Sequence[float]], rows: Sequence[Limit]) -> Solution | None:
        found = solve_choice(costs, rows)
        return None if found is None else replace(found, gap=0.0123)

    monkeypatch.setattr("quantkit.allocators._table.solve_choice", unproven)
    sentence = "bits are not proven best: another choice may be predicted to lose up to 1.2 % less"
    assert allocate_by(made, "made", Fixed()).notes == ("a note", sentence)
    sized = make(Budget(max_size=4001), file_size=lambda specs: FIXED + file_bytes(made, specs))
    assert allocate_by(sized, "made", Fixed()).notes == ("a note", sentence)


def test_what_was_not_measured_limits_nothing() -> None:
    made = make(Budget(max_latency=0.5, max_bops=Fraction(1, 9)))
    assert limits(made, units_of(made)) == []
    assert limits(replace(made, milliseconds=milliseconds), units_of(made)) == []  # no time of the model


def test_where_nothing_fits_everything_is_narrow() -> None:
    made = make(Budget(max_size=1000))
    units = units_of(made)
    assert solve(made, units, losses(units, table_of(units))) == [0, 0, 0, 0]


@pytest.mark.parametrize("overhead", [40, 200])
def test_the_real_file_is_what_has_to_fit(overhead: int) -> None:
    """Every further width in a file brings nodes that the estimates do not know."""
    asked: list[int] = []

    def file_size(specs: Mapping[str, QuantSpec]) -> int:
        asked.append(FIXED + file_bytes(made, specs) + overhead * len({spec.bits for spec in specs.values()}))
        return asked[-1]

    units = units_of(make(Budget()))
    table = losses(units, table_of(units, 1))
    plain = make(Budget(max_size=4400))
    limit = FIXED + file_bytes(plain, joined(units, solve(plain, units, table))) + 10
    made = make(Budget(max_size=limit), file_size=file_size)
    found = solve(made, units, table)
    assert len(asked) < 15 and asked[0] > limit  # the first estimate was too small
    assert file_size(joined(units, found)) <= limit
    # And it is far from giving up.
    assert total(table, found) < total(table, [0, 0, 0, 0]) / 2


# --- The front
