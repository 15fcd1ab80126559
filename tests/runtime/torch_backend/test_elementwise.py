"""Arithmetic, logic and activations: derivatives, old versions, types that torch lacks, values at the edges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from scipy import special

from quantkit.runtime.torch_backend import to_torch
from quantkit.runtime.torch_backend.backend import TorchBackend
from tests.runtime.torch_backend.cases import in_onnxruntime, in_torch, shapes_elsewhere, single

KIND = onnx.TensorProto


def f32(values: Any) -> Any:
    return np.array(values, np.float32)


def spaced(*shape: int, low: float = -2.0, high: float = 2.0, seed: int = 0) -> torch.Tensor:
    """Distinct float64 numbers away from 0, 0.5 and 1, where functions have corners."""
    order = torch.randperm(int(np.prod(shape)), generator=torch.Generator().manual_seed(seed))
    values = torch.linspace(low, high, len(order), dtype=torch.float64)[order] + 0.013
    return values.reshape(shape)


OF_ONE = """Abs Asinh Atan Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity LeakyRelu LogSoftmax
Max Mish Neg Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softmax Softplus Softsign Sum Swish Tan Tanh
ThresholdedRelu"""
# Operator -> (inputs, attributes).
SMOOTH: dict[str, tuple[tuple[torch.Tensor, ...], Mapping[str, Any]]] = {
    **{name: ((spaced(2, 3),), {}) for name in OF_ONE.split()},
    **{name: ((spaced(2, 3, low=-0.8, high=0.8),), {}) for name in ("Acos", "Asin", "Atanh")},
    **{name: ((spaced(2, 3, low=1.1, high=4.0),), {}) for name in ("Acosh", "Log", "Sqrt")},
    **{
        name: ((spaced(2, 3), spaced(1, 3, low=0.47, high=1.83, seed=1)), {})
        for name in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Mean", "Sum")
    },
    "Mean of three": ((spaced(2, 3), spaced(3), spaced(2, 1)), {}),
    "Max of three": ((spaced(2, 3), spaced(3, seed=1) + 0.1, spaced(2, 1, seed=2)), {}),
    "Pow": ((spaced(2, 3, low=0.3), spaced(2, 3)), {}),
    "Pow of a scalar": ((spaced(2, 3, low=0.3), torch.tensor(3.0, dtype=torch.float64)), {}),
    "Mod": ((spaced(2, 3), spaced(2, 3, low=3.0, high=4.0)), {"fmod": 1}),
    "Clip": ((spaced(2, 3), torch.tensor(-0.6).double(), torch.tensor(0.7).double()), {}),
    "PRelu": ((spaced(2, 3, 2, 2), spaced(3, 1, 1)), {}),
    "PRelu of one slope": ((spaced(2, 3), spaced(1)), {}),
    "SwiGLU": ((spaced(2, 3), spaced(2, 3, seed=1)), {"alpha": 1.3}),
    "Swish of another slope": ((spaced(2, 3),), {"alpha": 0.7}),
    "Gelu by tanh": ((spaced(2, 3),), {"approximate": "tanh"}),
    "Softmax in the middle": ((spaced(2, 3, 2),), {"axis": 1}),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_first_and_second_derivatives(name: str) -> None:
    tensors, attributes = SMOOTH[name]
    inputs = {f"x{place}": item.float().numpy() for place, item in enumerate(tensors)}
    op = name.split(" ")[0]
    module = to_torch(single(op, inputs, attributes, opset=28), dtype=torch.float64)
    leaves = [item.clone().requires_grad_(True) for item in tensors]
    assert torch.autograd.gradcheck(module, leaves)
    assert torch.autograd.gradgradcheck(module, leaves, atol=1e-4)


@pytest.mark.parametrize("name", SMOOTH)
def test_nothing_is_read_back_from_the_device(name: str) -> None:
    tensors, attributes = SMOOTH[name]
    inputs = {f"x{place}": item.float().numpy() for place, item in enumerate(tensors)}
    model = single(name.split(" ")[0], inputs, attributes, opset=28)
    shape = np.broadcast_shapes(*(tuple(item.shape) for item in tensors))
    assert shapes_elsewhere(model, inputs) == [(torch.float32, tuple(shape))]


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_and_is_as_good_as_it_gets(name: str, dtype: torch.dtype) -> None:
    tensors, attributes = SMOOTH[name]
    inputs = {f"x{place}": item.float().numpy() for place, item in enumerate(tensors)}
    model = single(name.split(" ")[0], inputs, attributes, opset=28)
    halves = [item.to(dtype) for item in tensors]
    found = to_torch(model, dtype=dtype)(*halves)
    assert found.dtype == dtype
    expected = to_torch(model, dtype=torch.float64)(*(item.double() for item in halves))
    assert torch.allclose(found.double(), expected, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


WHERE = np.array([[True, False, True]])


def test_where_passes_gradients_to_the_side_that_is_chosen() -> None:
    x, y = spaced(2, 3).requires_grad_(True), spaced(2, 1, seed=1).requires_grad_(True)
    inputs = {"c": WHERE, "x": np.ones((2, 3), np.float32), "y": np.ones((2, 1), np.float32)}
    module = to_torch(single("Where", inputs), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, y: module(torch.from_numpy(WHERE), x, y), (x, y))


X = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
OLD: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "Softmax of axes as one": ("Softmax", 11, {"x": X}, {}),
    "Softmax of all axes": ("Softmax", 11, {"x": X}, {"axis": 0}),
    "Softmax of the last axis": ("Softmax", 11, {"x": X}, {"axis": -1}),
    "LogSoftmax of two axes": ("LogSoftmax", 11, {"x": X}, {"axis": -2}),
    "Hardmax of two axes": ("Hardmax", 11, {"x": X}, {"axis": 1}),
    "Softmax of nothing": ("Softmax", 11, {"x": np.zeros((0, 3), np.float32)}, {}),
    "Clip by attributes": ("Clip", 7, {"x": X}, {"min": -0.3, "max": 0.4}),
    "Clip by one attribute": ("Clip", 7, {"x": X}, {"max": 0.4}),
    "Clip by no attribute": ("Clip", 7, {"x": X}, {}),
    "Clip of whole numbers": ("Clip", 12, {"x": np.arange(6), "low": np.array(2), "high": np.array(4)}, {}),
    "Clip from below": ("Clip", 13, {"x": X, "low": np.float32(0.1)}, {}),
    "Clip from above": ("Clip", 13, {"x": X, "low": None, "high": np.float32(0.1)}, {}),
    "Clip by crossed bounds": ("Clip", 13, {"x": X, "low": np.float32(1), "high": np.float32(-1)}, {}),
    "Max of old": ("Max", 8, {"x": X, "y": X[:, :1] + 1, "z": X[0] * 2}, {}),
    "Min of one": ("Min", 8, {"x": X}, {}),
    "PRelu": ("PRelu", 7, {"x": X, "slope": X[0, :, :1]}, {}),
    "PRelu of one slope": ("PRelu", 9, {"x": X, "slope": X[0, 0, :1]}, {}),
    "PRelu along the last axis": ("PRelu", 9, {"x": X, "slope": X[0, 0]}, {}),
    "Div of whole numbers": ("Div", 14, {"x": np.array([-7, 7, -7, 7]), "y": np.array([2, 2, -2, -2])}, {}),
    "Mod of whole numbers": ("Mod", 13, {"x": np.array([-7, 7, -7, 7]), "y": np.array([4, 4, -4, -4])}, {}),
    "Mod with the dividend's sign": (
        "Mod",
        13,
        {"x": np.array([-7, 7, -7, 7]), "y": np.array([4, 4, -4, -4])},
        {"fmod": 1},
    ),
    "Pow of whole numbers": ("Pow", 13, {"x": np.array([2, -3, 5]), "y": np.array([3, 2, 0])}, {}),
    "Pow of int by float": ("Pow", 15, {"x": np.array([2, 3, 9], np.int32), "y": f32([2, 2, 0.5])}, {}),
    "Pow of float by int": ("Pow", 15, {"x": X, "y": np.array(3, np.int64)}, {}),
    "Round half to even": ("Round", 11, {"x": np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 2.51], np.float32)}, {}),
    "Sign": ("Sign", 13, {"x": np.array([-2.5, -0.0, 3], np.float32)}, {}),
    "IsInf of one sign": ("IsInf", 10, {"x": f32([np.inf, -np.inf, 1])}, {"detect_negative": 0}),
    "IsInf of the other": ("IsInf", 10, {"x": f32([np.inf, -np.inf, 1])}, {"detect_positive": 0}),
    "IsInf of none": (
        "IsInf",
        10,
        {"x": f32([np.inf, -np.inf, 1])},
        {"detect_positive": 0, "detect_negative": 0},
    ),
    "Softplus of large numbers": ("Softplus", 1, {"x": f32([-100, -3, 0, 25, 100, 1e30])}, {}),
    "Selu of other numbers": ("Selu", 6, {"x": X}, {"alpha": 1.1, "gamma": 2.3}),
    "HardSigmoid": ("HardSigmoid", 6, {"x": X * 3}, {"alpha": 0.4, "beta": 0.3}),
    "Shrink": ("Shrink", 9, {"x": X}, {"lambd": 0.4, "bias": 0.1}),
    "Shrink of whole numbers": ("Shrink", 9, {"x": np.arange(-3, 4, dtype=np.int32)}, {"lambd": 1.5, "bias": 1.5}),
    "Hardmax of equals": ("Hardmax", 13, {"x": f32([[1, 3, 3], [2, 2, 1]])}, {}),
    "Equal of bools": ("Equal", 13, {"x": np.array([True, False]), "y": np.array([True])}, {}),
    "Shift left": (
        "BitShift",
        11,
        {"x": np.array([200, 3, 255], np.uint8), "y": np.array([1, 7, 4], np.uint8)},
        {"direction": "LEFT"},
    ),
    "Shift right": (
        "BitShift",
        11,
        {"x": np.array([2**64 - 1, 3, 2**63], np.uint64), "y": np.array([1, 0, 63], np.uint64)},
        {"direction": "RIGHT"},
    ),
    "Empty": ("Add", 14, {"x": np.zeros((0, 3), np.float32), "y": f32([1, 2, 3])}, {}),
}


@pytest.mark.parametrize("name", OLD)
def test_results_are_those_of_onnxruntime(name: str) -> None:
    op, opset, inputs, attributes = OLD[name]
    model = single(op, inputs, attributes, opset=opset)
    (expected,), (found,) = in_onnxruntime(model, inputs), TorchBackend.prepare(model).run(_arrays(inputs))
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def _arrays(inputs: Mapping[str, Any]) -> list[Any]:
    return [np.asarray(item) for item in inputs.values() if item is not None]


def test_a_constant_exponent_or_bound_may_also_be_computed() -> None:
    """A plain number is a faster way to the same result."""
    inputs = {"x": X, "y": np.float32(3)}
    for op, opset in (("Pow", 15), ("Clip", 13)):
        model = single(op, inputs, opset=opset)
        constant = single(op, inputs, opset=opset, constants=["y"])
        x, y = torch.from_numpy(X), torch.tensor(3.0, requires_grad=True)
        expected = to_torch(constant)(x)
        assert torch.allclose(to_torch(model)(x, y), expected, rtol=1e-6)
        (gradient,) = torch.autograd.grad(to_torch(model)(x.abs() + 1, y).sum(), y)
        assert float(gradient) != 0


BEFORE_7: dict[str, Callable[[Any, Any], Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Less": np.less,
    "Greater": np.greater,
}


@pytest.mark.parametrize("op", BEFORE_7)
def test_before_version_7_the_axis_of_broadcasting_is_an_attribute(op: str) -> None:
    x, y = np.abs(X) + 0.5, f32([1, 2, 3])
    model = single(op, {"x": x, "y": y}, {"broadcast": 1, "axis": 1}, opset=6)
    (found,) = in_torch(model, {"x": x, "y": y})
    np.testing.assert_allclose(found, BEFORE_7[op](x, y[:, None]), rtol=1e-6)
    model = single(op, {"x": x, "y": x[0, 0]}, {"broadcast": 1}, opset=6)
    (found,) = in_torch(model, {"x": x, "y": x[0, 0]})
    np.testing.assert_allclose(found, BEFORE_7[op](x, x[0, 0]), rtol=1e-6)
    model = single(op, {"x": x, "y": x[::-1].copy()}, {"axis": 0}, opset=6)
    (found,) = in_torch(model, {"x": x, "y": x[::-1].copy()})
    np.testing.assert_allclose(found, BEFORE_7[op](x, x[::-1]), rtol=1e-6)


@pytest.mark.parametrize(("op", "function"), [("And", np.logical_and), ("Or", np.logical_or), ("Xor", np.logical_xor)])
def test_logic_before_version_7(op: str, function: Callable[[Any, Any], Any]) -> None:
    x, y = X > 0, np.array([True, False, True])
    (found,) = in_torch(single(op, {"x": x, "y": y}, {"broadcast": 1, "axis": -2}, opset=6), {"x": x, "y": y})
    np.testing.assert_array_equal(found, function(x, y[:, None]))


def test_slopes_of_channels_before_version_7() -> None:
    slope = f32([0.1, 0.2, 0.3])
    (found,) = in_torch(single("PRelu", {"x": X, "s": slope}, opset=6), {"x": X, "s": slope})
    np.testing.assert_allclose(found, np.where(X < 0, X * slope[:, None], X), rtol=1e-6)
    (found,) = in_torch(single("PRelu", {"x": X, "s": slope[:1]}, opset=6), {"x": X, "s": slope[:1]})
    np.testing.assert_allclose(found, np.where(X < 0, X * slope[0], X), rtol=1e-6)


LARGE = np.array([0, 1, 7, 2**63 - 1, 2**63, 2**63 + 5, 2**64 - 2, 2**64 - 1], np.uint64)
ON_UINT64: dict[str, Callable[[Any, Any], Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.floor_divide,
    "Mod": np.mod,
    "Max": np.maximum,
    "Min": np.minimum,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Equal": np.equal,
    "BitwiseXor": np.bitwise_xor,
}


@pytest.mark.parametrize("op", ON_UINT64)
def test_unsigned_numbers_of_64_bits(op: str) -> None:
    rows, columns = LARGE[:, None], LARGE[None, 1:]
    model = single(op, {"x": rows, "y": columns}, opset=28)
    (found,) = TorchBackend.prepare(model).run([rows, columns])
    np.testing.assert_array_equal(found, ON_UINT64[op](rows, columns))


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Max"])
def test_smaller_unsigned_numbers_wrap_around(op: str, dtype: Any) -> None:
    top = np.iinfo(dtype).max
    x, y = np.array([top, 3, top // 2 + 1], dtype), np.array([2, 5, 2], dtype)
    (found,) = TorchBackend.prepare(single(op, {"x": x, "y": y}, opset=28)).run([x, y])
    np.testing.assert_array_equal(found, ON_UINT64[op](x, y))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
@pytest.mark.parametrize("direction", ["LEFT", "RIGHT"])
def test_shifts_past_the_last_bit(dtype: Any, direction: str) -> None:
    info = np.iinfo(dtype)
    x = np.array([info.min, info.max, 5, info.max // 3], dtype)
    bits = info.bits
    for by in (0, 1, bits - 1, bits, bits + 3, *((-1,) if info.min < 0 else ())):
        y = np.full(4, by, dtype)
        (found,) = TorchBackend.prepare(single("BitShift", {"x": x, "y": y}, {"direction": direction}, opset=28)).run(
            [x, y]
        )
        outside = by < 0 or by >= bits
        exact = [int(item) for item in x]
        if direction == "LEFT":
            expected = [0 if outside else (item << by) & ((1 << bits) - 1) for item in exact]
            expected = [item - (1 << bits) if info.min < 0 and item >> (bits - 1) else item for item in expected]
        else:
            expected = [(-1 if item < 0 else 0) if outside else item >> by for item in exact]
        assert [int(item) for item in found] == expected, by


def test_bitwise_not_keeps_to_the_bits_of_its_type() -> None:
    x = np.array([0, 1, 65535], np.uint16)
    (found,) = TorchBackend.prepare(single("BitwiseNot", {"x": x})).run([x])
    np.testing.assert_array_equal(found, ~x)


def test_clip_of_uint64_compares_unsigned() -> None:
    low, high = np.array(7, np.uint64), np.array(2**63 + 5, np.uint64)
    (found,) = TorchBackend.prepare(single("Clip", {"x": LARGE, "l": low, "h": high})).run([LARGE, low, high])
    np.testing.assert_array_equal(found, np.clip(LARGE, low, high))


def test_remainders_of_floats_at_the_edges() -> None:
    x = f32([0, -0.0, 5.5, -5.5, np.inf, 2, -2, np.nan, 3])
    y = f32([-3, 3, 2, 2, 3, np.inf, np.inf, 1, 0])
    (found,) = in_torch(single("Mod", {"x": x, "y": y}, opset=28), {"x": x, "y": y})
    np.testing.assert_array_equal(found, f32([-0.0, 0, 1.5, 0.5, np.nan, 2, np.inf, np.nan, np.nan]))
    assert np.signbit(found[:2]).tolist() == [True, False]


def test_float64_results_are_exact_to_the_last_digits() -> None:
    x = np.linspace(-30, 50, 81)
    for op, function in (
        ("Softplus", lambda v: np.logaddexp(0, v)),
        ("Erf", special.erf),
        ("Mish", lambda v: v * np.tanh(np.logaddexp(0, v))),
        ("Gelu", lambda v: v * special.ndtr(v)),
        ("Sigmoid", special.expit),
    ):
        (found,) = in_torch(single(op, {"x": x}, opset=23), {"x": x})
        np.testing.assert_allclose(found, function(x), rtol=1e-9, atol=1e-14, err_msg=op)
