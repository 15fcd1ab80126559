"""Device functions: packed words in registers -> tensor-core operands.

An int16 tile q [BN, C] holds P planes of codes; plane p, the bits [b*p, b*p + b) of every word, is one operand
[BN, C] of `tl.dot`. Two adjacent words are the halves of one register, so one `and` extracts two codes, as the lowest
bits of two floats. Read as floats those are subnormal, or just above: up to 2^11 in float16 and 2^8 in bfloat16 the
value is linear in the bits, q * 2^-24 or q * 2^-133. One packed fma brings them to (q - z) / UNIT, exactly, with the
same -z / UNIT for every plane; the factor UNIT is left to the end of the sums. Planes that sit at different bits of the
same byte need no shift of their own: their factor of 4, 8, 16 or 64 leaves in the fma.

`ASM` = False spells the same arithmetic without inline assembly: for Triton's interpreter, and as the twin in tests on
a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unit(DT: tl.constexpr):
    """What planes of type DT are divided by: 2^9 in float16, 2^6 in bfloat16, by the largest power of two they have."""
    return 512.0 if DT == tl.float16 else 64.0


@triton.jit
def _bits(w, SHIFT: tl.constexpr, MASK: tl.constexpr, DT: tl.constexpr):
    """(w >> SHIFT) & MASK of two int16 words at once, as floats of type DT."""
    if SHIFT == 0:
        asm: tl.constexpr = f"and.b32 $0, $1, {MASK};"
    elif SHIFT == 8 and MASK == 0x00FF00FF:
        asm: tl.constexpr = "prmt.b32 $0, $1, 0, 0x4341;"
    else:
        asm: tl.constexpr = f"{{ .reg .b32 t; shr.u32 t, $1, {SHIFT}; and.b32 $0, t, {MASK}; }}"
    return tl.inline_asm_elementwise(
        asm, "=r,r", [w], dtype=tl.float16 if DT == tl.float16 else tl.bfloat16, is_pure=True, pack=2
    )


@triton.jit
def _with_bits(v, w, SHIFT: tl.constexpr, MASK: tl.constexpr, DT: tl.constexpr):
    """v | ((w >> SHIFT) & MASK) of two floats v and two int16 words w."""
    asm: tl.constexpr = f"{{ .reg .b32 t; shr.u32 t, $1, {SHIFT}; lop3.b32 $0, t, {MASK}, $2, 0xEA; }}"
    return tl.inline_asm_elementwise(
        asm, "=r,r,r", [w, v], dtype=tl.float16 if DT == tl.float16 else tl.bfloat16, is_pure=True, pack=2
    )


@triton.jit
def _less_zero(v, z, AT: tl.constexpr, DT: tl.constexpr):
    """(q - zero point) / unit for v of bits q << AT; z as `meta_zero`, [BN, 1] or [BN, C]."""
    factor: tl.constexpr = 2.0 ** (15 - AT) if DT == tl.float16 else 2.0 ** (127 - AT)
    return tl.fma(v, tl.full(v.shape, factor, DT), tl.broadcast_to(z, v.shape))


@triton.jit
def qplane(q, z, p: tl.constexpr, BITS: tl.constexpr, DT: tl.constexpr, ASM: tl.constexpr):
    """Plane p of int16 words q [BN, C] of 2, 4 or 8 bits as (q - zero point) / unit, exact, in DT.

    z: as `meta_zero`, [BN, 1] or [BN, C].
    """
    if not ASM:
        code = (q.to(tl.int32) >> (p * BITS)) & ((1 << BITS) - 1)
        return (code.to(tl.float32) / unit(DT) + z.to(tl.float32)).to(DT)
    else:
        PER: tl.constexpr = 8 // BITS  # planes per shift
        AT: tl.constexpr = BITS * (p % PER)
        return _less_zero(_bits(q, BITS * (p - p % PER), ((1 << BITS) - 1) * (65537 << AT), DT), z, AT, DT)


@triton.jit
def q3plane(q0, q1, q2, z, p: tl.constexpr, DT: tl.constexpr, ASM: tl.constexpr):
    """As `qplane` for plane p of the 16 of 3-bit codes in three int16 tiles [BN, C]: five in each, one in bits 15."""
    q = q0 if p % 15 < 5 else (q1 if p < 10 else q2)
    if not ASM:
        if p == 15:
            code = ((q0.to(tl.int32) >> 15) & 1) | ((q1.to(tl.int32) >> 14) & 2) | ((q2.to(tl.int32) >> 13) & 4)
        else:
            code = (q.to(tl.int32) >> (p % 5 * 3)) & 7
        return (code.to(tl.float32) / unit(DT) + z.to(tl.float32)).to(DT)
    elif p == 15:  # shifts that other planes need as well bring bits 15 next to each other
        TOP: tl.constexpr = 6 if DT == tl.float16 else 5
        v = _bits(q0, 15 - TOP, 65537 << TOP, DT)
        v = _with_bits(v, q1, 14 - TOP, 65537 << (TOP + 1), DT)
        return _less_zero(_with_bits(v, q2, 13 - TOP, 65537 << (TOP + 2), DT), z, TOP, DT)
    else:
        SHIFT: tl.constexpr = _shift_of_three(p // 5, p % 5, DT)
        AT: tl.constexpr = p % 5 * 3 - SHIFT
        return _less_zero(_bits(q, SHIFT, 7 * (65537 << AT), DT), z, AT, DT)


@triton.jit
def run_plane(q0, q1, q2, z, p: tl.constexpr, BITS: tl.constexpr, DT: tl.constexpr, ASM: tl.constexpr):
    """Plane p of the 16 of a run of 256 codes: 2 bits in two tiles, 3 bits in three."""
    if BITS == 3:
        return q3plane(q0, q1, q2, z, p, DT, ASM)
    else:
        return qplane(q0 if p < 8 else q1, z, p % 8, 2, DT, ASM)


@triton.constexpr_function
def _shift_of_three(tile, field, dtype):
    """Few shifts for the 5 fields and bit 15 of a word: field * 3 - shift to + 3 lies within 11 or 8 bits."""
    if dtype == tl.float16:
        return 0 if field < 3 else 9 - tile
    if field < 2:
        return 0
    if field == 2 or (tile == 0 and field == 3):
        return 6
    return 10 - tile


@triton.jit
def xplane(xq, j: tl.constexpr, DT: tl.constexpr):
    """Value j of packed pairs (int32) or quadruples (int64) of 16-bit floats."""
    return (xq >> (16 * j)).to(tl.int16).to(DT, bitcast=True)


@triton.jit
def meta_zero(mt, DT: tl.constexpr):
    """Minus the zero points of words of `meta`, divided by the unit of DT, in DT; exact."""
    if DT == tl.float16:
        z = (mt >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        return z * tl.full(z.shape, -1.0 / unit(DT), tl.float16)
    else:
        return (meta_point(mt) * (-1.0 / unit(DT))).to(DT)


@triton.jit
def meta_point(mt):
    """Zero points float32 of words of `meta`."""
    return (mt >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def meta_scale(mt):
    """Scales float32 of words of `meta`, where float16 holds them."""
    return mt.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
