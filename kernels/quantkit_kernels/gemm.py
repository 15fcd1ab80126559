"""More rows of x (M > 32): planes of x come sorted from memory, and the scale is applied to the weights."""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit_kernels._finish import finish
from quantkit_kernels._planes import meta_scale, meta_zero, qplane, unit
from quantkit_kernels._segment import group_scale, joined, load_run


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
def _per_word(sz, g, last, N, wide, ok, R: tl.constexpr, C: tl.constexpr, DT: tl.constexpr, WIDE: tl.constexpr):
    """(`meta_zero`, scales * unit) [BN, C] ([BN, 1] for R = 1) of the groups g to g + R in a tile of C words."""
    at = sz + tl.minimum(g, last) * N
    mt = tl.load(at, mask=ok, other=0)
    z = meta_zero(mt, DT)[:, None]
    s = (tl.load(at + wide, mask=ok, other=0).to(tl.float32, bitcast=True) if WIDE else meta_scale(mt))[:, None]
    for r in tl.static_range(1, R):
        at = sz + tl.minimum(g + r, last) * N
        mt = tl.load(at, mask=ok, other=0)
        sr = (tl.load(at + wide, mask=ok, other=0).to(tl.float32, bitcast=True) if WIDE else meta_scale(mt))[:, None]
        here = (tl.arange(0, C) // (C // R) >= r)[None, :]
        z = tl.where(here, meta_zero(mt, DT)[:, None], z)
        s = tl.where(here, sr, s)
    return z, s * unit(DT)


@triton.jit
def _scaled(plane, s, FULL: tl.constexpr):
    """plane * s, rounded once to the plane's type; FULL: s lies outside of what that type holds."""
    if FULL:
        return (plane.to(tl.float32) * s).to(plane.dtype)
    else:
        return plane * s.to(plane.dtype)


@triton.jit
def gemm(
    x, w, sz, bias, o, ws, cnt, M, N, K, swn, sxm, wide, BITS: tl.constexpr, GS: tl.constexpr, C: tl.constexpr,
    U: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
    WIDE: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One program: BN outputs of BM rows over one of SPLIT parts of K, in steps of U tiles of C words (R groups each).

    x: the activations, whole steps long, as `sort_planes` leaves them; for 2 and 3 bits in their own order.  The rest
    as in `skinny`; programs of one BN come one after the other, so that the weights are read from memory once.
    """
    DT: tl.constexpr = o.dtype.element_ty
    T: tl.constexpr = C * 16 // BITS
    blocks = tl.cdiv(M, BM)
    tile = tl.program_id(0)
    part = tl.program_id(1)
    m = tile % blocks * BM + tl.arange(0, BM)
    n = tile // blocks * BN + tl.arange(0, BN)
    n_ok = n < N
    m_ok = (m < M)[None, :]
    SPAN: tl.constexpr = (min(GS, 64) if GS > 0 else 64) if BITS < 4 else C  # values of x in a product
    c = tl.arange(0, SPAN)
    steps = tl.cdiv(K, U * T)
    per = tl.cdiv(steps, SPLIT)
    row = w + n.to(tl.int64) * swn
    xp = x + m[None, :].to(tl.int64) * sxm + c[:, None]
    last = 0 if GS == 0 else tl.cdiv(K, GS) - 1
    acc = tl.zeros((BN, BM), tl.float32)
    if GS == 0:
        z = meta_zero(tl.load(sz + n, mask=n_ok, other=0), DT)[:, None]
    for step in range(part * per, tl.minimum(steps, part * per + per)):
        if BITS < 4:
            q0, q1, q2 = load_run(row, step, swn, n_ok, C, EVEN)
            for i in tl.static_range(T // SPAN):
                if GS > 0 and i * SPAN % GS == 0:
                    g = (step * T + i * SPAN) // GS
                    z, s = _per_word(sz + n, g, last, N, wide, n_ok, 1, C, DT, WIDE)
                plane = joined(q0, q1, q2, z, i * (SPAN // 16), SPAN // 16, BITS, DT, ASM)
                xj = tl.load(xp + (step * T + i * SPAN), mask=m_ok, other=0)
                acc = tl.dot(_scaled(plane, s, WIDE) if GS > 0 else plane, xj, acc)
        else:
            for u in tl.static_range(U):
                at = (step * U + u) * C
                q_ok = n_ok[:, None] if EVEN else n_ok[:, None] & (at + c < swn)[None, :]
                q = tl.load(row[:, None] + (at + c)[None, :], mask=q_ok, other=0, eviction_policy="evict_first")
                if GS > 0:
                    g = (step * U + u) * R if R > 1 else (step * U + u) // (GS // T)
                    z, s = _per_word(sz + n, g, last, N, wide, n_ok, R, C, DT, WIDE)
                for p in tl.static_range(16 // BITS):
                    plane = qplane(q, z, p, BITS, DT, ASM)
                    xj = tl.load(xp + (at * 16 // BITS + p * C), mask=m_ok, other=0)
                    acc = tl.dot(_scaled(plane, s, WIDE) if GS > 0 else plane, xj, acc)
    if GS == 0:
        acc = acc * (group_scale(sz + n, wide, n_ok, WIDE) * unit(DT))[:, None]
    finish(acc, bias, o, ws, cnt, M, N, n, m, tile, part, SPLIT, HAS_BIAS, ACT)
