"""The parity gate turns red: a form packed wrongly, a corrupted file, a runtime that computes something else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from quantkit import LayerPlan, Plan, QuantSpec, VerificationError, compress
from quantkit.calibration.request import CalibrationRequest, EvaluationRequest
from quantkit.cli import main
from quantkit.comparison import compare_files
from quantkit.emitters._builder import Builder
from quantkit.errors import InputError
from quantkit.graph import emit
from quantkit.plan import save_plan
from quantkit.report.types import Accuracy
from quantkit.runtime.ort import Session, make_session
from quantkit.types import Emitter, QuantizedWeight, Target
from quantkit.verify import check_parity, check_repeatable, compare
from tests.helpers import models

RNG = np.random.default_rng(0)
SCORES = RNG.standard_normal((4, 10)).astype(np.float32)
FORMS = {
    "packed": QuantSpec(4, 32),
    "matmulnbits": QuantSpec(4, 32),
    "dynamic": QuantSpec(8, -1, symmetric=True, act_bits=8),
    "gather": QuantSpec(4, 32),
    "qdq": QuantSpec(8, -1, symmetric=True, act_bits=8),
}


class Wrong:
    """An emitter that writes other weights than it was given, and simulates the right ones."""

    def __init__(self, right: Emitter, row: int) -> None:
        self._right, self._row = right, row

    def __getattr__(self, name: str) -> Any:
        return getattr(self._right, name)

    def emit(self, builder: Builder, target: Target, weight: QuantizedWeight) -> None:
        codes = weight.codes.copy()
        codes[self._row] = codes[self._row].max() - codes[self._row]
        self._right.emit(builder, target, replace(weight, codes=codes))


def case(form: str) -> tuple[onnx.ModelProto, dict[str, Any], Plan]:
    """A model with one layer in this form; the others stay float."""
    model, data, op = models.block(), models.tokens(), "op:MatMul"
    if form == "gather":
        op = "op:Gather"
    elif form == "qdq":
        model, data, op = models.cnn(), models.images(), "op:Conv"
    return model, data, Plan({op: LayerPlan(FORMS[form], form, "")}, {}, {})


@pytest.mark.parametrize("with_data", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_one_wrong_row_of_codes(
    form: str, with_data: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models.quick(monkeypatch)
    model, data, plan = case(form)
    if form == "qdq" and not with_data:
        with pytest.raises(InputError, match="no activation range"):
            compress(model, plan=plan)
        return
    made = compress(model, plan=plan, calibration=data if with_data else None)
    assert {layer.form for layer in made.plan.layers.values() if layer.spec} == {form}

    right = emit.emitter
    monkeypatch.setattr(emit, "emitter", lambda name: Wrong(right(name), 5))
    with pytest.raises(VerificationError, match="of the emitted model differs from its simulation"):
        compress(model, plan=plan, calibration=data if with_data else None)
    onnx.save(model, tmp_path / "m.onnx")
    save_plan(plan, tmp_path / "p.json")
    np.savez(tmp_path / "d.npz", **data)
    monkeypatch.chdir(tmp_path)
    extra = ["--calib", "d.npz"] if with_data else []
    assert main(["apply", "m.onnx", "p.json", "-o", "out.onnx", "-q", *extra]) == 2
    assert "no file was written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.npz", "m.onnx", "p.json"]


def test_a_weight_that_changes_on_its_way_to_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    models.quick(monkeypatch)
    right = emit.save

    def save(model: ir.Model, path: Path, **_: bool) -> None:
        copy = model.clone()
        scales = next(value for value in copy.graph.initializers.values() if "scale" in str(value.name))
        assert scales.const_value is not None
        scales.const_value = ir.tensor(scales.const_value.numpy() * np.float32(1.1))
        right(copy, path)

    monkeypatch.setattr("quantkit.pipeline.save", save)
    with pytest.raises(VerificationError, match=r"layer MatMul/y .* differs from its simulation"):
        compress(models.matmul(), calibration={"x": models.random(16, 64)}, activations="none", bits=(4,))


def test_a_runtime_whose_fused_kernels_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    models.quick(monkeypatch)

    class Bad(Session):
        def run(self, feed: Any) -> Any:
            return {name: value * np.float32(1.2) for name, value in super().run(feed).items()}

    def session(model: Any, **options: Any) -> Session:
        made = make_session(model, **options)
        if isinstance(model, Path) and options.get("optimize", "all") == "all":
            made.__class__ = Bad
        return made

    monkeypatch.setattr("quantkit.pipeline.make_session", session)
    with pytest.raises(VerificationError, match=r"the emitted model differs from its simulation: 14\.\d dB, needed"):
        compress(models.matmul(), calibration={"x": models.random(16, 64)}, activations="none")


def test_parity_of_floats() -> None:
    near = SCORES * np.float32(1 + 1e-6)
    assert check_parity({"y": near}, {"y": SCORES}, {"y": SCORES}) > 100
    with pytest.raises(VerificationError, match=r"differs from its simulation: 20\.0 dB, needed 40\.0 dB"):
        check_parity({"y": SCORES * np.float32(1.1)}, {"y": SCORES}, {"y": SCORES})
    broken = SCORES.copy()
    broken[1, 2] = np.nan
    with pytest.raises(VerificationError, match="output 'y' is not finite"):
        check_parity({"y": broken}, {"y": SCORES}, {"y": SCORES})
    with pytest.raises(VerificationError, match=r"output 'y' is float32 \[40\], planned was float32 \[4, 10\]"):
        check_parity({"y": SCORES.ravel()}, {"y": SCORES}, {"y": SCORES})


def test_values_that_are_not_finite_in_the_float_model_either() -> None:
    masked = SCORES.copy()
    masked[:, 3], masked[0, 0] = -np.inf, np.nan
    assert compare({"y": masked}, {"y": masked}).sqnr == 200
    assert check_parity({"y": masked}, {"y": masked}, {"y": masked}) == 200
    wrong = np.where(np.isfinite(masked), masked * np.float32(1.5), masked)
    with pytest.raises(VerificationError, match="differs from its simulation: 6"):
        check_parity({"y": wrong}, {"y": masked}, {"y": masked})
    assert compare({"y": masked}, {"y": SCORES}).sqnr == -200


def test_indices_and_counts_may_jump() -> None:
    indices = np.array([[0, 1, 2], [3, 4, 5]])
    assert check_parity({"i": indices[:, :2]}, {"i": indices}, {"i": indices}) == 200
    assert check_parity({"i": indices + 1}, {"i": indices}, {"i": indices}) == 200
    assert check_parity({"y": SCORES[:2]}, {"y": SCORES}, {"y": SCORES}) == 200
    with pytest.raises(VerificationError, match="output 'i' is int32"):
        check_parity({"i": indices.astype(np.int32)}, {"i": indices}, {"i": indices})
    assert compare({"i": indices}, {"i": indices + 1}).top1_agreement == 0


def test_random_operators_are_found() -> None:
    text = "g (float[N,64] x, float[64,64] w) => (float[N,64] y) { r = RandomNormalLike(x) y = MatMul(r, w) }"
    feed = {"x": models.random(2, 64)}
    check_repeatable(make_session(ir.from_proto(models.matmul())), feed)
    with pytest.raises(InputError, match="different outputs for the same input"):
        check_repeatable(make_session(ir.from_proto(models.matmul(text))), feed)


def test_compare_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.quick(monkeypatch)
    paths = {name: tmp_path / f"{name}.onnx" for name in ("cnn", "block", "q")}
    onnx.save(models.block(), paths["block"])
    onnx.save(models.cnn(), paths["cnn"], save_as_external_data=True, location="cnn.bin", size_threshold=16)
    compress(paths["cnn"]).save(paths["q"])
    data: Any = models.images()
    found = compare_files(paths["q"], paths["cnn"], calibration=data)
    assert 30 < found.fidelity.sqnr < 80 and found.samples == 20 and found.timings[0].speedup == 1
    assert found.reference_size == paths["cnn"].stat().st_size + (tmp_path / "cnn.bin").stat().st_size
    assert found.size == paths["q"].stat().st_size
    with pytest.raises(InputError, match=r"are not the same model: inputs \['ids'\] and \['x'\]"):
        compare_files(paths["block"], paths["cnn"], calibration=data)
    with pytest.raises(InputError, match="there is no data to compare the two models on; give calibration or eval"):
        compare_files(paths["q"], paths["cnn"])


def test_metric_of_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracy on samples whose labels are the float model's classes, but for a quarter."""
    models.quick(monkeypatch)
    onnx.save(models.cnn(), tmp_path / "m.onnx")
    images: Any = models.images(40)
    compress(tmp_path / "m.onnx", bits=3, quantizer="rtn", activations="none").save(tmp_path / "q.onnx")
    scores = {name: make_session(tmp_path / f"{name}.onnx").run(images)["y"] for name in "mq"}
    labels = (scores["m"].argmax(1) + (np.arange(40) % 4 == 0)) % scores["m"].shape[1]
    np.savez(tmp_path / "e.npz", **images, labels=labels)
    request = EvaluationRequest(CalibrationRequest(str(tmp_path / "e.npz")), "top1")
    found = compare_files(tmp_path / "q.onnx", tmp_path / "m.onnx", evaluation=request)
    kept = float((scores["q"].argmax(1) == labels).mean())
    assert found.accuracy == Accuracy("top1", 0.75, pytest.approx(kept), 40) and found.samples == 40
    assert 0 < kept < 0.75 and 0.03 < found.drop_error < 0.12
    other = compare_files(tmp_path / "m.onnx", tmp_path / "m.onnx", calibration=models.images(8), evaluation=request)
    assert other.samples == 8 and other.drop_error == 0
    assert other.accuracy is not None and other.accuracy.before == other.accuracy.after == 0.75
