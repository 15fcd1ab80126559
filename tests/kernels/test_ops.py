"""The operators on CPU tensors: values, types, fakes, torch.compile, and one sentence for tensors that do not fit."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from quantkit_kernels import gather_nbits, int8_linear, make_counters, mixed_linear, nbits_linear, reference
from torch import Tensor

from tests.kernels.samples import activations, bias, error, mixed_sample, product, sample, tensor

BFLOAT16 = 4e-3  # norm of the error over norm of the result: bfloat16 results round by 2^-8


def arguments(bits: int = 4, group_size: int = 32) -> tuple[Tensor, Tensor, Tensor, int, int]:
    codes, meta = sample(bits, group_size, (12, 96)).tensors()
    return activations(6, 96, torch.float32).reshape(2, 3, 96), codes, meta, bits, group_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_nbits_linear(bits: int, dtype: torch.dtype) -> None:
    sampled = sample(bits, 64, (12, 200))
    codes, meta = sampled.tensors()
    x, offsets = activations(5, 200, dtype), bias(12, dtype)
    out = nbits_linear(x, codes, meta, bits, 64, offsets, "none")
    assert out.dtype == dtype
    expected = product(x, sampled.weight) + offsets.double().numpy()
    assert error(out, expected) < {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: BFLOAT16}[dtype]


def test_mixed_linear() -> None:
    weight, dense = mixed_sample(np.array([4, 2, 3, 8]), 64, (12, 250))
    x = activations(5, 250, torch.float32)
    codes = [tensor(part) for part in weight.codes]
    out = mixed_linear(x, codes, tensor(weight.meta), tensor(weight.table), 64, activation="relu")
    np.testing.assert_allclose(out.numpy(), np.maximum(product(x, dense), 0), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_int8_linear_is_integer_arithmetic(bits: int) -> None:
    """By hand in numpy integers; a row of zeros has scale 1."""
    sampled = sample(bits, -1, (12, 96))
    codes, meta = sampled.tensors()
    x = activations(4, 96, torch.float32)
    x[1] = 0
    rows = x.numpy().astype(np.float64)
    scales = np.maximum(np.abs(rows).max(axis=1, keepdims=True) / 127, (rows == 0).all(axis=1, keepdims=True))
    sums = (
        np.rint(rows / scales).astype(np.int64) @ (sampled.codes.astype(np.int64) - sampled.zero_points.astype(int)).T
    )
    expected = sums * scales * sampled.scales.astype(np.float64).T
    np.testing.assert_allclose(int8_linear(x, codes, meta, bits, 96).numpy(), expected, rtol=1e-5, atol=1e-5)
    static = int8_linear(x, codes, meta, bits, 96, torch.tensor(0.01)).numpy()
    clipped = np.clip(np.rint(rows / np.float32(0.01)), -127, 127) * np.float64(np.float32(0.01))
    np.testing.assert_allclose(static, clipped @ sampled.weight.T, rtol=1e-4, atol=1e-3)


def test_gather() -> None:
    sampled = sample(3, 32, (12, 90))
    codes, meta = sampled.tensors()
    rows = gather_nbits(torch.tensor([[3, 0], [11, 3]]), codes, meta, 3, 32, 90, torch.float32)
    np.testing.assert_allclose(rows.numpy(), sampled.weight[[[3, 0], [11, 3]]], rtol=1e-6)


def calls() -> list[tuple[Any, tuple[Any, ...]]]:
    x, codes, meta, bits, group_size = arguments()
    weight, _ = mixed_sample(np.array([4, 2, 3, 8]), 64, (12, 250))
    parts = [tensor(part) for part in weight.codes]
    return [
        (nbits_linear, (x, codes, meta, bits, group_size, bias(12, torch.float32), "gelu", make_counters("cpu"))),
        (mixed_linear, (activations(5, 250), parts, tensor(weight.meta), tensor(weight.table), 64)),
        (int8_linear, (x, codes, meta, bits, group_size, torch.tensor(0.1))),
        (gather_nbits, (torch.tensor([[1, 2]]), codes, meta, bits, group_size, 96)),
    ]


@pytest.mark.parametrize("index", range(4))
def test_fakes_and_schemas(index: int) -> None:
    """Shapes, types and aliasing as declared, under torch's own checks of an operator."""
    operator, args = calls()[index]
    torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"))


@pytest.mark.parametrize("index", range(4))
def test_compiled_without_a_break(index: int) -> None:
    operator, args = calls()[index]

    def call(*inputs: Any) -> Tensor:
        out: Tensor = operator(*inputs)
        return out + 1

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*args), call(*args))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "the kernels have 2, 3, 4 and 8 bits, got 5"),
        ({"bits": 8}, "rows of 24 words do not hold 96 codes of 8 bits"),
        ({"group_size": 64}, "meta must be [(2,) G, N] with G = 2 and N = 12, got (3, 12)"),
        ({"codes": torch.zeros(12, 24)}, "codes must be int16 and meta int32, got torch.float32 and torch.int32"),
        ({"bias": torch.zeros(3)}, "bias must be [N] = [12], got [3]"),
        ({"activation": "tanh"}, "activation must be one of none, relu, gelu, silu, got 'tanh'"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    given = dict(zip(("x", "codes", "meta", "bits", "group_size"), arguments(), strict=True)) | change
    with pytest.raises(ValueError, match=re.escape(message)):
        nbits_linear(**given)


def test_refused_by_the_others() -> None:
    x, codes, meta, _, _ = arguments()
    with pytest.raises(ValueError, match="weights of 4 and 8 bits, got 2"):
        int8_linear(x, codes, meta, 2, 32)
    with pytest.raises(ValueError, match="groups of 32 or more, got 16"):
        int8_linear(x, *sample(4, 16, (12, 96)).tensors(), 4, 16)
    with pytest.raises(ValueError, match="x_scale must have one element, got 2"):
        int8_linear(x, codes, meta, 4, 32, torch.ones(2))
    weight, _ = mixed_sample(np.array([4, 2, 3, 8]), 64, (12, 250))
    parts, words, table = [tensor(part) for part in weight.codes], tensor(weight.meta), tensor(weight.table)
    with pytest.raises(ValueError, match="4 groups of 64 do not fit K = 96"):
        mixed_linear(x, parts, words, table, 64)
    with pytest.raises(ValueError, match=re.escape("and a table of 5 do not hold 4 groups of 128")):
        mixed_linear(activations(5, 250), parts, words, table, 128)
    for entries in (3, 6):
        with pytest.raises(ValueError, match=f"and a table of {entries} do not hold 4 groups of 64"):
            mixed_linear(activations(5, 250), parts, words, torch.zeros(entries, dtype=torch.int32), 64)
    with pytest.raises(ValueError, match="activation must be one of"):
        reference.activate(x, "tanh")


def test_import_needs_no_triton() -> None:
    code = "import sys, quantkit_kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
