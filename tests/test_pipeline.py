"""compress and apply from Python: what goes in stays as it is, what comes out runs, and plans repeat it."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import quantkit
from quantkit import LayerPlan, Plan, QuantSpec
from quantkit.cli import main
from quantkit.errors import InputError
from tests.helpers import models

Feed = dict[str, Any]


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    models.quick(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))


def written(result: quantkit.Result, folder: Path, name: str = "out.onnx") -> bytes:
    result.save(folder / name)
    return (folder / name).read_bytes()


class Reader:
    """onnxruntime's CalibrationDataReader."""

    def __init__(self, feeds: list[Feed]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self._feeds, None)


def batches() -> Iterator[Feed]:
    data = models.images(16)["x"]
    yield from ({"x": data[place : place + 4]} for place in range(0, 16, 4))


@pytest.mark.parametrize("source", [models.images(16), list(batches()), batches, Reader(list(batches()))])
def test_data_in_every_form(source: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = quantkit.compress(models.cnn(), calibration=source, calibrator="minmax")
    assert result.report.fidelity is not None and result.report.fidelity.sqnr > 30
    session = ort.InferenceSession(written(result, tmp_path), providers=["CPUExecutionProvider"])
    assert session.run(None, models.images(3))[0].shape == (3, 10)
    assert capfd.readouterr() == ("", "")


def test_inputs_are_not_changed(tmp_path: Path) -> None:
    proto, data = models.cnn(), models.images()
    graph = ir.from_proto(proto)
    before, values = proto.SerializeToString(), data["x"].copy()
    ir_before = ir.to_proto(graph).SerializeToString()
    first = quantkit.compress(proto, calibration=data, calibrator="minmax")
    second = quantkit.compress(graph, calibration=data, calibrator="minmax")
    assert proto.SerializeToString() == before and ir.to_proto(graph).SerializeToString() == ir_before
    np.testing.assert_array_equal(data["x"], values)
    assert first.plan == second.plan
    once = written(first, tmp_path)
    assert written(first, tmp_path) == once  # saving does not change the result


def test_plan_and_report_travel() -> None:
    result = quantkit.compress(models.cnn(), calibration=models.images(), calibrator="minmax")
    for value in (result.plan, result.report):
        assert pickle.loads(pickle.dumps(value)) == value


@pytest.mark.parametrize(
    "settings",
    [
        {"activations": "none", "bits": (4,)},
        {"quantizer": "rtn", "bits": (4,), "seed": 5},
        {"settings": {"mse.steps": "3"}, "target": "portable"},
        {"calibrator": "percentile"},
    ],
)
@pytest.mark.parametrize("kind", ["cnn", "block"])
def test_a_plan_repeats_the_bytes(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model, data = (models.cnn(), models.images()) if kind == "cnn" else (models.block(), models.tokens())
    made = quantkit.compress(model, calibration=data, **settings)
    quantkit.save_plan(made.plan, tmp_path / "plan.json")
    again = quantkit.apply(model, quantkit.load_plan(tmp_path / "plan.json"), calibration=data)
    assert again.plan == made.plan
    assert written(again, tmp_path, "b.onnx") == written(made, tmp_path, "a.onnx")


def test_a_plan_without_data_repeats_the_bytes(tmp_path: Path) -> None:
    onnx.save(models.block(), tmp_path / "m.onnx")
    command = [str(tmp_path / "m.onnx"), "-q", "-o"]
    plan = str(tmp_path / "plan.json")
    assert main(["compress", *command, str(tmp_path / "a.onnx"), "--save-plan", plan, "--quantizer", "rtn"]) == 0
    assert main(["apply", str(tmp_path / "m.onnx"), plan, "-q", "-o", str(tmp_path / "b.onnx")]) == 0
    assert main(["compress", *command, str(tmp_path / "c.onnx"), "--plan", plan]) == 0
    first = (tmp_path / "a.onnx").read_bytes()
    assert (tmp_path / "b.onnx").read_bytes() == first and (tmp_path / "c.onnx").read_bytes() == first


def test_edits_of_a_plan_are_followed() -> None:
    data = models.tokens()
    made = quantkit.compress(models.block(), calibration=data, activations="none")
    layers = dict(made.plan.layers)
    floats, narrow = list(layers)[1:3]
    layers[floats] = LayerPlan(None, None, "by hand")
    layers[narrow] = LayerPlan(QuantSpec(3, 32), None, "by hand")
    edited = quantkit.apply(models.block(), replace(made.plan, layers=layers), calibration=data)
    rows = {row.name: row for row in edited.report.layers}
    assert rows[floats].bits is None and rows[floats].reason == "by hand"
    assert rows[narrow].bits == 3 and edited.plan.layers[narrow].form is not None
    assert edited.report.fidelity is not None and made.report.fidelity is not None
    assert edited.report.fidelity.sqnr < made.report.fidelity.sqnr - 1 and edited.report.fidelity.parity > 30


def test_what_the_caller_says_goes_before_the_plan() -> None:
    plan = Plan({"op:MatMul": LayerPlan(QuantSpec(4, 32), None, "")}, {}, {"quantizer": "rtn", "seed": 3})
    kept = quantkit.apply(models.matmul(), plan)
    plain = {"augment": 1, "holdout": 20, "calibration_size": 0}
    assert kept.plan.settings == {"quantizer": "rtn", "seed": 3, "target": "ort-cpu", **plain}
    other = quantkit.apply(models.matmul(), plan, quantizer="mse", seed=4, target="portable")
    assert other.plan.settings == {"quantizer": "mse", "seed": 4, "target": "portable", **plain}
    assert other.report.provenance["quantkit.seed"] == "4" and other.report.target == "portable"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"calibrator": "best"}, "calibrator must be one of minmax"),
        ({"seed": "one"}, "seed must be a whole number from 0, got 'one'"),
        ({"seed": True}, "seed must be a whole number"),
        ({"quantizer": 3}, "quantizer must be text, got 3"),
        ({"quantizer": "best"}, "there is no quantizer 'best'"),
        ({"target": "tpu"}, "target must be one of"),
        ({"mse.stepz": 1}, "unknown setting 'mse.stepz'"),
    ],
)
def test_settings_of_a_plan_are_checked(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        quantkit.apply(models.matmul(), Plan({}, {}, settings))


def test_provenance(tmp_path: Path) -> None:
    result = quantkit.compress(models.cnn(), calibration=models.images(), calibrator="minmax", seed=9)
    props = {item.key: item.value for item in onnx.load_from_string(written(result, tmp_path)).metadata_props}
    assert set(props) == {f"quantkit.{key}" for key in ("model", "calibration", "plan", "seed", "target", "versions")}
    assert props == result.report.provenance and props["quantkit.seed"] == "9"
    assert all(len(props[f"quantkit.{key}"]) == 64 for key in ("model", "calibration", "plan"))
    other = quantkit.compress(models.cnn(), seed=9).report.provenance
    assert other["quantkit.calibration"] == "none" and other["quantkit.model"] == props["quantkit.model"]
    assert other["quantkit.plan"] != props["quantkit.plan"]


def test_save_refuses_what_is_no_file(tmp_path: Path) -> None:
    result = quantkit.compress(models.matmul())
    with pytest.raises(InputError, match="is a folder; give a file name"):
        result.save(tmp_path)
    with pytest.raises(InputError, match="/dev/null is a device"):
        result.save("/dev/null")
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        result.save(tmp_path / "none" / "out.onnx")
    assert Path("/dev/null").is_char_device()


def test_large_models_keep_their_weights_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    external: dict[str, Any] = {"save_as_external_data": True, "location": "m.bin", "size_threshold": 16}
    onnx.save(models.cnn(), tmp_path / "m.onnx", **external)
    result = quantkit.compress(tmp_path / "m.onnx", ignore=("re:.*c1",))
    small = ort.InferenceSession(written(result, tmp_path), providers=["CPUExecutionProvider"])
    monkeypatch.setattr("quantkit.graph.emit.PROTOBUF_LIMIT", 1000)
    (tmp_path / "other").mkdir()
    result.save(tmp_path / "other" / "out.onnx")
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["out.onnx", "out.onnx.data"]
    large = ort.InferenceSession(str(tmp_path / "other" / "out.onnx"), providers=["CPUExecutionProvider"])
    for got, wanted in zip(large.run(None, models.images()), small.run(None, models.images()), strict=True):
        np.testing.assert_array_equal(got, wanted)


X = "float[N,64] x, float[64,64] w"
ODD = {
    "no inputs": "(float[64,64] w) => (float[4,64] y) { x = RandomNormal<shape=[4,64]>() y = MatMul(x, w) }",
    "strings": f"(string[N] s, {X}) => (float[N,64] y, string[N] t) {{ y = MatMul(x, w) t = Identity(s) }}",
    "indices": f"({X}) => (int64[N,1] y) {{ z = MatMul(x, w) y = ArgMax<axis=1>(z) }}",
    "sequence": f"({X}) => (seq(float[N,64]) y) {{ z = MatMul(x, w) y = SequenceConstruct(z, z) }}",
    "if": f"({X}, bool c) => (float[N,64] y) {{ z = MatMul(x, w) y = If (c) <then_branch = t () => (float[N,64] a) "
    "{ a = MatMul(z, w) }, else_branch = e () => (float[N,64] b) { b = Exp(z) }> }",
    "counts": f"({X}) => (int64[2,M] y) {{ a = MatMul(x, w) z = Relu(a) y = NonZero(z) }}",
    "fixed": f"({X.replace('N', '3')}) => (float[3,64] y) {{ y = MatMul(x, w) }}",
    "double": f"({X.replace('float[N', 'double[N')}) => (double[N,64] y) "
    "{ f = Cast<to=1>(x) z = MatMul(f, w) y = Cast<to=11>(z) }",
}


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("kind", ODD)
def test_odd_models(kind: str, random: bool, tmp_path: Path) -> None:
    model = models.matmul(f"g {ODD[kind]}")
    if random and kind in ("no inputs", "strings"):
        with pytest.raises(InputError, match=r"the model has no inputs|has the type tensor"):
            quantkit.compress(model, random_calibration=True)
        return
    result = quantkit.compress(model, random_calibration=random)
    session = ort.InferenceSession(written(result, tmp_path), providers=["CPUExecutionProvider"])
    assert [item.name for item in session.get_inputs()] == [item.name for item in model.graph.input]
    assert len(result.report.layers) == 1 and result.report.layers[0].bits == 8
    compared = "was not run and compared" not in " ".join(result.report.notes)
    assert compared == (kind not in ("no inputs", "strings"))


@pytest.mark.parametrize("opset", [7, 25])
def test_old_and_new_opsets(opset: int, tmp_path: Path) -> None:
    model = models.matmul(opset=opset, ir=4 if opset == 7 else 10)
    content = written(quantkit.compress(model), tmp_path)
    assert ort.InferenceSession(content, providers=["CPUExecutionProvider"]).get_inputs()[0].name == "x"


def test_recurrent_and_table_only(tmp_path: Path) -> None:
    recurrent = "g (float[S,B,32] x, float[1,256,32] w, float[1,256,64] r) => (float[S,1,B,64] y) "
    recurrent += "{ y, h, c = LSTM<hidden_size=64>(x, w, r) }"
    lstm = models.build(recurrent, {"w": models.random(1, 256, 32), "r": models.random(1, 256, 64)})
    table = models.build(
        "g (int64[B,S] ids, float[50,64] e) => (float[B,S,64] y) { y = Gather(e, ids) }", {"e": models.random(50, 64)}
    )
    for model, feed in ((lstm, {"x": models.random(5, 2, 32)}), (table, models.tokens(4))):
        result = quantkit.compress(model, calibration=[feed, feed])
        assert result.report.fidelity is not None and result.report.fidelity.sqnr > 30
        assert written(result, tmp_path)
