"""A quantized matrix as a file holds it, and how the kernels pack it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
from quantkit_kernels.packing import GROUP_SIZES, WIDTHS, MixedWeight, PackedWeight, pack, pack_mixed

from quantkit.packing import unpack
from quantkit.types import Array, FloatArray

LARGEST_CODE = 255
WORTH_MIXING = 0.9
"""Groups keep their own widths when that saves a tenth of the codes' bytes; a single width runs in fewer loops."""


@dataclass(frozen=True)
class Stored:
    """W[n, k] = (codes[n, k] - zero_points[n, g]) * scales[n, g] with g = k // group_size.

    Attributes:
        codes: uint8 [N, K].
        scales, zero_points: float32 [N, G].
        group_size: inputs per group; K when one scale serves a row.
    """

    codes: npt.NDArray[np.uint8]
    scales: FloatArray
    zero_points: FloatArray
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])

    def dequantize(self) -> FloatArray:
        """W[N, K], with the roundings of `QuantizedWeight.dequantize`."""
        scales, zero_points = (self._spread(item) for item in (self.scales, self.zero_points))
        weight: FloatArray = (self.codes.astype(np.float32) - zero_points) * scales
        return weight

    def _spread(self, values: FloatArray) -> FloatArray:
        repeated: FloatArray = np.repeat(values, self.group_size, axis=1)[:, : self.shape[1]]
        return repeated

    @cached_property
    def widths(self) -> npt.NDArray[np.int64]:
        """[G] the kernels' width that each group needs, for its codes and its zero points."""
        starts = np.arange(0, self.shape[1], self.group_size)
        largest = np.maximum.reduceat(self.codes.max(axis=0).astype(np.float64), starts)
        largest = np.maximum(largest, self.zero_points.max(axis=0))
        return np.array([next(bits for bits in WIDTHS if value < 1 << bits) for value in largest])


def from_integers(values: Array, scales: FloatArray, zero_points: Array, group_size: int) -> Stored:
    """Of integers in any range that lies within 256 of the row's zero: moved down as far as codes go.

    Args:
        values: [N, K] integers.
        scales, zero_points: [N, G].
    """
    starts = np.arange(0, values.shape[1], group_size)
    wide = values.astype(np.int16)
    low = np.minimum(np.minimum.reduceat(wide, starts, axis=1), zero_points.astype(np.int16))
    codes = (wide - np.repeat(low, group_size, axis=1)[:, : values.shape[1]]).astype(np.uint8)
    points = (zero_points.astype(np.float32) - low).astype(np.float32)
    return Stored(codes, scales.astype(np.float32), points, group_size)


def from_blob(
    blob: Array, scales: Array, zero_points: Array | None, bits: int, block: int, shape: tuple[int, int]
) -> Stored:
    """From the inputs of a MatMulNBits node with `bits` 2, 4 or 8; float zero points are taken as they are."""
    num_rows, num_inputs = shape
    groups = -(-num_inputs // block)
    flat = unpack((np.ascontiguousarray(blob).reshape(-1),), bits, num_rows * groups * block)
    codes = np.ascontiguousarray(flat.reshape(num_rows, -1)[:, :num_inputs])
    steps = np.asarray(scales).reshape(num_rows, groups).astype(np.float32)
    if zero_points is None:
        points = np.full((num_rows, groups), 1 << (bits - 1), np.float32)
    elif np.asarray(zero_points).dtype == np.uint8:
        rows = np.asarray(zero_points).reshape(num_rows, -1)
        count = rows.size * 8 // bits
        points = unpack((rows.reshape(-1),), bits, count).reshape(num_rows, -1)[:, :groups].astype(np.float32)
    else:
        points = np.asarray(zero_points).reshape(num_rows, groups).astype(np.float32)
    return Stored(codes, steps, points, min(block, num_inputs) if groups == 1 else block)


def packed(stored: Stored) -> PackedWeight | MixedWeight | str:
    """The same matrix for the kernels, or in one phrase why they cannot hold it.

    Widths that the kernels lack are stored in the next wider one. Half zero points (mid-rise grids) become whole by
    doubling: q - 0.5 = (2q - 1) / 2. Groups of a size that the kernels lack are split into equal parts.
    """
    whole = _whole(stored)
    if whole is None:
        return "its zero points are no codes"
    split = _split(whole)
    if split is None:
        return f"the kernels have no groups of {stored.group_size}"
    widths, widest = split.widths, int(split.widths.max())
    mixes = split.group_size in GROUP_SIZES and widths.sum() <= WORTH_MIXING * widest * widths.size
    if mixes:
        return pack_mixed(split.codes, split.scales, split.zero_points, widths, split.group_size)
    return pack(split.codes, split.scales, split.zero_points, widest, split.group_size)


def packed_rows(stored: Stored) -> PackedWeight | str:
    """`packed` with one width for all groups, as the table lookup reads it."""
    whole = _whole(stored)
    if whole is None:
        return "its zero points are no codes"
    split = _split(whole)
    if split is None:
        return f"the kernels have no groups of {stored.group_size}"
    return pack(split.codes, split.scales, split.zero_points, int(split.widths.max()), split.group_size)


def _whole(stored: Stored) -> Stored | None:
    """With zero points that are codes; groups with a half among them are doubled."""
    points = stored.zero_points
    halves = np.any(points != np.rint(points), axis=0)
    if halves.any():
        factor = np.where(halves, np.float32(2), np.float32(1))
        columns = np.repeat(factor.astype(np.uint8), stored.group_size)[: stored.shape[1]]
        points = points * factor
        largest = int(stored.codes[:, columns == 2].max(initial=0))
        if not np.array_equal(points, np.rint(points)) or 2 * largest > LARGEST_CODE:
            return None
        scales = (stored.scales / factor).astype(np.float32)
        stored = replace(stored, codes=stored.codes * columns, scales=scales, zero_points=points)
    fits = points.min(initial=0) >= 0 and points.max(initial=0) <= LARGEST_CODE
    return stored if fits and bool(np.isfinite(stored.scales).all()) else None


def _split(stored: Stored) -> Stored | None:
    num_inputs, size = stored.shape[1], stored.group_size
    if size in GROUP_SIZES or size == num_inputs:
        return stored
    part = next((item for item in sorted(GROUP_SIZES, reverse=True) if size % item == 0), None)
    if part is None:
        return None
    groups = -(-num_inputs // part)
    scales, points = (np.repeat(item, size // part, axis=1)[:, :groups] for item in (stored.scales, stored.zero_points))
    return replace(stored, scales=scales, zero_points=points, group_size=part)


def num_bytes(weight: PackedWeight | MixedWeight) -> int:
    """On the device: codes, scales, zero points and the order of the groups."""
    if isinstance(weight, PackedWeight):
        return int(weight.codes.nbytes + weight.meta.nbytes)
    return int(sum(part.nbytes for part in weight.codes) + weight.meta.nbytes + weight.table.nbytes)


def group_bits(weight: PackedWeight | MixedWeight) -> Sequence[int]:
    """The widths that occur."""
    if isinstance(weight, PackedWeight):
        return (weight.bits,)
    return tuple(bits for bits, part in zip(WIDTHS, weight.codes, strict=True) if part.shape[1])
