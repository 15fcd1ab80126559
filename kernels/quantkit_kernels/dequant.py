"""Packed rows -> float rows: whole weights ahead of a dense product, or the rows of a table that ids ask for."""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit_kernels._planes import meta_point, meta_scale


@triton.jit
def _in_order(q, p: tl.constexpr, BITS: tl.constexpr, STRIDE: tl.constexpr):
    """Codes int32 [BN, C, P / STRIDE] of planes p, p + STRIDE, ...: those of one word lie side by side."""
    if STRIDE * BITS == 16:
        return (q >> (p * BITS)) & ((1 << BITS) - 1)
    else:
        return tl.join(_in_order(q, p, BITS, 2 * STRIDE), _in_order(q, p + STRIDE, BITS, 2 * STRIDE))


@triton.jit
def _codes_of_runs(row, k, ok, BITS: tl.constexpr):
    """2- or 3-bit codes int32 [BN, T] of columns k [T] of the rows that start at the pointers row [BN]."""
    plane = k // 16 % 16
    top = plane == 15
    tile = plane // 8 if BITS == 2 else tl.where(top, 0, plane // 5)
    shift = plane % 8 * 2 if BITS == 2 else tl.where(top, 15, plane % 5 * 3)
    at = row[:, None] + (k // 256 * (16 * BITS) + k % 16)[None, :]
    word = tl.load(at + tile[None, :] * 16, mask=ok, other=0).to(tl.int32) & 0xFFFF
    code = (word >> shift[None, :]) & ((1 << BITS) - 1)
    if BITS == 3:  # the last of 16 planes takes one bit from each tile
        for j in tl.static_range(1, 3):
            word = tl.load(at + j * 16, mask=ok & top[None, :], other=0).to(tl.int32)
            code |= (word >> (15 - j)) & (1 << j)
    return code


@triton.jit
def dequant(
    ids,
    w,
    sz,
    o,
    rows,
    N,
    K,
    swn,
    son,
    wide,
    BITS: tl.constexpr,
    GS: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
    WIDE: tl.constexpr,
    IDS: tl.constexpr,
):
    """Rows of W [N, K] -> o [rows, K], row stride son: the first `rows`, or those in ids.

    One program: BN rows of C words, a run for 2 and 3 bits.
    w: int16 words, row stride swn.  sz: meta [(2,) G, N].  GS: 0 for one scale per row.
    """
    T: tl.constexpr = C * 16 // BITS
    i = tl.program_id(0) * BN + tl.arange(0, BN)
    ok = i < rows
    n = tl.load(ids + i, mask=ok, other=0).to(tl.int64) if IDS else i.to(tl.int64)
    k = tl.program_id(1) * T + tl.arange(0, T)
    row = w + n * swn
    if BITS < 4:
        code = _codes_of_runs(row, k, ok[:, None] & (k < K)[None, :], BITS)
    else:
        c = tl.program_id(1) * C + tl.arange(0, C)
        q_ok = ok[:, None] & (c * (16 // BITS) < K)[None, :]
        q = tl.load(row[:, None] + c[None, :], mask=q_ok, other=0).to(tl.int32)
        code = tl.reshape(_in_order(q, 0, BITS, 1), (BN, T))
    mask = ok[:, None] & (k < K)[None, :]
    g = k * 0 if GS == 0 else k // GS
    mt = tl.load(sz + g[None, :] * N + n[:, None], mask=mask, other=0)
    if WIDE:
        scale = tl.load(sz + wide + g[None, :] * N + n[:, None], mask=mask, other=0).to(tl.float32, bitcast=True)
    else:
        scale = meta_scale(mt)
    value = (code.to(tl.float32) - meta_point(mt)) * scale
    tl.store(o + i.to(tl.int64)[:, None] * son + k[None, :], value.to(o.dtype.element_ty), mask=mask)
