"""ONNX's own test models go through the pass, or are refused with one sentence.

Those that PyTorch exported have opset 6, which is too old: they are refused as they are, and go through once converted.
The large networks make their weights of zeros by ConstantOfShape, which leaves no layer; here they get random ones.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper, version_converter

import quantkit
from quantkit.errors import InputError
from tests.helpers import models

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
EXPORTED = ("pytorch-converted", "pytorch-operator")
OPSET = 13
NOTHING = "has no layer to quantize"
TOO_OLD = "has opset 6, older than 7"
QUICK = ("light_squeezenet", "light_shufflenet")


def small_models(group: str) -> list[Path]:
    return sorted((DATA / group).glob("*/model.onnx"))


def large_models() -> list[Path]:
    return sorted((DATA / "light").glob("*.onnx"))


def convert(path: Path) -> onnx.ModelProto:
    return version_converter.convert_version(onnx.load(path), OPSET)


def with_weights(path: Path) -> onnx.ModelProto:
    """A large network with random weights, small enough that values stay in range, for its zeros."""
    model = onnx.load(path)
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for seed, node in enumerate([node for node in model.graph.node if node.op_type == "ConstantOfShape"]):
        dims = tuple(int(dim) for dim in shapes[node.input[0]])
        values = np.random.default_rng(seed).standard_normal(dims, np.float32)
        values *= np.float32((2.0 / max(1, int(np.prod(dims[1:])))) ** 0.5)
        positive = np.abs(values) + np.float32(0.5)  # a variance of batch normalisation among the vectors
        model.graph.initializer.append(numpy_helper.from_array(values if len(dims) > 1 else positive, node.output[0]))
        model.graph.node.remove(node)
    return model


def attempt(model: Path | onnx.ModelProto, folder: Path, *, calibrate: bool = False) -> str:
    """`compressed`, or the sentence of the refusal."""
    options = {"random_calibration": True, "activations": "8"} if calibrate else {"activations": "none"}
    options |= {"bits": 8, "quantizer": "rtn", "allocator": "uniform", "calibrator": "minmax", "workers": 1}
    try:
        result = quantkit.compress(model, cache=folder, **options)
    except InputError as error:
        return str(error)
    result.save(folder / "out.onnx")
    silent = ort.SessionOptions()
    silent.log_severity_level = 4
    ort.InferenceSession(str(folder / "out.onnx"), silent, providers=["CPUExecutionProvider"])
    return "compressed"


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    models.quick(monkeypatch)


def test_simple_models(tmp_path: Path) -> None:
    found = {path.parent.name: attempt(path, tmp_path) for path in small_models("simple")}
    assert len(found) > 20 and {name: told for name, told in found.items() if NOTHING not in told} == {}


@pytest.mark.parametrize("group", EXPORTED)
def test_exported_models(group: str, tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    for path in small_models(group):
        old = onnx.load(path).opset_import[0].version < 7
        assert not old or TOO_OLD in attempt(path, tmp_path)
        told = attempt(convert(path) if old else path, tmp_path)
        assert told == "compressed" or NOTHING in told, f"{path.parent.name}: {told}"
        counts[told.split()[0]] += 1
    assert sum(counts.values()) == len(small_models(group)) and counts["compressed"] > 0


def test_large_models_as_they_are(tmp_path: Path) -> None:
    for path in large_models():
        told = attempt(path, tmp_path)
        assert NOTHING in told and "computed by ConstantOfShape" in told, f"{path.name}: {told}"


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("calibrate", [False, True])
def test_large_models_with_weights(name: str, calibrate: bool, tmp_path: Path) -> None:
    assert attempt(with_weights(DATA / "light" / f"{name}.onnx"), tmp_path, calibrate=calibrate) == "compressed"
