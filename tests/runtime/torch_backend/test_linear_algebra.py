"""Matrix products, Einsum and determinants: like numpy, in every type, twice differentiable."""

from __future__ import annotations

import numpy as np
import pytest

from quantkit.errors import InputError
from quantkit.runtime.torch_backend import to_torch
from tests.runtime.torch_backend.single_node import Array, Case, by_onnxruntime, by_torch, check_derivatives

RNG = np.random.default_rng(21)


def normal(*shape: int) -> Array:
    return RNG.normal(size=shape).astype(np.float32)


def whole(*shape: int, dtype: type = np.int32) -> Array:
    return RNG.integers(0, 9, shape).astype(dtype)


CASES = [
    Case("MatMul", [normal(2, 1, 3, 4), normal(5, 4, 2)], label="broadcast"),
    Case("MatMul", [normal(4), normal(3, 4, 2)], label="vector"),
    Case("MatMul", [normal(3, 4), normal(4)], label="by vector"),
    Case("MatMul", [normal(0, 4), normal(4, 3)], label="empty"),
    Case("MatMul", [normal(3, 0), normal(0, 3)], label="nothing summed"),
    Case("MatMul", [whole(2, 3, 4), whole(4, 2)], label="integers"),
    Case("Gemm", [normal(3, 4), normal(4, 5), normal(5)]),
    Case("Gemm", [normal(3, 4), normal(5, 4), normal(5)], {"transB": 1}, label="linear layer"),
    Case("Gemm", [normal(3, 4), normal(5, 4), normal(3, 1)], {"transB": 1}, label="column"),
    Case("Gemm", [normal(3, 4), normal(5, 4), normal(3, 5)], {"transB": 1}, label="matrix"),
    Case("Gemm", [normal(3, 4), normal(5, 4), np.float32([2.5]).reshape(())], {"transB": 1}, label="scalar"),
    Case("Gemm", [normal(3, 4), normal(5, 4)], {"transB": 1}, label="no bias"),
    Case("Gemm", [normal(3, 4), normal(4, 5)], {"alpha": 0.5, "beta": 3.0}, label="scaled without bias"),
    Case("Gemm", [normal(4, 3), normal(5, 4), normal(5)], {"transA": 1, "transB": 1, "alpha": 0.5, "beta": -2.0}),
    Case("Gemm", [normal(4, 3), normal(4, 5), np.float32([2.5]).reshape(())], {"transA": 1, "beta": 2.0}, label="0d"),
    Case("Gemm", [normal(3, 4), normal(4, 5), normal(5)], opset=7, label="opset 7"),
    Case("Einsum", [normal(2, 3, 4), normal(2, 5, 4)], {"equation": "bij, bkj -> bik"}),
    Case("Einsum", [normal(2, 3, 3)], {"equation": "...ii->...i"}, label="diagonal"),
    Case("Einsum", [normal(3, 2), normal(2, 4)], {"equation": "ji,ia"}, label="implicit"),
    Case("Einsum", [normal(3, 2), normal(2, 4), normal(4, 3)], {"equation": "ij,jk,kl->il"}, label="three"),
    Case("Det", [normal(2, 3, 3)]),
    Case("Det", [normal(1, 1)], label="1 by 1"),
]
MOVING = [case for case in CASES if case.inputs[0].dtype == np.float32 and case.inputs[0].size]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_as_onnxruntime(case: Case) -> None:
    (found,), (expected,) = by_torch(case), by_onnxruntime(case)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", MOVING, ids=str)
def test_derivatives(case: Case) -> None:
    check_derivatives(case)


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_integer_products_are_exact(dtype: type) -> None:
    a, b, c = whole(3, 4, dtype=dtype), whole(4, 2, dtype=dtype), whole(2, dtype=dtype)
    np.testing.assert_array_equal(by_torch(Case("MatMul", [a, b]))[0], a @ b)
    product = Case("Gemm", [a, b, c], {"alpha": 2.0, "beta": 3.0})
    np.testing.assert_array_equal(by_torch(product)[0], 2 * (a @ b) + 3 * c)
    np.testing.assert_array_equal(by_torch(Case("Gemm", [a, b]))[0], a @ b)
    np.testing.assert_array_equal(by_torch(Case("Einsum", [a, b], {"equation": "ij,jk->ki"}))[0], (a @ b).T)


def test_fractions_of_integers_are_refused() -> None:
    model = Case("Gemm", [whole(3, 4), whole(4, 2)], {"alpha": 0.5}).model()
    with pytest.raises(InputError, match=r"Gemm 'the_node': alpha 0.5 and beta 1 of an integer product must be whole"):
        to_torch(model)


def test_half_precision() -> None:
    a, b, c = normal(3, 4), normal(4, 4), normal(4)
    for case in (Case("MatMul", [a, b]), Case("Gemm", [a, b, c], {"alpha": 0.5}), Case("Det", [b])):
        half = Case(case.op, [item.astype(np.float16) for item in case.inputs], case.attributes)
        (found,), (expected,) = by_torch(half), by_torch(case)
        assert found.dtype == np.float16
        np.testing.assert_allclose(found, expected, rtol=2e-2, atol=2e-2)
