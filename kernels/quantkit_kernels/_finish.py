"""Device functions: bias, activation, and the sum of the parts of K that several programs hold."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activation(v, ACT: tl.constexpr):
    """float32 values through relu, gelu (by the error function), silu or none."""
    if ACT == "relu":
        return tl.maximum(v, 0.0)
    elif ACT == "gelu":
        return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACT == "silu":
        return v / (1.0 + tl.exp(-v))
    else:
        return v


@triton.jit
def store_tile(acc, bias, n, n_ok, o, mask, HAS_BIAS: tl.constexpr, ACT: tl.constexpr):
    """Store act(acc + bias) at pointers o; acc float32 [BN, BM]."""
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n_ok, other=0).to(tl.float32)[:, None]
    tl.store(o, activation(acc, ACT).to(o.dtype.element_ty), mask=mask)


@triton.jit
def finish(
    acc,
    bias,
    o,
    ws,
    cnt,
    M,
    N,
    n,
    m,
    tile,
    part,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACT: tl.constexpr,
):
    """The end of a program that holds part `part` of SPLIT of the sums [BN, BM] of output tile `tile`.

    With SPLIT > 1 every program leaves its sums in ws [SPLIT, M, N]; the last to come adds them up in order, so that
    the result does not depend on who that is, and sets the tile's counter back to 0.
    """
    n_ok = n < N
    mask = (m < M)[None, :] & n_ok[:, None]
    place = m[None, :].to(tl.int64) * N + n[:, None]
    if SPLIT == 1:
        store_tile(acc, bias, n, n_ok, o + place, mask, HAS_BIAS, ACT)
    else:
        tl.store(ws + part * M * N + place, acc, mask=mask)
        tl.debug_barrier()
        before = tl.atomic_add(cnt + tile, 1, sem="acq_rel")
        if before == SPLIT - 1:
            total = tl.zeros(acc.shape, tl.float32)
            for i in range(tl.num_programs(1)):  # SPLIT, but not known to be: unrolled it takes too many registers
                total += tl.load(ws + i * M * N + place, mask=mask, other=0.0, cache_modifier=".cg")
            store_tile(total, bias, n, n_ok, o + place, mask, HAS_BIAS, ACT)
            tl.store(cnt + tile, 0)
