"""`auto` is a method like any other: settings of the methods that it uses reach it, and plans name it."""

from __future__ import annotations

import numpy as np
import pytest

import quantkit
from quantkit import methods
from quantkit.errors import InputError
from quantkit.options import make_options
from quantkit.pipeline import method_settings
from quantkit.quantizers.auto import Auto
from quantkit.quantizers.gptq import GPTQ
from tests.helpers import models


def made(settings: dict[str, object], name: str = "auto") -> object:
    return methods.make("quantizers", name, method_settings(make_options({"settings": settings}), name))


def test_settings_of_its_methods_reach_it() -> None:
    assert made({}) == Auto()
    assert made({"gptq.damp": "0.2", "gptq.rounds": 2, "mse.steps": "40"}) == Auto(damp=0.2, rounds=2, steps=40)
    assert made({"auto.damp": "0.3", "gptq.damp": "0.2", "mse.norm": 2.5}) == Auto(damp=0.3, norm=2.5)
    assert made({"gptq.damp": "0.2", "auto.damp": 0.3, "mse.steps": 5}, "gptq") == GPTQ(damp=0.2)
    with pytest.raises(InputError, match=r"'auto.damp' must be a number, got 'much'"):
        made({"gptq.damp": "much"})


def test_it_is_the_default_and_the_plan_says_so() -> None:
    data = models.tokens()
    default = quantkit.compress(models.block(), calibration=data, activations="none", bits=(3,))
    assert default.plan.settings["quantizer"] == "auto"
    again = quantkit.apply(models.block(), default.plan, calibration=data)
    assert again.plan.settings["quantizer"] == "auto"
    for one, other in zip(
        default.model.graph.initializers.values(), again.model.graph.initializers.values(), strict=True
    ):
        np.testing.assert_array_equal(one.const_value.numpy(), other.const_value.numpy())  # type: ignore[union-attr]
