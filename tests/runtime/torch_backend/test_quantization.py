"""QuantizeLinear and its kin: codes of every type and layout, exact differences, straight-through gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import pytest
import torch

from quantkit.errors import InputError
from quantkit.runtime.torch_backend import to_torch
from tests.runtime.torch_backend.cases import MICROSOFT, in_onnxruntime, in_torch, single

KIND = onnx.TensorProto
RANGES: dict[int, tuple[int, int]] = {
    KIND.INT2: (-2, 1),
    KIND.UINT2: (0, 3),
    KIND.INT4: (-8, 7),
    KIND.UINT4: (0, 15),
    KIND.INT8: (-128, 127),
    KIND.UINT8: (0, 255),
    KIND.INT16: (-32768, 32767),
    KIND.UINT16: (0, 65535),
}
SHAPE = (3, 10, 4)


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def spread(values: Any, axis: int, block: int) -> Any:
    """Scales as large as the data."""
    if values.ndim == 0:
        return values
    if block:
        return np.take(values, np.arange(SHAPE[axis]) // block, axis)
    return values.reshape([-1 if place == axis % 3 else 1 for place in range(3)])


LAYOUTS = {"tensor": ((), 1, 0), "axis": ((10,), 1, 0), "last axis": ((4,), -1, 0), "blocks": ((3, 5, 4), 1, 2)}
LAYOUTS["short last block"] = ((3, 3, 4), 1, 4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", RANGES)
def test_quantize_and_dequantize_are_their_definitions(kind: int, layout: str) -> None:
    shape, axis, block = LAYOUTS[layout]
    low, high = RANGES[kind]
    scale = np.abs(normal(*shape, seed=1)) * np.float32(6 / (high - low)) + np.float32(1e-5)
    points = np.random.default_rng(2).integers(low // 2, high // 2, shape, endpoint=True)
    x = normal(*SHAPE)
    given = {"axis": axis, **({"block_size": block} if block else {})}
    stored = oh.make_tensor("z", kind, shape, np.ravel(points))
    inputs = {"x": x, "s": scale, "z": stored}
    (codes,) = in_torch(single("QuantizeLinear", inputs, given, opset=25), inputs)
    wide, zero = spread(scale, axis, block), spread(points, axis, block)
    expected = np.clip(np.rint(x / wide) + zero, low, high).astype(np.int64)
    np.testing.assert_array_equal(codes.astype(np.int64), expected)
    assert {low, high} <= set(expected.ravel().tolist()) or kind in (KIND.INT16, KIND.UINT16)
    inputs = {"x": oh.make_tensor("x", kind, SHAPE, expected.ravel()), "s": scale, "z": stored}
    (restored,) = in_torch(single("DequantizeLinear", inputs, given, opset=25), inputs)
    np.testing.assert_allclose(restored, (expected - zero) * wide, rtol=1e-6)


@pytest.mark.parametrize("domain", ["", MICROSOFT])
@pytest.mark.parametrize("half", [False, True])
def test_codes_are_those_of_onnxruntime(half: bool, domain: str) -> None:
    dtype = np.float16 if half else np.float32
    inputs = {"x": normal(2, 300).astype(dtype), "s": np.array(0.031, dtype), "z": np.array(100, np.uint8)}
    model = single("QuantizeLinear", inputs, opset=21, domain=domain)
    (expected,), (found,) = in_onnxruntime(model, inputs), in_torch(model, inputs)
    if half:  # onnxruntime divides in float32, where the definition says in the type of the scale
        difference = np.abs(found.astype(np.int64) - expected)
        assert difference.max() <= 1
        assert 0 < difference.mean() <= 0.03
    else:
        np.testing.assert_array_equal(found, expected)
    back = {"q": expected, "s": inputs["s"], "z": inputs["z"]}
    model = single("DequantizeLinear", back, opset=21, domain=domain)
    (expected,), (found,) = in_onnxruntime(model, back), in_torch(model, back)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected)


def test_oldest_version_without_zero_point_makes_uint8() -> None:
    inputs = {"x": np.array([-1, 0.26, 300], np.float32), "s": np.array(0.5, np.float32)}
    (found,) = in_torch(single("QuantizeLinear", inputs, opset=10), inputs)
    np.testing.assert_array_equal(found, np.array([0, 1, 255], np.uint8))
    (back,) = in_torch(single("DequantizeLinear", {"q": found, "s": inputs["s"]}, opset=10), {"q": found, **inputs})
    np.testing.assert_array_equal(back, np.array([0, 0.5, 127.5], np.float32))


def test_output_type_and_precision_are_attributes() -> None:
    x, scale = np.array([1.0, 2.5, -7.0], np.float32), np.array(0.3, np.float16)
    inputs = {"x": x, "s": scale}
    given = {"output_dtype": KIND.INT4, "precision": KIND.FLOAT}
    (found,) = in_torch(single("QuantizeLinear", inputs, given, opset=25), inputs)
    np.testing.assert_array_equal(found, np.clip(np.rint(x / scale.astype(np.float32)), -8, 7))
    back = {"q": np.array([1, 2], np.int8), "s": scale}
    (found,) = in_torch(single("DequantizeLinear", back, {"output_dtype": KIND.FLOAT}, opset=25), back)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array([1, 2]) * scale.astype(np.float32))


def test_the_scale_has_the_precision_of_the_division() -> None:
    """2049 / 0.1 in float16 and in float32 are different codes."""
    x = np.array([204.9], np.float32)
    codes = {}
    for dtype in (np.float16, np.float32):
        inputs = {"x": x, "s": np.array(0.1, dtype), "z": np.array(0, np.int16)}
        (codes[dtype],) = in_torch(single("QuantizeLinear", inputs, opset=25), inputs)
    assert codes[np.float32] == 2049
    half = np.float16(204.9) / np.float16(0.1)
    assert codes[np.float16] == np.rint(half) != 2049


def test_scales_that_are_powers_of_two_of_8_bits() -> None:
    scale = oh.make_tensor("s", KIND.FLOAT8E8M0, [], [0.25])
    x = np.array([1.0, -3.1, 0.126], np.float32)
    inputs = {"x": x, "s": scale, "z": np.array(0, np.int8)}
    (codes,) = in_torch(single("QuantizeLinear", inputs, opset=28), inputs)
    np.testing.assert_array_equal(codes, np.array([4, -12, 1], np.int8))
    (back,) = in_torch(single("DequantizeLinear", {"q": codes, "s": scale}, opset=28), {"q": codes})
    np.testing.assert_array_equal(back, np.array([1, -3, 0.25], np.float32))


def test_int32_is_dequantized_exactly_in_double() -> None:
    inputs = {"q": np.array([2**31 - 1, -(2**31)], np.int32), "s": np.array(0.5, np.float32)}
    found = to_torch(single("DequantizeLinear", inputs), dtype=torch.float64)(
        torch.from_numpy(inputs["q"]), torch.tensor(0.5, dtype=torch.float64)
    )
    assert found.tolist() == [(2**31 - 1) / 2, -(2.0**30)]


@pytest.mark.parametrize("rows", [normal(3, 5), normal(2, 4) + 9, -np.abs(normal(7)), np.zeros((2, 2), np.float32)])
def test_dynamic_quantization_is_that_of_onnxruntime(rows: Any) -> None:
    model = single("DynamicQuantizeLinear", {"x": rows}, opset=13, outputs=3)
    for found, expected in zip(in_torch(model, {"x": rows}), in_onnxruntime(model, {"x": rows}), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def round_trip(low_type: int, scale: Any, zero_point: int, axis: int = 1) -> onnx.ModelProto:
    """x -> QuantizeLinear -> DequantizeLinear."""
    given = [oh.make_tensor("z", low_type, scale.shape, np.full(scale.size, zero_point)), nh.from_array(scale, "s")]
    nodes = [
        oh.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=axis),
        oh.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=axis),
    ]
    values = [oh.make_tensor_value_info(name, KIND.FLOAT, None) for name in "xy"]
    graph = oh.make_graph(nodes, "g", values[:1], values[1:], given)
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize("zero_point", [0, 3])
@pytest.mark.parametrize("kind", [KIND.INT4, KIND.INT8])
def test_gradients_pass_inside_the_grid_and_stop_outside(kind: int, zero_point: int) -> None:
    low, high = RANGES[kind]
    scale = np.array([0.25, 0.5], np.float32)
    module = to_torch(round_trip(kind, scale, zero_point), dtype=torch.float64).requires_grad_(True)
    ends = torch.tensor([low - zero_point, high - zero_point], dtype=torch.float64)
    units = torch.stack([ends[0] - 2.3, ends[0] + 0.3, torch.tensor(0.4).double(), ends[1] - 0.7, ends[1] + 5.1])
    steps = torch.from_numpy(scale).double()
    x = (units[:, None] * steps).requires_grad_(True)
    found = module(x)
    whole = torch.clamp(torch.round(units), ends[0], ends[1])
    assert torch.equal(found, whole[:, None] * steps)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parameter = module.get_parameter(module.keys["s"])
    of_x, of_scale = torch.autograd.grad((found * direction).sum(), [x, parameter])
    inside = torch.tensor([0.0, 1, 1, 1, 0], dtype=torch.float64)
    assert torch.allclose(of_x, inside[:, None] * direction, rtol=0, atol=1e-12)
    # A step's size: rounding error inside, the end of the grid outside (learned step sizes, arXiv 1902.08153).
    expected = ((whole - inside * units)[:, None] * direction).sum(0)
    assert torch.allclose(of_scale, expected, rtol=0, atol=1e-12)


def test_second_derivatives_pass_as_well() -> None:
    module = to_torch(round_trip(KIND.INT8, np.array(0.1, np.float32), 0), dtype=torch.float64)
    x = torch.tensor([0.33, -1.2, 40.0], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(module(x).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    values = module(x.detach())
    assert torch.allclose(second, 6 * values * torch.tensor([1.0, 1, 0]), rtol=1e-12)


@pytest.mark.parametrize("kind", [KIND.FLOAT8E4M3FN, KIND.FLOAT8E5M2, KIND.FLOAT4E2M1])
def test_gradients_pass_through_grids_of_floats(kind: int) -> None:
    module = to_torch(round_trip(kind, np.array(0.5, np.float32), 0))
    x = torch.tensor([0.7, -2.9, 1e6])
    with torch.no_grad():
        plain = module(x)
    x.requires_grad_(True)
    found = module(x)
    assert torch.equal(found, plain)
    assert torch.autograd.grad(found.sum(), x)[0].tolist() == [1, 1, 0]


def test_without_gradients_codes_are_integers_and_with_them_floats() -> None:
    model = round_trip(KIND.INT8, np.array(0.5, np.float32), 0)
    module, x = to_torch(model), torch.randn(4)
    codes = module.run({"x": x}, ["q"])["q"]
    assert codes.dtype == torch.int8
    carried = module.run({"x": x.requires_grad_(True)}, ["q"])["q"]
    assert carried.dtype == torch.float32
    assert torch.equal(carried, codes.float())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_derivatives_of_dequantize_by_its_scales(layout: str) -> None:
    shape, axis, block = LAYOUTS[layout]
    codes = torch.randint(-128, 128, SHAPE, dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    given = {"axis": axis, **({"block_size": block} if block else {})}
    inputs = {"q": codes.numpy(), "s": np.ones(shape, np.float32), "z": np.zeros(shape, np.int8)}
    module = to_torch(single("DequantizeLinear", inputs, given), dtype=torch.float64)
    scale = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_(True)

    def run(scale: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = module(codes, scale, torch.ones(shape, dtype=torch.int8)) ** 2 / 1e4
        return found.sum((0, 2))

    assert torch.autograd.gradcheck(run, scale)
    assert torch.autograd.gradgradcheck(run, scale)


def test_codes_of_other_types_are_refused() -> None:
    inputs = {"x": normal(2), "s": np.array(1, np.float32)}
    with pytest.raises(InputError, match="QuantizeLinear 'node': codes of type FLOAT"):
        to_torch(single("QuantizeLinear", inputs, {"output_dtype": KIND.FLOAT}, opset=25))
