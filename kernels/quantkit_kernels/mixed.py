"""Groups of 2, 3, 4 and 8 bits of one weight in one launch: one loop per width, over groups sorted by width."""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit_kernels._finish import finish
from quantkit_kernels._planes import unit
from quantkit_kernels._segment import in_order, outputs, segment, segment_of_runs


@triton.jit
def _share(count, GS: tl.constexpr, STEP: tl.constexpr, part, SPLIT: tl.constexpr):
    """The part-th of SPLIT ranges of steps over `count` groups."""
    steps = tl.cdiv(count * GS, STEP)
    return steps * part // SPLIT, steps * (part + 1) // SPLIT


@triton.jit
def _width(
    acc, x, w, sw, sz, wide, tab, N, KX, count, rows, n_ok, m_ok, part, BITS: tl.constexpr, GS: tl.constexpr,
    SHAPE: tl.constexpr, DT: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """acc + this program's share of the `count` groups of one width; SHAPE = (C, U, R, EVEN) of `segment`.

    sz, n_ok: in the order of N; rows [BN]: in that of `outputs`.
    """
    s0, s1 = _share(count, GS, SHAPE[0] * SHAPE[1] * 16 // BITS, part, SPLIT)
    wp = w + rows.to(tl.int64) * sw
    row_ok = rows < N
    if BITS < 4:
        return segment_of_runs(
            acc, x, wp, sw, sz, wide, tab, N, KX, count, row_ok, n_ok, m_ok, s0, s1, BITS, GS, DT, SHAPE[3], WIDE,
            True, ASM,
        )  # fmt: skip
    else:
        return segment(
            acc, x, wp, sw, sz, wide, tab, N, KX, count, row_ok, n_ok, m_ok, s0, s1, BITS, GS, SHAPE[0], SHAPE[1],
            SHAPE[2], DT, SHAPE[3], WIDE, True, ASM,
        )  # fmt: skip


@triton.jit
def mixed(
    x4, x2, x1, w2, w3, w4, w8, sz, tab, bias, o, ws, cnt, M, N, K, kx4, kx2, n2, n3, n4, n8, sw2, sw3, sw4, sw8, sx4,
    sx2, sx1, wide, GS: tl.constexpr, S2: tl.constexpr, S3: tl.constexpr, S4: tl.constexpr, S8: tl.constexpr,
    R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One program: BN outputs of BM rows over one of SPLIT shares of the groups of every width.

    x4, x2, x1: the activations as int64 [M, kx4], as int32 [M, kx2], and [M, K] themselves.
    n2 to n8: groups of each width.  sw2 to sw8: row strides in words.
    S2 to S8: (C, U, R, EVEN) per width, with the same R, copies of every row of x; 2 and 3 bits need but one.
    tab: the group of K that each sorted group is.
    """
    DT: tl.constexpr = o.dtype.element_ty
    tile = tl.program_id(0)
    part = tl.program_id(1)
    first = tl.program_id(2) * BM
    row = first + tl.arange(0, BM * R) % BM if R > 1 else first + tl.arange(0, BM)
    rows = outputs(tile * BN, BN)
    n = tile * BN + tl.arange(0, BN)
    n_ok = n < N
    sz += n
    m_ok = (row < M)[None, :]
    once = m_ok & (tl.arange(0, BM * R) < BM)[None, :]
    x1 += row[None, :] * sx1
    x2 += row[None, :] * sx2
    x4 += row[None, :] * sx4
    acc = tl.zeros((BN, BM * R), tl.float32)
    acc = _width(acc, x1, w2, sw2, sz, wide, tab, N, K, n2, rows, n_ok, once, part, 2, GS, S2, DT, SPLIT, WIDE, ASM)
    sz += n2 * N
    tab += n2
    acc = _width(acc, x1, w3, sw3, sz, wide, tab, N, K, n3, rows, n_ok, once, part, 3, GS, S3, DT, SPLIT, WIDE, ASM)
    sz += n3 * N
    tab += n3
    acc = _width(acc, x4, w4, sw4, sz, wide, tab, N, kx4, n4, rows, n_ok, m_ok, part, 4, GS, S4, DT, SPLIT, WIDE, ASM)
    sz += n4 * N
    tab += n4
    acc = _width(acc, x2, w8, sw8, sz, wide, tab, N, kx2, n8, rows, n_ok, m_ok, part, 8, GS, S8, DT, SPLIT, WIDE, ASM)
    if R > 1:
        acc = tl.sum(tl.reshape(acc, (BN, R, BM)), 1)
    acc = in_order(acc) * unit(DT)
    m = first + tl.arange(0, BM)
    block = tile + tl.program_id(2) * tl.num_programs(0)
    finish(acc, bias, o, ws, cnt, M, N, n, m, block, part, SPLIT, HAS_BIAS, ACT)
