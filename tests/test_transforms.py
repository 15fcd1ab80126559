"""Transforms from end to end: what ships is verified against the original model, and a plan repeats it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import quantkit
from quantkit import LayerPlan, Plan, QuantSpec
from quantkit.budget import Budget
from quantkit.cli import main
from quantkit.errors import InputError
from quantkit.methods import transform_names
from quantkit.options import Options
from quantkit.report.html import report_html
from quantkit.report.types import ScaleRow
from quantkit.rescaling import choices, search_bits
from quantkit.types import Array
from tests.helpers import models

NET = """g (float[B,S,64] x, float[64] gain, float[64] shift, float[64,96] w1, float[96,64] w2, float[64,64] w3)
    => (float[B,S,64] y) {
    n = LayerNormalization<axis=-1>(x, gain, shift)
    h = MatMul(n, w1)
    r = Relu(h)
    o = MatMul(r, w2)
    t = Tanh(o)
    y = MatMul(t, w3)
}"""


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    models.quick(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))


def net() -> onnx.ModelProto:
    """Five channels behind the norm are far larger than the others, and weigh as little."""
    gain = np.ones(64, np.float32)
    gain[::13] = 40
    weights = {name: models.random(*shape) for name, shape in (("w1", (64, 96)), ("w2", (96, 64)), ("w3", (64, 64)))}
    weights["w1"] = weights["w1"] / gain[:, None] ** 0.7
    model: onnx.ModelProto = models.build(NET, {**weights, "gain": gain, "shift": models.random(64, 1)[:, 0]})
    return model


def samples() -> dict[str, Array]:
    return {"x": np.random.default_rng(2).standard_normal((24, 5, 64)).astype(np.float32)}


def sqnr(result: quantkit.Result) -> float:
    assert result.report.fidelity is not None
    return result.report.fidelity.sqnr


def saved(result: quantkit.Result, path: Path) -> bytes:
    result.save(path)
    return path.read_bytes()


def scaled(result: quantkit.Result) -> list[ScaleRow]:
    return [row for row in result.report.scales if row.spread is not None]


CASES = [
    ("awq", {"activations": "none", "bits": (3,)}, 2.0),
    ("smoothquant", {"activations": "8", "bits": (8,)}, 3.0),
    ("awq,smoothquant", {"activations": "none", "bits": (4,)}, None),
    ("awq", {"activations": "none", "bits": (3,), "settings": {"awq.insert": "true"}}, 2.0),
]


@pytest.mark.parametrize(("transform", "options", "gain"), CASES)
def test_transformers_are_verified_and_repeated(
    transform: str, options: Mapping[str, Any], gain: float | None, tmp_path: Path
) -> None:
    model, data = net(), samples()
    before = model.SerializeToString()
    plain = quantkit.compress(model, calibration=data, **options)
    made = quantkit.compress(model, calibration=data, transform=transform, **options)
    assert model.SerializeToString() == before
    assert made.report.fidelity is not None and made.report.fidelity.parity > 30
    assert {row.transform for row in scaled(made)} == set(transform.split(","))
    if gain is not None:
        assert sqnr(made) > sqnr(plain) + gain
    assert made.plan.settings["transforms"] == transform.split(",")
    assert made.model.metadata_props["quantkit.model"] == plain.model.metadata_props["quantkit.model"]
    quantkit.save_plan(made.plan, tmp_path / "plan.json")
    again = quantkit.apply(model, quantkit.load_plan(tmp_path / "plan.json"), calibration=data)
    assert again.plan == made.plan and again.report.scales == made.report.scales
    assert saved(again, tmp_path / "b.onnx") == saved(made, tmp_path / "a.onnx") != saved(plain, tmp_path / "c.onnx")


@pytest.mark.parametrize("options", [{}, {"activations": "none", "bits": (4,)}, {"bits": (3,)}])
def test_convolutions_with_cle(options: Mapping[str, Any], tmp_path: Path) -> None:
    data = models.images()
    made = quantkit.compress(models.cnn(), calibration=data, transform="cle", **options)
    assert [row.layers for row in scaled(made)] == [("Conv/c2",), ("MatMul/y",)]
    assert made.report.fidelity is not None and made.report.fidelity.parity > 30
    again = quantkit.apply(models.cnn(), made.plan, calibration=data)
    assert saved(again, tmp_path / "b.onnx") == saved(made, tmp_path / "a.onnx")


def test_cle_without_data(tmp_path: Path) -> None:
    made = quantkit.compress(models.cnn(), transform="cle", bits=(4,))
    assert len(scaled(made)) == 2
    again = quantkit.apply(models.cnn(), made.plan)
    assert saved(again, tmp_path / "b.onnx") == saved(made, tmp_path / "a.onnx")


@pytest.mark.parametrize("name", ["awq", "smoothquant"])
def test_data_is_needed(name: str) -> None:
    with pytest.raises(InputError, match=f"the transform {name} needs calibration data; give --calib"):
        quantkit.compress(net(), transform=name)


def test_every_layer_is_in_the_report_with_its_reason() -> None:
    made = quantkit.compress(net(), calibration=samples(), transform="awq", activations="none", bits=(3,))
    rows = {row.layers: row for row in made.report.scales}
    assert rows[("MatMul/y",)].reason == "Tanh 'Tanh/t' lets no scale through"
    first = rows[("MatMul/h",)]
    assert first.spread is not None and first.spread > 2 and first.source == "LayerNormalization/n"
    page = report_html(made.report)
    assert "Rescaled layers" in page and "lets no scale through" in page
    assert made.report.to_dict()["scales"][0]["transform"] == "awq"


def test_what_a_transform_leaves_is_said() -> None:
    made = quantkit.compress(
        net(), calibration=samples(), transform="awq", activations="none", bits=(3,), settings={"awq.gain": "0.99"}
    )
    assert {row.reason for row in made.report.scales if row.layers == ("MatMul/h",)} == {
        "the transform leaves it as it is"
    }
    plain = quantkit.compress(net(), calibration=samples(), activations="none", bits=(3,))
    assert sqnr(made) == sqnr(plain)


def test_an_inserted_mul_is_said() -> None:
    """Without `layers`, smoothquant scales what normalisations make and nothing else."""
    settings = {"smoothquant.insert": "true"}
    options: dict[str, Any] = {"calibration": samples(), "transform": "smoothquant", "activations": "8"}
    some = quantkit.compress(net(), settings=settings, **options)
    assert [row.layers for row in scaled(some)] == [("MatMul/h",)]
    made = quantkit.compress(net(), settings={**settings, "smoothquant.layers": "true"}, **options)
    rows = {row.layers: row for row in scaled(made)}
    assert rows[("MatMul/y",)].source == "t" and rows[("MatMul/y",)].reason == "a Mul is inserted"
    assert (
        sum(node.op_type == "Mul" and str(node.outputs[0].name).startswith("t.Mul") for node in made.model.graph) == 1
    )


def test_a_mul_behind_a_norm_that_a_residual_reads() -> None:
    """BERT adds what its normalisations make: nothing can be folded there, an inserted Mul can."""
    options: dict[str, Any] = {"calibration": models.tokens(), "transform": "smoothquant", "activations": "8"}
    plain = quantkit.compress(models.block(), **options)
    assert scaled(plain) == []
    made = quantkit.compress(models.block(), settings={"smoothquant.insert": "true"}, **options)
    assert [(row.source, row.layers, row.reason) for row in scaled(made)] == [("n", ("MatMul/h",), "a Mul is inserted")]


def test_ignored_layers_stay_float_and_are_scaled_along() -> None:
    options: dict[str, Any] = {"activations": "none", "bits": (3,), "ignore": ("MatMul/o",)}
    made = quantkit.compress(models.cnn(), calibration=models.images(), transform="cle", bits=(4,), ignore=("Conv/c2",))
    assert [row.name for row in made.report.layers] == ["Conv/c1", "MatMul/y"]
    assert made.report.fidelity is not None and made.report.fidelity.parity > 30
    other = quantkit.compress(net(), calibration=samples(), transform="awq", **options)
    assert [row.layers for row in scaled(other)] == [("MatMul/h",)]


def test_auto_keeps_what_measurably_helps(tmp_path: Path) -> None:
    options: dict[str, Any] = {"calibration": samples(), "activations": "none", "bits": (3,)}
    plain = quantkit.compress(net(), **options)
    made = quantkit.compress(net(), transform="auto", **options)
    assert sqnr(made) > sqnr(plain) + 0.3
    (name,) = made.plan.settings["transforms"]
    (kept,) = [row for row in made.report.contenders if row.chosen]
    assert kept.name.endswith(f", {name}") and kept.sqnr == pytest.approx(sqnr(made))
    assert kept.sqnr == max(row.sqnr for row in made.report.contenders)
    again = quantkit.apply(net(), made.plan, calibration=samples())
    assert saved(again, tmp_path / "b.onnx") == saved(made, tmp_path / "a.onnx")


def test_auto_keeps_nothing_that_gains_too_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"calibration": samples(), "activations": "none", "bits": (3,)}
    monkeypatch.setattr("quantkit.pipeline.CORRECTION_GAIN_DB", 100.0)
    made = quantkit.compress(net(), transform="auto", **options)
    plain = quantkit.compress(net(), **options)
    assert made.plan == plain.plan and made.report.scales == ()
    assert saved(made, tmp_path / "a.onnx") == saved(plain, tmp_path / "b.onnx")
    (kept,) = [row for row in made.report.contenders if row.chosen]
    assert kept.sqnr == pytest.approx(sqnr(plain)) and "awq" not in kept.name
    assert any(row.name.endswith(", awq") for row in made.report.contenders)


def test_auto_skips_transforms_that_change_nothing() -> None:
    data = {"x": np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)}
    made = quantkit.compress(models.matmul(), calibration=data, transform="auto")
    plain = quantkit.compress(models.matmul(), calibration=data)
    assert [row.name for row in made.report.contenders] == [row.name for row in plain.report.contenders]


def test_auto_without_data_does_nothing(tmp_path: Path) -> None:
    made = quantkit.compress(models.cnn(), transform="auto")
    assert saved(made, tmp_path / "a.onnx") == saved(quantkit.compress(models.cnn()), tmp_path / "b.onnx")


def test_the_quantizer_awq_folds_first() -> None:
    options: dict[str, Any] = {"activations": "none", "bits": (3,)}
    folded = quantkit.compress(net(), calibration=samples(), quantizer="awq", **options)
    assert folded.plan.settings["transforms"] == ["awq"]
    divided = quantkit.compress(net(), calibration=samples(), quantizer="awq", transform="none", **options)
    assert "transforms" not in divided.plan.settings
    plain = quantkit.compress(net(), calibration=samples(), quantizer="mse", **options)
    assert sqnr(folded) > sqnr(plain) + 2 and sqnr(divided) > sqnr(plain) + 2
    assert "transforms" not in quantkit.compress(net(), quantizer="awq", bits=(3,)).plan.settings


def test_the_packed_kernel_gets_a_div_and_the_report_says_so() -> None:
    rules = {"op:MatMul": LayerPlan(QuantSpec(3, 32), "matmulnbits", "")}
    plan = Plan(rules, {}, {"quantizer": "awq"})
    made = quantkit.apply(net(), plan, calibration=samples())
    (note,) = [note for note in made.report.notes if "Div" in note]
    assert note.startswith("a Div is inserted in front of ") and "MatMul/h" in note
    divisions = sum(node.op_type == "Div" for node in made.model.graph)
    assert divisions == note.count("MatMul/") > 0
    # Folded into the norm first, h needs none.
    folded = quantkit.apply(
        net(), replace(plan, settings={"quantizer": "awq", "transforms": ["awq"]}), calibration=samples()
    )
    assert not any("MatMul/h" in note for note in folded.report.notes if "Div" in note)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nope", "there is no transform 'nope'; .*known transforms: awq, cle, smoothquant"),
        ("cle,cle", "transform 'cle' is given twice in 'cle,cle'"),
        ("auto,cle", "transform 'auto' cannot go with others, got 'auto,cle'"),
        ("cle,none", "transform 'none' cannot go with others, got 'cle,none'"),
        ("", "there is no transform ''"),
    ],
)
def test_bad_names(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=message):
        quantkit.compress(models.cnn(), transform=text)
    onnx.save(models.cnn(), tmp_path / "m.onnx")
    assert main(["compress", str(tmp_path / "m.onnx"), "--transform", text]) == 2
    assert "transform" in capsys.readouterr().err
    assert not (tmp_path / "m.q.onnx").exists()


def test_options_of_the_wrong_kind() -> None:
    with pytest.raises(InputError, match="transform must be none, auto or names such as cle,awq, got 3"):
        quantkit.compress(models.cnn(), transform=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"transforms": "cle"}, "plan: settings: transforms must be a list of names, got 'cle'"),
        ({"transforms": [1]}, r"plan: settings: transforms must be a list of names, got \[1\]"),
        ({"transforms": ["nope"]}, "there is no transform 'nope'"),
        ({"transform_bits": 9}, "plan: settings: transform_bits must be a whole number from 1 to 8, got 9"),
        ({"transform_bits": True}, "plan: settings: transform_bits must be a whole number from 1 to 8, got True"),
    ],
)
def test_plans_of_the_wrong_kind(settings: dict[str, Any], message: str) -> None:
    made = quantkit.compress(models.cnn())
    with pytest.raises(InputError, match=message):
        quantkit.apply(models.cnn(), replace(made.plan, settings={**made.plan.settings, **settings}))


def test_names_and_choices() -> None:
    assert transform_names("cle, awq") == ("cle", "awq")
    assert transform_names(None) == transform_names("none") == transform_names("auto") == ()
    assert choices(Options(), has_data=True) == ((),)
    assert choices(Options(transform="awq,cle"), has_data=False) == (("awq", "cle"),)
    assert choices(Options(transform="auto"), has_data=True) == ((), ("awq",), ("cle",), ("smoothquant",))
    assert choices(Options(transform="auto"), has_data=False) == ((),)
    assert choices(Options(quantizer="awq"), has_data=True) == (("awq",),)
    assert choices(Options(quantizer="awq"), has_data=False) == ((),)
    assert choices(Options(quantizer="awq", transform="none"), has_data=True) == ((),)


@pytest.mark.parametrize(
    ("budget", "bits", "wanted"),
    [
        (Budget(), None, 8),
        (Budget(), (4, 8), 4),
        (Budget(avg_bits=4.25), None, 4),
        (Budget(avg_bits=4.25), (2, 3, 8), 3),
        (Budget(avg_bits=1.5), None, 2),
        (Budget(avg_bits=3.0), (4, 8), 4),
        (Budget(avg_bits=30.0), None, 8),
        (Budget(max_size=Fraction(1, 8)), None, 4),
        (Budget(max_size=Fraction(1, 4)), (3, 5), 5),
    ],
)
def test_the_width_to_prepare_for(budget: Budget, bits: tuple[int, ...] | None, wanted: int) -> None:
    assert search_bits(budget, Options(bits=bits), 1_000_000) == wanted
