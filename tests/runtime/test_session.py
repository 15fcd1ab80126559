"""InferenceSession: onnxruntime's face on the CPU, errors, and the executor's runner with the same face."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

import quantkit
from quantkit import metrics
from quantkit.errors import InputError
from quantkit.runtime import session as module
from quantkit.runtime.executor import Executor
from quantkit.runtime.executor.runner import Runner
from quantkit.runtime.session import Argument, InferenceSession, choose_device
from quantkit.types import QuantSpec
from tests.emitters.conftest import KINDS, feed_of
from tests.helpers import models
from tests.runtime.executor.files import CPU, expected, file_of

TWO = "g (float[N,4] x, int64[N] k) => (float[N,4] a, float16[N,4] b) { a = Neg(x) b = Cast<to=10>(x) }"
X = np.arange(8, dtype=np.float32).reshape(2, 4)
FEED = {"x": X, "k": np.zeros(2, np.int64)}


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def two() -> Any:
    return models.build(TWO, {})


def runner(dtype: torch.dtype = torch.float16) -> Runner:
    return Runner(Executor(two(), CPU, dtype), 4)


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize("given", ["path", "text", "protobuf", "graph"])
def test_models_in_every_shape(given: str, tmp_path: Path) -> None:
    onnx.save(two(), tmp_path / "m.onnx")
    path = tmp_path / "m.onnx"
    model = {"path": path, "text": str(path), "protobuf": two(), "graph": ir.from_proto(two())}[given]
    session = quantkit.InferenceSession(model)  # type: ignore[arg-type]
    assert (session.device, session.layers) == ("cpu", ())
    a, b = session.run(None, FEED)
    np.testing.assert_array_equal(a, -X)
    assert b.dtype == np.float16


def test_arguments_are_described_like_onnxruntimes() -> None:
    session = InferenceSession(two(), "cpu")
    inputs = [Argument("x", "tensor(float)", ["N", 4]), Argument("k", "tensor(int64)", ["N"])]
    outputs = [Argument("a", "tensor(float)", ["N", 4]), Argument("b", "tensor(float16)", ["N", 4])]
    assert (session.get_inputs(), session.get_outputs()) == (inputs, outputs)
    executor = runner().executor
    assert [module._argument(value) for value in executor.inputs] == inputs
    assert [module._argument(value) for value in executor.outputs] == outputs
    assert module._argument(ir.Value(name="v")) == Argument("v", "tensor()", None)


def test_chosen_outputs_in_the_order_asked_for() -> None:
    session = InferenceSession(two(), "cpu")
    b, a = session.run(["b", "a"], FEED)
    assert (a.dtype, b.dtype) == (np.float32, np.float16)
    with pytest.raises(InputError, match=r"^the model has no output 'c'; it has a, b$"):
        session.run(["a", "c"], FEED)


def test_tensors_and_dlpack() -> None:
    session = InferenceSession(two(), "cpu")
    found = session.run_torch({"x": torch.from_numpy(X), "k": FEED["k"]}, ["a"])  # numpy has __dlpack__
    assert list(found) == ["a"] and torch.equal(found["a"], torch.from_numpy(-X))


def test_tensors_need_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    session = InferenceSession(two(), "cpu")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^run_torch needs PyTorch: pip install 'quantkit\[torch\]'$"):
        session.run_torch(FEED)


@pytest.mark.usefixtures("no_cuda")
def test_without_cuda() -> None:
    sentence = (
        "^device='cuda' cannot be used: PyTorch finds no CUDA device; device='cpu' runs the model with onnxruntime$"
    )
    with pytest.raises(InputError, match=sentence):
        InferenceSession(two(), "cuda")
    assert choose_device("auto") == "cpu"


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_without_the_packages(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda item: None if item == name else importlib.util.find_spec(item))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match=rf"{name} is not installed \(pip install 'quantkit\[gpu\]'\)"):
        choose_device("cuda")
    assert choose_device("auto") == "cpu"


def test_the_cpu_needs_no_torch(tmp_path: Path) -> None:
    onnx.save(two(), tmp_path / "m.onnx")
    code = (
        "import sys; sys.modules['torch'] = None; import quantkit\n"
        "session = quantkit.InferenceSession(sys.argv[1]); print(session.device, len(session.get_inputs()))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "m.onnx"], capture_output=True, text=True, check=True)
    assert done.stdout == "cpu 2\n"


@pytest.mark.parametrize(("capability", "device"), [((7, 5), "cpu"), ((8, 0), "cuda"), ((9, 0), "cuda")])
def test_auto_takes_a_gpu_that_the_kernels_run_on(
    capability: tuple[int, int], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == device
    assert choose_device("cuda:1") == "cuda:1"
    with pytest.raises(InputError, match=r"^device='cuda:2' cannot be used: there are 2 CUDA devices$"):
        choose_device("cuda:2")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"device": "gpu"}, "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        ({"device": "cuda:x"}, "device must be auto, cpu, cuda or cuda:N, got 'cuda:x'"),
        ({"dtype": "int8"}, "dtype must be one of float16, bfloat16, float32, got 'int8'"),
        ({"graphs": -1}, r"graphs must be 0 \(none\) or the number of shapes to keep, got -1"),
    ],
)
def test_wrong_options(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=f"^{sentence}$"):
        InferenceSession(two(), **options)


def test_a_missing_file() -> None:
    with pytest.raises(InputError, match=r"^there is no model file 'nowhere.onnx'$"):
        InferenceSession("nowhere.onnx", "cpu")


def test_the_runner_gives_numpy_in_the_models_types() -> None:
    found = runner().run(FEED)
    assert (found["a"].dtype, found["b"].dtype) == (np.float32, np.float16)
    np.testing.assert_array_equal(found["a"], -X)
    tensors = runner(torch.bfloat16).run_tensors(
        {"x": torch.from_numpy(X).half(), "k": torch.zeros(2, dtype=torch.int64)}
    )
    assert (tensors["a"].dtype, tensors["b"].dtype) == (torch.float32, torch.float16)


@pytest.mark.parametrize(
    ("feed", "sentence"),
    [
        ({"x": X}, "the input 'k' is missing; the model reads x, k"),
        ({**FEED, "x": X.astype(np.float64)}, "the input 'x' has the type float64, the model wants float32"),
        ({**FEED, "x": X[0]}, r"the input 'x' has the shape \[4\], the model wants \[any, 4\]"),
        ({**FEED, "x": X[:, :3]}, r"the input 'x' has the shape \[2, 3\], the model wants \[any, 4\]"),
        ({**FEED, "z": X}, "inputs of the model are 'x', 'k': 'z' is unknown"),
    ],
)
def test_wrong_inputs(feed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=f"^{sentence}$"):
        runner().run(feed)


def test_tensors_of_another_kind() -> None:
    with pytest.raises(InputError, match=r"^the input 'k' has the type torch.float32, the model wants INT64$"):
        runner().run_tensors({"x": torch.from_numpy(X), "k": torch.zeros(2)})


def test_sequences_come_back_as_lists() -> None:
    text = "g (float[4,2] x) => (seq(float) s) { s = SplitToSequence<axis=0>(x) }"
    model = models.build(text, {}).SerializeToString()
    found = Runner(Executor(onnx.ModelProto.FromString(model), CPU, torch.float32), 0).run({"x": X.reshape(4, 2)})
    assert [item.tolist() for item in found["s"]] == X.reshape(4, 1, 2).tolist()


def test_graphs_are_not_changed() -> None:
    model = file_of("packed", "gemm bias", "ort-cpu", [QuantSpec(3, 32)])
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    Executor(model, CPU, torch.float16)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_external_data(tmp_path: Path) -> None:
    model = file_of("matmulnbits", "gemm bias", "ort-cpu", [QuantSpec(4, 32), QuantSpec(3, 32)])
    wanted = expected(model, feed_of(KINDS["gemm bias"]))
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    before = (tmp_path / "m.data").read_bytes()
    found = Runner(Executor(tmp_path / "m.onnx", CPU, torch.float32), 0).run(feed_of(KINDS["gemm bias"]))
    assert all(metrics.sqnr(value, found[name]) >= 110 for name, value in wanted.items())
    assert (tmp_path / "m.data").read_bytes() == before
