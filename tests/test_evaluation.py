"""The user's metric: built-in ones by name, functions of theirs, and everything that can be wrong with either."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from quantkit.calibration.request import CalibrationRequest, EvaluationRequest
from quantkit.errors import InputError
from quantkit.evaluation import (
    LABELS,
    Evaluation,
    Outputs,
    agreement_error,
    label_input,
    make_evaluation,
    needs_labels,
)
from quantkit.runtime.ort import Session, make_session
from quantkit.types import FloatArray
from quantkit.verify import open_data, session_inputs

WEIGHT: FloatArray = np.random.default_rng(1).standard_normal((6, 4)).astype(np.float32)


def linear(weight: FloatArray, name: str = "image") -> Session:
    """image[N, 6] @ weight."""
    data = ir.val(name, dtype=ir.DataType.FLOAT, shape=["N", 6])
    operand = ir.val("w", const_value=ir.tensor(weight))
    node = ir.node("MatMul", [data, operand], name="layer")
    node.outputs[0].name, node.outputs[0].dtype = "y", ir.DataType.FLOAT
    node.outputs[0].shape = ir.Shape(["N", weight.shape[1]])
    graph = ir.Graph([data], node.outputs, nodes=[node], initializers=[operand], opset_imports={"": 21}, name="g")
    return make_session(ir.Model(graph, ir_version=10))


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """20 samples; the float model is right on 15 of them."""
    images = np.random.default_rng(2).standard_normal((20, 6)).astype(np.float32)
    labels = (images @ WEIGHT).argmax(axis=1)
    labels[:5] = (labels[:5] + 1) % 4
    path = tmp_path / "data.npz"
    np.savez(path, X=images, Y=labels, few=labels[:3])
    return path


def evaluation(metric: str, path: Path, keys: str = "image=X,labels=Y", reference: Session | None = None) -> Evaluation:
    reference = reference or linear(WEIGHT)
    keys = keys if needs_labels(metric) else keys.partition(",")[0]
    request = EvaluationRequest(CalibrationRequest(f"{path}:{keys}", batch_size=8), metric)
    inputs = session_inputs(reference)
    wanted = [*inputs, label_input()] if needs_labels(metric) else inputs
    return make_evaluation(request, open_data(request.data, wanted), reference)


def test_only_top1_needs_labels() -> None:
    assert [name for name in ("top1", "agreement", "cosine", "sqnr", "m:f") if needs_labels(name)] == ["top1"]
    assert (label_input().name, label_input().dtype) == (LABELS, np.dtype(np.int64))


def test_top1_with_labels_from_the_same_file(samples: Path) -> None:
    found = evaluation("top1", samples)
    assert found.float_score == 0.75
    assert found.drop(linear(WEIGHT)) == 0.0
    assert found.drop(linear(-WEIGHT)) == pytest.approx(0.75 - found.measure(linear(-WEIGHT)), abs=1e-12)
    assert found.drop(linear(-WEIGHT)) > 0.3


def test_figures_against_the_float_model(samples: Path) -> None:
    near = linear(WEIGHT * np.float32(1.01))
    assert evaluation("sqnr", samples).measure(near) == pytest.approx(40, abs=0.01)
    assert evaluation("cosine", samples).measure(near) == pytest.approx(1, abs=1e-6)
    assert evaluation("cosine", samples).drop(linear(-WEIGHT)) == pytest.approx(2, abs=1e-6)
    assert evaluation("agreement", samples).measure(near) == 1.0
    images = np.load(samples)["X"]
    same = ((images @ WEIGHT).argmax(axis=1) == (images @ -WEIGHT).argmax(axis=1)).mean()
    assert evaluation("agreement", samples).drop(linear(-WEIGHT)) == pytest.approx(1 - same, abs=1e-12)


def test_agreement_needs_class_scores(samples: Path) -> None:
    with pytest.raises(InputError, match="agreement failed on the model's outputs: the first output holds no class"):
        evaluation("agreement", samples, reference=linear(WEIGHT[:, :1])).measure(linear(WEIGHT[:, :1]))


def test_labels_that_do_not_match(samples: Path) -> None:
    with pytest.raises(InputError, match="samples"):
        evaluation("top1", samples, "image=X,labels=few").measure(linear(WEIGHT))
    with pytest.raises(InputError, match="absent"):
        evaluation("top1", samples, "image=X,labels=absent")
    with pytest.raises(InputError, match="labels"):
        evaluation("top1", samples, "image=X")


@pytest.fixture
def function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with metrics in the working directory."""
    text = """
import numpy as np
NUMBER = 3
def mean(outputs, feeds):
    return np.abs(outputs["y"]).mean() + feeds["image"].shape[0]
def nothing(outputs, feeds): return None
def text(outputs, feeds): return "good"
def lost(outputs, feeds): return outputs["z"]
def index(outputs, feeds): return [][1]
def attribute(outputs, feeds): return outputs.absent
def undefined(outputs, feeds): return float("nan")
def endless(outputs, feeds): return np.inf
"""
    (tmp_path / "my_metrics.py").write_text(text)
    (tmp_path / "my_broken.py").write_text("1 / 0")
    (tmp_path / "my_typo.py").write_text("def f(:")
    monkeypatch.chdir(tmp_path)
    return "my_metrics"


