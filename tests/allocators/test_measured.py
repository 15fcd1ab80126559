"""The table of measured losses, and what is chosen by it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from quantkit.allocators._table import joined, units_of, weights_of
from quantkit.allocators.measured import METHOD, Measured
from quantkit.budget import Budget
from quantkit.errors import InputError
from tests.allocators import small


@pytest.mark.parametrize("name", ["dense", "conv", "tied", "recurrent", "inner", "outputs"])
def test_each_figure_is_the_loss_of_that_option_alone(name: str) -> None:
    made = small.problem(name)
    units = units_of(made)
    assert made.network is not None
    found = METHOD().scores(made, units)  # type: ignore[attr-defined]
    assert found.nats and found.quantity == "nats per sample" and list(found.raw) == [unit.name for unit in units]
    for unit in units:
        alone = [made.network.calibration.loss(weights_of(made, option)) for option in unit.options]
        assert found.raw[unit.name] == pytest.approx(alone, rel=1e-3, abs=1e-9)
        assert found.raw[unit.name][0] > found.raw[unit.name][-1] >= 0  # 3 bits lose more than 8


def test_the_choice_is_the_best_within_the_average() -> None:
    made = replace(small.problem("outputs"), budget=Budget(avg_bits=5))
    found = Measured().allocate(made)
    units = units_of(made)
    table = found.scores["measured"].raw
    sizes = {name: target.shape[0] * target.shape[1] for name, target in made.targets.items()}

    def loss(choice: tuple[int, ...]) -> float:
        return sum(table[unit.name][pick] for unit, pick in zip(units, choice, strict=True))

    choices = itertools.product(*(range(len(unit.options)) for unit in units))
    fitting = [
        choice
        for choice in choices
        if sum(spec.bits * sizes[name] for name, spec in joined(units, choice).items()) <= 5 * sum(sizes.values())
    ]
    best = min(fitting, key=loss)
    assert dict(found) == joined(units, best) and found.predicted == pytest.approx(loss(best))
    assert np.all(np.diff([point.loss for point in found.front]) < 0)


def test_without_data_there_is_nothing_to_measure() -> None:
    made = replace(small.problem("dense"), network=None)
    with pytest.raises(InputError, match="the allocator measured needs calibration data: give --calib"):
        Measured().allocate(made)
