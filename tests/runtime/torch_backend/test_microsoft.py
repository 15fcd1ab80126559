"""Fused operators of onnxruntime's optimised files, like onnxruntime itself; derivatives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from quantkit.errors import InputError
from quantkit.runtime.torch_backend import to_torch
from tests.runtime.torch_backend.single_node import Array, Case, by_onnxruntime, by_torch, check_derivatives

RNG = np.random.default_rng(14)
FLOAT = 1


def normal(*shape: int) -> Array:
    return RNG.normal(size=shape).astype(np.float32)


def fused(op: str, *inputs: Any, outputs: Any = 1, label: str = "", kind: int = FLOAT, **attributes: Any) -> Case:
    return Case(op, inputs, attributes, outputs, domain="com.microsoft", label=label, kind=kind)


def gemm(label: str = "", **attributes: Any) -> Case:
    return fused("FusedGemm", normal(3, 4), normal(4, 2), normal(2), label=label, **attributes)


def conv(label: str = "", *more: Any, **attributes: Any) -> Case:
    inputs = [normal(1, 2, 4, 4), normal(2, 2, 2, 2), normal(2), *more]
    return fused("FusedConv", *inputs, label=label, kernel_shape=[2, 2], **attributes)


X, SKIP, GAMMA, BETA, BIAS = normal(2, 3, 5), normal(2, 3, 5), normal(5), normal(5), normal(5)
WORDS = np.array([[1, 0, 3], [2, 2, 1]], dtype=np.int32)
SEGMENTS = np.array([[0, 1, 1], [0, 0, 1]], dtype=np.int32)
TABLES = (normal(4, 5), normal(6, 5), normal(2, 5))
CASES = [
    fused("FusedMatMul", normal(2, 4, 3), normal(2, 5, 4), alpha=0.3, transA=1, transB=1),
    fused("FusedMatMul", normal(4, 2, 3), normal(2, 3, 5), transBatchA=1, label="batch"),
    fused(
        "FusedMatMul", normal(4, 2, 3), normal(5, 2, 4), transBatchA=1, transBatchB=1, transA=1, transB=1, label="all"
    ),
    fused("TransposeMatMul", normal(4, 3), normal(4, 5), transA=1, alpha=2.0),
    gemm(alpha=0.5, beta=2.0, activation="Tanh"),
    gemm("relu", activation="Relu"),
    gemm("leaky", activation="LeakyRelu", activation_alpha=0.2),
    fused(
        "FusedGemm",
        normal(4, 3),
        normal(2, 4),
        None,
        transA=1,
        transB=1,
        alpha=0.3,
        activation="Sigmoid",
        label="turned",
    ),
    conv(),
    conv("relu", activation="Relu", pads=[1, 0, 1, 0]),
    conv("leaky", activation="LeakyRelu", activation_params=[0.3]),
    conv("clip", activation="Clip", activation_params=[-0.5, 0.7]),
    conv("hard", activation="HardSigmoid", activation_params=[0.3, 0.4]),
    conv("sum", normal(1, 2, 3, 3), activation="Relu"),
    fused("SkipLayerNormalization", X, SKIP, GAMMA, BETA, BIAS, epsilon=1e-3),
    fused("SkipLayerNormalization", X, SKIP[:1], GAMMA, outputs=(1, 0, 0, 1), label="sum"),
    fused("SkipLayerNormalization", X, SKIP[0], GAMMA, BETA, label="one skip"),
    fused("SkipSimplifiedLayerNormalization", X, SKIP, GAMMA, BIAS, outputs=(1, 0, 0, 1), epsilon=1e-3),
    fused("SkipSimplifiedLayerNormalization", X, SKIP, GAMMA, label="one output"),
    Case("SimplifiedLayerNormalization", [X, GAMMA], {"epsilon": 1e-2}),
    Case("SimplifiedLayerNormalization", [X, normal(3, 5)], {"axis": 1}, 2, label="axes"),
    fused("BiasGelu", X, BIAS),
    fused("CDist", normal(3, 4), normal(2, 4), metric="euclidean"),
    fused("CDist", normal(3, 4), normal(2, 4), metric="sqeuclidean", label="squares"),
    fused("ExpandDims", X, np.int32(-2)),
    fused("FastGelu", X, BIAS),
    fused("FastGelu", X, label="no bias"),
    fused("Gelu", X),
    fused("Inverse", normal(2, 3, 3)),
    fused("QuickGelu", X, alpha=1.1),
    fused("QuickGelu", X, label="default"),
    fused("Trilu", X, np.int64(1)),
    fused("GatherND", X, np.array([[0, 1], [1, -1]])),
    Case("Pad", [X[0], np.array([1, 0, 0, 2]), np.float32([0.5])], domain="com.microsoft", constants=(1, 2)),
]
PLAIN = [
    *CASES,
    fused("Range", np.float32(1), np.float32(4)),
    fused(
        "EmbedLayerNormalization", WORDS, SEGMENTS, *TABLES, GAMMA, BETA, SEGMENTS, outputs=3, mask_index_type=1, kind=0
    ),
    fused("EmbedLayerNormalization", WORDS, None, *TABLES[:2], None, GAMMA, BETA, outputs=2, label="words", kind=0),
    fused(
        "EmbedLayerNormalization",
        *(WORDS, SEGMENTS, *TABLES, GAMMA, BETA, None, WORDS + 2),
        outputs=2,
        label="positions",
        epsilon=0.1,
        kind=0,
    ),
]


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_like_onnxruntime(case: Case) -> None:
    expected, found = by_onnxruntime(case), by_torch(case)
    assert len(expected) == len(found)
    for wanted, got in zip(expected, found, strict=True):
        assert got.dtype == wanted.dtype
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_derivatives(case: Case) -> None:
    check_derivatives(case)


def test_embeddings_pass_derivatives_to_their_tables() -> None:
    inputs = [WORDS, SEGMENTS, *TABLES, GAMMA, BETA]
    check_derivatives(fused("EmbedLayerNormalization", *inputs, outputs=2, epsilon=0.1))


def test_gemm_without_activation() -> None:
    """onnxruntime wants one."""
    case = gemm(alpha=0.5, beta=2.0)
    a, b, c = case.inputs
    np.testing.assert_allclose(by_torch(case)[0], 0.5 * a @ b + 2 * c, rtol=1e-5, atol=1e-6)


def test_bias_add() -> None:
    """onnxruntime runs it on other devices only."""
    np.testing.assert_array_equal(by_torch(fused("BiasAdd", X, BIAS, SKIP))[0], X + BIAS + SKIP)


def test_norms_of_halves_are_computed_in_float32() -> None:
    """The squares of these numbers are beyond float16."""
    case = Case("SimplifiedLayerNormalization", [np.array([[300, -400]], np.float16), np.array([1, 2], np.float16)])
    result = by_torch(case)[0]
    assert result.dtype == np.float16
    np.testing.assert_allclose(result, np.array([[0.8485, -2.2627]]), rtol=2e-3)


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(InputError, match=r"FusedGemm 'the_node': it does not know the activation 'Wave'"):
        to_torch(gemm(activation="Wave").model())


def test_optimised_files_have_standard_names_that_onnx_lacks() -> None:
    module = to_torch(Case("SimplifiedLayerNormalization", [X, GAMMA]).model(), dtype=torch.float64)
    assert module(torch.ones(1, 1, 5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)).dtype == torch.float64
