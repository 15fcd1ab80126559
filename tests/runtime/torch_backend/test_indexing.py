"""Operators that read, write and choose elements: like onnxruntime or numpy, ties and corners, derivatives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit.errors import InputError
from quantkit.runtime.torch_backend import to_torch
from tests.runtime.torch_backend.single_node import Array, Case, by_onnxruntime, by_torch, check_derivatives

RNG = np.random.default_rng(12)
X = RNG.normal(size=(3, 4, 5)).astype(np.float32)
ROWS = RNG.normal(size=(4, 5)).astype(np.float32)
UPDATES = RNG.normal(size=(2, 5)).astype(np.float32)
LONG = RNG.permutation(4000).reshape(2, 2000).astype(np.float32)
TIES = np.array([[2, 7, 7, 1, 7, 2, 2]], dtype=np.float32)
FAR = 2**63 - 1


def numbers(*values: int) -> Array:
    return np.array(values, dtype=np.int64)


def sliced(*parameters: Array | None, label: str = "") -> Case:
    present = [position + 1 for position, value in enumerate(parameters) if value is not None]
    return Case("Slice", [X, *parameters], constants=present, label=label)


INDICES = np.array([[0, -1, 2, 1, -4], [3, 3, -2, 0, 1]])
PLACES = np.array([[[0, 1], [-1, 2]], [[2, 3], [1, -4]]])
DISTINCT = np.array([[0, -1, 2, 1, -4], [3, 0, -4, 0, 1]])
CASES = [
    Case("Gather", [X, np.array([[0, -1], [2, 1]])], {"axis": 1}),
    Case("Gather", [X, np.int64(-1)], {"axis": -1}, label="scalar"),
    Case("Gather", [X, np.array([2, 2, 0], dtype=np.int32)], label="32 bits"),
    Case("GatherElements", [ROWS, INDICES], {"axis": 0}),
    Case("GatherElements", [ROWS, INDICES[:, :2]], {"axis": -1}, label="columns"),
    Case("GatherND", [X, PLACES]),
    Case("GatherND", [X, PLACES[:, 0]], {}, label="rows"),
    Case("GatherND", [X[:2], np.array([[[0], [-1]], [[2], [3]]])], {"batch_dims": 1}, label="batch"),
    Case("GatherND", [X[:2, :2], np.array([[[0], [-1]], [[2], [3]]])], {"batch_dims": 2}, label="two batches"),
    Case("Scatter", [ROWS, DISTINCT, UPDATES], opset=9),
    Case("ScatterElements", [ROWS, DISTINCT, UPDATES], {"axis": 0}),
    *(
        Case("ScatterElements", [ROWS, INDICES, UPDATES], {"reduction": r}, label=r)
        for r in ("add", "mul", "max", "min")
    ),
    Case("ScatterND", [X, np.array([[0, 1], [2, -1]]), UPDATES]),
    *(
        Case("ScatterND", [X, np.array([[2, 3], [2, -1]]), UPDATES], {"reduction": r}, label=r)
        for r in ("add", "mul", "max", "min")
    ),
    Case("ScatterND", [X, PLACES[0, :1, :1], X[:1] + 1], {"reduction": "max"}, label="blocks"),
    sliced(numbers(1, -2), numbers(3, FAR), numbers(0, -1)),
    sliced(numbers(-1), numbers(-FAR), numbers(1), numbers(-2), label="backwards"),
    sliced(numbers(2, 9), numbers(0, -9), numbers(0, 2), numbers(-1, -3), label="two backwards"),
    sliced(numbers(0, 0), numbers(2, FAR), None, numbers(1, 3), label="no axes"),
    Case("Slice", [X], {"starts": [1, -3], "ends": [1000, -1], "axes": [0, 2]}, opset=9, label="9"),
    Case("Slice", [X], {"starts": [1], "ends": [2]}, opset=1, label="no axes, 1"),
    Case("TopK", [ROWS, numbers(3)], {"axis": 0, "largest": 0}, 2),
    Case("TopK", [ROWS], {"k": 2}, 2, opset=9, label="9"),
    Case("Compress", [ROWS, np.array([True, False, True])], {"axis": 1}),
    Case("Compress", [ROWS, np.array([False, True, True])], label="flat"),
    Case("ReverseSequence", [X, numbers(1, 4, 2, 3)[:3]], {"batch_axis": 0, "time_axis": 1}),
    Case("ReverseSequence", [X[..., 0].T.copy(), numbers(1, 4, 2)], label="time first"),
    Case("Trilu", [X, np.int64(-1)], {"upper": 0}),
    Case("Trilu", [X], label="upper"),
    Case("Trilu", [ROWS, np.int64(100)], label="beyond"),
    Case("Unique", [np.array([2, 1, 4, 3], dtype=np.float32)]),
    Case("OneHot", [np.array([[1, -1], [4, 7]]), np.int64(5), np.array([0.5, 2.0], dtype=np.float32)], {"axis": 1}),
]
PLAIN = [
    *CASES,
    Case("Unique", [np.array([2, 1, 1, 3, 2], dtype=np.float32)], {"sorted": 0}, 4, label="all outputs"),
    sliced(numbers(3), numbers(1), numbers(1), numbers(1), label="nothing"),
    sliced(numbers(1), numbers(3), numbers(1), numbers(-1), label="nothing backwards"),
    Case("TopK", [TIES, numbers(5)], {"largest": 1}, 2, label="ties"),
    Case("TopK", [TIES, numbers(4)], {"largest": 0}, 2, label="low ties"),
    Case("TopK", [LONG, numbers(7)], {}, 2, label="long"),
    Case("TopK", [np.repeat(LONG, 2, 1), numbers(7)], {"largest": 0}, 2, label="long ties"),
    Case("TopK", [LONG, numbers(2000)], {}, 2, label="all"),
    Case("NonZero", [(ROWS > 0).astype(np.float32)]),
    Case("NonZero", [np.zeros((2, 0), dtype=np.float32)], label="empty"),
    Case("Unique", [np.array([[3, 1], [2, 2], [3, 1]])], {"axis": 0}, 4, label="axis"),
    Case("Unique", [np.array([[3, 1, 3], [2, 2, 2]])], {"axis": -1, "sorted": 0}, (1, 0, 1, 0), label="columns"),
    Case("Unique", [np.array([4, 4])], {}, 1, label="values"),
    Case(
        "OneHot",
        [np.array([0.0, 3.0], dtype=np.float32), np.float32(4), np.array([0, 1], dtype=np.float32)],
        label="floats",
    ),
    Case("GatherND", [X, np.zeros((0, 2), dtype=np.int64)], label="empty"),
    Case("Gather", [X, np.zeros((0,), dtype=np.int64)], label="empty"),
]


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_like_onnxruntime(case: Case) -> None:
    expected, found = by_onnxruntime(case), by_torch(case)
    assert len(expected) == len(found)
    for wanted, got in zip(expected, found, strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=0)
        assert got.shape == wanted.shape


@pytest.mark.parametrize("case", CASES, ids=str)
def test_derivatives(case: Case) -> None:
    check_derivatives(case)


def boxes(seed: int, batch: int, count: int, center: bool) -> Array:
    generator = np.random.default_rng(seed)
    middle, size = generator.uniform(0, 1, (batch, count, 2)), generator.uniform(0.05, 0.5, (batch, count, 2))
    corners = [middle, size] if center else [middle - size / 2, middle + size / 2]
    found = np.concatenate(corners, -1).astype(np.float32)
    if not center:
        found[:, ::3] = found[:, ::3][..., [2, 1, 0, 3]]  # corners in any order
    return found


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("score", [None, 0.3])
def test_non_max_suppression_like_onnxruntime(center: bool, score: float | None) -> None:
    scores = np.random.default_rng(5).uniform(0, 1, (2, 3, 40)).astype(np.float32)
    scores[:, :, 7] = scores[:, :, 3]  # ties: the lower index first
    inputs = [boxes(4, 2, 40, center), scores, numbers(9), np.float32(0.4)]
    inputs += [] if score is None else [np.float32(score)]
    case = Case("NonMaxSuppression", inputs, {"center_point_box": int(center)})
    expected = by_onnxruntime(case)[0]
    assert len(expected) > 10
    np.testing.assert_array_equal(by_torch(case)[0], expected)


def test_non_max_suppression_without_a_limit_keeps_nothing() -> None:
    case = Case("NonMaxSuppression", [boxes(4, 1, 5, False), np.ones((1, 1, 5), dtype=np.float32)])
    assert by_torch(case)[0].shape == (0, 3)


@pytest.mark.parametrize("mode", ["linear", "circular"])
def test_cache_update_by_its_definition(mode: str) -> None:
    past, update = RNG.normal(size=(2, 3, 6, 2)), RNG.normal(size=(2, 3, 2, 2))
    starts = numbers(5, 3) if mode == "circular" else numbers(4, 0)
    expected = past.copy()
    for sample, start in enumerate(starts):
        for step in range(2):
            expected[sample, :, (start + step) % 6] = update[sample, :, step]
    case = Case("TensorScatter", [past, update, starts], {"mode": mode}, opset=24)
    np.testing.assert_array_equal(by_torch(case)[0], expected)
    check_derivatives(case)
    plain = Case("TensorScatter", [past, update], {"axis": 2}, opset=24)
    np.testing.assert_array_equal(by_torch(plain)[0][:, :, :2], update)


def test_gather_of_a_scalar_waits_for_no_device() -> None:
    """Meta tensors have no values to read."""
    module = to_torch(Case("Gather", [X, np.int64(1)], {"axis": 1}).model())
    run = module._compiled.program.steps[0].run
    assert run(torch.empty(3, 4, 5, device="meta"), torch.empty((), dtype=torch.int64, device="meta")).shape == (3, 5)


def test_unknown_reduction_is_refused() -> None:
    case = Case("ScatterND", [ROWS, numbers(1).reshape(1, 1), ROWS[:1]], {"reduction": "mean"})
    with pytest.raises(
        InputError, match=r"ScatterND 'the_node': reduction 'mean' is none of none, add, mul, max and min"
    ):
        to_torch(case.model())
