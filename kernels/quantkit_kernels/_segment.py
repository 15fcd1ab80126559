"""Device functions: the products of one range of K with packed words, group by group, for one width of codes."""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit_kernels._planes import BF16_W8, meta_scale, meta_zero, qplane, xplane


@triton.jit
def _paired(a, b, AXIS: tl.constexpr):
    """a and b one after the other along AXIS; in the registers of tensor-core operands this moves nothing."""
    joined = tl.join(a, b)
    if AXIS == 1:
        return tl.reshape(tl.permute(joined, (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))
    else:
        return tl.reshape(tl.permute(joined, (2, 0, 1)), (2 * a.shape[0], a.shape[1]))


@triton.jit
def _tile_product(
    d, q, h, z, x, rows_ok, at, KX, BITS: tl.constexpr, HALF: tl.constexpr, DT: tl.constexpr, EVEN: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """d [BN, BX] + (q - z) x of int16 words q [BN, C] with pointers x [C, BX] to the values of their first planes.

    x: four values in an int64 (two in an int32 for 8 bits); value j of word c belongs to plane j of word c.
    at: [C, 1 or BX], the place in its row of every load; without EVEN, loads from KX on count as 0.
    """
    P: tl.constexpr = 16 // (2 if BITS == 3 else BITS)
    XW: tl.constexpr = 4 if P >= 4 else 2
    for i in tl.static_range(P // XW):
        xq = tl.load(x + i, mask=rows_ok if EVEN else rows_ok & (at + i < KX), other=0)
        if q.shape[1] < 16:  # tensor cores take 16 values of K: two planes make one operand
            for j in tl.static_range(0, XW, 2):
                first = qplane(q, h, z, i * XW + j, BITS, HALF, DT, ASM)
                second = qplane(q, h, z, i * XW + j + 1, BITS, HALF, DT, ASM)
                d = tl.dot(_paired(first, second, 1), _paired(xplane(xq, j, DT), xplane(xq, j + 1, DT), 0), d)
        else:
            for j in tl.static_range(XW):
                d = tl.dot(qplane(q, h, z, i * XW + j, BITS, HALF, DT, ASM), xplane(xq, j, DT), d)
    return d


@triton.jit
def _zeros(sz, g, last, N, ok, R: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr):
    """float32 zero points [BN, C] ([BN, 1] for R = 1) of groups g to g + R, of which `last` is the last there is."""
    z = meta_zero(tl.load(sz + (g if EVEN else tl.minimum(g, last)) * N, mask=ok, other=0))[:, None]
    for r in tl.static_range(1, R):
        zr = meta_zero(tl.load(sz + (g + r if EVEN else tl.minimum(g + r, last)) * N, mask=ok, other=0))[:, None]
        z = tl.where((tl.arange(0, C) // (C // R) >= r)[None, :], zr, z)
    return z


@triton.jit
def group_scale(at, wide, ok, BITS: tl.constexpr, DT: tl.constexpr, WIDE: tl.constexpr):
    """float32 scales [BN] to words of meta `at`; WIDE: float16 does not hold them, they lie `wide` words on."""
    if WIDE:
        s = tl.load(at + wide, mask=ok, other=0).to(tl.float32, bitcast=True)
    else:
        s = meta_scale(tl.load(at, mask=ok, other=0))
    if BITS == 8 and DT == tl.bfloat16:
        s = s * BF16_W8
    return s


@triton.jit
def _scales(sz, g, last, N, wide, ok, BITS: tl.constexpr, R: tl.constexpr, BX: tl.constexpr, DT: tl.constexpr,
            EVEN: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """float32 scales [BN, BX] ([BN, 1] for R = 1): column j belongs to group g + j // (BX // R)."""
    s = group_scale(sz + (g if EVEN else tl.minimum(g, last)) * N, wide, ok, BITS, DT, WIDE)[:, None]
    for r in tl.static_range(1, R):
        at = sz + (g + r if EVEN else tl.minimum(g + r, last)) * N
        sr = group_scale(at, wide, ok, BITS, DT, WIDE)[:, None]
        s = tl.where((tl.arange(0, BX) // (BX // R) >= r)[None, :], sr, s)
    return s


@triton.jit
def _start(
    tab, g, copy, tile, last, XW: tl.constexpr, GS: tl.constexpr, T: tl.constexpr, R: tl.constexpr, EVEN: tl.constexpr,
    TABLE: tl.constexpr, within,
):  # fmt: skip
    """Where a tile starts in a row of x, in loads of XW values; for R > 1 [1, BX], where each copy's group starts.

    within: tiles of its group that come before it.
    """
    if TABLE and R > 1:
        return tl.load(tab + g + copy, mask=g + copy <= last, other=0)[None, :] * (GS // XW)
    elif TABLE:
        return tl.load(tab + (g if EVEN else tl.minimum(g, last))) * (GS // XW) + within * (T // XW)
    elif R > 1:
        return (tile * (T // XW) + copy * (GS // XW))[None, :]
    else:
        return tile * (T // XW)


@triton.jit
def segment(
    acc, x, w, words, high, sz, wide, tab, N, KX, groups, n_ok, m_ok, s0, s1, BITS: tl.constexpr, GS: tl.constexpr,
    C: tl.constexpr, U: tl.constexpr, R: tl.constexpr, DT: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    TABLE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """acc [BN, BX] + the products of steps s0 to s1, each of U tiles of C words (T codes) of one width.

    x: pointers [1, BX] to the rows of the activations, packed as `_tile_product` says; for R > 1 (tiles of R groups)
        every row comes R times, and copy r gets the products of the r-th group.
        KX loads make up a row.
    w, sz: pointers [BN] to the rows' first words and their words of meta; `words` words (3 bits: `high`, then the high
        bits) and `groups` groups per row.
    tab: group of K that each group here is (TABLE), else in order.  GS: 0 for one scale per row, left to the caller.
    """
    P: tl.constexpr = 16 // (2 if BITS == 3 else BITS)
    XW: tl.constexpr = 4 if P >= 4 else 2
    T: tl.constexpr = P * C
    OWN: tl.constexpr = GS > 0 and (T == GS or R > 1)  # every tile has groups of its own
    BX: tl.constexpr = acc.shape[1]
    c = tl.arange(0, C)
    copy = tl.arange(0, BX) // (BX // R)
    word = c % (C // R) if R > 1 else c  # within its group
    last = groups - 1
    row_words = high if BITS == 3 else words
    if GS == 0:
        z = meta_zero(tl.load(sz, mask=n_ok, other=0))[:, None]
    d = tl.zeros(acc.shape, tl.float32)
    for s in range(s0, s1):
        for u in tl.static_range(U):
            tile = s * U + u
            at = tile * C
            q_ok = n_ok[:, None] if EVEN else n_ok[:, None] & (at + c < row_words)[None, :]
            q = tl.load(w[:, None] + (at + c)[None, :], mask=q_ok, other=0, eviction_policy="evict_first")
            h = q
            if BITS == 3:  # 16 words of high bits for 32 words of low bits, the last ones filled up
                h_at = high + s * (U * C // 2) + (u * C) % 16
                h = tl.load(w[:, None] + (h_at + c)[None, :], mask=n_ok[:, None], other=0)
            g = 0 if GS == 0 else (tile * R if OWN else s * U // (GS // T))
            start = _start(
                tab, g, copy, tile, last, XW, GS, T, R, EVEN, TABLE, 0 if OWN or GS == 0 else tile % (GS // T)
            )
            place = start + (word * (P // XW))[:, None]
            load_at = place
            if TABLE and not EVEN:  # a step may reach beyond the last group: nothing counts there
                load_at += tl.maximum(g + copy - last, 0)[None, :] * KX
            rows_ok = m_ok & (c[:, None] // (C // R) == copy[None, :]) if R > 1 else m_ok
            if GS > 0 and (OWN or u == 0):
                d = tl.zeros(acc.shape, tl.float32)
                z = _zeros(sz, g, last, N, n_ok, R, C, EVEN)
            d = _tile_product(
                acc if GS == 0 else d, q, h, z, x + place, rows_ok, load_at, KX, BITS, (u * C) // 16 % 2, DT, EVEN, ASM
            )  # fmt: skip
            if GS == 0:
                acc = d
            elif OWN or u == U - 1:
                acc += d * _scales(sz, g, last, N, wide, n_ok, BITS, R, BX, DT, EVEN, WIDE)
    return acc
