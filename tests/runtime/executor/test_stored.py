"""Codes as files hold them, packed for the kernels: nothing is lost, and what cannot be packed says why."""

from __future__ import annotations

import numpy as np
import pytest
from quantkit_kernels.packing import MixedWeight, PackedWeight, unpack

from quantkit.packing import blob, pack_zero_points
from quantkit.runtime.executor._stored import Stored, from_blob, from_integers, num_bytes, packed, packed_rows


def random(shape: tuple[int, int], groups: int, size: int, top: int, points: float | None = None) -> Stored:
    rng = np.random.default_rng([*shape, top])
    zero = rng.integers(0, top + 1, (shape[0], groups)) if points is None else np.full((shape[0], groups), points)
    scales = rng.uniform(0.5, 2, (shape[0], groups)).astype(np.float32)
    return Stored(rng.integers(0, top + 1, shape).astype(np.uint8), scales, zero.astype(np.float32), size)


def rebuilt(weight: PackedWeight) -> np.ndarray:
    codes, scales, points = unpack(weight)
    return Stored(codes, scales, points, weight.group_size).dequantize()


@pytest.mark.parametrize(("top", "bits"), [(1, 2), (3, 2), (4, 3), (7, 3), (8, 4), (15, 4), (16, 8), (255, 8)])
def test_narrowest_width(top: int, bits: int) -> None:
    stored = random((5, 70), 3, 32, top)
    stored.codes[:, ::32] = top
    weight = packed(stored)
    assert isinstance(weight, PackedWeight) and (weight.bits, weight.group_size) == (bits, 32)
    np.testing.assert_array_equal(rebuilt(weight), stored.dequantize())
    assert num_bytes(weight) == weight.codes.nbytes + weight.meta.nbytes


@pytest.mark.parametrize(("size", "part"), [(48, 16), (96, 32), (384, 128), (512, 256), (100, 100)])
def test_groups_are_split(size: int, part: int) -> None:
    columns = 2 * size - 8 if size != 100 else 100
    stored = random((3, columns), -(-columns // size), size, 15)
    weight = packed(stored)
    assert isinstance(weight, PackedWeight) and weight.group_size == part
    np.testing.assert_array_equal(rebuilt(weight), stored.dequantize())


def test_half_zero_points_are_doubled_where_they_occur() -> None:
    stored = random((4, 64), 2, 32, 1, 0.5)
    weight = packed(stored)
    assert isinstance(weight, PackedWeight) and weight.bits == 2
    np.testing.assert_array_equal(rebuilt(weight), stored.dequantize())
    codes = stored.codes.copy()
    codes[:, 32:] = 255  # a group that could not be doubled, and need not be
    points = stored.zero_points.copy()
    points[:, 1] = 128
    both = Stored(codes, stored.scales, points, 32)
    weight = packed_rows(both)
    assert isinstance(weight, PackedWeight) and weight.bits == 8
    np.testing.assert_array_equal(rebuilt(weight), both.dequantize())


@pytest.mark.parametrize(("points", "top"), [(0.25, 3), (-1.0, 3), (256.0, 3), (0.5, 255), (-0.5, 1)])
def test_zero_points_that_are_no_codes(points: float, top: int) -> None:
    stored = random((4, 64), 2, 32, top, points)
    assert packed(stored) == packed_rows(stored) == "its zero points are no codes"


def test_groups_that_do_not_fit() -> None:
    stored = random((4, 80), 2, 40, 15)
    assert packed(stored) == packed_rows(stored) == "the kernels have no groups of 40"


def test_infinite_scales_stay_float() -> None:
    stored = random((4, 64), 2, 32, 15)
    stored.scales[1, 1] = np.inf
    assert packed(stored) == "its zero points are no codes"


@pytest.mark.parametrize(("tops", "bits"), [((3, 15, 7, 3), (2, 3, 4)), ((15, 15, 15, 7), (4,)), ((255, 3), (2, 8))])
def test_widths_are_mixed_where_it_pays(tops: tuple[int, ...], bits: tuple[int, ...]) -> None:
    parts = [random((6, 32), 1, 32, top, 1.0) for top in tops]
    codes, scales, points = (
        np.concatenate([getattr(part, name) for part in parts], 1) for name in ("codes", "scales", "zero_points")
    )
    weight = packed(Stored(codes, scales, points, 32))
    if len(bits) == 1:
        assert isinstance(weight, PackedWeight) and weight.bits == bits[0]
    else:
        assert isinstance(weight, MixedWeight)
        assert tuple(np.array([2, 3, 4, 8])[[part.shape[1] > 0 for part in weight.codes]]) == bits
        total = sum(part.nbytes for part in weight.codes)
        assert num_bytes(weight) == total + weight.meta.nbytes + weight.table.nbytes


def test_integers_move_down_as_far_as_codes_go() -> None:
    values = np.array([[-3, 4, 0, 1], [-128, 127, 5, 5]], np.int8)
    stored = from_integers(values, np.ones((2, 2), np.float32), np.zeros((2, 2), np.int16), 2)
    assert stored.codes.tolist() == [[0, 7, 0, 1], [0, 255, 5, 5]]
    assert stored.zero_points.tolist() == [[3, 0], [128, 0]]
    np.testing.assert_array_equal(stored.dequantize(), values)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero", ["none", "packed", "float"])
@pytest.mark.parametrize("columns", [96, 80, 20])
def test_blobs(bits: int, zero: str, columns: int) -> None:
    """MatMulNBits' inputs, with a last block that is filled up; a lone block may be wider than the row."""
    groups, top = -(-columns // 32), 2**bits - 1
    stored = random((5, columns), groups, 32, top, float(1 << (bits - 1)) if zero == "none" else None)
    points = {"none": None, "packed": pack_zero_points(stored.zero_points, bits), "float": stored.zero_points}[zero]
    found = from_blob(blob(stored.codes, bits, 32, 0), stored.scales.reshape(-1), points, bits, 32, (5, columns))
    np.testing.assert_array_equal(found.codes, stored.codes)
    np.testing.assert_array_equal(found.dequantize(), stored.dequantize())
    assert found.group_size == min(32, columns)