def test_a_function_of_the_users(samples: Path, function: str) -> None:
    before = list(sys.path)
    found = evaluation(f"{function}:mean", samples)
    images = np.load(samples)["X"]
    assert found.float_score == pytest.approx(np.abs(images @ WEIGHT).mean() + 20, rel=1e-6)
    assert found.name == "my_metrics:mean"
    assert sys.path == before


@pytest.mark.parametrize("name", ["nothing", "text", "lost", "index", "attribute"])
def test_a_function_that_fails(samples: Path, function: str, name: str) -> None:
    with pytest.raises(InputError, match=f"the metric my_metrics:{name} failed on the model's outputs: ."):
        evaluation(f"{function}:{name}", samples).measure(linear(WEIGHT))


@pytest.mark.parametrize("name", ["undefined", "endless"])
def test_a_figure_must_be_finite(samples: Path, function: str, name: str) -> None:
    with pytest.raises(InputError, match=f"my_metrics:{name} gave (nan|inf) on the model's outputs"):
        evaluation(f"{function}:{name}", samples).measure(linear(WEIGHT))


@pytest.mark.parametrize(
    "metric", ["my_metrics:absent", "my_absent:f", "my_broken:f", "my_typo:f", ":f", "my_metrics:", "my_metrics.x:f"]
)
def test_a_function_that_cannot_be_imported(samples: Path, function: str, metric: str) -> None:
    before = list(sys.path)
    with pytest.raises(InputError, match=f"the metric '{metric}' cannot be imported: ."):
        evaluation(metric, samples)
    assert sys.path == before and function == "my_metrics"


def test_what_is_no_function(samples: Path, function: str) -> None:
    with pytest.raises(InputError, match="the metric 'my_metrics:NUMBER' is no function but int"):
        evaluation(f"{function}:NUMBER", samples)


def test_an_unknown_name(samples: Path) -> None:
    with pytest.raises(InputError, match="unknown metric 'f1'; known: top1, agreement, cosine, sqnr, or module:f"):
        evaluation("f1", samples)


@pytest.mark.parametrize(("count", "tolerance"), [(400, 0.35), (1000, 0.35)])
def test_the_error_of_a_drop_is_that_of_the_samples_that_change(tmp_path: Path, count: int, tolerance: float) -> None:
    images = np.random.default_rng(4).standard_normal((count, 6)).astype(np.float32)
    labels = (images @ WEIGHT).argmax(axis=1)
    labels[::3] = (labels[::3] + 1) % 4
    np.savez(tmp_path / "data.npz", X=images, Y=labels)
    found = evaluation("top1", tmp_path / "data.npz")
    other = WEIGHT + 0.2 * np.random.default_rng(5).standard_normal(WEIGHT.shape).astype(np.float32)
    drop, error = found.drop_with_error(linear(other))
    assert drop == found.drop(linear(other))
    changes = ((images @ WEIGHT).argmax(1) == labels).astype(float) - ((images @ other).argmax(1) == labels)
    assert drop == pytest.approx(changes.mean()) and 0 < error < 0.1
    assert error == pytest.approx(changes.std() / math.sqrt(count), rel=tolerance)
    assert found.drop_with_error(linear(WEIGHT)) == (0.0, 0.0)


def test_a_metric_that_wants_all_samples_has_no_error(samples: Path) -> None:
    found = evaluation("top1", samples)

    def whole(outputs: Outputs, reference: Outputs, feeds: Outputs) -> float:
        assert len(outputs["y"]) == 20
        return float(outputs["y"].mean())

    drop, error = replace(found, score=whole).drop_with_error(linear(2 * WEIGHT))
    assert error == 0.0 and drop == replace(found, score=whole).drop(linear(2 * WEIGHT)) != 0
    joined = replace(found, score=lambda outputs, reference, feeds: float(outputs["y"].mean()))
    single = replace(joined, data=joined.data.subset(1))
    assert single.drop_with_error(linear(2 * WEIGHT))[1] == 0.0


def test_the_error_of_an_agreement() -> None:
    rng = np.random.default_rng(6)
    wanted = rng.standard_normal((50, 7)).astype(np.float32)
    got = wanted.copy()
    got[:5, 0] += 100.0
    share = float((wanted.argmax(1) != got.argmax(1)).mean())
    error = agreement_error({"y": wanted}, {"y": got})
    assert error == pytest.approx(math.sqrt(share * (1 - share) / 50)) and error > 0
    assert agreement_error({"y": wanted}, {"y": wanted}) == 0.0
    rows, other = wanted.reshape(10, 5, 7), got.reshape(10, 5, 7)  # no class scores
    cosines = [1 - (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()) for a, b in zip(rows, other, strict=True)]
    assert agreement_error({"z": rows}, {"z": other}) == pytest.approx(np.std(cosines) / math.sqrt(10), rel=1e-4)
    assert agreement_error({"y": wanted}, {"y": got[:3]}) == 0.0  # shapes differ: nothing is known
    assert agreement_error({"ids": np.arange(3)}, {"ids": np.arange(3)}) == 0.0
