"""The allocator that learns from measured plans: within the budget, never worse than `auto`, repeatable."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest

from quantkit.allocators.auto import Auto
from quantkit.allocators.quantune import Quantune
from quantkit.budget import Budget
from quantkit.errors import InputError
from quantkit.methods import make
from quantkit.types import AllocationProblem, QuantSpec
from tests.allocators.test_auto import Evaluator, ready
from tests.allocators.test_slim import average


def counted(budget: Budget, planted: Mapping[str, int] | None = None) -> tuple[AllocationProblem, Evaluator]:
    """A problem whose `evaluate` remembers what was asked; with `planted`, those widths lose next to nothing."""

    def loss(name: str, specs: Mapping[str, QuantSpec], true: float) -> float:
        fits = planted is not None and all(specs[key].bits == bits for key, bits in planted.items())
        return 1e-9 if fits and name == "quantune" else true

    return ready(budget, loss=loss)


def tried(evaluator: Evaluator) -> list[dict[str, int]]:
    return [{key: spec.bits for key, spec in specs.items()} for name, specs in evaluator.asked if name == "quantune"]


def test_within_the_budget_and_never_worse_than_auto() -> None:
    made, evaluator = counted(Budget(avg_bits=4.0))
    found = Quantune(trials=10).allocate(made)
    assert average(found) <= 4.0 + 1e-9
    auto = Auto().allocate(made)
    assert made.evaluate(found.specs).loss <= made.evaluate(auto.specs).loss
    plans = tried(evaluator)
    assert 5 < len(plans) <= 10
    assert len({tuple(sorted(item.items())) for item in plans}) == len(plans)
    assert any(note.startswith("quantune: ") and "plans were measured" in note for note in found.notes)


def test_what_measures_better_is_kept() -> None:
    """The first layer is narrowed by one step: no estimator would do that, only measuring finds it."""
    plain, _ = counted(Budget(avg_bits=4.0))
    auto = Auto().allocate(plain)
    narrow = {key: [spec.bits for spec in plain.candidates[key] if spec.bits < auto[key].bits] for key in auto}
    first = next(key for key, widths in narrow.items() if widths)
    narrower = max(narrow[first])
    made, _ = counted(Budget(avg_bits=4.0), planted={first: narrower})
    found = Quantune(trials=30).allocate(made)
    assert found[first].bits == narrower
    assert any("loses" in note and "less than auto's" in note for note in found.notes)


def test_the_same_twice() -> None:
    first, second = (Quantune(trials=8).allocate(counted(Budget(avg_bits=3.5))[0]) for _ in range(2))
    assert dict(first) == dict(second)


def test_an_accuracy_alone_is_left_to_auto() -> None:
    made, evaluator = counted(Budget(max_drop=0.5))
    assert dict(Quantune().allocate(made)) == dict(Auto().allocate(made)) and tried(evaluator) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trials": 1}, "quantune.trials must be at least 2, got 1"),
        ({"margin": 1.0}, "quantune.margin must be at least 0 and below 1, got 1.0"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        make("allocators", "quantune", settings)
