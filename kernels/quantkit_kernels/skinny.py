"""Few rows of x (M <= 64): out[M, N]ᵀ = W xᵀ, the packed weight as the left operand and kept in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit_kernels._finish import finish
from quantkit_kernels._planes import unit
from quantkit_kernels._segment import group_scale, in_order, outputs, segment, segment_of_runs


@triton.jit
def skinny(
    x, w, sz, bias, o, ws, cnt, M, N, K, KX, swn, sxm, wide, BITS: tl.constexpr, GS: tl.constexpr,
    C: tl.constexpr, U: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One program: BN outputs of BM rows over one of SPLIT parts of K, in steps of U tiles of C words (`segment`).

    x: the activations [M, K], for 4 bits as [M, KX] int64, for 8 bits as int32; row stride sxm of those.
    w: int16 words, row stride swn.  sz: meta [(2,) G, N], its float32 scales `wide` words on.
    o: [M, N] float16 or bfloat16.  GS: group size, 0 for one scale per row.
    EVEN: K is a multiple of a step.
    """
    DT: tl.constexpr = o.dtype.element_ty
    STEP: tl.constexpr = U * C * 16 // BITS
    tile = tl.program_id(0)
    part = tl.program_id(1)
    first = tl.program_id(2) * BM
    row = first + tl.arange(0, BM * R) % BM if R > 1 else first + tl.arange(0, BM)
    rows = outputs(tile * BN, BN)
    n = tile * BN + tl.arange(0, BN)
    n_ok = n < N
    steps = tl.cdiv(K, STEP)
    per = tl.cdiv(steps, SPLIT)
    s0 = part * per
    s1 = tl.minimum(steps, s0 + per)
    groups = 1 if GS == 0 else tl.cdiv(K, GS)
    acc = tl.zeros((BN, BM * R), tl.float32)
    xp, wp, m_ok = x + row[None, :] * sxm, w + rows.to(tl.int64) * swn, (row < M)[None, :]
    if BITS < 4:
        acc = segment_of_runs(
            acc, xp, wp, swn, sz + n, wide, sz, N, K, groups, rows < N, n_ok, m_ok, s0, s1, BITS, GS, DT, EVEN, WIDE,
            False, ASM,
        )  # fmt: skip
    else:
        acc = segment(
            acc, xp, wp, swn, sz + n, wide, sz, N, KX, groups, rows < N, n_ok, m_ok, s0, s1, BITS, GS, C, U, R, DT,
            EVEN, WIDE, False, ASM,
        )  # fmt: skip
    if R > 1:
        acc = tl.sum(tl.reshape(acc, (BN, R, BM)), 1)
    acc = in_order(acc) * unit(DT)
    if GS == 0:
        acc = acc * group_scale(sz + n, wide, n_ok, WIDE)[:, None]
    m = first + tl.arange(0, BM)
    block = tile + tl.program_id(2) * tl.num_programs(0)
    finish(acc, bias, o, ws, cnt, M, N, n, m, block, part, SPLIT, HAS_BIAS, ACT)
