"""More rows of x (M > 32): planes of x come sorted from memory, and the scale is applied to the weights."""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit_kernels._finish import finish
from quantkit_kernels._planes import BF16_W8, meta_scale, meta_zero, qplane
from quantkit_kernels._segment import group_scale


@triton.jit
def sort_planes(x, o, M, K, sxm, som, P: tl.constexpr, C: tl.constexpr, BM: tl.constexpr):
    """o[m, t*P*C + p*C + c] = x[m, t*P*C + c*P + p], 0 from K on: one program per tile t and BM rows, 16-bit values."""
    T: tl.constexpr = P * C
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    j = tl.arange(0, T)
    k = tl.program_id(1) * T + j % C * P + j // C
    value = tl.load(x + m[:, None] * sxm + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0)
    tl.store(o + m[:, None].to(tl.int64) * som + (tl.program_id(1) * T + j)[None, :], value, mask=(m < M)[:, None])


@triton.jit
def _per_word(sz, g, last, N, wide, ok, R: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr):
    """(zero points, scales) float32 [BN, C] ([BN, 1] for R = 1) of the groups g to g + R in a tile of C words."""
    at = sz + tl.minimum(g, last) * N
    mt = tl.load(at, mask=ok, other=0)
    z = meta_zero(mt)[:, None]
    s = (tl.load(at + wide, mask=ok, other=0).to(tl.float32, bitcast=True) if WIDE else meta_scale(mt))[:, None]
    for r in tl.static_range(1, R):
        at = sz + tl.minimum(g + r, last) * N
        mt = tl.load(at, mask=ok, other=0)
        sr = (tl.load(at + wide, mask=ok, other=0).to(tl.float32, bitcast=True) if WIDE else meta_scale(mt))[:, None]
        here = (tl.arange(0, C) // (C // R) >= r)[None, :]
        z = tl.where(here, meta_zero(mt)[:, None], z)
        s = tl.where(here, sr, s)
    return z, s


@triton.jit
def _scaled(plane, s, FULL: tl.constexpr):
    """plane * s, rounded once to the plane's type; FULL: s lies outside of what that type holds."""
    if FULL:
        return (plane.to(tl.float32) * s).to(plane.dtype)
    else:
        return plane * s.to(plane.dtype)


@triton.jit
def gemm(
    x, w, sz, bias, o, ws, cnt, M, N, K, swn, sxm, high, wide, BITS: tl.constexpr, GS: tl.constexpr, C: tl.constexpr,
    U: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
    WIDE: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One program: BN outputs of BM rows over one of SPLIT parts of K, in steps of U tiles of C words (R groups each).

    x: the activations as `sort_planes` leaves them, whole steps long.  The rest as in `skinny`; programs of one BN come
    one after the other, so that the weights are read from memory once.
    """
    DT: tl.constexpr = o.dtype.element_ty
    P: tl.constexpr = 16 // (2 if BITS == 3 else BITS)
    T: tl.constexpr = P * C
    blocks = tl.cdiv(M, BM)
    tile = tl.program_id(0)
    part = tl.program_id(1)
    m = tile % blocks * BM + tl.arange(0, BM)
    n = tile // blocks * BN + tl.arange(0, BN)
    n_ok = n < N
    m_ok = (m < M)[None, :]
    c = tl.arange(0, C)
    steps = tl.cdiv(K, U * T)
    per = tl.cdiv(steps, SPLIT)
    row = w + n.to(tl.int64) * swn
    xp = x + m[None, :].to(tl.int64) * sxm + c[:, None]
    last = 0 if GS == 0 else tl.cdiv(K, GS) - 1
    row_words = high if BITS == 3 else swn
    acc = tl.zeros((BN, BM), tl.float32)
    if GS == 0:
        z = meta_zero(tl.load(sz + n, mask=n_ok, other=0))[:, None]
    for step in range(part * per, tl.minimum(steps, part * per + per)):
        for u in tl.static_range(U):
            at = (step * U + u) * C
            q_ok = n_ok[:, None] if EVEN else n_ok[:, None] & (at + c < row_words)[None, :]
            q = tl.load(row[:, None] + (at + c)[None, :], mask=q_ok, other=0, eviction_policy="evict_first")
            h = q
            if BITS == 3:
                h_at = high + step * (U * C // 2) + (u * C) % 16
                h = tl.load(row[:, None] + (h_at + c)[None, :], mask=n_ok[:, None], other=0)
            if GS > 0:
                g = (step * U + u) * R if R > 1 else (step * U + u) // (GS // T)
                z, s = _per_word(sz + n, g, last, N, wide, n_ok, R, C, WIDE)
                if BITS == 8 and DT == tl.bfloat16:
                    s = s * BF16_W8
            for p in tl.static_range(P):
                plane = qplane(q, h, z, p, BITS, (u * C) // 16 % 2, DT, ASM)
                xj = tl.load(xp + (at * P + p * C), mask=m_ok, other=0)
                acc = tl.dot(_scaled(plane, s, WIDE) if GS > 0 else plane, xj, acc)
    if GS == 0:
        acc = acc * group_scale(sz + n, wide, n_ok, BITS, DT, WIDE)[:, None]
    finish(acc, bias, o, ws, cnt, M, N, n, m, tile, part, SPLIT, HAS_BIAS, ACT)
