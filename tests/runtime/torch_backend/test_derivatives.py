"""Derivatives of operators whose own files test other things: conversions, choices, sequences, old and foreign ones."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from quantkit.runtime.torch_backend import to_torch
from tests.runtime.torch_backend.single_node import Case, check_derivatives

X = np.random.default_rng(2).normal(size=(2, 3)).astype(np.float32)
Y = np.random.default_rng(3).normal(size=(2, 3)).astype(np.float32)
CODES = np.array([[3, 250, 7], [0, 128, 9]], np.uint8)

CASES = [
    Case("Cast", [X], {"to": onnx.TensorProto.FLOAT}),
    Case("CastLike", [X, Y]),
    Case("Where", [np.array([[True, False, True]]), X, Y]),
    Case("Upsample", [X.reshape(1, 1, 2, 3), np.array([1, 1, 2, 2], np.float32)], opset=9, constants=(1,)),
    Case("BiasAdd", [X.reshape(1, 2, 3), Y[0], Y.reshape(1, 2, 3)], domain="com.microsoft"),
    Case("DequantizeLinear", [CODES, np.float32([0.3, 0.2]), np.uint8([4, 90])], {"axis": 0}, domain="com.microsoft"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_first_and_second_derivatives(case: Case) -> None:
    check_derivatives(case)


def test_derivatives_through_sequences() -> None:
    """Built, extended, split, shortened, joined: every element is a square, so that second derivatives are not zero."""
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 21]>
        g (float[2,3] x, float[2,3] y) => (float[A,B] z) {
            one = Constant<value_int = 1>()
            xx = Mul(x, x)
            xy = Mul(x, y)
            built = SequenceConstruct(xx, xy)
            longer = SequenceInsert(built, y, one)
            shorter = SequenceErase(longer, one)
            joined = ConcatFromSequence<axis = 1>(shorter)
            parts = SplitToSequence<axis = 1, keepdims = 1>(joined)
            part = SequenceAt(parts, one)
            z = Mul(part, joined)
        }""")
    module = to_torch(model, dtype=torch.float64)
    points = tuple(torch.from_numpy(value).double().requires_grad_() for value in (X, Y))
    assert torch.autograd.gradcheck(module, points)
    assert torch.autograd.gradgradcheck(module, points)
