"""Accuracy by bisection: what was measured, and what is said of it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from quantkit.allocators._bisection import Bisection
from quantkit.allocators._table import joined, units_of
from quantkit.budget import Budget
from quantkit.types import Measurement, QuantSpec
from tests.allocators.tables import FIXED, file_bytes, make, table_of


@pytest.mark.parametrize("avg_bits", [None, 5.0])
def test_what_is_told_is_what_was_measured(avg_bits: float | None) -> None:
    """Configurations that a linear budget rules out are not measured, and not counted."""
    asked: list[bool] = []

    def evaluate(specs: Mapping[str, QuantSpec], name: str = "") -> Measurement:
        narrow = sum(spec.bits for spec in specs.values()) < 14
        asked.append(not narrow)
        return Measurement(FIXED + file_bytes(made, specs), 0.0, 0.5 if narrow else 0.001, 1.0)

    made = make(Budget(avg_bits=avg_bits, max_drop=0.01), evaluate=evaluate)
    units = units_of(made)
    table = table_of(units)
    bisection = Bisection(made, units, [table[unit.name] for unit in units], verified=1)
    start = [3, 0, 1, 2] if avg_bits else [4, 4, 4, 4]
    found = joined(units, bisection.run(start))
    assert len(asked) > sum(asked) > 0 and len(asked) <= len(bisection.known)
    assert bisection.found and sum(spec.bits for spec in found.values()) >= 14
    assert bisection.sentence() == (
        f"{len(asked)} configurations were measured, {sum(asked)} of which kept the accuracy"
    )


def test_what_a_linear_budget_rules_out_is_not_measured() -> None:
    made = make(Budget(avg_bits=3.0, max_drop=0.01))  # measuring would fail
    units = units_of(made)
    table = table_of(units)
    bisection = Bisection(made, units, [table[unit.name] for unit in units], verified=1)
    assert bisection.run([4, 4, 4, 4]) == [4, 4, 4, 4] and bisection.measured == []
    assert bisection.sentence().startswith("no configuration keeps the accuracy")


def test_one_is_not_many() -> None:
    made = make(
        Budget(max_drop=0.01),
        widths=dict.fromkeys("abcd", (4,)),
        evaluate=lambda specs, name="": Measurement(1, 0.0, 0.0, 1.0),
    )
    units = units_of(made)
    bisection = Bisection(made, units, [[1.0]] * 4, verified=1)
    bisection.run([0] * 4)
    assert bisection.sentence() == "1 configuration was measured, 1 of which kept the accuracy"
