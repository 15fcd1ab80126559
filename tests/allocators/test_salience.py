"""Relative output errors against products written out in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from quantkit.allocators._table import units_of
from quantkit.allocators.salience import METHOD, Salience, relative_error
from quantkit.budget import Budget
from quantkit.graph.load import load_model
from quantkit.graph.targets import find_targets
from quantkit.runtime.probe import Probe
from quantkit.types import AllocationProblem, Array, LayerStats, Target
from tests.allocators import small
from tests.helpers.models import build, random


def rows_of(target: Target, seed: int = 0) -> Array:
    """[groups, T, K] inputs of very different size."""
    rng = np.random.default_rng([seed, 9])
    rows = rng.standard_normal((target.groups, 40, target.shape[1]))
    return np.asarray(rows * np.geomspace(0.01, 10, target.shape[1]))


def with_grams(made: AllocationProblem) -> tuple[AllocationProblem, dict[str, Array]]:
    rows = {name: rows_of(target, place) for place, (name, target) in enumerate(made.targets.items())}
    stats = {
        name: LayerStats(40, -1.0, 1.0, gram=item.transpose(0, 2, 1) @ item / 40, data_shapes={})
        for name, item in rows.items()
    }
    return replace(made, stats=stats), rows


def expected(made: AllocationProblem, rows: Mapping[str, Array] | None) -> dict[str, list[float]]:
    found = {}
    for unit in units_of(made):
        found[unit.name] = [0.0] * len(unit.options)
        for place, option in enumerate(unit.options):
            for name, spec in option.items():
                target = made.targets[name]
                own = target.load().astype(np.float64)
                error = made.quantize(target, spec).dequantize().astype(np.float64) - own
                if rows is None:
                    found[unit.name][place] += np.square(error).sum() / np.square(own).sum()
                    continue
                parts = [item.reshape(target.groups, -1, target.shape[1]).transpose(0, 2, 1) for item in (error, own)]
                wrong, right = (np.square(rows[name] @ part).sum() for part in parts)
                found[unit.name][place] += wrong / right
    return found


@pytest.mark.parametrize("name", ["dense", "conv", "mixed"])
def test_the_error_of_the_output_relative_to_the_output(name: str) -> None:
    made, rows = with_grams(small.problem(name))
    found = METHOD().scores(made, units_of(made))  # type: ignore[attr-defined]
    assert not found.nats and found.quantity == "relative squared output error"
    wanted = expected(made, rows)
    assert list(found.raw) == list(wanted)
    for unit, row in wanted.items():
        assert found.raw[unit] == pytest.approx(row, rel=1e-4)


@pytest.mark.parametrize("name", ["dense", "conv", "recurrent", "tied"])
def test_without_data_it_is_the_error_of_the_weight(name: str) -> None:
    made = small.problem(name)
    found = Salience().scores(made, units_of(made))
    for unit, row in expected(made, None).items():
        assert found.raw[unit] == pytest.approx(row, rel=1e-4)


def test_large_inputs_make_errors_salient() -> None:
    """The same weight error where inputs are large, or small."""
    made = small.problem("values")
    (name,) = made.targets
    target, spec = made.targets[name], made.candidates[name][0]
    error = np.abs(made.quantize(target, spec).dequantize() - target.load()).sum(axis=0)
    loud = np.where(error > np.median(error), 10.0, 0.1)
    figures = [
        relative_error(
            replace(made, stats={name: LayerStats(1, 0, 1, gram=np.diag(np.square(size))[None])}), name, spec
        )
        for size in (loud, 1 / loud)
    ]
    assert figures[0] > 1.2 * figures[1]


def test_a_layer_without_output_has_no_relative_error() -> None:
    """Calibration saw only an input that the weight ignores: what is left is the error itself."""
    weight = random(16, 24)
    weight[0] = 0
    text = "g (float[N,16] x, float[16,24] w) => (float[N,24] y) { y = MatMul(x, w) }"
    model = load_model(build(text, {"w": weight})).model
    made = small.problem("values", made=Probe(model, find_targets(model)[0], []))
    (name,) = made.targets
    gram = np.zeros((1, 16, 16))
    gram[0, 0, 0] = 1.0
    spec = made.candidates[name][0]
    found = relative_error(replace(made, stats={name: LayerStats(1, 0, 1, gram=gram)}), name, spec)
    error = made.quantize(made.targets[name], spec).dequantize()[:, 0]
    assert found == pytest.approx(np.square(error).sum(), abs=1e-12)


def test_it_allocates() -> None:
    made, _ = with_grams(small.problem("conv", (2, 3, 4, 8)))
    found = Salience().allocate(replace(made, budget=Budget(avg_bits=6)))
    assert set(found) == set(made.targets) and found.predicted is None and len(found.front) > 1
    sizes = {name: target.shape[0] * target.shape[1] for name, target in made.targets.items()}
    assert sum(found[name].bits * size for name, size in sizes.items()) <= 6 * sum(sizes.values())
    assert len({spec.bits for spec in found.values()}) > 1
