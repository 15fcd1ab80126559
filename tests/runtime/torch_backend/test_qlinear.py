"""Operators on codes: the same codes as onnxruntime, exact sums, gradients as if nothing were rounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import pytest
import torch

from quantkit.errors import InputError
from quantkit.runtime.torch_backend import to_torch
from tests.runtime.torch_backend.cases import MICROSOFT, in_onnxruntime, in_torch, shapes_elsewhere, single

UINT8, INT8 = np.uint8, np.int8


def codes(dtype: Any, *shape: int, seed: int = 0) -> Any:
    info = np.iinfo(dtype)
    return np.random.default_rng([seed, *shape]).integers(info.min, info.max, shape, dtype, endpoint=True)


def scale(*values: float) -> Any:
    return np.array(values if len(values) > 1 else values[0], np.float32)


@dataclass(frozen=True)
class Case:
    """One node. `apart`: the share of codes that may be one step off, where onnxruntime rounds another way."""

    op: str
    inputs: Mapping[str, Any]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    domain: str = ""
    apart: float = 0.0


def product(a: Any, b: Any, dtype: Any = UINT8, columns: bool = False) -> dict[str, Any]:
    """Inputs of QLinearMatMul."""
    number = b.shape[-1]
    b_scale = np.linspace(0.01, 0.02, number).astype(np.float32) if columns else scale(0.013)
    b_zero = np.zeros(number, b.dtype) if columns else b.dtype.type(3)
    return {
        "a": a,
        "as": scale(0.02),
        "az": a.dtype.type(7),
        "b": b,
        "bs": b_scale,
        "bz": b_zero,
        "ys": scale(0.3),
        "yz": dtype(5),
    }


def gemm(a: Any, b: Any, quantized: bool = True) -> dict[str, Any]:
    """Inputs of QGemm: the bias stands before the output's scale."""
    inputs = product(a, b)
    output = {name: inputs.pop(name) for name in ("ys", "yz")}
    inputs["c"] = np.arange(6, dtype=np.int32) * 50
    return {**inputs, **output} if quantized else inputs


def convolution(x: Any, w: Any, bias: bool, per_channel: bool = True) -> dict[str, Any]:
    number = w.shape[0]
    w_scale = np.linspace(0.01, 0.02, number).astype(np.float32) if per_channel else scale(0.02)
    zero = np.zeros(number, w.dtype) if per_channel else w.dtype.type(0)
    inputs = {"x": x, "xs": scale(0.02), "xz": x.dtype.type(9), "w": w, "ws": w_scale, "wz": zero}
    inputs |= {"ys": scale(0.4), "yz": x.dtype.type(4)}
    return {**inputs, "b": np.arange(number, dtype=np.int32) * 99} if bias else inputs


def pair(a: Any, b: Any) -> dict[str, Any]:
    inputs = {"a": a, "as": scale(0.02), "az": a.dtype.type(7), "b": b, "bs": scale(0.031), "bz": a.dtype.type(5)}
    return {**inputs, "cs": scale(0.05), "cz": a.dtype.type(11)}


def alone(x: Any, y_scale: float = 0.02, y_zero: int = 6) -> dict[str, Any]:
    return {"x": x, "xs": scale(0.025), "xz": x.dtype.type(12), "ys": scale(y_scale), "yz": x.dtype.type(y_zero)}


