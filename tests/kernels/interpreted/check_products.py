"""Every kernel in the interpreter against float64 and, on the same bytes, onnxruntime; run by test_interpreted.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from quantkit_kernels import launch, reference
from quantkit_kernels.config import Tile

from tests.kernels.samples import (
    OUTPUT,
    WEIGHTS,
    Sample,
    activations,
    bias,
    error,
    mixed_sample,
    onnxruntime_product,
    product,
    sample,
    tensor,
)

TILE = Tile(BM=8, BN=16, split=2, warps=1, stages=1)
GROUPS = (16, 32, 64, 128, 256, -1)


def skinny(sampled: Sample, x: torch.Tensor, tile: Tile = TILE, kernel: str = "skinny") -> torch.Tensor:
    codes, meta = sampled.tensors()
    packed = sampled.packed
    return launch.nbits_linear(x, codes, meta, packed.bits, packed.group_size, tile=tile, kernel=kernel)


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_skinny(bits: int, group_size: int) -> None:
    """Neither M nor N fill their tiles; K = 300 ends within a group, a tile and a load of x, and is cut in two."""
    sampled = sample(bits, group_size, (20, 300), wide=group_size == 64)
    x = activations(5, 300)
    out = skinny(sampled, x)
    assert error(out, product(x, sampled.weight)) < OUTPUT
    if bits != 3 and group_size != -1:
        assert error(out, onnxruntime_product(x, sampled, group_size)) < OUTPUT


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_skinny_whole_tiles(bits: int, group_size: int) -> None:
    """Without masks on K, in one part, and the zero points of a symmetric grid left to onnxruntime's default."""
    sampled = sample(bits, group_size, (16, 256), symmetric=True)
    x = activations(8, 256)
    out = skinny(sampled, x, replace(TILE, split=1))
    assert error(out, product(x, sampled.weight)) < OUTPUT
    if bits != 3:
        assert error(out, onnxruntime_product(x, sampled, group_size, with_points=False)) < OUTPUT


@pytest.mark.parametrize("num_inputs", [301, 302, 40])
def test_rows_that_are_no_whole_loads(num_inputs: int) -> None:
    sampled = sample(4, 32, (17, num_inputs))
    x = activations(9, 2 * num_inputs)[:, ::2]
    assert error(skinny(sampled, x), product(x, sampled.weight)) < OUTPUT


