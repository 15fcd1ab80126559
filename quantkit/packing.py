"""Codes of 1 to 8 bits as bytes, at their true size, and in the layout that onnxruntime's MatMulNBits reads.

A width is split into planes of power-of-two widths, low bits first, so that no code straddles a byte and standard
operators can unpack it. A plane is flat; within a byte the first code takes the lowest bits:

    3-bit codes 5, 2, 7, 1      = 101 010 111 001
    plane of the low 2 bits     01 10 11 01   -> one byte  0b01_11_10_01
    plane of the high bit       1  0  1  0    -> one byte  0b0000_0101   (padded with zeros to a whole byte)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from quantkit.errors import InputError
from quantkit.types import Array

Bytes = npt.NDArray[np.uint8]

_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def planes(bits: int) -> tuple[int, ...]:
    """Widths of the planes that hold `bits`-bit codes, low bits first."""
    if bits not in _PLANES:
        raise InputError(f"codes of 1 to 8 bits can be packed, got {bits} bits")
    return _PLANES[bits]


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes take, each plane padded to whole bytes."""
    return sum(-(-count * width // 8) for width in planes(bits))


def pack_plane(codes: Bytes, shift: int, width: int) -> Bytes:
    """Bits [shift, shift + width) of flat codes, 8 // width codes to a byte."""
    per_byte = 8 // width
    plane = (codes >> shift) & (2**width - 1)
    padded = np.zeros(-(-plane.size // per_byte) * per_byte, dtype=np.uint8)
    padded[: plane.size] = plane
    return _join(padded.reshape(-1, per_byte), width)


def pack(codes: Bytes, bits: int) -> tuple[Bytes, ...]:
    """One byte array per plane, from codes of any shape read in C order."""
    _check(codes, bits)
    flat = codes.reshape(-1)
    widths = planes(bits)
    return tuple(pack_plane(flat, sum(widths[:i]), width) for i, width in enumerate(widths))


def unpack(packed: Sequence[Bytes], bits: int, count: int) -> Bytes:
    """The first `count` codes, flat; the inverse of `pack`."""
    codes = np.zeros(count, dtype=np.uint8)
    shift = 0
    for plane, width in zip(packed, planes(bits), strict=True):
        shifts = np.arange(0, 8, width, dtype=np.uint8)
        values = (plane[:, None] >> shifts) & np.uint8(2**width - 1)
        codes |= values.reshape(-1)[:count] << shift
        shift += width
    return codes


def blob(codes: Bytes, bits: int, block: int, pad: int | Array) -> Bytes:
    """[N, ceil(K / block), block * bits / 8] as MatMulNBits reads B; bits 2, 4 or 8.

    Args:
        pad: code that fills the last block, one for all rows or [N]; the zero point makes the filling worth 0.
    """
    _check(codes, bits)
    if bits not in (2, 4, 8):
        raise InputError(f"MatMulNBits holds 2, 4 or 8 bits, got {bits}; widen the codes first")
    if block * bits % 8:
        raise InputError(f"a block of {block} {bits}-bit codes does not fill whole bytes; use a block of 16 or more")
    num_rows, num_inputs = codes.shape
    num_blocks = -(-num_inputs // block)
    padded = np.empty((num_rows, num_blocks * block), dtype=np.uint8)
    filling = np.asarray(pad, dtype=np.uint8).reshape(-1, 1)
    _check(filling, bits)
    padded[:, num_inputs:] = filling
    padded[:, :num_inputs] = codes
    return _join(padded.reshape(-1, 8 // bits), bits).reshape(num_rows, num_blocks, block * bits // 8)


def pack_zero_points(zero_points: Array, bits: int) -> Bytes:
    """[N * ceil(G * bits / 8)] as MatMulNBits reads zero_points: integers [N, G], each row padded to whole bytes."""
    codes = np.asarray(zero_points).astype(np.uint8)
    if not np.array_equal(codes, zero_points):
        raise InputError("zero points must be integers from 0 to 255 to be packed; a mid-rise grid stores none")
    _check(codes, bits)
    num_rows, num_groups = codes.shape
    per_byte = 8 // planes(bits)[0]
    num_bytes = -(-num_groups // per_byte)
    return blob(codes, bits, num_bytes * per_byte, pad=0).reshape(num_rows * num_bytes)


def _join(fields: Bytes, width: int) -> Bytes:
    """[..., 8 // width] fields -> [...] bytes, first field in the lowest bits."""
    joined = np.zeros(fields.shape[:-1], dtype=np.uint8)
    for i in range(fields.shape[-1]):
        joined |= fields[..., i] << (i * width)
    return joined


def _check(codes: Bytes, bits: int) -> None:
    planes(bits)
    largest = int(codes.max(initial=0))
    if largest >= 2**bits:
        raise InputError(f"code {largest} does not fit {bits} bits; pack with more bits or quantize with fewer")
