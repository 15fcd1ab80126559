"""int8 activations: rows of x rounded to int8, and products with 4- and 8-bit weights on integer tensor cores."""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit_kernels._finish import finish
from quantkit_kernels._planes import meta_point
from quantkit_kernels._segment import group_scale

INT8_MAX = tl.constexpr(127.0)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it to a float32 of at most 2^22 rounds half to even


@triton.jit
def round_rows(
    x,
    xq,
    scales,
    sums,
    static,
    M,
    K,
    KP,
    sxm,
    P: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    STATIC: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One row of x -> xq int8 [M, KP] in the order of `gemm.sort_planes` (P planes of C bytes), 0 from K on; scales
    float32 [M]; sums int32 [KP / (P * C), M] over every tile, or [M] over the row (WHOLE).

    static: float32, one scale for all rows (STATIC).  KP and BLOCK are multiples of P * C.
    """
    T: tl.constexpr = P * C
    m = tl.program_id(0)
    j = tl.arange(0, BLOCK)
    row = x + m.to(tl.int64) * sxm
    if STATIC:
        scale = tl.load(static)
    else:
        peak = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, K, BLOCK):
            peak = tl.maximum(peak, tl.abs(tl.load(row + first + j, mask=first + j < K, other=0).to(tl.float32)))
        scale = tl.div_rn(tl.max(peak, 0), INT8_MAX)
        scale = tl.where(scale == 0, 1.0, scale)
    tl.store(scales + m, scale)
    total = tl.zeros((BLOCK // T,), tl.int32)
    for first in range(0, KP, BLOCK):
        value = tl.load(row + first + j, mask=first + j < K, other=0).to(tl.float32)
        ratio = tl.minimum(tl.maximum(tl.div_rn(value, tl.broadcast_to(scale, value.shape)), -INT8_MAX), INT8_MAX)
        rounded = ((ratio + ROUND) - ROUND).to(tl.int32)
        place = j // T * T + j % P * C + j % T // P
        tl.store(xq + m.to(tl.int64) * KP + first + place, rounded.to(tl.int8), mask=first + j < KP)
        part = tl.sum(tl.reshape(rounded, (BLOCK // T, T)), 1)
        if WHOLE:
            total += part
        else:
            tile = first // T + tl.arange(0, BLOCK // T)
            tl.store(sums + tile * M + m, part, mask=tile < KP // T)
    if WHOLE:
        tl.store(sums + m, tl.sum(total, 0))


@triton.jit
def _byte_plane(q, p: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """int8 codes of plane p of bytes q: 4-bit codes as they are, 8-bit codes minus 128; four bytes per instruction."""
    if not ASM:
        if BITS == 8:
            return ((q.to(tl.int32) & 255) - 128).to(tl.int8)
        return ((q.to(tl.int32) >> (4 * p)) & 15).to(tl.int8)
    if BITS == 8:
        flip: tl.constexpr = "xor.b32 $0, $1, 0x80808080;"
        return tl.inline_asm_elementwise(flip, "=r,r", [q], dtype=tl.int8, is_pure=True, pack=4)
    if p == 0:
        low: tl.constexpr = "and.b32 $0, $1, 0x0f0f0f0f;"
        return tl.inline_asm_elementwise(low, "=r,r", [q], dtype=tl.int8, is_pure=True, pack=4)
    high: tl.constexpr = "{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x0f0f0f0f; }"
    return tl.inline_asm_elementwise(high, "=r,r", [q], dtype=tl.int8, is_pure=True, pack=4)


@triton.jit
def _paired_bytes(a, b, AXIS: tl.constexpr):
    joined = tl.join(a, b)
    if AXIS == 1:
        return tl.reshape(tl.permute(joined, (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))
    else:
        return tl.reshape(tl.permute(joined, (2, 0, 1)), (2 * a.shape[0], a.shape[1]))


@triton.jit
def act8(
    xq, xs, sums, w, sz, bias, o, ws, cnt, M, N, K, swb, sxm, wide, BITS: tl.constexpr, GS: tl.constexpr,
    C: tl.constexpr, U: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
    WIDE: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One program: BN outputs of BM rows over one of SPLIT parts of K, in steps of U tiles of C bytes of weights.

    xq int8 [M, whole steps], xs float32 [M], sums int32 [tiles or 1, M]: from `round_rows`.  w: bytes, row stride swb.
    The sums of a tile are exact; its zero point leaves through the sum of the activations.  Groups take whole tiles.
    """
    P: tl.constexpr = 8 // BITS
    T: tl.constexpr = P * C
    blocks = tl.cdiv(M, BM)
    tile = tl.program_id(0)
    part = tl.program_id(1)
    m = tile % blocks * BM + tl.arange(0, BM)
    n = tile // blocks * BN + tl.arange(0, BN)
    n_ok = n < N
    m_ok = m < M
    c = tl.arange(0, C)
    steps = tl.cdiv(K, U * T)
    per = tl.cdiv(steps, SPLIT)
    row = w + n.to(tl.int64) * swb
    xp = xq + m[None, :].to(tl.int64) * sxm + c[:, None]
    middle = 128.0 if BITS == 8 else 0.0
    last = 0 if GS == 0 else tl.cdiv(K, GS) - 1
    acc = tl.zeros((BN, BM), tl.float32)
    d = tl.zeros((BN, BM), tl.int32)
    for step in range(part * per, tl.minimum(steps, part * per + per)):
        for u in tl.static_range(U):
            at = (step * U + u) * C
            q_ok = n_ok[:, None] if EVEN else n_ok[:, None] & (at + c < swb)[None, :]
            q = tl.load(row[:, None] + (at + c)[None, :], mask=q_ok, other=0, eviction_policy="evict_first")
            if GS > 0:
                d = tl.zeros((BN, BM), tl.int32)
            if P == 2 and C == 16:  # integer tensor cores take 32 values of K: two planes make one operand
                xa = tl.load(xp + at * P, mask=m_ok[None, :], other=0)
                xb = tl.load(xp + (at * P + C), mask=m_ok[None, :], other=0)
                both = _paired_bytes(_byte_plane(q, 0, BITS, ASM), _byte_plane(q, 1, BITS, ASM), 1)
                d = tl.dot(both, _paired_bytes(xa, xb, 0), d, out_dtype=tl.int32)
            else:
                for p in tl.static_range(P):
                    xj = tl.load(xp + (at * P + p * C), mask=m_ok[None, :], other=0)
                    d = tl.dot(_byte_plane(q, p, BITS, ASM), xj, d, out_dtype=tl.int32)
            if GS > 0:
                t = step * U + u
                g = tl.minimum(t // (GS // T), last)
                z = (meta_point(tl.load(sz + g * N + n, mask=n_ok, other=0)) - middle).to(tl.int32)
                sx = tl.load(sums + t * M + m, mask=m_ok, other=0)
                s = group_scale(sz + g * N + n, wide, n_ok, WIDE)
                acc += (d - z[:, None] * sx[None, :]).to(tl.float32) * s[:, None]
    if GS == 0:
        z = (meta_point(tl.load(sz + n, mask=n_ok, other=0)) - middle).to(tl.int32)
        sx = tl.load(sums + m, mask=m_ok, other=0) * tl.where(part == 0, 1, 0)  # once, not once per part
        s = group_scale(sz + n, wide, n_ok, WIDE)
        acc = (d - z[:, None] * sx[None, :]).to(tl.float32) * s[:, None]
    acc = acc * tl.load(xs + m, mask=m_ok, other=0)[None, :]
    finish(acc, bias, o, ws, cnt, M, N, n, m, tile, part, SPLIT, HAS_BIAS, ACT)
