"""Packed weights: exact inverses, the emitter's bytes, onnxruntime's node, and one sentence for what does not fit."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from quantkit_kernels import from_matmulnbits, pack, pack_mixed, reference, unpack
from quantkit_kernels.packing import LARGEST_SCALE, pack_meta, padded_inputs, unpack_meta

from quantkit.packing import blob, pack_zero_points
from tests.kernels.samples import (
    activations,
    error,
    exact,
    mixed_sample,
    onnxruntime_product,
    packed_points,
    product,
    sample,
    tensor,
)


@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_unpack_inverts_pack(bits: int, group_size: int) -> None:
    """Also by the reference's own unpacking, and with K that fills neither words nor groups."""
    sampled = sample(bits, group_size, (7, 301), wide=bits == 8)
    codes, scales, zero_points = unpack(sampled.packed)
    assert np.array_equal(codes, sampled.codes)
    assert np.array_equal(scales, sampled.scales.astype(np.float32))
    assert np.array_equal(zero_points, sampled.zero_points)
    words, meta = sampled.tensors()
    assert np.array_equal(reference.unpack_codes(words, bits)[:, :301].numpy(), sampled.codes)
    width = sampled.packed.group_size
    assert words.shape[1] * 16 == padded_inputs(301, bits, width) * bits
    dense = reference.dequantize(words, meta, bits, width, 301).double().numpy()
    np.testing.assert_allclose(dense, sampled.weight, rtol=2**-23, atol=0)


@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_are_those_of_the_emitter(bits: int, block: int) -> None:
    sampled = sample(bits, block, (6, 200))
    stored = blob(sampled.codes, bits, block, sampled.zero_points[:, -1].astype(np.uint8))
    assert np.array_equal(sampled.packed.codes.view(np.uint8).reshape(stored.shape), stored)
    assert np.array_equal(pack_zero_points(sampled.zero_points, bits), packed_points(sampled.zero_points, bits))


