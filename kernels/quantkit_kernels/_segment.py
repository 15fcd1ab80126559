"""Device functions: the products of one range of K with packed words, group by group, for one width of codes."""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit_kernels._planes import meta_scale, meta_zero, qplane, run_plane, xplane


@triton.jit
def outputs(first, BN: tl.constexpr):
    """BN outputs from `first` on [BN], such that the 8 rows of a tensor-core tile lie BN / 8 apart."""
    r = tl.arange(0, BN)
    return first + r % 8 * (BN // 8) + r // 8


@triton.jit
def _in_rows(values):
    """[BN] in the order of N -> in that of `outputs`: a thread's values lie side by side, and come in one load."""
    BN: tl.constexpr = values.shape[0]
    return tl.reshape(tl.trans(tl.reshape(values, (8, BN // 8))), (BN,))


@triton.jit
def in_order(acc):
    """[BN, BM] with rows as `outputs` has them -> with rows in the order of N."""
    BN: tl.constexpr = acc.shape[0]
    BM: tl.constexpr = acc.shape[1]
    return tl.reshape(tl.permute(tl.reshape(acc, (BN // 8, 8, BM)), (1, 0, 2)), (BN, BM))


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
    d, q, z, x, rows_ok, at, KX, BITS: tl.constexpr, DT: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr
):
    """d [BN, BX] + (q - zero point) x / unit of int16 words q [BN, C] and the activations at pointers x [C, BX].

    x: four values in an int64 (two in an int32 for 8 bits); value j of word c belongs to plane j of word c.
    at: [C, 1 or BX], the place in its row of every load; without EVEN, loads from KX on count as 0.
    """
    xq = tl.load(x, mask=rows_ok if EVEN else rows_ok & (at < KX), other=0)
    if q.shape[1] < 16:  # tensor cores take 16 values of K: two planes make one operand
        for p in tl.static_range(0, 16 // BITS, 2):
            planes = _paired(qplane(q, z, p, BITS, DT, ASM), qplane(q, z, p + 1, BITS, DT, ASM), 1)
            d = tl.dot(planes, _paired(xplane(xq, p, DT), xplane(xq, p + 1, DT), 0), d)
    else:
        for p in tl.static_range(16 // BITS):
            d = tl.dot(qplane(q, z, p, BITS, DT, ASM), xplane(xq, p, DT), d)
    return d


@triton.jit
def _zeros(at, g, last, N, ok, R: tl.constexpr, C: tl.constexpr, DT: tl.constexpr, EVEN: tl.constexpr):
    """`meta_zero` [BN, C] ([BN, 1] for R = 1) of groups g to g + R, whose words of meta start at `at`."""
    z = meta_zero(_in_rows(tl.load(at, mask=ok, other=0)), DT)[:, None]
    for r in tl.static_range(1, R):
        zr = meta_zero(_in_rows(tl.load(_next(at, g, r, last, N, EVEN), mask=ok, other=0)), DT)[:, None]
        z = tl.where((tl.arange(0, C) // (C // R) >= r)[None, :], zr, z)
    return z


@triton.jit
def _next(at, g, r: tl.constexpr, last, N, EVEN: tl.constexpr):
    """`at`, the words of group g, moved on by r groups, but not beyond group `last`."""
    if EVEN:
        return at + r * N
    else:
        return at + tl.minimum(r, last - g) * N


@triton.jit
def group_scale(at, wide, ok, WIDE: tl.constexpr):
    """float32 scales [BN] to words of meta `at`; WIDE: float16 does not hold them, they lie `wide` words on."""
    if WIDE:
        return tl.load(at + wide, mask=ok, other=0).to(tl.float32, bitcast=True)
    else:
        return meta_scale(tl.load(at, mask=ok, other=0))


@triton.jit
def _scales(at, g, last, N, wide, ok, R: tl.constexpr, BX: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr):
    """float32 scales [BN, BX] ([BN, 1] for R = 1): column j belongs to group g + j // (BX // R)."""
    s = _in_rows(group_scale(at, wide, ok, WIDE))[:, None]
    for r in tl.static_range(1, R):
        sr = _in_rows(group_scale(_next(at, g, r, last, N, EVEN), wide, ok, WIDE))[:, None]
        s = tl.where((tl.arange(0, BX) // (BX // R) >= r)[None, :], sr, s)
    return s


@triton.jit
def _four_groups(sz, N, ok):
    """Words of meta [BN] of four groups from sz on, by one load."""
    mt = tl.load(sz[:, None] + (tl.arange(0, 4) * N)[None, :], mask=ok[:, None], other=0)
    even, odd = tl.split(tl.reshape(mt, (sz.shape[0], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return _in_rows(first), _in_rows(second), _in_rows(third), _in_rows(fourth)


@triton.jit
def _from_table(tab, g, copy, last, within, GS: tl.constexpr, R: tl.constexpr, EVEN: tl.constexpr):
    """Where a tile `within` its group g starts in a row of x; for R > 1 [1, BX], where each copy's group starts."""
    if R > 1:
        return tl.load(tab + g + copy, mask=g + copy <= last, other=0)[None, :] * GS
    else:
        return tl.load(tab + (g if EVEN else tl.minimum(g, last))) * GS + within


@triton.jit
def segment(
    acc, x, w, words, sz, wide, tab, N, KX, groups, n_ok, sz_ok, m_ok, s0, s1, BITS: tl.constexpr, GS: tl.constexpr,
    C: tl.constexpr, U: tl.constexpr, R: tl.constexpr, DT: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    TABLE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """acc [BN, BX] + the products / unit of steps s0 to s1, each of U tiles of C words (T codes) of 4 or 8 bits.

    x: pointers [1, BX] to the rows of the activations, packed as `_tile_product` says; for R > 1 (tiles of R groups)
        every row comes R times, and copy r gets the products of the r-th group. KX loads make up a row.
    w: pointers [BN] to the first of `words` words of rows in the order of `outputs`.
    sz, sz_ok: pointers [BN] to words of meta in the order of N, of which rows have `groups`, and their mask.
    tab: group of K that each group here is (TABLE), else in order.  GS: 0 for one scale per row, left to the caller.
    Addresses are those of a step plus constants, which the instructions hold.
    """
    P: tl.constexpr = 16 // BITS
    T: tl.constexpr = P * C
    OWN: tl.constexpr = GS > 0 and (T == GS or R > 1)  # every tile has groups of its own
    FOUR: tl.constexpr = OWN and EVEN and R == 1 and U == 4
    BX: tl.constexpr = acc.shape[1]
    c = tl.arange(0, C)
    copy = tl.arange(0, BX) // (BX // R)
    word = (c % (C // R) if R > 1 else c)[:, None]  # within its group
    last = groups - 1
    rows_ok = m_ok & (c[:, None] // (C // R) == copy[None, :]) if R > 1 else m_ok
    if GS == 0:
        z = meta_zero(_in_rows(tl.load(sz, mask=sz_ok, other=0)), DT)[:, None]
    d = tl.zeros(acc.shape, tl.float32)
    for s in range(s0, s1):
        at = s * (U * C) + c[None, :]
        ws = w[:, None] + at
        place = s * (U * C) + word + copy[None, :] * (GS // P) if R > 1 else s * (U * C) + word
        xs = x + place
        szs = sz + s * (U * R * N)
        if FOUR:
            meta = _four_groups(szs, N, sz_ok)
        for u in tl.static_range(U):
            q_ok = n_ok[:, None] if EVEN else n_ok[:, None] & (at + u * C < words)
            q = tl.load(ws + u * C, mask=q_ok, other=0, eviction_policy="evict_first")
            g = 0 if GS == 0 else ((s * U + u) * R if OWN else s * U // (GS // T))
            if TABLE:
                within = 0 if OWN else (s * U + u) % (GS // T) * T
                place = _from_table(tab, g, copy, last, within, GS, R, EVEN) // P + word
                xu = x + place
                # a step may reach beyond the last group: nothing counts there
                load_at = place if EVEN else place + tl.maximum(g + copy - last, 0)[None, :] * KX
            else:
                xu = xs + u * C
                load_at = place + u * C
            if GS > 0 and (OWN or u == 0):
                d = tl.zeros(acc.shape, tl.float32)
                szg = szs + u * (R * N) if OWN and EVEN else sz + (g if EVEN else tl.minimum(g, last)) * N
                z = meta_zero(meta[u], DT)[:, None] if FOUR else _zeros(szg, g, last, N, sz_ok, R, C, DT, EVEN)
            d = _tile_product(acc if GS == 0 else d, q, z, xu, rows_ok, load_at, KX, BITS, DT, EVEN, ASM)
            if GS == 0:
                acc = d
            elif FOUR and not WIDE:
                acc += d * meta_scale(meta[u])[:, None]
            elif OWN or u == U - 1:
                acc += d * _scales(szg, g, last, N, wide, sz_ok, R, BX, EVEN, WIDE)
    return acc


@triton.jit
def joined(
    q0, q1, q2, z, p: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, DT: tl.constexpr, ASM: tl.constexpr
):
    """COUNT planes of a run from plane p on, side by side: [BN, 16 * COUNT]."""
    if COUNT == 1:
        return run_plane(q0, q1, q2, z, p, BITS, DT, ASM)
    else:
        first = joined(q0, q1, q2, z, p, COUNT // 2, BITS, DT, ASM)
        return _paired(first, joined(q0, q1, q2, z, p + COUNT // 2, COUNT // 2, BITS, DT, ASM), 1)


@triton.jit
def load_run(w, s, words, ok, C: tl.constexpr, EVEN: tl.constexpr):
    """The tiles [BN, 16] of run s, C words long, of rows of `words` words at w; C = 32 may end with one tile."""
    c = s * C + tl.arange(0, 16)[None, :]
    at = w[:, None] + c
    q0 = tl.load(at, mask=ok[:, None], other=0, eviction_policy="evict_first")
    q1 = q0
    q2 = q0
    if C == 32:
        q_ok = ok[:, None] if EVEN else ok[:, None] & (c + 16 < words)
        q1 = tl.load(at + 16, mask=q_ok, other=0, eviction_policy="evict_first")
    elif C == 48:
        q1 = tl.load(at + 16, mask=ok[:, None], other=0, eviction_policy="evict_first")
        q2 = tl.load(at + 32, mask=ok[:, None], other=0, eviction_policy="evict_first")
    return q0, q1, q2


@triton.jit
def segment_of_runs(
    acc, x, w, words, sz, wide, tab, N, K, groups, n_ok, sz_ok, m_ok, s0, s1, BITS: tl.constexpr, GS: tl.constexpr,
    DT: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, TABLE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """As `segment` for 2 and 3 bits: every step is a run of 256 codes, 16 planes of 16.

    x: pointers [1, BX] to the rows of the activations, K values each.
    """
    COUNT: tl.constexpr = GS // 16 if 0 < GS < 64 else 4  # planes of one product
    SPAN: tl.constexpr = 16 * COUNT
    PER: tl.constexpr = 1 if GS == 0 else 256 // GS  # groups per step
    j = tl.arange(0, SPAN)[:, None]
    last = groups - 1
    if GS == 0:
        z = meta_zero(_in_rows(tl.load(sz, mask=sz_ok, other=0)), DT)[:, None]
    d = tl.zeros(acc.shape, tl.float32)
    for s in range(s0, s1):
        q0, q1, q2 = load_run(w, s, words, n_ok, 16 * BITS, EVEN)
        xs = x + (s * 256 + j)
        szs = sz + s * (PER * N)
        for i in tl.static_range(256 // SPAN):
            group = 0 if GS == 0 else s * PER + i * SPAN // GS
            g = group if EVEN else tl.minimum(group, last)
            if GS > 0 and i * SPAN % GS == 0:
                d = tl.zeros(acc.shape, tl.float32)
                szg = szs + i * SPAN // GS * N if EVEN else sz + g * N
                z = meta_zero(_in_rows(tl.load(szg, mask=sz_ok, other=0)), DT)[:, None]
            k = tl.load(tab + g) * GS + i * SPAN % GS + j if TABLE else s * 256 + j + i * SPAN
            xi = x + k if TABLE else xs + i * SPAN
            if EVEN:
                values = tl.load(xi, mask=m_ok, other=0)
            else:  # a step may reach beyond the last group: nothing counts there
                values = tl.load(xi, mask=m_ok & (k + tl.maximum(group - last, 0) * K < K), other=0)
            planes = joined(q0, q1, q2, z, i * COUNT, COUNT, BITS, DT, ASM)
            if GS == 0:
                acc = tl.dot(planes, values, acc)
            else:
                d = tl.dot(planes, values, d)
                if (i + 1) * SPAN % GS == 0:
                    acc += d * _in_rows(group_scale(szg, wide, sz_ok, WIDE))[:, None]
    return acc
