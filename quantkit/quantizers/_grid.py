"""The arithmetic that all weight quantizers share: groups along K, scales, zero points, codes.

Affine grid of one group: w ~ scale * (code - zero_point), code = clip(rint(w / scale + zero_point)).

    2 bits, asymmetric       -s   0   s   2s     zero_point 1 (any of 0..3), codes 0..3
    2 bits, symmetric      -2s  -s   0   s       zero_point 2; round-to-nearest leaves code 0 unused
    1 bit (mid-rise)            -s/2 s/2         zero_point 0.5: zero itself is not on the grid

Scales are values that float16 holds exactly wherever float16 is fine enough for the whole layer, and they are rounded
before the codes are computed: a file may then store them in two bytes without changing a single weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quantkit.errors import InputError
from quantkit.types import Array, FloatArray, QuantizedWeight, QuantSpec

CHUNK_ELEMENTS = 1 << 17
"""Weights handled at once: 512 KiB per float32 temporary, so that a chunk stays in the processor's cache."""

_SMALLEST_HALF = 2.0**-24  # exact in float16; scale of an all-zero group on the mid-rise grid, which has no zero
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Grid:
    """Where the codes of a matrix lie.

    Attributes:
        scales: [N, G] float32, positive.
        zero_points: [N, G] float32, integers in [0, 2**bits - 1] of the group, or 0.5 for 1 bit.
        half: the scales are exact in float16.
    """

    scales: FloatArray
    zero_points: FloatArray
    half: bool


@dataclass(frozen=True)
class Limits:
    """Smallest and largest code of every group.

    Attributes:
        low, high: [G] float32.
    """

    low: FloatArray
    high: FloatArray


def middles(widths: npt.NDArray[np.uint8]) -> FloatArray:
    """[G] the zero point of a symmetric grid of each width; 0.5 for 1 bit."""
    return np.where(widths > 1, 2.0 ** (widths - 1.0), 0.5).astype(np.float32)


def all_codes(spec: QuantSpec, num_inputs: int) -> Limits:
    """Every code that a group's width holds."""
    high = (2.0 ** spec.widths(num_inputs) - 1).astype(np.float32)
    return Limits(np.zeros_like(high), high)


def rtn_codes(spec: QuantSpec, num_inputs: int) -> Limits:
    """The codes of round-to-nearest: a symmetric grid leaves code 0 unused so that -w maps to -q."""
    limits = all_codes(spec, num_inputs)
    low = (spec.widths(num_inputs) > 1) if spec.symmetric else limits.low
    return Limits(np.asarray(low, dtype=np.float32), limits.high)


