"""The demo: gradients are right, training reaches 97 %, the ONNX file computes the same, compression keeps it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from quantkit import demo
from quantkit.cli import main
from quantkit.errors import InputError
from quantkit.report.progress import SilentProgress


@pytest.fixture(scope="module")
def digits() -> demo.Digits:
    return demo.load_digits()


@pytest.fixture(scope="module")
def weights(digits: demo.Digits) -> demo.Weights:
    return demo.train(digits, progress=SilentProgress())


def loss(path: Path, weights: demo.Weights, digits: demo.Digits, count: int) -> float:
    ir.save(demo.to_onnx(weights), path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    scores = session.run(None, {"image": digits.train_images[:count]})[0].astype(np.float64)
    logs = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return float(-logs[np.arange(count), digits.train_labels[:count]].mean())


@pytest.mark.parametrize("name", ["conv1", "conv1.bias", "conv2", "conv2.bias", "fc1", "fc1.bias", "fc2", "fc2.bias"])
def test_gradient_against_differences(tmp_path: Path, digits: demo.Digits, name: str) -> None:
    count = 32
    weights = demo.initial_weights(np.random.default_rng(1))
    slope = demo.gradient(weights, digits.train_images[:count], digits.train_labels[:count])[name]
    # Along the gradient itself the loss rises by its squared length.
    step = 1e-3 / float(np.linalg.norm(slope))
    up, down = ({**weights, name: weights[name] + sign * step * slope} for sign in (1, -1))
    path = tmp_path / "m.onnx"
    measured = (loss(path, up, digits, count) - loss(path, down, digits, count)) / (2 * step)
    assert measured == pytest.approx(float((slope * slope).sum()), rel=0.02)


def test_accuracy(tmp_path: Path, digits: demo.Digits, weights: demo.Weights) -> None:
    path = tmp_path / "digits.onnx"
    ir.save(demo.to_onnx(weights), path)
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    scores = session.run(["scores"], {"image": digits.test_images})[0]
    assert np.mean(scores.argmax(axis=1) == digits.test_labels) >= 0.97


def test_held_out_images_are_new(digits: demo.Digits) -> None:
    assert len(digits.train_images) + len(digits.test_images) == 1797
    seen = {image.tobytes() for image in digits.train_images}
    assert not any(image.tobytes() in seen for image in digits.test_images)


def test_same_seed_same_weights(digits: demo.Digits) -> None:
    first, second = (demo.train(digits, progress=SilentProgress(), epochs=1) for _ in range(2))
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r"this needs sklearn: pip install 'quantkit\[demo\]'"):
        demo.load_digits()


def test_whole_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--keep", str(tmp_path), "--json"]) == 0
    shown = capsys.readouterr()
    rows = json.loads(shown.out)
    assert [row["name"] for row in rows] == ["float32", "8 bits", "4 bits"]
    assert all(row["accuracy"] >= 0.96 for row in rows)
    assert rows[1]["size"] < 0.35 * rows[0]["size"] and rows[2]["size"] < 0.25 * rows[0]["size"]
    assert all(name in shown.err for name in ("float32", "8 bits", "4 bits", "accuracy"))
    for name in ("digits.onnx", "digits.8bit.onnx", "digits.4bit.onnx", "digits.4bit.plan.json"):
        assert (tmp_path / name).stat().st_size > 0
