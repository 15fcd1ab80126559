"""Operators that change shapes: views, numbers on the host, old opsets, derivatives."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.helper as oh
import pytest
import torch

from quantkit.errors import InputError
from quantkit.runtime.torch_backend import to_torch
from tests.runtime.torch_backend.single_node import Case, by_onnxruntime, by_torch, check_derivatives

RNG = np.random.default_rng(11)
X = RNG.normal(size=(2, 3, 5)).astype(np.float32)
IMAGE = RNG.normal(size=(1, 2, 4, 5)).astype(np.float32)
EMPTY = np.zeros((0, 3), dtype=np.float32)
SCALAR = np.float32(3.5).reshape(())


def numbers(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def pads(mode: str, widths: np.ndarray, x: np.ndarray = IMAGE, label: str = "") -> Case:
    return Case("Pad", [x, widths], {"mode": mode}, constants=(1,), label=f"{mode}{label}", opset=19)


CASES = [
    Case("Concat", [X, X[:, :1]], {"axis": 1}),
    Case("Concat", [X], {"axis": -1}, label="one"),
    Case("Concat", [X, X[:, :0]], {"axis": 1}, label="empty"),
    Case("Expand", [X[:, :1], numbers(4, 1, 3, 1)], constants=(1,)),
    Case("Expand", [X, numbers(1)], constants=(1,), label="shorter"),
    Case("Expand", [SCALAR, numbers(2, 0)], constants=(1,), label="scalar"),
    Case("Flatten", [X], {"axis": -1}),
    Case("Flatten", [X], {"axis": 0}, label="first"),
    Case("Flatten", [EMPTY], label="empty"),
    Case("Reshape", [X, numbers(0, -1)]),
    Case("Reshape", [EMPTY, numbers(3, 0)], {"allowzero": 1}, label="allowzero"),
    Case("Reshape", [X, numbers(5, -1, 2)], opset=5, label="5"),
    Case("Split", [X], {"axis": -1, "split": [1, 3, 1]}, 3, opset=11, label="11"),
    Case("Split", [X], {"axis": 0}, 2, opset=2, label="2"),
    Case("Split", [X, numbers(2, 3)], {"axis": 2}, 2, constants=(1,), opset=13, label="13"),
    Case("Split", [X], {"axis": 2, "num_outputs": 3}, 3, opset=18, label="uneven"),
    Case("Split", [X], {"axis": 2, "num_outputs": 1}, 1, opset=18, label="single"),
    Case("Squeeze", [X[:1, :, :1]]),
    Case("Squeeze", [X[:1, :, :1]], {"axes": [-1]}, opset=11, label="11"),
    Case("Squeeze", [X[:1, :, :1], numbers(0)], constants=(1,), label="one"),
    Case("Tile", [X, numbers(1, 2, 3)], constants=(1,)),
    Case("Tile", [X, numbers(1, 0, 1)], constants=(1,), label="nothing"),
    Case("Transpose", [X]),
    Case("Transpose", [X], {"perm": [1, 2, 0]}, label="perm"),
    Case("Unsqueeze", [X, numbers(-1, 0, 2)], constants=(1,)),
    Case("Unsqueeze", [X], {"axes": [0, 3]}, opset=11, label="11"),
    Case("Unsqueeze", [X, numbers(-2)], constants=(1,), label="one"),
    Case("Identity", [X]),
    pads("constant", numbers(0, 1, 2, 3, 1, 0, 1, 2)),
    pads("constant", numbers(0, 0, -1, 1, 0, 0, 0, -2), label="-crop"),
    pads("reflect", numbers(0, 0, 2, 3, 0, 0, 1, 2)),
    pads("reflect", numbers(0, 1, 2, 0, 0, 0, 0, 0), label="-channels"),
    pads("reflect", numbers(0, 0, -1, 2, 0, 0, 1, -1), label="-crop"),
    pads("edge", numbers(0, 0, 2, 7, 0, 0, 0, 1)),
    pads("edge", numbers(2, 0, 0, 1, 0, 1, 0, 0), label="-all"),
    pads("wrap", numbers(0, 1, 2, 3, 0, 1, 0, 1)),
    pads("wrap", numbers(2, 1), X[0, 0], label="-vector"),
    Case("Pad", [IMAGE], {"pads": [0, 0, 1, 1, 0, 0, 0, 2], "value": 2.5}, opset=2, label="2"),
    Case("Pad", [IMAGE, numbers(1, 2), np.float32(-1.0), numbers(-1)], constants=(1, 2, 3), label="axes", opset=18),
]
PLAIN = [
    *CASES,
    Case("Shape", [X], {"start": -2, "end": 7}),
    Case("Shape", [X], {"start": 2, "end": 1}, label="nothing"),
    Case("Size", [EMPTY]),
    Case("ConstantOfShape", [numbers(2, 0, 3)]),
    Case("ConstantOfShape", [numbers(2)], {"value": oh.make_tensor("v", 7, [1], [9])}, label="integers"),
    Case("ConstantOfShape", [numbers()], label="scalar"),
    Case("EyeLike", [X[0]], {"k": -1, "dtype": onnx.TensorProto.INT32}),
    Case("EyeLike", [X[0]], {"k": 2}, label="own type"),
    Case("Range", [np.float32(0.1), np.float32(2), np.float32(0.3)]),
    Case("Range", [np.int64(7), np.int64(-4), np.int64(-3)], label="down"),
    Case("Range", [np.int32(7), np.int32(7), np.int32(2)], label="empty"),
    Case("Pad", [np.array([[True, False]]), numbers(0, 1, 0, 2), np.array(True)], constants=(1, 2), label="bool"),
    Case("Pad", [np.array([3, 4, 5]), numbers(1, 2)], {"mode": "reflect"}, constants=(1,), label="mirrored integers"),
    Case("Transpose", [X.astype(np.float16)], label="half"),
]


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_like_onnxruntime(case: Case) -> None:
    expected, found = by_onnxruntime(case), by_torch(case)
    assert len(expected) == len(found)
    for wanted, got in zip(expected, found, strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=0)
        assert got.shape == wanted.shape


@pytest.mark.parametrize("case", [case for case in CASES if case.inputs[0].size], ids=str)
def test_derivatives(case: Case) -> None:
    check_derivatives(case)


def test_mirrored_more_than_once_like_numpy() -> None:
    row = X[0, 0]
    case = Case("Pad", [row, numbers(11, 9)], {"mode": "reflect"}, constants=(1,))
    np.testing.assert_array_equal(by_torch(case)[0], np.pad(row, (11, 9), mode="reflect"))
    single = Case("Pad", [row[:1], numbers(1, 2)], {"mode": "reflect"}, constants=(1,))
    np.testing.assert_array_equal(by_torch(single)[0], np.pad(row[:1], (1, 2), mode="reflect"))


def test_oldest_forms() -> None:
    reshape = Case("Reshape", [X], {"shape": [0, -1]}, opset=1)
    np.testing.assert_array_equal(by_torch(reshape)[0], X.reshape(2, 15))
    tile = Case("Tile", [X, np.float32(2), np.float32(1)], opset=1)
    np.testing.assert_array_equal(by_torch(tile)[0], np.tile(X, (1, 2, 1)))
    concat = Case("Concat", [X, X], opset=1)
    np.testing.assert_array_equal(by_torch(concat)[0], np.concatenate([X, X], 1))
    pad = Case("Pad", [X[0]], {"paddings": [1, 0, 0, 2]}, opset=1)
    np.testing.assert_array_equal(by_torch(pad)[0], np.pad(X[0], ((1, 0), (0, 2))))
    split = Case("Split", [X, numbers(1, 2).astype(np.float32)], {"axis": 1}, 2, opset=1)
    np.testing.assert_array_equal(by_torch(split)[1], X[:, 1:])


@pytest.mark.parametrize(
    "case",
    [
        Case("Reshape", [X, numbers(6, 5)]),
        Case("Flatten", [X]),
        Case("Transpose", [X]),
        Case("Squeeze", [X[:1]]),
        Case("Unsqueeze", [X, numbers(0)]),
        Case("Expand", [X[:1], numbers(4, 3, 5)]),
        Case("Identity", [X]),
        Case("Split", [X], {"axis": 1}, 3),
        Case("Slice", [X, numbers(1), numbers(3), numbers(1), numbers(1)]),
        Case("Slice", [X], {"starts": [0], "ends": [-1]}, opset=9),
        Case("Gather", [X, np.int64(1)]),
    ],
    ids=str,
)
def test_views_copy_nothing(case: Case) -> None:
    module = to_torch(case.model())
    feeds = {name: torch.from_numpy(np.asarray(value)) for name, value in case.feeds().items()}
    for result in module.run(feeds).values():
        assert result.untyped_storage().data_ptr() == feeds["x0"].untyped_storage().data_ptr()


def test_large_integers_are_exact() -> None:
    huge = 2**62
    case = Case("Range", [np.int64(huge), np.int64(huge + 5), np.int64(2)])
    assert by_torch(case)[0].tolist() == [huge, huge + 2, huge + 4]


def test_unknown_mode_is_refused() -> None:
    case = Case("Pad", [X, numbers(0, 0, 0, 0, 0, 0)], {"mode": "sideways"})
    with pytest.raises(
        InputError, match=r"Pad 'the_node': mode 'sideways' is none of constant, reflect, edge and wrap"
    ):
        to_torch(case.model())
