"""The space of configurations: what a run leaves open, and which points are the same model."""

from __future__ import annotations

from itertools import product

import numpy as np

from quantkit.allocators._table import Unit
from quantkit.candidate import Recipe
from quantkit.options import Options
from quantkit.tuning.recipes import (
    Possible,
    columns,
    features,
    label,
    make_space,
    options_of,
    recipe_dimensions,
    recipe_of,
)
from quantkit.tuning.space import Value
from quantkit.tuning.widths import Widths
from quantkit.types import QuantSpec

UNITS = tuple(Unit(name, (name,), tuple({name: QuantSpec(bits)} for bits in (2, 4, 8))) for name in ("u0", "u1"))
WIDTHS = Widths(UNITS, {"uniform": (1, 1), "auto": (0, 2)}, ((0,), (1,)))
EVERYTHING = Possible(("none", "cle"), static=True, biases=True, samples=100)
SPACE = make_space(recipe_dimensions(Options(), EVERYTHING), WIDTHS)
PLAIN: dict[str, Value] = {
    "samples": "all",
    "granularity": "channel",
    "ends": "planned",
    "transform": "none",
    "quantizer": "auto",
    "inputs": "float",
    "bias": False,
    "activations": "auto",
    "calibrator": "minmax",
    "scheme": "asymmetric",
    "group size": "default",
    "plan": "uniform",
    "step 1": 0,
    "step 2": 0,
}


def values(options: Options, possible: Possible) -> dict[str, tuple[Value, ...]]:
    return {dimension.name: dimension.values for dimension in recipe_dimensions(options, possible)}


def test_what_is_fixed_or_makes_no_difference_has_one_value() -> None:
    found = values(Options(), EVERYTHING)
    assert all(len(found[name]) > 1 for name in found)
    nothing = values(Options(), Possible(("none",), static=False, biases=False))
    assert [name for name in nothing if len(nothing[name]) > 1] == [
        "quantizer",
        "granularity",
        "inputs",
        "activations",
        "group size",
        "ends",
    ]
    fixed = values(
        Options(activations="8", calibrator="mse", quantizer="gptq", inputs="float", group_size=16, transform="awq"),
        EVERYTHING,
    )
    assert {name: value for name, value in fixed.items() if len(value) == 1} == {
        "transform": ("awq",),
        "quantizer": ("gptq",),
        "granularity": ("channel",),
        "inputs": ("float",),
        "activations": ("8",),
        "calibrator": ("mse",),
        "group size": (16,),
    }


def test_settings_that_nothing_reads_make_no_new_point() -> None:
    same = [
        {**PLAIN, "activations": "none", "calibrator": "mse", "scheme": "symmetric"},
        {**PLAIN, "activations": "none", "calibrator": "entropy"},
        {**PLAIN, "activations": "none"},
    ]
    assert len({SPACE.point(item) for item in same}) == 1
    assert SPACE.point({**PLAIN, "inputs": "quantized", "bias": True}) == SPACE.point({**PLAIN, "inputs": "quantized"})
    assert SPACE.point({**PLAIN, "granularity": "tensor"}) == SPACE.point(PLAIN)  # only rtn knows it
    whole = {**PLAIN, "quantizer": "rtn", "granularity": "tensor"}
    assert SPACE.point(whole) != SPACE.point({**PLAIN, "quantizer": "rtn"})
    assert options_of(whole, Options()).settings == {"rtn.per_tensor": True}
    assert SPACE.point({**PLAIN, "bias": True}) != SPACE.point(PLAIN)
    assert SPACE.point({**PLAIN, "calibrator": "mse"}) != SPACE.point(PLAIN)


def test_the_same_bits_are_one_point_whatever_they_are_called() -> None:
    stepped = SPACE.point({**PLAIN, "step 1": -1, "step 2": 1})
    assert stepped == SPACE.point({**PLAIN, "plan": "auto"})
    assert SPACE.configuration(stepped)["plan"] == "auto"  # without steps
    assert SPACE.point({**PLAIN, "plan": "auto", "step 1": -1}) == stepped  # nothing narrower there
    drawn = SPACE.draw(np.random.default_rng(0), 3000)
    bits = {tuple(WIDTHS.choice(SPACE.configuration(point))) for point in drawn}
    assert bits == set(product(range(3), repeat=2))


def test_a_configuration_says_options_and_recipe() -> None:
    configuration = {**PLAIN, "quantizer": "mse", "group size": 64, "activations": "none", "bias": True}
    options = options_of(configuration, Options(seed=3))
    assert (options.quantizer, options.group_size, options.activations, options.seed) == ("mse", 64, "none", 3)
    assert options_of(PLAIN, Options(group_size=32)).group_size is None
    assert recipe_of(configuration) == Recipe("minmax", bias_correction=True)
    assert recipe_of({**PLAIN, "inputs": "quantized", "scheme": "symmetric"}) == Recipe(
        "minmax", sequential=True, scheme="symmetric"
    )


def test_every_known_value_has_a_column() -> None:
    found = features(PLAIN)
    assert len(found) == len(columns()) and found.sum() == 11
    assert dict(zip(columns(), found, strict=True))["calibrator=minmax"] == 1
    assert features({**PLAIN, "group size": 48}).sum() == 10  # a value of the user's own


def test_labels_say_what_differs() -> None:
    assert label(PLAIN) == "uniform, minmax"
    everything = {
        **PLAIN,
        "step 1": -1,
        "step 2": 1,
        "transform": "cle",
        "quantizer": "rtn",
        "scheme": "symmetric",
        "group size": 32,
        "bias": True,
        "activations": "none",
        "ends": "float",
        "samples": 32,
    }
    assert label(everything) == "uniform, -+, cle, rtn, symmetric, g32, bias, ends float, 32 samples, A float"
    assert label({**PLAIN, "inputs": "quantized"}) == "uniform, sequential, minmax"