IMAGE, PIXELS = codes(UINT8, 2, 5, 7, 6), codes(INT8, 2, 7, 6, 5)
CASES = {
    "MatMulInteger": Case(
        "MatMulInteger", {"a": codes(UINT8, 3, 700), "b": codes(INT8, 700, 5), "az": UINT8(77), "bz": INT8(-3)}
    ),
    "MatMulInteger batched": Case("MatMulInteger", {"a": codes(UINT8, 2, 3, 9), "b": codes(UINT8, 9, 5)}),
    "ConvInteger": Case(
        "ConvInteger",
        {"x": codes(UINT8, 2, 40, 6, 5), "w": codes(UINT8, 4, 40, 3, 3), "xz": UINT8(200), "wz": UINT8(3)},
        {"pads": [1, 0, 2, 1], "strides": [2, 1]},
    ),
    "QLinearMatMul": Case("QLinearMatMul", product(codes(UINT8, 4, 300), codes(INT8, 300, 6))),
    "QLinearMatMul signed": Case("QLinearMatMul", product(codes(INT8, 4, 9), codes(INT8, 9, 6), INT8)),
    "QLinearMatMul by columns": Case("QLinearMatMul", product(codes(UINT8, 2, 4, 9), codes(INT8, 9, 6), columns=True)),
    "QLinearConv": Case("QLinearConv", convolution(IMAGE, codes(INT8, 4, 5, 3, 3), True), {"pads": [1, 1, 1, 1]}),
    "QLinearConv one scale": Case(
        "QLinearConv", convolution(IMAGE, codes(UINT8, 4, 5, 3, 2), False, False), {"auto_pad": "SAME_LOWER"}
    ),
    "QLinearConv grouped": Case(
        "QLinearConv", convolution(codes(UINT8, 1, 8, 9), codes(INT8, 6, 4, 3), True), {"group": 2, "dilations": [2]}
    ),
    "QLinearConv same upper": Case(
        "QLinearConv",
        convolution(codes(INT8, 1, 2, 7, 8), codes(INT8, 3, 2, 4, 2), True),
        {"auto_pad": "SAME_UPPER", "strides": [2, 3]},
    ),
    "QGemm": Case("QGemm", gemm(codes(UINT8, 5, 4), codes(INT8, 6, 5)), {"transA": 1, "transB": 1}, MICROSOFT),
    "QGemm to floats": Case(
        "QGemm", gemm(codes(UINT8, 4, 9), codes(INT8, 9, 6), quantized=False), {"alpha": 0.7}, MICROSOFT
    ),
    "MatMulIntegerToFloat": Case(
        "MatMulIntegerToFloat",
        {
            "a": codes(UINT8, 2, 3, 8),
            "b": codes(INT8, 8, 5),
            "as": scale(0.02),
            "bs": scale(1, 2, 3, 4, 5),
            "az": UINT8(9),
            "bz": np.array([1, 2, 3, -4, 5], INT8),
            "c": scale(5, 4, 3, 2, 1),
        },
        domain=MICROSOFT,
    ),
    "DynamicQuantizeMatMul": Case(
        "DynamicQuantizeMatMul",
        {
            "a": np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32),
            "b": codes(INT8, 8, 5),
            "bs": scale(0.1, 0.2, 0.3, 0.4, 0.5),
            "bz": None,
            "c": scale(5, 4, 3, 2, 1),
        },
        domain=MICROSOFT,
    ),
    "QLinearAdd": Case("QLinearAdd", pair(codes(UINT8, 2, 300), codes(UINT8, 300, seed=1)), {}, MICROSOFT, 0.01),
    "QLinearAdd signed": Case("QLinearAdd", pair(codes(INT8, 2, 3, 4), codes(INT8, 3, 1)), {}, MICROSOFT, 0.01),
    "QLinearMul": Case("QLinearMul", pair(codes(UINT8, 2, 300), codes(UINT8, 2, 1)), {}, MICROSOFT, 0.01),
    "QLinearSigmoid": Case("QLinearSigmoid", alone(codes(UINT8, 400), 1 / 256, 0), {}, MICROSOFT, 0.01),
    "QLinearLeakyRelu": Case("QLinearLeakyRelu", alone(codes(INT8, 400)), {"alpha": 0.3}, MICROSOFT, 0.01),
    "QLinearSoftmax": Case(
        "QLinearSoftmax", alone(codes(UINT8, 3, 4, 5), 1 / 256, 0), {"axis": -1, "opset": 13}, MICROSOFT, 0.02
    ),
    "QLinearSoftmax before 13": Case(
        "QLinearSoftmax", alone(codes(INT8, 3, 4, 5), 1 / 256, -128), {"axis": 1, "opset": 11}, MICROSOFT, 0.02
    ),
    "QLinearGlobalAveragePool": Case("QLinearGlobalAveragePool", alone(IMAGE), {}, MICROSOFT, 0.02),
    "QLinearGlobalAveragePool channels last": Case(
        "QLinearGlobalAveragePool", alone(PIXELS), {"channels_last": 1}, MICROSOFT, 0.02
    ),
    "QLinearAveragePool": Case(
        "QLinearAveragePool",
        alone(IMAGE),
        {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 1]},
        MICROSOFT,
        0.01,
    ),
    "QLinearAveragePool with its padding": Case(
        "QLinearAveragePool",
        alone(IMAGE),
        {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1},
        MICROSOFT,
        0.01,
    ),
    "QLinearAveragePool channels last": Case(
        "QLinearAveragePool", alone(PIXELS), {"kernel_shape": [2, 2], "channels_last": 1}, MICROSOFT, 0.01
    ),
    "QLinearConcat": Case(
        "QLinearConcat",
        {
            "ys": scale(0.05),
            "yz": UINT8(3),
            "a": codes(UINT8, 2, 30),
            "as": scale(0.02),
            "az": UINT8(0),
            "b": codes(UINT8, 2, 40),
            "bs": scale(0.03),
            "bz": UINT8(99),
        },
        {"axis": 1},
        MICROSOFT,
        0.01,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_codes_are_those_of_onnxruntime(name: str) -> None:
    case = CASES[name]
    model = single(case.op, case.inputs, case.attributes, opset=21, domain=case.domain)
    (expected,), (found,) = in_onnxruntime(model, case.inputs), in_torch(model, case.inputs)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if expected.dtype == np.float32:
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    else:
        difference = np.abs(found.astype(np.int64) - expected)
        assert difference.max(initial=0) <= (1 if case.apart else 0)
        assert (difference > 0).mean() <= case.apart
    assert shapes_elsewhere(model, case.inputs) == [(torch.from_numpy(found).dtype, found.shape)]
    if np.issubdtype(expected.dtype, np.integer):
        assert len(np.unique(expected)) > 3, "the case says little"


def test_a_case_that_is_wrong_by_one_zero_point_is_seen() -> None:
    """The comparison above is sharp: another zero point of the output moves nearly all codes."""
    case = CASES["QLinearAdd"]
    other = {**case.inputs, "cz": UINT8(12)}
    model = single(case.op, case.inputs, case.attributes, opset=21, domain=case.domain)
    (expected,), (found,) = in_onnxruntime(model, case.inputs), in_torch(model, other)
    assert (expected != found).mean() > 0.5


def test_products_of_floats_of_8_bits_stay_floats() -> None:
    a, b = (np.random.default_rng(seed).normal(size=(3, 4)).astype(np.float32) for seed in (0, 1))
    quarter = oh.make_tensor("", onnx.TensorProto.FLOAT8E4M3FN, [], [0.0])
    inputs = {
        "a": cast_codes(a),
        "as": scale(0.5),
        "az": quarter,
        "b": cast_codes(b.T),
        "bs": scale(2),
        "bz": quarter,
        "ys": scale(0.25),
        "yz": quarter,
    }
    model = single("QLinearMatMul", inputs, opset=21, constants=["as", "bs", "ys"])
    found = to_torch(model)()
    exact = torch.from_numpy(rounded(a) @ rounded(b).T * 4).to(torch.float8_e4m3fn)
    assert torch.equal(found.float(), exact.float())


def rounded(x: Any) -> Any:
    return torch.from_numpy(x).to(torch.float8_e4m3fn).float().numpy()


def cast_codes(x: Any) -> onnx.TensorProto:
    return oh.make_tensor("", onnx.TensorProto.FLOAT8E4M3FN, x.shape, rounded(x).ravel())


def chain(second: str, weight: Any) -> onnx.ModelProto:
    """x -> DynamicQuantizeLinear -> MatMulInteger or ConvInteger -> Cast -> Mul."""
    nodes = [
        oh.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        oh.make_node(second, ["q", "w", "z"], ["t"]),
        oh.make_node("Cast", ["t"], ["f"], to=onnx.TensorProto.FLOAT),
        oh.make_node("Mul", ["f", "s"], ["y"]),
    ]
    graph = oh.make_graph(
        nodes,
        "g",
        [oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None)],
        [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [nh.from_array(weight, "w")],
    )
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize("second", ["MatMulInteger", "ConvInteger"])
def test_gradients_pass_through_integer_products_without_changing_them(second: str) -> None:
    weight = codes(INT8, 300, 6) if second == "MatMulInteger" else codes(INT8, 6, 40, 3)
    shape = (5, 300) if second == "MatMulInteger" else (2, 40, 7)
    module = to_torch(chain(second, weight))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = module(x)
    x.requires_grad_(True)
    found = module(x)
    assert torch.equal(found, plain)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((found * direction).sum(), x)
    smooth = x.detach().clone().requires_grad_(True)
    wide = torch.from_numpy(weight).float()
    product = smooth @ wide if second == "MatMulInteger" else torch.nn.functional.conv1d(smooth, wide)
    (expected,) = torch.autograd.grad((product * direction).sum(), smooth)
    # The two ends of the range also move the scale.
    middle = (x != x.min()) & (x != x.max())
    assert torch.allclose(gradient[middle], expected[middle], rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["QLinearConv", "QLinearMatMul", "QLinearAdd", "QLinearLeakyRelu", "QGemm"])
def test_results_with_gradients_are_the_same_codes(name: str) -> None:
    case = CASES[name]
    module = to_torch(single(case.op, case.inputs, case.attributes, opset=21, domain=case.domain))
    feed = {key: torch.from_numpy(np.asarray(item)) for key, item in case.inputs.items()}
    with torch.no_grad():
        plain = module(**feed)
    key = "ys" if "ys" in feed else "cs"
    feed[key] = feed[key].clone().requires_grad_(True)
    found = module(**feed)
    assert torch.equal(found, plain.to(found.dtype))
    (gradient,) = torch.autograd.grad(found.sum(), feed[key])
    step = 0.05 * feed[key].detach()
    with torch.no_grad():
        more, less = (module(**{**feed, key: feed[key] + sign * step}).double().sum() for sign in (1, -1))
    difference = float((more - less) / (2 * step))
    assert abs(float(gradient) - difference) <= 0.1 * abs(difference)


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "domain", "message"),
    [
        ("ConvInteger", {"x": codes(UINT8, 1, 1, 2, 2, 2, 2), "w": codes(INT8, 1, 1, 1, 1, 1, 1)}, {}, "", "4 spatial"),
        ("QLinearAveragePool", alone(IMAGE), {"kernel_shape": [1] * 4}, MICROSOFT, "4 spatial axes"),
        ("QLinearAveragePool", alone(IMAGE), {"kernel_shape": [2, 2], "ceil_mode": 1}, MICROSOFT, "ceil_mode"),
    ],
)
def test_what_is_not_done_is_refused(
    op: str, inputs: Mapping[str, Any], attributes: Mapping[str, Any], domain: str, message: str
) -> None:
    model = single(op, inputs, attributes, opset=21, domain=domain)
    with pytest.raises(InputError, match=f"{op} 'node': .*{message}"):
        in_torch(model, inputs)
