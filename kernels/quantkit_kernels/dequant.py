"""Packed rows -> float rows: whole weights ahead of a dense product, or the rows of a table that ids ask for."""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit_kernels._planes import meta_scale, meta_zero


@triton.jit
def _in_order(q, h, p: tl.constexpr, BITS: tl.constexpr, STRIDE: tl.constexpr):
    """Codes int32 [BN, C, P / STRIDE] of planes p, p + STRIDE, ...: those of one word lie side by side."""
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    if STRIDE * LOW == 16:
        code = (q >> (p * LOW)) & ((1 << LOW) - 1)
        if BITS == 3:
            code = code | (((h >> (2 * (p % 4) + 2 + p // 4)) & 1) << 2)
        return code
    else:
        even = _in_order(q, h, p, BITS, 2 * STRIDE)
        odd = _in_order(q, h, p + STRIDE, BITS, 2 * STRIDE)
        return tl.join(even, odd)


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
    high,
    wide,
    BITS: tl.constexpr,
    GS: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
    WIDE: tl.constexpr,
    IDS: tl.constexpr,
):
    """Rows of W [N, K] -> o [rows, K], row stride son: the first `rows`, or those in ids.

    One program: BN rows of C words, 16 for 3 bits.
    w: int16 words, row stride swn.  sz: meta [(2,) G, N].  GS: 0 for one scale per row.
    """
    P: tl.constexpr = 16 // (2 if BITS == 3 else BITS)
    i = tl.program_id(0) * BN + tl.arange(0, BN)
    ok = i < rows
    n = tl.load(ids + i, mask=ok, other=0).to(tl.int64) if IDS else i.to(tl.int64)
    first = tl.program_id(1) * C
    c = first + tl.arange(0, C)
    k = first * P + tl.arange(0, C * P)
    q = tl.load(w + n[:, None] * swn + c[None, :], mask=ok[:, None] & (c * P < K)[None, :], other=0).to(tl.int32)
    if BITS == 3:
        at = high + first // 32 * 16 + tl.arange(0, 16)
        h = tl.load(w + n[:, None] * swn + at[None, :], mask=ok[:, None], other=0).to(tl.int32)
        half = first // 16 % 2  # whose bits lie eight further on, modulo 16
        h = ((h & 0xFFFF) >> (8 * half)) | (h << (8 * half))
    else:
        h = q
    code = tl.reshape(_in_order(q, h, 0, BITS, 1), (BN, C * P))
    mask = ok[:, None] & (k < K)[None, :]
    g = k * 0 if GS == 0 else k // GS
    mt = tl.load(sz + g[None, :] * N + n[:, None], mask=mask, other=0)
    if WIDE:
        scale = tl.load(sz + wide + g[None, :] * N + n[:, None], mask=mask, other=0).to(tl.float32, bitcast=True)
    else:
        scale = meta_scale(mt)
    value = (code.to(tl.float32) - meta_zero(mt)) * scale
    tl.store(o + i.to(tl.int64)[:, None] * son + k[None, :], value.to(o.dtype.element_ty), mask=mask)
