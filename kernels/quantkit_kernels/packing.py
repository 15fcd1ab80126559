"""Weights as the kernels read them: packed codes and one word of scale and zero point per group and row.

`W[n, k] = (codes[n, k] - zero_points[n, g]) * scales[n, g]` with g = k // group_size, W of shape [N, K].

codes: int16 [N, words], the rows K-contiguous, codes low bits first.
  4, 8 bits      the bytes of onnxruntime's MatMulNBits initializer B, read as little-endian int16: code k lies in
                 bits [b*(k % P), b*(k % P) + b) of word k // P, with P = 16 / b codes per word. K is filled up to whole
                 groups and to whole words; for one scale per row, to a multiple of 128.
  2 bits         K is filled up to a multiple of 128. Each 128 codes are 16 words: code 16*p + c lies in bits
                 [2*p, 2*p + 2) of word c, so that 16 codes that follow each other are a tensor-core operand's.
  3 bits         K is filled up to a multiple of 256. Each 256 codes are 48 words, three tiles of 16: code 16*p + c lies
                 in bits [3*(p % 5), 3*(p % 5) + 3) of word c of tile p // 5; of the last 16 codes (p = 15), bit j is
                 bit 15 of word c of tile j.
meta: int32 [G, N]: float16 scale | float16 zero point << 16. Where float16 does not hold 512 times the scales, int32
  [2, G, N]: the same with rounded scales, then the float32 scales.
Mixed widths (`MixedWeight`) sort the groups by width; `table` tells which group of K each one is, and by its length
how many groups fill up the codes of 2 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.int16]
Meta = npt.NDArray[np.int32]
Floats = npt.NDArray[np.floating]

WIDTHS = (2, 3, 4, 8)
GROUP_SIZES = (16, 32, 64, 128, 256)
ROW_MULTIPLE = 128  # of codes, so that rows with one scale start at 16-byte boundaries
RUNS = {2: 128, 3: 256}  # codes that are packed together
LARGEST_SCALE = 127.0  # 512 times as much is a float16


@dataclass(frozen=True)
class PackedWeight:
    """One weight [N, K] of one width; see the module for `codes` int16 [N, words] and `meta` int32 [(2,) G, N]."""

    bits: int
    group_size: int
    shape: tuple[int, int]
    codes: Words
    meta: Meta


@dataclass(frozen=True)
class MixedWeight:
    """One weight [N, K] whose groups differ in width; the groups are sorted by width, equal widths in the order of K.

    codes: one int16 [N, words] per width of `WIDTHS`, [N, 0] where no group has it; the groups of a width are packed as
        if they were the whole weight.
    meta: int32 [(2,) G, N] in sorted order.
    table: int32 [G + F]: entry i is the group of K that sorted group i holds; F zeros, for the groups that fill up the
        codes of 2 bits to a multiple of 128.
    """

    group_size: int
    shape: tuple[int, int]
    codes: tuple[Words, ...]
    meta: Meta
    table: npt.NDArray[np.int32]


def pack(codes: Codes, scales: Floats, zero_points: Floats, bits: int, group_size: int) -> PackedWeight:
    """Pack codes uint8 [N, K] with scales and zero points [N, ceil(K / group_size)].

    Args:
        group_size: 16, 32, 64, 128, 256, or K (or -1) for one scale per row.

    Raises:
        ValueError: a width, group size or array that the kernels have no place for.
    """
    shape = (int(codes.shape[0]), int(codes.shape[1]))
    group_size = shape[1] if group_size == -1 else group_size
    _check_geometry(bits, group_size, shape, scales.shape)
    words = _pack_words(_filled(codes, zero_points, bits, group_size), bits)
    return PackedWeight(bits, group_size, shape, words, pack_meta(scales, zero_points, bits))


def from_matmulnbits(
    blob: npt.ArrayLike,
    scales: Floats,
    zero_points: npt.NDArray[np.generic] | None,
    bits: int,
    block: int,
    shape: tuple[int, int],
) -> PackedWeight:
    """The initializers of a MatMulNBits node; codes of 4 and 8 bits are a view of its B.

    Args:
        blob: uint8 B, N * ceil(K / block) * block * bits / 8 bytes in any shape.
        scales: [N, G] or flat.
        zero_points: None for 2^(bits-1); uint8 as the operator packs them; floats [N, G] or flat.

    Raises:
        ValueError: as `pack`, or arrays that do not have the operator's sizes.
    """
    num_rows, num_inputs = shape
    num_groups = -(-num_inputs // block)
    row_bytes = num_groups * block * bits // 8
    data = np.ascontiguousarray(np.asarray(blob)).view(np.uint8).reshape(-1)
    if bits == 3 or bits not in WIDTHS:
        raise ValueError(f"MatMulNBits is read with 2, 4 or 8 bits, got {bits}")
    if data.size != num_rows * row_bytes or np.size(scales) != num_rows * num_groups:
        raise ValueError(
            f"{bits}-bit B of {data.size} bytes and {np.size(scales)} scales do not fit a weight {shape} in blocks of "
            f"{block}: expected {num_rows * row_bytes} bytes and {num_rows * num_groups} scales"
        )
    points = _matmulnbits_points(zero_points, bits, num_rows, num_groups)
    grid = np.asarray(scales).reshape(num_rows, num_groups)
    _check_geometry(bits, block, shape, grid.shape, whole_row=False)
    if bits == 2:
        words = _pack_words(_split(data.reshape(num_rows, -1), bits), bits)
    else:
        words = data.view("<i2").reshape(num_rows, -1)
    return PackedWeight(bits, block, shape, words, pack_meta(grid, points, bits))


def unpack(packed: PackedWeight) -> tuple[Codes, Floats, Floats]:
    """(codes uint8 [N, K], scales float32 [N, G], zero points float32 [N, G]); the inverse of `pack`."""
    codes = _unpack_words(packed.codes, packed.bits)[:, : packed.shape[1]]
    return codes, *unpack_meta(packed.meta)


def pack_mixed(
    codes: Codes,
    scales: Floats,
    zero_points: Floats,
    group_bits: npt.NDArray[np.integer],
    group_size: int,
) -> MixedWeight:
    """Pack codes uint8 [N, K] whose group g has `group_bits[g]` of `WIDTHS` bits; scales and zero points [N, G].

    Raises:
        ValueError: as `pack`.
    """
    shape = (int(codes.shape[0]), int(codes.shape[1]))
    widths = np.asarray(group_bits)
    for bits in np.unique(widths).tolist():
        _check_geometry(bits, group_size, shape, scales.shape, whole_row=False)
    if widths.shape != (scales.shape[1],):
        raise ValueError(f"group_bits must have one entry for each of {scales.shape[1]} groups, got {widths.shape}")
    table = np.argsort(widths, kind="stable").astype(np.int32)
    grid = np.zeros((shape[0], scales.shape[1] * group_size), np.uint8)
    grid[:, : shape[1]] = codes
    groups = grid.reshape(shape[0], -1, group_size)
    parts, metas = [], []
    for bits in WIDTHS:
        chosen = np.flatnonzero(widths == bits)
        part = groups[:, chosen].reshape(shape[0], -1)
        parts.append(_pack_words(_check_codes(part, bits), bits))
        metas.append(pack_meta(scales[:, chosen], zero_points[:, chosen], bits))
    if any(meta.ndim == 3 for meta in metas):
        meta = pack_meta(scales[:, table], zero_points[:, table], int(widths.max()), wide=True)
    else:
        meta = np.concatenate(metas)
    filling = parts[0].shape[1] * 8 // group_size - np.count_nonzero(widths == 2)
    return MixedWeight(group_size, shape, tuple(parts), meta, np.pad(table, (0, filling)))


def pack_meta(scales: Floats, zero_points: Floats, bits: int, wide: bool = False) -> Meta:
    """int32 [G, N], or [2, G, N] where float16 does not hold the scales or `wide` asks for it; from arrays [N, G].

    Raises:
        ValueError: zero points that are no codes, or scales that are not finite.
    """
    points = np.asarray(zero_points).astype(np.float32)
    if not np.array_equal(points, np.rint(points)) or points.min(initial=0) < 0 or points.max(initial=0) >= 1 << bits:
        raise ValueError(f"zero points must be integers from 0 to {(1 << bits) - 1} for {bits} bits")
    full = np.asarray(scales).astype(np.float32)
    if not np.all(np.isfinite(full)):
        raise ValueError("scales must be finite")
    with np.errstate(over="ignore"):
        half = full.astype(np.float16)
    meta = _low_half(half) | (_low_half(points.astype(np.float16)) << np.uint32(16))
    held = np.array_equal(half.astype(np.float32), full) and bool(np.all(np.abs(full) <= LARGEST_SCALE))
    if held and not wide:
        return meta.view(np.int32)
    return np.stack([meta, np.ascontiguousarray(full.T).view(np.uint32)]).view(np.int32)


def unpack_meta(meta: Meta) -> tuple[Floats, Floats]:
    """(scales float32 [N, G], zero points float32 [N, G])."""
    narrow = (meta if meta.ndim == 2 else meta[0]).view(np.uint32)
    points = (narrow >> np.uint32(16)).astype(np.uint16).view(np.float16).astype(np.float32)
    if meta.ndim == 3:
        return np.ascontiguousarray(meta[1]).view(np.float32).T, points.T
    return narrow.astype(np.uint16).view(np.float16).astype(np.float32).T, points.T


def padded_inputs(num_inputs: int, bits: int, group_size: int) -> int:
    """Codes per packed row, filling included."""
    if bits in RUNS:
        return -(-num_inputs // RUNS[bits]) * RUNS[bits]
    multiple = group_size if group_size in GROUP_SIZES else ROW_MULTIPLE
    return -(-num_inputs // multiple) * multiple


def _filled(codes: Codes, zero_points: Floats, bits: int, group_size: int) -> Codes:
    """[N, padded K]: the filling is worth 0, as the emitter writes it."""
    num_rows, num_inputs = codes.shape
    _check_codes(codes, bits)
    filled = np.empty((num_rows, padded_inputs(num_inputs, bits, group_size)), np.uint8)
    filled[:, :num_inputs] = codes
    filled[:, num_inputs:] = np.clip(np.asarray(zero_points)[:, -1:], 0, (1 << bits) - 1).astype(np.uint8)
    return filled


def _pack_words(codes: Codes, bits: int) -> Words:
    """int16 [N, words] from codes [N, padded K]."""
    num_rows, count = codes.shape
    if bits not in RUNS:
        return _join(codes.reshape(num_rows, -1, 8 // bits), bits).view("<i2").reshape(num_rows, count * bits // 16)
    run = RUNS[bits]
    padded = np.zeros((num_rows, -(-count // run) * run), np.uint8)
    padded[:, :count] = codes
    planes = padded.reshape(num_rows, -1, run // 16, 16).astype(np.uint16)  # [N, run, plane, word]
    words = np.zeros((num_rows, planes.shape[1], run * bits // 256, 16), np.uint16)
    per_tile = 16 // bits
    for plane in range(words.shape[2] * per_tile):
        words[:, :, plane // per_tile] |= planes[:, :, plane] << np.uint16(plane % per_tile * bits)
    if bits == 3:
        for tile in range(3):
            words[:, :, tile] |= (planes[:, :, 15] >> np.uint16(tile) & np.uint16(1)) << np.uint16(15)
    return words.view(np.int16).reshape(num_rows, -1)


def _unpack_words(words: Words, bits: int) -> Codes:
    """uint8 [N, padded K]."""
    num_rows = words.shape[0]
    if bits not in RUNS:
        return _split(np.ascontiguousarray(words).view(np.uint8), bits)
    run, per_tile = RUNS[bits], 16 // bits
    tiles = np.ascontiguousarray(words).view(np.uint16).reshape(num_rows, -1, run * bits // 256, 16)
    codes = np.empty((num_rows, tiles.shape[1], run // 16, 16), np.uint8)
    for plane in range(tiles.shape[2] * per_tile):
        shift = np.uint16(plane % per_tile * bits)
        codes[:, :, plane] = tiles[:, :, plane // per_tile] >> shift & np.uint16((1 << bits) - 1)
    if bits == 3:
        top = (tiles >> np.uint16(15)).astype(np.uint8)
        codes[:, :, 15] = top[:, :, 0] | top[:, :, 1] << np.uint8(1) | top[:, :, 2] << np.uint8(2)
    return codes.reshape(num_rows, -1)


def _join(fields: Codes, width: int) -> Codes:
    """[..., 8 // width] fields -> contiguous [...] bytes, first field in the lowest bits."""
    joined = np.zeros(fields.shape[:-1], np.uint8)
    for i in range(fields.shape[-1]):
        joined |= fields[..., i] << np.uint8(i * width)
    return joined


def _split(data: Codes, width: int) -> Codes:
    """[N, bytes] -> [N, bytes * 8 // width] fields."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    fields: Codes = (data[:, :, None] >> shifts) & np.uint8((1 << width) - 1)
    return fields.reshape(data.shape[0], -1)


def _low_half(values: npt.NDArray[np.float16]) -> npt.NDArray[np.uint32]:
    """[N, G] -> [G, N], the bits of a float16 in a uint32."""
    return np.ascontiguousarray(values.T).view(np.uint16).astype(np.uint32)


def _matmulnbits_points(
    zero_points: npt.NDArray[np.generic] | None, bits: int, num_rows: int, num_groups: int
) -> npt.NDArray[np.float32]:
    if zero_points is None:
        return np.full((num_rows, num_groups), 1 << (bits - 1), np.float32)
    stored = np.asarray(zero_points)
    expected = num_rows * (-(-num_groups * bits // 8) if stored.dtype == np.uint8 else num_groups)
    if stored.size != expected:
        raise ValueError(
            f"{stored.size} {stored.dtype} values of zero points, expected {expected} for {num_rows} rows of "
            f"{num_groups} groups"
        )
    if stored.dtype != np.uint8:
        return stored.reshape(num_rows, num_groups).astype(np.float32)
    return _split(stored.reshape(num_rows, -1), bits)[:, :num_groups].astype(np.float32)


def _check_codes(codes: Codes, bits: int) -> Codes:
    largest = int(codes.max(initial=0))
    if largest >= 1 << bits:
        raise ValueError(f"code {largest} does not fit {bits} bits")
    return codes


def _check_geometry(
    bits: int, group_size: int, shape: tuple[int, int], grid: tuple[int, ...], whole_row: bool = True
) -> None:
    if bits not in WIDTHS:
        raise ValueError(f"the kernels have 2, 3, 4 and 8 bits, got {bits}")
    if group_size not in GROUP_SIZES and not (whole_row and group_size == shape[1]):
        raise ValueError(f"the kernels have groups of 16, 32, 64, 128, 256 or the whole row, got {group_size}")
    expected = (shape[0], -(-shape[1] // group_size))
    if tuple(grid) != expected:
        raise ValueError(f"scales must be [N, G] = {expected}, got {tuple(grid)}")
