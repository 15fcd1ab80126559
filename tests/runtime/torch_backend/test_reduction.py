"""Reductions: axes given in every way there was, nothing to reduce, types, derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from quantkit.runtime.torch_backend import to_torch
from quantkit.runtime.torch_backend.backend import TorchBackend
from tests.runtime.torch_backend.cases import in_onnxruntime, in_torch, single

X = np.random.default_rng(0).normal(size=(3, 1, 4, 2)).astype(np.float32)
REFERENCE: dict[str, Callable[..., Any]] = {
    "ReduceL1": lambda x, axis: np.abs(x).sum(axis, keepdims=True),
    "ReduceL2": lambda x, axis: np.sqrt((x * x).sum(axis, keepdims=True)),
    "ReduceLogSum": lambda x, axis: np.log(x.sum(axis, keepdims=True)),
    "ReduceLogSumExp": lambda x, axis: np.log(np.exp(x).sum(axis, keepdims=True)),
    "ReduceMax": lambda x, axis: x.max(axis, keepdims=True),
    "ReduceMean": lambda x, axis: x.mean(axis, keepdims=True),
    "ReduceMin": lambda x, axis: x.min(axis, keepdims=True),
    "ReduceProd": lambda x, axis: x.prod(axis, keepdims=True),
    "ReduceSum": lambda x, axis: x.sum(axis, keepdims=True),
    "ReduceSumSquare": lambda x, axis: (x * x).sum(axis, keepdims=True),
}


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("axes", [[1], [0, -1], [-2], [2, 0, 3], None])
@pytest.mark.parametrize("op", REFERENCE)
def test_axes_as_attribute_and_as_input(op: str, axes: list[int] | None, keep: int) -> None:
    x = np.abs(X) + 0.1
    axis = tuple(range(4)) if axes is None else tuple(axes)
    expected = REFERENCE[op](x.astype(np.float64), axis)
    expected = expected if keep else expected.squeeze(axis)
    given = {"keepdims": keep}
    old = single(op, {"x": x}, given if axes is None else {**given, "axes": axes}, opset=11)
    inputs = {"x": x} if axes is None else {"x": x, "axes": np.array(axes)}
    for model in (old, single(op, inputs, given, opset=20), single(op, inputs, given, opset=20, constants=["axes"])):
        (found,) = in_torch(model, inputs)
        assert found.dtype == np.float32
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("op", REFERENCE)
def test_no_axes_mean_all_or_none(op: str) -> None:
    x = np.abs(X) + 0.1
    empty = np.zeros(0, np.int64)
    (found,) = in_torch(single(op, {"x": x, "a": empty}, opset=20), {"x": x, "a": empty})
    np.testing.assert_allclose(found, REFERENCE[op](x.astype(np.float64), (0, 1, 2, 3)), rtol=1e-5)
    model = single(op, {"x": x, "a": empty}, {"noop_with_empty_axes": 1}, opset=20)
    (found,) = in_torch(model, {"x": x, "a": empty})
    single_elements = REFERENCE[op](x.astype(np.float64)[..., None], (4,))[..., 0]  # each is a set of its own
    np.testing.assert_allclose(found, single_elements, rtol=1e-5)


@pytest.mark.parametrize("op", REFERENCE)
def test_derivatives(op: str) -> None:
    inputs = {"x": np.ones((3, 2, 2), np.float32), "a": np.array([0, 2])}
    module = to_torch(single(op, inputs, opset=20, constants=["a"]), dtype=torch.float64)
    x = (torch.randperm(12, generator=torch.Generator().manual_seed(0)) / 7 + 0.2).double().reshape(3, 2, 2)
    assert torch.autograd.gradcheck(module, x.clone().requires_grad_(True))
    assert torch.autograd.gradgradcheck(module, x.clone().requires_grad_(True))


def test_the_norm_of_zeros_has_a_gradient() -> None:
    module = to_torch(single("ReduceL2", {"x": np.zeros((2, 3), np.float32)}, {"axes": [1]}, opset=13))
    x = torch.zeros(2, 3, requires_grad=True)
    assert torch.autograd.grad(module(x).sum(), x)[0].tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("ReduceSum", 0),
        ("ReduceProd", 1),
        ("ReduceMax", -np.inf),
        ("ReduceMin", np.inf),
        ("ReduceL2", 0),
        ("ReduceLogSum", -np.inf),
        ("ReduceLogSumExp", -np.inf),
    ],
)
def test_of_nothing(op: str, expected: float) -> None:
    inputs = {"x": np.zeros((2, 0, 3), np.float32), "a": np.array([1])}
    (found,) = in_torch(single(op, inputs, {"keepdims": 0}, opset=20), inputs)
    np.testing.assert_array_equal(found, np.full((2, 3), expected, np.float32))


@pytest.mark.parametrize(("op", "ends"), [("ReduceMax", (-128, False)), ("ReduceMin", (127, True))])
def test_of_no_whole_numbers_and_of_no_truth_values(op: str, ends: tuple[int, bool]) -> None:
    for dtype, end in zip((np.int8, np.bool_), ends, strict=True):
        inputs = {"x": np.zeros((2, 0), dtype), "a": np.array([1])}
        (found,) = in_torch(single(op, inputs, {"keepdims": 0}, opset=20), inputs)
        assert found.tolist() == [end, end]


@pytest.mark.parametrize("op", ["ReduceL1", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"])
def test_whole_numbers_stay_what_they_are(op: str) -> None:
    x = np.array([[-7, 2, 3], [5, -6, 2]], np.int32)
    inputs = {"x": x, "a": np.array([1])}
    model = single(op, inputs, {"keepdims": 0}, opset=13 if op == "ReduceSum" else 18)
    (expected,), (found,) = in_onnxruntime(model, inputs), in_torch(model, inputs)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("op", "dtype", "values", "expected"),
    [
        ("ReduceMax", np.uint64, [2**63 + 1, 5], 2**63 + 1),
        ("ReduceMin", np.uint64, [2**63 + 1, 5], 5),
        ("ReduceSum", np.uint32, [2**32 - 1, 5], 4),
        ("ReduceProd", np.uint32, [2**31, 3], 2**31),
        ("ReduceMean", np.uint32, [2**32 - 1, 1], 2**31),
        ("ReduceL2", np.int32, [3, 4], 5),
    ],
)
def test_unsigned_numbers_wrap_around_and_compare_as_such(
    op: str, dtype: Any, values: list[int], expected: int
) -> None:
    x = np.array(values, dtype)
    (found,) = TorchBackend.prepare(single(op, {"x": x}, {"keepdims": 0}, opset=18)).run([x])
    assert found.dtype == dtype
    assert int(found) == expected


TIES = np.array([[3, 1, 3, 1], [2, 2, 2, 2], [0, 5, 5, 0]], np.float32)


@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
def test_places_of_extremes(op: str, keep: int, axis: int, last: int) -> None:
    given = {"axis": axis, "keepdims": keep, "select_last_index": last}
    model = single(op, {"x": TIES}, given, opset=13)
    (expected,), (found,) = in_onnxruntime(model, {"x": TIES}), in_torch(model, {"x": TIES})
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, expected)


def test_the_greatest_of_uint64() -> None:
    x = np.array([5, 2**63 + 1, 7], np.uint64)
    for op, place in (("ArgMax", 1), ("ArgMin", 0)):
        (found,) = TorchBackend.prepare(single(op, {"x": x}, opset=13)).run([x])
        assert found.tolist() == [place]


@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
@pytest.mark.parametrize(("op", "function"), [("CumSum", np.cumsum), ("CumProd", np.cumprod)])
def test_running_sums_and_products(
    op: str, function: Callable[..., Any], dtype: Any, exclusive: int, reverse: int
) -> None:
    x = np.array([[1, 2, -3, 4], [5, -6, 2, 2]], dtype)
    for axis in (0, -1):
        data = np.flip(x, axis) if reverse else x
        if exclusive:
            first = np.full_like(data.take([0], axis), 0 if op == "CumSum" else 1)
            data = np.concatenate([first, data.take(range(data.shape[axis] - 1), axis)], axis)
        expected = function(data, axis=axis)
        expected = np.flip(expected, axis) if reverse else expected
        inputs = {"x": x, "a": np.array(axis)}
        model = single(op, inputs, {"reverse": reverse, "exclusive": exclusive}, opset=26, constants=["a"])
        (found,) = in_torch(model, inputs)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("op", ["CumSum", "CumProd"])
def test_derivatives_of_running_sums_and_products(op: str) -> None:
    inputs = {"x": np.ones((2, 4), np.float32), "a": np.array(1)}
    given = {"reverse": 1, "exclusive": 1}
    module = to_torch(single(op, inputs, given, opset=26, constants=["a"]), dtype=torch.float64)
    x = torch.tensor([[0.5, 0.0, -2, 1], [1, 2, 3, 0.3]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, x)
    assert torch.autograd.gradgradcheck(module, x)


def test_running_sums_of_nothing_and_of_uint32() -> None:
    inputs = {"x": np.zeros((2, 0), np.float32), "a": np.array(1)}
    (found,) = in_torch(single("CumSum", inputs, {"exclusive": 1}, opset=14, constants=["a"]), inputs)
    assert found.shape == (2, 0)
    x = np.array([2**32 - 1, 3], np.uint32)
    (found,) = TorchBackend.prepare(single("CumSum", {"x": x, "a": np.array(0)}, opset=14, constants=["a"])).run([x])
    assert found.tolist() == [2**32 - 1, 2]
