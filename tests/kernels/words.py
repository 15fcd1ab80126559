"""Every plane of every packed word: what the GPU's tests and those of the emulated assembly compare."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import triton
import triton.language as tl
from quantkit_kernels._planes import meta_zero, q3plane, qplane, unit
from quantkit_kernels.act8 import _byte_plane

from quantkit.types import Array


@triton.jit
def planes(
    words, points, o, BITS: tl.constexpr, DT: tl.constexpr, ASM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """o[z, p, word] = plane p of every word for every zero point; words [3, 65536], of which 3 bits read all."""
    P: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    q0 = tl.load(words + at)
    q1 = tl.load(words + 65536 + at)
    q2 = tl.load(words + 131072 + at)
    z = meta_zero(tl.zeros((1, 1), tl.int32) + (tl.load(points + tl.program_id(1)) << 16), DT)
    for p in tl.static_range(P):
        value = q3plane(q0, q1, q2, z, p, DT, ASM) if BITS == 3 else qplane(q0, z, p, BITS, DT, ASM)
        tl.store(o + (tl.program_id(1) * P + p) * 65536 + at, value.to(tl.float32) * unit(DT))


def codes_of(words: np.ndarray, bits: int, plane: int) -> np.ndarray:
    """Codes of one plane of words uint16 [3, 65536]."""
    if bits != 3:
        return (words[0] >> (bits * plane)) & ((1 << bits) - 1)
    if plane < 15:
        return (words[plane // 5] >> (3 * (plane % 5))) & 7
    return (words[0] >> 15) | (words[1] >> 15 << 1) | (words[2] >> 15 << 2)


@triton.jit
def byte_plane(stored, o, p: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """o[byte] = plane p of 256 bytes."""
    at = tl.arange(0, 256)
    tl.store(o + at, _byte_plane(tl.load(stored + at), p, BITS, ASM))


@dataclass(frozen=True)
class Words:
    """All 65536 words beside two shuffled copies, at every zero point (every 17th for 8 bits).

    Attributes:
        words: int16 [3, 65536].
        points: int32 [Z], the bits of zero points float16.
        exact: float32 [Z, planes, 65536], code less zero point.
    """

    words: Array
    points: Array
    exact: Array

    @classmethod
    def of(cls, bits: int) -> Words:
        generator = np.random.default_rng(0)
        words = np.stack([np.arange(65536), *(generator.permutation(65536) for _ in range(2))]).astype(np.uint16)
        points = np.arange(0, 1 << bits, 17 if bits == 8 else 1, dtype=np.float16)
        count = 16 if bits == 3 else 16 // bits
        codes = np.stack([codes_of(words, bits, plane) for plane in range(count)]).astype(np.float32)
        exact = codes[None] - points.astype(np.float32)[:, None, None]
        return cls(words.view(np.int16), points.view(np.int16).astype(np.int32), exact)
