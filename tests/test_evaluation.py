"""The user's metric: built-in ones by name, functions of theirs, and everything that can be wrong with either."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import quantkit
from quantkit.calibration.request import CalibrationRequest, EvaluationRequest
from quantkit.errors import InputError
from quantkit.evaluation import (
    Evaluation,
    Outputs,
    agreement_error,
    needs_labels,
    open_evaluation,
)
from quantkit.runtime.ort import Session, make_session
from quantkit.types import Array, FloatArray
from tests.helpers import models

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
    request = EvaluationRequest(CalibrationRequest(f"{path}:{keys}", batch_size=8), metric)
    return open_evaluation(request, reference)


def test_only_top1_needs_labels() -> None:
    assert [name for name in ("top1", "agreement", "cosine", "sqnr", "m:f") if needs_labels(name)] == ["top1"]


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
    with pytest.raises(InputError, match=r"agreement on 20 samples of data\.npz:.*: the first output holds no class"):
        evaluation("agreement", samples, reference=linear(WEIGHT[:, :1])).measure(linear(WEIGHT[:, :1]))


def test_labels_that_do_not_match(samples: Path) -> None:
    for metric in ("top1", "agreement"):
        with pytest.raises(InputError, match="different numbers of samples: 20 for 'image', 3 for 'labels'"):
            evaluation(metric, samples, "image=X,labels=few")
    with pytest.raises(InputError, match="absent"):
        evaluation("top1", samples, "image=X,labels=absent")
    with pytest.raises(InputError, match="labels"):
        evaluation("top1", samples, "image=X")


@pytest.mark.parametrize(("wrong", "place"), [(-1, 3), (4, 0), (900, 19)])
def test_labels_that_are_no_class(tmp_path: Path, wrong: int, place: int) -> None:
    labels = np.arange(20) % 4
    labels[place] = wrong
    np.savez(tmp_path / "e.npz", image=np.ones((20, 6), np.float32), labels=labels)
    request = EvaluationRequest(CalibrationRequest(str(tmp_path / "e.npz")), "top1")
    told = (
        rf"the metric top1 on 20 samples of e\.npz: the label {wrong} of sample {place} is none of the 4 classes 0 to "
        r"3 of the model's output; number labels from 0 \(are they counted from 1\?\), in the order of the output's"
    )
    with pytest.raises(InputError, match=told):
        open_evaluation(request, linear(WEIGHT)).drop_with_error(linear(WEIGHT))


@pytest.mark.parametrize("metric", ["agreement", "cosine", "sqnr"])
def test_metrics_that_need_no_labels_ignore_them(tmp_path: Path, metric: str) -> None:
    images = np.random.default_rng(7).standard_normal((20, 6)).astype(np.float32)
    found = []
    for extra in ({}, {"labels": np.full((20, 2), -7.5)}):
        np.savez(tmp_path / "e.npz", image=images, **extra)
        request = EvaluationRequest(CalibrationRequest(str(tmp_path / "e.npz")), metric)
        found.append(open_evaluation(request, linear(WEIGHT)).drop_with_error(linear(WEIGHT * np.float32(0.9))))
    assert found[0] == found[1]


@pytest.fixture
def function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with metrics in the working directory."""
    text = """
import numpy as np
NUMBER = 3
def mean(outputs, feeds):
    return np.abs(outputs["y"]).mean() + feeds["image"].shape[0]
def labelled(outputs, feeds):
    assert set(feeds) == {"image", "labels"} and len(feeds["labels"]) == len(feeds["image"])
    return feeds["labels"].astype(np.float64).sum()
def batches():
    for start in (0, 10):
        yield {"image": np.ones((10, 6), np.float32), "labels": np.arange(start, start + 10)}
def tuples():
    return [(np.ones((10, 6), np.float32), np.arange(start, start + 10)) for start in (0, 10)]
def unlabelled():
    yield {"image": np.ones((10, 6), np.float32)}
def other(outputs, feeds): return {}["labels"]
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


@pytest.mark.parametrize(
    "labels",
    [np.arange(20), np.arange(20.0)[:, None] / 8, np.ones((20, 3, 2), np.uint8), np.ones((20, 5, 5, 3), np.uint8)],
)
@pytest.mark.parametrize("packed", [False, True])
def test_labels_of_any_kind_reach_a_function(tmp_path: Path, function: str, labels: Array, packed: bool) -> None:
    save = np.savez_compressed if packed else np.savez
    save(tmp_path / "e.npz", image=np.ones((20, 6), np.float32), labels=labels)
    request = EvaluationRequest(CalibrationRequest(str(tmp_path / "e.npz")), f"{function}:labelled")
    found = open_evaluation(request, linear(WEIGHT))
    assert found.float_score == labels.astype(np.float64).sum() and found.data.samples == 20
    assert found.drop_with_error(linear(WEIGHT)) == (0.0, 0.0)


def test_labels_by_key(samples: Path, function: str) -> None:
    found = evaluation(f"{function}:labelled", samples)
    assert found.float_score == np.load(samples)["Y"].sum()


@pytest.mark.parametrize("feeds", ["batches", "tuples"])
@pytest.mark.parametrize("metric", ["labelled", "top1"])
def test_labels_of_a_function(function: str, feeds: str, metric: str) -> None:
    """Samples are counted one by one whatever the model calls its first axis, here N."""
    wanted = metric if metric == "top1" else f"{function}:{metric}"
    data = CalibrationRequest(f"{function}:{feeds}@:3" if metric == "top1" else f"{function}:{feeds}")
    found = open_evaluation(EvaluationRequest(data, wanted), linear(WEIGHT))
    best = int((np.ones(6, np.float32) @ WEIGHT).argmax())
    expected = ((best < 3) / 3, 3) if metric == "top1" else (sum(range(20)), 20)
    assert (found.float_score, found.data.samples) == pytest.approx(expected)


@pytest.mark.parametrize("source", ["data.npz:X", "my_metrics:unlabelled"])
def test_a_function_that_wants_labels_which_are_not_there(samples: Path, function: str, source: str) -> None:
    request = EvaluationRequest(CalibrationRequest(source), f"{function}:labelled")
    unguarded = EvaluationRequest(request.data, f"{function}:other")
    found = open_evaluation(request, linear(WEIGHT))
    found = replace(found, score=lambda outputs, reference, feeds: float(feeds["labels"].mean()))
    told = (
        r"my_metrics:labelled asks for feeds\['labels'\], and there are none in (20 samples of data|10 samples of my_m)"
    )
    with pytest.raises(InputError, match=told + r".*: give an \.npz file with 'labels' \[samples, \.\.\.\] beside"):
        assert found.float_score
    with pytest.raises(InputError, match=r"my_metrics:other asks for feeds\['labels'\]"):
        assert open_evaluation(unguarded, linear(WEIGHT)).float_score


def test_labels_that_are_there_and_a_function_that_fails(samples: Path, function: str) -> None:
    with pytest.raises(InputError, match="the metric my_metrics:other failed on the model's outputs: 'labels'"):
        assert evaluation(f"{function}:other", samples).float_score


def test_a_models_own_input_called_labels(tmp_path: Path) -> None:
    images = np.random.default_rng(8).standard_normal((20, 6)).astype(np.float32)
    np.savez(tmp_path / "e.npz", labels=images)
    for metric in ("cosine", "agreement"):
        request = EvaluationRequest(CalibrationRequest(str(tmp_path / "e.npz")), metric)
        assert open_evaluation(request, linear(WEIGHT, "labels")).float_score == pytest.approx(1.0)


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


def test_arrays_in_memory_are_evaluation_data_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As with calibration data, not only what the command line can name."""
    models.quick(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))
    data: Any = {**models.images(12), "labels": np.arange(12) % 10}
    report = quantkit.compress(models.cnn(), evaluation=EvaluationRequest(data, "top1"), quantizer="rtn").report
    assert report.accuracy is not None and report.accuracy.samples == 12