@pytest.mark.parametrize("points", ["packed", "floats", "default"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_initializers_of_a_node(bits: int, points: str) -> None:
    """The codes of 4 and 8 bits are a view of the initializer; the product is onnxruntime's."""
    sampled = sample(bits, 32, (6, 200), symmetric=points == "default")
    stored = blob(sampled.codes, bits, 32, 0)
    given = {"packed": pack_zero_points(sampled.zero_points, bits), "floats": sampled.zero_points, "default": None}
    packed = from_matmulnbits(stored, sampled.scales.reshape(-1), given[points], bits, 32, (6, 200))
    assert np.shares_memory(packed.codes, stored) == (bits != 2)
    assert np.array_equal(unpack(packed)[0], sampled.codes)
    assert np.array_equal(packed.meta, sampled.packed.meta)
    x = activations(3, 200, torch.float32)
    weight = reference.dequantize(tensor(packed.codes), tensor(packed.meta), bits, 32, 200)
    out = reference.linear(x, weight, None, "none")
    assert error(out, onnxruntime_product(x, sampled, 32, with_points=points != "default")) < 1e-5
    assert error(out, product(x, sampled.weight)) < 1e-6


def test_words_of_two_bits() -> None:
    """One code at a time: of 128, 16 * p + c fills field p of word c."""
    for k in range(256):
        codes = np.zeros((1, 256), np.uint8)
        codes[0, k] = 3
        words = pack(codes, np.ones((1, 1)), np.zeros((1, 1)), 2, 256).codes.view(np.uint16).reshape(2, 16)
        expected = np.zeros((2, 16), np.uint16)
        expected[k // 128, k % 16] = 3 << 2 * (k // 16 % 8)
        assert np.array_equal(words, expected)


def test_words_of_three_bits() -> None:
    """One code at a time: 16 * p + c fills field p % 5 of word c of tile p // 5, or bits 15 of the three words c."""
    for k in range(256):
        codes = np.zeros((1, 256), np.uint8)
        codes[0, k] = 5
        tiles = pack(codes, np.ones((1, 1)), np.zeros((1, 1)), 3, 256).codes.view(np.uint16).reshape(3, 16)
        expected = np.zeros((3, 16), np.uint16)
        if k < 240:
            expected[k // 80, k % 16] = 5 << 3 * (k // 16 % 5)
        else:
            expected[[0, 2], k % 16] = 1 << 15
        assert np.array_equal(tiles, expected)


def test_words_of_meta() -> None:
    """One word by hand, and scales that need float32."""
    half = pack_meta(np.array([[0.5]]), np.array([[3]]), 2)
    assert half.tolist() == [[0x42003800]]
    wide = pack_meta(np.array([[0.1]]), np.array([[3]]), 2)
    assert wide.shape == (2, 1, 1)
    scales, points = unpack_meta(wide)
    assert scales[0, 0] == np.float32(0.1)
    assert points[0, 0] == 3
    assert unpack_meta(pack_meta(np.array([[1e-9]]), np.array([[0]]), 2))[0][0, 0] == np.float32(1e-9)


@pytest.mark.parametrize("sign", [1, -1])
def test_large_scales_stay_float32(sign: int) -> None:
    """The kernels multiply scales by 512 in float16."""
    assert np.isfinite(np.float16(512 * LARGEST_SCALE))
    assert pack_meta(np.array([[sign * LARGEST_SCALE]]), np.array([[0]]), 2).shape == (1, 1)
    assert pack_meta(np.array([[sign * 128.0]]), np.array([[0]]), 2).shape == (2, 1, 1)


@pytest.mark.parametrize("wide", [False, True])
def test_mixed_widths(wide: bool) -> None:
    """Odd numbers of groups, an absent width, a last group that K cuts; equal widths stay in order."""
    group_bits = np.array([4, 2, 3, 3, 4, 2, 3])
    weight, dense = mixed_sample(group_bits, 64, (5, 430), wide=wide)
    assert weight.table.tolist() == [1, 5, 2, 3, 6, 0, 4]
    assert [part.shape[1] for part in weight.codes] == [16, 48, 32, 0]
    codes = [tensor(part) for part in weight.codes]
    restored = reference.dequantize_mixed(codes, tensor(weight.meta), tensor(weight.table), 64, 430)
    np.testing.assert_allclose(restored.double().numpy(), dense, rtol=2**-23, atol=0)


@pytest.mark.parametrize(("count", "filling"), [(1, 3), (3, 1), (4, 0), (5, 3)])
def test_groups_that_fill_up_two_bits(count: int, filling: int) -> None:
    """128 codes are four groups of 32: the table has a zero for each that is missing, and counts can be told."""
    weight, dense = mixed_sample(np.array([3] + [2] * count), 32, (5, 32 * (1 + count)))
    assert weight.table.tolist() == [*range(1, count + 1), 0] + [0] * filling
    words = [part.shape[1] for part in weight.codes]
    assert reference.group_counts(words, 32, count + 1, weight.table.size) == (count, 1, 0, 0)
    codes = [tensor(part) for part in weight.codes]
    restored = reference.dequantize_mixed(codes, tensor(weight.meta), tensor(weight.table), 32, dense.shape[1])
    np.testing.assert_allclose(restored.double().numpy(), dense, rtol=2**-23, atol=0)


def ones(num_rows: int, num_groups: int) -> np.ndarray:
    return np.ones((num_rows, num_groups), np.float32)


@pytest.mark.parametrize(
    ("bits", "group_size", "change", "message"),
    [
        (5, 32, {}, "the kernels have 2, 3, 4 and 8 bits, got 5"),
        (4, 48, {}, "groups of 16, 32, 64, 128, 256 or the whole row, got 48"),
        (4, 32, {"scales": ones(4, 3)}, "scales must be [N, G] = (4, 2), got (4, 3)"),
        (2, 32, {"codes": np.full((4, 64), 4, np.uint8)}, "code 4 does not fit 2 bits"),
        (4, 32, {"zero_points": ones(4, 2) * 7.5}, "zero points must be integers from 0 to 15 for 4 bits"),
        (4, 32, {"zero_points": ones(4, 2) * 16}, "zero points must be integers from 0 to 15 for 4 bits"),
        (4, 32, {"scales": ones(4, 2) * np.inf}, "scales must be finite"),
    ],
)
def test_refused(bits: int, group_size: int, change: dict[str, np.ndarray], message: str) -> None:
    arrays = {"codes": np.zeros((4, 64), np.uint8), "scales": ones(4, 2), "zero_points": ones(4, 2)} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        pack(**arrays, bits=bits, group_size=group_size)


def test_refused_initializers() -> None:
    stored, scales = np.zeros(4 * 32, np.uint8), ones(4, 2)
    with pytest.raises(ValueError, match="read with 2, 4 or 8 bits, got 3"):
        from_matmulnbits(stored, scales, None, 3, 32, (4, 64))
    with pytest.raises(ValueError, match="expected 256 bytes and 8 scales"):
        from_matmulnbits(stored, scales, None, 8, 32, (4, 64))
    with pytest.raises(ValueError, match="3 uint8 values of zero points, expected 4"):
        from_matmulnbits(stored, scales, np.zeros(3, np.uint8), 4, 32, (4, 64))


def test_refused_mixed_widths() -> None:
    codes, scales = np.zeros((4, 64), np.uint8), ones(4, 2)
    with pytest.raises(ValueError, match="the kernels have 2, 3, 4 and 8 bits, got 6"):
        pack_mixed(codes, scales, scales, np.array([2, 6]), 32)
    with pytest.raises(ValueError, match="one entry for each of 2 groups"):
        pack_mixed(codes, scales, scales, np.array([2, 2, 2]), 32)
    with pytest.raises(ValueError, match="code 4 does not fit 2 bits"):
        pack_mixed(codes + 4, scales, scales, np.array([2, 4]), 32)


def test_exact_is_the_definition() -> None:
    assert exact(np.array([[3, 1]], np.uint8), np.array([[2.0]]), np.array([[1]], np.float32), 2).tolist() == [[4, 0]]