def row_chunks(shape: tuple[int, int], elements: int = CHUNK_ELEMENTS) -> Iterator[slice]:
    """Consecutive row ranges of about `elements` weights each."""
    step = max(1, elements // max(shape[1], 1))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def grouped(rows: FloatArray, width: int) -> FloatArray:
    """[n, K] -> [n, G, width]; a shorter last group is filled with zeros. A view where nothing has to be filled."""
    n, num_inputs = rows.shape
    num_groups = -(-num_inputs // width)
    missing = num_groups * width - num_inputs
    if missing:
        rows = np.concatenate([rows, np.zeros((n, missing), rows.dtype)], axis=1)
    return rows.reshape(n, num_groups, width)


def group_lengths(num_inputs: int, width: int) -> npt.NDArray[np.int64]:
    """[G] inputs of each group."""
    starts = np.arange(0, num_inputs, width)
    return np.minimum(starts + width, num_inputs) - starts


def _to_half(scales: Array) -> npt.NDArray[np.float64]:
    """The float16 value at or below each scale.

    Rounding down keeps both ends of the range on the first and the last code, so quantizing a quantized matrix again
    changes nothing.
    """
    exact = np.asarray(scales, dtype=np.float64)
    with np.errstate(over="ignore"):
        nearest = exact.astype(np.float16)
    below = np.nextafter(nearest, np.float16(0))
    return np.where(nearest.astype(np.float64) > exact, below, nearest).astype(np.float64)


def fits_half(scales: Array) -> bool:
    """True when float16 holds every scale to a relative 2**-10."""
    exact = np.asarray(scales, dtype=np.float64)
    return bool(np.all(np.abs(_to_half(exact) - exact) <= 2.0**-10 * exact))


def store_scales(scales: Array, half: bool) -> FloatArray:
    """Scales as they will be stored: float32, and exact in float16 when `half`."""
    return (_to_half(scales) if half else np.asarray(scales)).astype(np.float32)


def nearest_scales(scales: Array, half: bool, otherwise: Array) -> npt.NDArray[np.float64]:
    """The storable value nearest to each scale, as float64; `otherwise` where that is 0 or infinite."""
    with np.errstate(over="ignore"):
        stored = scales.astype(np.float16 if half else np.float32).astype(np.float64)
    return np.where((stored > 0) & np.isfinite(stored), stored, otherwise)


def minmax_grid(weight: FloatArray, spec: QuantSpec) -> Grid:
    """The grid that covers each group's range and zero; for 1 bit the one that minimises the squared error."""
    low, high, size = _group_ranges(weight, spec)
    widths = spec.widths(weight.shape[1])
    single = widths == 1
    if spec.symmetric:
        scales = np.maximum(high, -low) / np.maximum(2.0 ** (widths - 1.0) - 1, 1)
    else:
        scales = (high - low) / (2.0**widths - 1)
    scales = np.where(single, 2 * size, scales)
    empty = np.where(single, _SMALLEST_HALF, 1.0)
    scales = np.where(scales < _SMALLEST_SCALE, empty, scales)
    half = fits_half(scales)
    stored = store_scales(scales, half)
    # Half goes up: the smallest weight then always gets code 0 and the largest always the last code.
    free = np.clip(np.floor(-low / stored + 0.5), 0, 2.0**widths - 1)
    zero_points = np.where(single | spec.symmetric, middles(widths), free).astype(np.float32)
    return Grid(stored, zero_points, half)


def _group_ranges(weight: FloatArray, spec: QuantSpec) -> tuple[Array, Array, Array]:
    """[N, G] float64 each: smallest value or 0, largest value or 0, and mean |w| (zeros when no group has 1 bit)."""
    num_rows, num_inputs = weight.shape
    width = spec.group_width(num_inputs)
    shape = (num_rows, spec.num_groups(num_inputs))
    low, high, size = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    lengths = group_lengths(num_inputs, width)
    needs_size = bool((spec.widths(num_inputs) == 1).any())
    for rows in row_chunks(weight.shape):
        groups = grouped(weight[rows], width)
        low[rows] = np.minimum(groups.min(axis=-1), 0)
        high[rows] = np.maximum(groups.max(axis=-1), 0)
        if needs_size:
            size[rows] = np.abs(groups).sum(axis=-1, dtype=np.float64) / lengths
    bad = ~(np.isfinite(low) & np.isfinite(high)).all(axis=1)
    if bad.any():
        row = int(np.argmax(bad))
        raise InputError(f"weight row {row} holds NaN or infinity, which no grid can hold; repair the model's weights")
    return low, high, size


def nearest_codes(values: Array, scales: Array, zero_points: Array, limits: Limits) -> npt.NDArray[np.uint8]:
    """clip(rint(values / scales + zero_points)); values [n, G, width], scales and zero_points [n, G, 1]."""
    codes = values / scales
    codes += zero_points
    np.rint(codes, out=codes)
    np.maximum(codes, limits.low[:, None], out=codes)
    np.minimum(codes, limits.high[:, None], out=codes)
    return codes.astype(np.uint8)


def quantized(weight: FloatArray, spec: QuantSpec, grid: Grid, limits: Limits) -> QuantizedWeight:
    """Every weight at its nearest code of the grid."""
    num_inputs = weight.shape[1]
    width = spec.group_width(num_inputs)
    codes = np.empty(weight.shape, dtype=np.uint8)
    for rows in row_chunks(weight.shape):
        scales, zero_points = grid.scales[rows, :, None], grid.zero_points[rows, :, None]
        part = nearest_codes(grouped(weight[rows], width), scales, zero_points, limits)
        codes[rows] = part.reshape(part.shape[0], -1)[:, :num_inputs]
    return QuantizedWeight(spec, codes, grid.scales, grid.zero_points, spec.widths(num_inputs))
