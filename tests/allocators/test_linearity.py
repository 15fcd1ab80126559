"""alpha t^2: exact where the loss is quadratic, fitted through the origin elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from quantkit.allocators._table import units_of, weights_of
from quantkit.allocators.linearity import METHOD, Linearity, fit_slope, relative_error
from quantkit.allocators.measured import Measured
from quantkit.budget import Budget
from quantkit.errors import InputError
from quantkit.graph.load import load_model
from quantkit.graph.targets import find_targets
from quantkit.runtime.probe import Probe
from quantkit.types import AllocationProblem
from tests.allocators import small
from tests.helpers.models import build, random

LINEAR = """g (float[N,16] x, float[16,24] w1, float[16,24] w2) => (float[N,4,6] y, float[N,4,6] z) {
    shape = Constant<value_ints = [0, 4, 6]>()
    h = Neg(x)
    a = MatMul(x, w1)
    b = MatMul(h, w2)
    y = Reshape(a, shape)
    z = Reshape(b, shape)
}"""


def quadratic() -> AllocationProblem:
    """Outputs are linear in each weight, and compared by their squared distance."""
    weights = {name: random(16, 24, seed=place) for place, name in enumerate(("w1", "w2"))}
    model = load_model(build(LINEAR, weights)).model
    rng = np.random.default_rng(1)
    probe = Probe(model, find_targets(model)[0], [{"x": rng.standard_normal((6, 16)).astype(np.float32)}])
    return small.problem("values", (2, 3, 4, 6, 8), made=probe)


@pytest.mark.parametrize("thetas", [(0.5, 1.0), (1.0,), (0.1, 0.3, 0.9), (2.0,)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_on_a_quadratic_loss_the_slope_is_exact(bits: int, thetas: tuple[float, ...]) -> None:
    made = quadratic()
    units = units_of(made)
    found = Linearity(bits=bits, thetas=thetas).scores(made, units)
    truth = Measured().scores(made, units)
    place = (2, 3, 4, 6, 8).index(bits)
    assert found.nats and found.notes == ()
    for unit in units:
        assert found.raw[unit.name][place] == pytest.approx(truth.raw[unit.name][place], rel=1e-3)
        # Of one slope for all widths: losses are in proportion to t^2.
        errors = [relative_error(made, unit, option) for option in range(5)]
        slopes = np.asarray(found.raw[unit.name]) / errors
        assert slopes == pytest.approx(slopes[0], rel=1e-12)


def test_t_squared_is_of_all_members_together() -> None:
    made = small.problem("values")
    (unit,) = units_of(made)
    for place, option in enumerate(unit.options):
        error = whole = 0.0
        for name, weight in weights_of(made, option).items():
            own = made.targets[name].load().astype(np.float64)
            error, whole = error + np.square(weight - own).sum(), whole + np.square(own).sum()
        assert relative_error(made, unit, place) == pytest.approx(error / whole, rel=1e-9)


@pytest.mark.parametrize("name", ["dense", "probabilities", "conv", "recurrent", "inner"])
def test_small_errors_are_predicted_from_others(name: str) -> None:
    """Fitted with 6 bits, for 6 bits: within a tenth of the measured loss where errors are small."""
    made = small.problem(name, (6, 8))
    units = units_of(made)
    found = Linearity(bits=6).scores(made, units)
    truth = Measured().scores(made, units)
    for unit in units:
        assert found.raw[unit.name][0] == pytest.approx(truth.raw[unit.name][0], rel=0.1)


def test_the_reference_is_the_narrowest_option_of_enough_bits() -> None:
    made = small.problem("dense", (2, 3, 6))
    asked: list[Mapping[str, Any]] = []

    class Recorder:
        def losses(self, trials: Mapping[tuple[str, ...], partial[Any]], progress: object) -> list[list[float]]:
            for trial in trials.values():
                asked.extend(trial())
            return [[0.25, 1.0]] * len(trials)

    class Recorded:
        calibration = Recorder()

    units = units_of(made)
    for bits, place in ((2, 0), (3, 1), (4, 2), (8, 2)):
        asked.clear()
        recorded: Any = Recorded()
        found = Linearity(bits=bits).scores(replace(made, network=recorded), units)
        assert len(asked) == 2 * len(units)
        for number, unit in enumerate(units):
            own = made.targets[unit.name].load()
            error = weights_of(made, unit.options[place])[unit.name] - own
            np.testing.assert_allclose(asked[2 * number][unit.name], own + 0.5 * error, rtol=1e-6)
            np.testing.assert_allclose(asked[2 * number + 1][unit.name], own + error, rtol=1e-5, atol=1e-7)
            assert found.raw[unit.name][place] == pytest.approx(1.0)


def test_the_line_goes_through_the_origin() -> None:
    assert fit_slope(np.array([1.0, 2.0]), np.array([3.0, 6.0])) == (3.0, 1.0)
    slope, explained = fit_slope(np.array([1.0, 2.0]), np.array([3.0, 4.0]))
    assert slope == pytest.approx(11 / 5) and explained == pytest.approx(1 - (0.8**2 + 0.4**2) / 25)
    assert fit_slope(np.array([1.0, 2.0]), np.array([-1.0, -2.0]))[0] == 0.0
    assert fit_slope(np.zeros(2), np.array([1.0, 2.0])) == (0.0, 1.0)
    assert fit_slope(np.array([1.0, 2.0]), np.zeros(2)) == (0.0, 1.0)
    assert fit_slope(np.array([1.0, 2.0]), np.array([1.0, math.inf])) == (math.inf, 0.0)
    assert fit_slope(np.array([1.0, 2.0]), np.array([math.nan, 1.0])) == (math.inf, 0.0)


def test_losses_that_are_not_in_proportion_are_told() -> None:
    made = small.problem("dense")

    class Steep:
        def losses(self, trials: Mapping[tuple[str, ...], Any], progress: object) -> list[list[float]]:
            return [[1.0, 0.0], [0.25, 1.0]]

    class Network:
        calibration = Steep()

    network: Any = Network()
    first = next(iter(made.targets))
    note = f"the loss of 1 of 2 units does not grow in proportion to t^2 (R^2 below 0.9), {first} for one"
    assert Linearity().scores(replace(made, network=network), units_of(made)).notes == (note,)


def test_it_allocates() -> None:
    made = replace(small.problem("conv", (2, 3, 4, 8)), budget=Budget(avg_bits=4))
    found = METHOD().allocate(made)
    sizes = {name: target.shape[0] * target.shape[1] for name, target in made.targets.items()}
    assert set(found) == set(sizes)
    assert sum(found[name].bits * size for name, size in sizes.items()) <= 4 * sum(sizes.values())
    assert found.predicted is not None and found.predicted > 0  # type: ignore[attr-defined]


def test_without_data_there_is_nothing_to_fit() -> None:
    made = replace(small.problem("dense"), network=None)
    with pytest.raises(InputError, match="the allocator linearity needs calibration data: give --calib"):
        Linearity().allocate(made)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"bits": 0}, "linearity.bits must be 1 to 8, got 0"),
        ({"bits": 9}, "linearity.bits must be 1 to 8, got 9"),
        ({"thetas": ()}, r"linearity.thetas must be numbers above 0, at least one, got \[\]"),
        ({"thetas": (0.5, 0.0)}, r"linearity.thetas must be numbers above 0, at least one, got \[0.5, 0.0\]"),
        ({"thetas": (math.inf,)}, r"linearity.thetas must be numbers above 0, at least one, got \[inf\]"),
        ({"thetas": (math.nan,)}, r"linearity.thetas must be numbers above 0, at least one, got \[nan\]"),
    ],
)
def test_wrong_settings(settings: Mapping[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Linearity(**settings)
