"""`--inputs` and `--augment` through the whole pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

import quantkit
from quantkit.budget import Budget
from quantkit.errors import InputError
from quantkit.pipeline import compress
from tests.helpers import models


def test_layers_on_quantized_inputs_come_closer_and_a_plan_repeats_them() -> None:
    data, budget = models.tokens(), quantkit.Budget(avg_bits=3)
    plain = quantkit.compress(models.block(), calibration=data, budget=budget, inputs="float")
    made = quantkit.compress(
        models.block(), calibration=data, budget=budget, inputs="quantized", augment=2, allocator="uniform"
    )
    assert plain.plan.settings["inputs"] == "float"
    assert (made.plan.settings["inputs"], made.plan.settings["augment"]) == ("quantized", 2)
    chosen = [row for row in made.report.contenders if row.chosen]
    assert [row.name for row in chosen] == ["uniform 3 bits, on quantized inputs"]
    again = quantkit.apply(models.block(), made.plan, calibration=data)
    first, second = (ir.to_proto(result.model).SerializeToString(deterministic=True) for result in (made, again))
    assert first == second


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"inputs": "quantized"}, "inputs quantized needs calibration data"),
        ({"inputs": "exact"}, "inputs must be one of auto, float, quantized, got 'exact'"),
        ({"augment": -1}, "augment must be at least 0 and at most 100, got -1"),
        ({"augment": 1.5}, "augment must be a whole number, got 1.5"),
    ],
)
def test_wrong_options(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        quantkit.compress(models.matmul(), **options)


def test_a_plan_says_which_inputs() -> None:
    made = quantkit.compress(models.matmul())
    wrong = quantkit.Plan(made.plan.layers, made.plan.activations, {"inputs": "auto"})
    with pytest.raises(InputError, match="plan: settings: inputs must be one of float, quantized, got 'auto'"):
        quantkit.apply(models.matmul(), wrong)


def test_new_biases_do_not_break_the_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Layers quantized in sequence gain corrected biases: at the size of the plan without them, bits make room."""
    models.quick(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))
    settings: dict[str, Any] = {"calibration": models.images(40), "activations": "none", "allocator": "uniform"}
    plain = compress(models.cnn(), budget=Budget(avg_bits=4.0), inputs="float", **settings)
    sequential = compress(models.cnn(), budget=Budget(avg_bits=4.0), inputs="quantized", **settings)
    assert sequential.report.size_after > plain.report.size_after
    limit = plain.report.size_after
    for inputs in ("auto", "quantized"):
        found = compress(models.cnn(), budget=Budget(max_size=limit), inputs=inputs, **settings)
        assert found.report.size_after <= limit and found.report.budget_met