@pytest.mark.parametrize("group_size", [16, 64, 128, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gemm(bits: int, group_size: int) -> None:
    sampled = sample(bits, group_size, (20, 300), wide=group_size == 64)
    x = activations(11, 300)
    assert error(skinny(sampled, x, kernel="gemm"), product(x, sampled.weight)) < WEIGHTS


@pytest.mark.parametrize("group_size", [16, 128, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dequantized(bits: int, group_size: int) -> None:
    """Bit for bit the weights of the reference; the product in pieces of N, with the epilogue."""
    sampled = sample(bits, group_size, (20, 300), wide=group_size == 16)
    codes, meta = sampled.tensors()
    packed = sampled.packed
    weight = launch.dequantize(codes, meta, bits, packed.group_size, 300, torch.float32)
    assert torch.equal(weight, reference.dequantize(codes, meta, bits, packed.group_size, 300))
    x, offsets = activations(7, 300), bias(20)
    out = launch.nbits_linear(x, codes, meta, bits, packed.group_size, offsets, kernel="dequant")
    assert error(out, product(x, sampled.weight) + offsets.double().numpy()) < WEIGHTS
    positive = launch.nbits_linear(x, codes, meta, bits, packed.group_size, offsets, "relu", kernel="dequant")
    assert torch.equal(positive, out.clamp(min=0))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gather(bits: int) -> None:
    sampled = sample(bits, 32, (20, 300), wide=bits == 8)
    codes, meta = sampled.tensors()
    ids = torch.tensor([[3, 19, 0], [1, 1, 7]])
    rows = launch.gather_nbits(ids, codes, meta, bits, 32, 300, torch.float32)
    assert torch.equal(rows, reference.dequantize(codes, meta, bits, 32, 300)[ids])
    assert launch.gather_nbits(ids, codes, meta, bits, 32, 300, torch.float16).dtype == torch.float16


@pytest.mark.parametrize(
    ("group_size", "num_inputs"), [(16, 376), (32, 376), (64, 768), (64, 750), (128, 768), (128, 750), (256, 750)]
)
def test_mixed(group_size: int, num_inputs: int) -> None:
    """Odd numbers of 3-bit groups, absent widths, a group that K cuts."""
    num_groups = -(-num_inputs // group_size)
    group_bits = np.random.default_rng(group_size).choice([2, 3, 4, 8], num_groups)
    weight, dense = mixed_sample(group_bits, group_size, (20, num_inputs), wide=group_size == 64)
    x = activations(3, num_inputs)
    codes = [tensor(part) for part in weight.codes]
    out = launch.mixed_linear(x, codes, tensor(weight.meta), tensor(weight.table), group_size, tile=TILE)
    assert error(out, product(x, dense)) < OUTPUT


def test_mixed_with_many_rows() -> None:
    weight, dense = mixed_sample(np.array([3, 8, 2, 4, 3, 3, 8]), 64, (20, 430))
    x, offsets = activations(129, 430), bias(20)
    codes, meta, table = [tensor(part) for part in weight.codes], tensor(weight.meta), tensor(weight.table)
    out = launch.mixed_linear(x, codes, meta, table, 64, offsets, "none")
    assert error(out, product(x, dense) + offsets.double().numpy()) < WEIGHTS


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_int8(bits: int, group_size: int, static: bool) -> None:
    """Against integers computed exactly: what is left is the rounding of the result."""
    sampled = sample(bits, group_size, (20, 300), wide=group_size == 64)
    codes, meta = sampled.tensors()
    x = activations(5, 300)
    x[2] = 0
    scale = torch.tensor([0.02]) if static else None
    width, offsets = sampled.packed.group_size, bias(20)
    out = launch.int8_linear(x, codes, meta, bits, width, scale, offsets, tile=replace(TILE, split=1 + static))
    rounded, scales = reference.quantize_rows(x, scale)
    expected = product(rounded.double() * scales.double(), sampled.weight) + offsets.double().numpy()
    assert error(out, expected) < OUTPUT


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("kernel", ["skinny", "gemm"])
def test_epilogue(kernel: str, activation: str) -> None:
    sampled = sample(4, 64, (20, 128))
    codes, meta = sampled.tensors()
    x, offsets = activations(3, 128) * 0.02, bias(20)
    out = launch.nbits_linear(x, codes, meta, 4, 64, offsets, activation, tile=TILE, kernel=kernel)
    exact = torch.from_numpy(product(x, sampled.weight)) + offsets.double()
    expected = reference.activate(exact, activation).numpy()
    np.testing.assert_allclose(out.double().numpy(), expected, rtol=2e-3, atol=1e-3)


def test_split_leaves_its_counters_at_zero_and_repeats() -> None:
    """Two calls with the same counters agree bit for bit; blocks of rows have counters of their own."""
    sampled = sample(4, 64, (20, 512))
    codes, meta = sampled.tensors()
    x = activations(10, 512)
    counters = torch.zeros(4096, dtype=torch.int32)
    tile = replace(TILE, split=4)
    first = launch.nbits_linear(x, codes, meta, 4, 64, counters=counters, tile=tile, kernel="skinny")
    second = launch.nbits_linear(x, codes, meta, 4, 64, counters=counters, tile=tile, kernel="skinny")
    assert torch.equal(first, second)
    assert not counters.any()
    assert error(first, product(x, sampled.weight)) < OUTPUT


@pytest.mark.parametrize(
    ("bits", "kernel"), [(2, "skinny"), (3, "skinny"), (4, "skinny"), (8, "skinny"), (3, "gemm"), (4, "gemm")]
)
def test_one_wrong_bit_is_seen(bits: int, kernel: str) -> None:
    """The lowest bit of one code, of one scale's upper byte, of one zero point, each beyond the tolerance."""
    sampled = sample(bits, 32, (20, 64))
    codes, meta = sampled.tensors()
    x = activations(5, 64)
    expected = product(x, sampled.weight)
    limit = OUTPUT if kernel == "skinny" else WEIGHTS
    wrong = [(codes.clone(), meta), (codes, meta.clone()), (codes, meta.clone())]
    wrong[0][0][7, 2] ^= 1
    wrong[1][1][1, 7] ^= 1 << 8
    wrong[2][1][1, 7] = meta[1, 8] & ~0xFFFF | meta[1, 7] & 0xFFFF
    assert meta[1, 7] >> 16 != meta[1, 8] >> 16
    for index, (stored, words) in enumerate([(codes, meta), *wrong]):
        out = launch.nbits_linear(x, stored, words, bits, 32, tile=TILE, kernel=kernel)
        assert (error(out, expected) > limit) == (index > 0)


def test_nothing_to_compute() -> None:
    sampled = sample(4, 32, (20, 64))
    codes, meta = sampled.tensors()
    assert launch.nbits_linear(activations(0, 64), codes, meta, 4, 32).shape == (0, 20)
    assert launch.int8_linear(activations(0, 64), codes, meta, 4, 32).shape == (0, 20)
