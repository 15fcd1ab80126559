"""Random small networks at random settings: what comes out runs, has the same shapes, and is as large as told.

`compress` itself proves that the model it made computes what its plan says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import quantkit
from tests.helpers import models

SAMPLES = 8
CHANNELS = (16, 24)
SIDE = 6
LENGTH = 5
LARGEST = 600
"""Inputs of the last layer; GPTQ takes seconds for thousands."""
Draw = Any


@dataclass
class Net:
    """A network in ONNX text, as it grows."""

    draw: Draw
    opset: int
    batch: int | None
    lines: list[str] = field(default_factory=list)
    weights: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def weight(self, *shape: int, scale: float = 0.2) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = scale * models.random(*shape, seed=len(self.weights))
        return name

    def constant(self, numbers: list[int]) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = np.array(numbers, np.int64)
        return name

    def add(self, call: str, shape: tuple[int, ...]) -> str:
        """One more node; the shape is without the batch."""
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {call}")
        self.shapes[name] = shape
        return name

    def pick(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def same(self, shape: tuple[int, ...]) -> str:
        """Any value of this shape."""
        return str(self.draw(st.sampled_from([name for name, known in self.shapes.items() if known == shape])))


def _image_step(net: Net, x: str) -> str:
    """One layer on [batch, channels, height, width]."""
    channels, height, width = net.shapes[x]
    kind = net.pick("conv", "conv", "depthwise", "groups", "transposed", "pool", "relu", "add", "concat")
    if kind == "conv":
        made, kernel = net.pick(*CHANNELS), net.pick(1, 3)
        bias = f", {net.weight(made)}" if net.pick(True, False) else ""
        pad = kernel // 2
        call = f"Conv<pads=[{pad},{pad},{pad},{pad}]>({x}, {net.weight(made, channels, kernel, kernel)}{bias})"
        return net.add(call, (made, height, width))
    if kind == "depthwise":
        weight = net.weight(channels, 1, 3, 3)
        return net.add(f"Conv<pads=[1,1,1,1], group={channels}>({x}, {weight})", (channels, height, width))
    if kind == "groups":
        weight = net.weight(channels, channels // 2, 3, 3)
        return net.add(f'Conv<auto_pad="SAME_UPPER", group=2>({x}, {weight})', (channels, height, width))
    if kind == "transposed" and height <= SIDE:
        groups = net.pick(1, 2)
        weight = net.weight(channels, 16 // groups, 2, 2)
        call = f"ConvTranspose<strides=[2,2], group={groups}>({x}, {weight})"
        return net.add(call, (16, 2 * height, 2 * width))
    if kind == "pool" and height >= 4:
        operator = net.pick("MaxPool", "AveragePool")
        call = f"{operator}<kernel_shape=[2,2], strides=[2,2]>({x})"
        return net.add(call, (channels, height // 2, width // 2))
    if kind == "add":
        return net.add(f"Add({x}, {net.same(net.shapes[x])})", net.shapes[x])
    if kind == "concat" and channels <= 24:
        return net.add(f"Concat<axis=1>({x}, {net.same(net.shapes[x])})", (2 * channels, height, width))
    return net.add(f"Relu({x})", net.shapes[x])


def _token_step(net: Net, x: str) -> str:
    """One layer on [batch, length, channels]."""
    length, channels = net.shapes[x]
    kind = net.pick("linear", "linear", "shared", "norm", "softmax", "attention", "relu", "add", "concat")
    if kind == "linear":
        made = net.pick(*CHANNELS)
        y = net.add(f"MatMul({x}, {net.weight(channels, made)})", (length, made))
        return net.add(f"Add({y}, {net.weight(made)})", (length, made)) if net.pick(True, False) else y
    if kind == "shared":
        weight = net.weight(channels, channels)
        y = net.add(f"MatMul({x}, {weight})", (length, channels))
        z = net.add(f"Relu({y})", (length, channels))
        return net.add(f"MatMul({z}, {weight})", (length, channels))
    if kind == "norm" and net.opset >= 17:
        return net.add(f"LayerNormalization({x}, {net.weight(channels)}, {net.weight(channels)})", (length, channels))
    if kind == "attention":
        q = net.add(f"MatMul({x}, {net.weight(channels, 16)})", (length, 16))
        k = net.add(f"MatMul({x}, {net.weight(channels, 16)})", (length, 16))
        t = net.add(f"Transpose<perm=[0,2,1]>({k})", (16, length))
        a = net.add(f"MatMul({q}, {t})", (length, length))
        s = net.add(f"Softmax<axis=-1>({a})", (length, length))
        return net.add(f"MatMul({s}, {x})", (length, channels))
    if kind == "add":
        return net.add(f"Add({x}, {net.same(net.shapes[x])})", net.shapes[x])
    if kind == "concat" and channels <= 24:
        return net.add(f"Concat<axis=2>({x}, {net.same(net.shapes[x])})", (length, 2 * channels))
    return net.add(f"{'Softmax<axis=-1>' if kind == 'softmax' else 'Relu'}({x})", net.shapes[x])


def _head(net: Net, x: str) -> tuple[str, int]:
    """[batch, ...] -> [batch, classes] through a layer that is large enough to be worth it."""
    shape = net.shapes[x]
    if len(shape) == 3 and net.pick(True, False):  # pixels as tokens
        flat = net.add(f"Reshape({x}, {net.constant([0, shape[0], -1])})", (shape[0], shape[1] * shape[2]))
        x = net.add(f"Transpose<perm=[0,2,1]>({flat})", (shape[1] * shape[2], shape[0]))
        x = _token_step(net, x)
    if len(shape) == 3 and len(net.shapes[x]) == 3 and int(np.prod(shape)) > LARGEST:
        x = net.add(f"GlobalAveragePool({x})", (shape[0], 1, 1))
    size = int(np.prod(net.shapes[x]))
    x = net.add(f"Reshape({x}, {net.constant([-1 if net.batch is None else net.batch, size])})", (size,))
    if net.pick(True, False):
        return net.add(f"MatMul({x}, {net.weight(size, 16)})", (16,)), 16
    bias = f", {net.weight(20)}" if net.pick(True, False) else ""
    alpha = net.pick("", "alpha=0.5, ")
    return net.add(f"Gemm<{alpha}transB=1>({x}, {net.weight(20, size)}{bias})", (20,)), 20


@st.composite
def networks(draw: Draw) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """A model and data that fits it."""
    net = Net(draw, draw(st.integers(13, 21)), draw(st.sampled_from([None, None, 1, 2])))
    kind = net.pick("image", "image", "features", "ids")
    shape = {"image": (16, SIDE, SIDE), "features": (LENGTH, 16), "ids": (LENGTH,)}[kind]
    net.shapes["x"] = shape
    first, random = "N" if net.batch is None else net.batch, np.random.default_rng(7)
    data: Any = random.standard_normal((SAMPLES, *shape)).astype(np.float32)
    x = "x"
    if kind == "ids":
        data = random.integers(0, 40, (SAMPLES, *shape))
        x = net.add(f"Gather({net.weight(100, 16)}, x)", (LENGTH, 16))
    for _ in range(draw(st.integers(0, 4))):
        x = _image_step(net, x) if kind == "image" else _token_step(net, x)
    y, classes = _head(net, x)
    outputs = [f"float[{first},{classes}] {y}"]
    if net.pick(True, False) and x != "x":  # a branch that leaves early
        outputs.append(f"float[{','.join(map(str, (first, *net.shapes[x])))}] {x}")
    letters = {"float32": "float", "int64": "int64"}
    declared = [f"{letters[array.dtype.name]}{list(array.shape)} {name}" for name, array in net.weights.items()]
    inputs = [f"{'int64' if kind == 'ids' else 'float'}[{','.join(map(str, (first, *shape)))}] x", *declared]
    text = f"g ({', '.join(inputs)}) => ({', '.join(outputs)}) {{ {' '.join(net.lines)} }}"
    return models.build(text, net.weights, opset=net.opset, ir=8), {"x": data}


OPTIONS = st.fixed_dictionaries(
    {
        "bits": st.one_of(st.integers(2, 8).map(lambda bits: (bits,)), st.just((4, 8)), st.just((2, 8))),
        "activations": st.sampled_from(["auto", "8", "none"]),
        "group_size": st.sampled_from([None, None, -1, 8, 16, 32]),
        "quantizer": st.sampled_from(["rtn", "mse", "gptq"]),
        "target": st.sampled_from(["ort-cpu", "portable"]),
        "seed": st.integers(0, 3),
    }
)


def _run(model: bytes | str, feed: Mapping[str, Any]) -> list[Any]:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return list(ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, dict(feed)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("properties")


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # making a failure smaller takes minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(network=networks(), options=OPTIONS, given_data=st.booleans())
def test_random_networks(
    network: tuple[onnx.ModelProto, dict[str, Any]],
    options: dict[str, Any],
    given_data: bool,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models.quick(monkeypatch)
    model, data = network
    before, values = model.SerializeToString(), data["x"].copy()
    source = {"calibration": data} if given_data else {"random_calibration": True}
    result = quantkit.compress(
        model, **source, **options, allocator="uniform", calibrator="minmax", cache=folder / "cache", workers=1
    )
    assert model.SerializeToString() == before
    np.testing.assert_array_equal(data["x"], values)
    path = folder / "out.onnx"
    result.save(path)
    assert result.report.size_after == path.stat().st_size
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 3
    feed = {"x": data["x"][:batch]}
    wanted, found = _run(before, feed), _run(str(path), feed)
    assert [(array.shape, array.dtype) for array in found] == [(array.shape, array.dtype) for array in wanted]
    assert all(np.isfinite(array).all() for array in found)
