"""Candidates that differ from the plain one: some layers in float, other schemes of ranges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantkit import candidate
from quantkit.budget import Budget
from quantkit.candidate import Context, Recipe, build
from quantkit.errors import InputError
from quantkit.graph.load import load_model
from quantkit.options import make_options
from quantkit.pipeline import apply, compress, prepare
from quantkit.plan import plan_from_json, plan_to_json
from quantkit.report.progress import SilentProgress
from quantkit.runtime.ort import make_session
from quantkit.types import Plan, QuantSpec
from tests.helpers import models

POOLED = """g (float[N,3,8,8] x, float[32,3,3,3] w1, float[32,32,3,3] w2, float[32,32,1,1] w3, float[32,10] w4)
            => (float[N,10] y) {
    c1 = Conv<pads=[1,1,1,1]>(x, w1)
    r1 = Relu(c1)
    p1 = MaxPool<kernel_shape=[2,2],strides=[2,2]>(r1)
    c2 = Conv<pads=[1,1,1,1]>(p1, w2)
    r2 = Relu(c2)
    c3 = Conv(r2, w3)
    s = Add(c3, p1)
    g = GlobalAveragePool(s)
    f = Flatten<axis=1>(g)
    y = MatMul(f, w4)
}"""
SHAPES = {"w1": (32, 3, 3, 3), "w2": (32, 32, 3, 3), "w3": (32, 32, 1, 1), "w4": (32, 10)}


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.quick(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))


def pooled() -> Any:
    return models.build(POOLED, {name: models.random(*shape) for name, shape in SHAPES.items()})


def context(**settings: Any) -> Context:
    options = make_options({"activations": "8", "quantizer": "rtn", **settings})
    run = prepare(pooled(), models.images(40), None, options, frozenset(), SilentProgress())
    return run.context(run.original)


def loss(made: Context, recipe: Recipe, names: list[str]) -> float:
    """Relative error of the outputs."""
    candidate = build(made, dict.fromkeys(names, QuantSpec(8)), recipe, name="candidate")
    held_out = made.held_out
    assert held_out is not None
    session = make_session(candidate.emitted.model)
    got = np.concatenate([session.run(feed)["y"] for feed in held_out.feeds])
    return float(np.linalg.norm(got - held_out.outputs["y"]) / np.linalg.norm(held_out.outputs["y"]))


def test_integers_may_begin_behind_any_layer() -> None:
    """Ranges are known wherever a region begins, also behind a pooling that only moves what is float now."""
    made = context()
    names = list(made.targets)
    assert len(names) == 4
    for kept in (names[1:], names[:1], names[2:], [names[1]], [names[0], names[2]]):
        assert loss(made, Recipe("minmax"), kept) < 0.05


@pytest.mark.parametrize("scheme", ["symmetric", "unsigned", "power"])
@pytest.mark.parametrize("calibrator", ["minmax", "entropy"])
def test_every_scheme_is_close_and_none_lets_negative_values_through(scheme: str, calibrator: str) -> None:
    made = context()
    plain = loss(made, Recipe(calibrator), list(made.targets))
    assert loss(made, Recipe(calibrator, scheme=scheme), list(made.targets)) < 4 * plain + 0.02


def test_a_plan_remembers_its_scheme_and_hold_out() -> None:
    made = compress(pooled(), calibration=models.images(40), budget=Budget(avg_bits=8.0), holdout=50)
    assert made.plan.settings["scheme"] == "asymmetric" and made.plan.settings["holdout"] == 50
    assert made.report.fidelity.samples == 20
    bare = Plan(made.plan.layers, {}, {**made.plan.settings, "scheme": "power", "calibrator": "minmax"})
    again = apply(pooled(), plan_from_json(plan_to_json(bare)), calibration=models.images(40))
    assert again.report.fidelity.samples == 20
    assert all(float(np.log2(act.scale)).is_integer() for act in again.plan.activations.values())
    wrong = Plan(made.plan.layers, {}, {**made.plan.settings, "scheme": "odd"})
    message = "plan: settings: scheme must be one of asymmetric, symmetric, unsigned, power, got 'odd'"
    with pytest.raises(InputError, match=message):
        apply(pooled(), wrong, calibration=models.images(40))


def test_content_is_the_structure_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit of one file as well: the same weights behind another operator are another model."""
    monkeypatch.setattr("quantkit.candidate.PROTOBUF_LIMIT", 100)
    weight = models.random(64, 64)
    texts = (models.MATMUL, models.MATMUL.replace("y = MatMul(x, w)", "z = Relu(x) y = MatMul(z, w)"))
    loaded = [load_model(models.build(text, {"w": weight})).model for text in texts]
    first, other = (candidate._digest(model) for model in loaded)
    assert first[0] != other[0] and first[1] == other[1] == weight.nbytes
    assert candidate._digest(loaded[0]) == first
