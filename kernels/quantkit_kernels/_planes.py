"""Device functions: packed words in registers -> tensor-core operands.

An int16 tile q [BN, C] holds P planes of codes; plane p, the bits [b*p, b*p + b) of every word, is one operand
[BN, C] of `tl.dot`. Two adjacent words are the halves of one register, so one `lop3` extracts two codes and puts them
into the mantissas of two floats (`| 0x6400` makes 1024 + q in float16, `| 0x4300` 128 + q in bfloat16); one packed
add or fma takes the offset and the zero point away, exactly. Planes that sit at different bits of the same byte need no
shift of their own: their factor of 4, 16 or 64 leaves in the fma.

`ASM` = False spells the same arithmetic without inline assembly: for Triton's interpreter, and as the twin in tests on
a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

# In bfloat16, 8-bit planes come as (q - z) / 64: only so can bit 7, an exponent bit there, be weighed in one fma.
BF16_W8 = tl.constexpr(64.0)


@triton.jit
def _code_floats(w, SHIFT: tl.constexpr, MASK: tl.constexpr, MAGIC: tl.constexpr, DT: tl.constexpr):
    """((w >> SHIFT) & MASK) | MAGIC of two int16 words at once, as floats of type DT."""
    if SHIFT == 0:
        asm: tl.constexpr = f"lop3.b32 $0, $1, {MASK}, {MAGIC}, 0xEA;"
    else:
        asm: tl.constexpr = f"{{ .reg .b32 t; shr.u32 t, $1, {SHIFT}; lop3.b32 $0, t, {MASK}, {MAGIC}, 0xEA; }}"
    return tl.inline_asm_elementwise(
        asm, "=r,r", [w], dtype=tl.float16 if DT == tl.float16 else tl.bfloat16, is_pure=True, pack=2
    )


@triton.jit
def _with_high_bit(v, h, SHIFT: tl.constexpr, MASK: tl.constexpr, DT: tl.constexpr):
    """v | ((h >> SHIFT) & MASK) of two floats v and two int16 words h; a negative shift goes left."""
    if SHIFT == 0:
        asm: tl.constexpr = f"lop3.b32 $0, $1, {MASK}, $2, 0xEA;"
    elif SHIFT > 0:
        asm: tl.constexpr = f"{{ .reg .b32 t; shr.u32 t, $1, {SHIFT}; lop3.b32 $0, t, {MASK}, $2, 0xEA; }}"
    else:
        asm: tl.constexpr = f"{{ .reg .b32 t; shl.b32 t, $1, {-SHIFT}; lop3.b32 $0, t, {MASK}, $2, 0xEA; }}"
    return tl.inline_asm_elementwise(
        asm, "=r,r,r", [h, v], dtype=tl.float16 if DT == tl.float16 else tl.bfloat16, is_pure=True, pack=2
    )


@triton.jit
def _centred(v, z, AT: tl.constexpr, OFFSET: tl.constexpr, DT: tl.constexpr):
    """(v - OFFSET) / 2^AT - z for v = OFFSET + q * 2^AT; z [BN, 1] or [BN, C]."""
    if AT == 0:
        return v - (z + OFFSET).to(DT)
    factor = tl.full(v.shape, 1.0 / (1 << AT), DT)
    return tl.fma(v, factor, tl.broadcast_to((-OFFSET / (1 << AT) - z).to(DT), v.shape))


@triton.jit
def _bf16_byte(w, z, SHIFT: tl.constexpr):
    """(q - z) / 64 in bfloat16 for the byte q at bit SHIFT of every word."""
    low = _code_floats(w, SHIFT, "0x007f007f", "0x40004000", tl.bfloat16)  # 2 + (q & 127) / 64
    if SHIFT == 0:
        asm: tl.constexpr = "lop3.b32 $0, $1, 0x00800080, 0, 0x0C;"
    else:
        asm: tl.constexpr = f"{{ .reg .b32 t; shr.u32 t, $1, {SHIFT}; lop3.b32 $0, t, 0x00800080, 0, 0x0C; }}"
    # 2^-126 where bit 7 is 0
    unset = tl.inline_asm_elementwise(asm, "=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=2)
    moved = low - (z * (1.0 / 64)).to(tl.bfloat16)
    return tl.fma(unset, tl.full(unset.shape, -(2.0**127), tl.bfloat16), moved)


@triton.jit
def qplane(q, h, z, p: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr, DT: tl.constexpr, ASM: tl.constexpr):
    """Plane p of int16 words q [BN, C] as q - z, exact, in DT (divided by `BF16_W8` for 8 bits in bfloat16).

    h: for 3 bits the words of high bits, of which q are the low words of half HALF; else anything.
    z: float32 zero points [BN, 1] or [BN, C], integers.
    """
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    HIGH: tl.constexpr = (2 * (p % 4) + 2 + p // 4 + 8 * HALF) % 16  # `packing.HIGH_BIT`
    if not ASM:
        code = (q.to(tl.int32) >> (p * LOW)) & ((1 << LOW) - 1)
        if BITS == 3:
            code = code | (((h.to(tl.int32) >> HIGH) & 1) << 2)
        value = code.to(tl.float32) - z
        if BITS == 8 and DT == tl.bfloat16:
            value = value / BF16_W8
        return value.to(DT)
    elif BITS == 8 and DT == tl.bfloat16:
        return _bf16_byte(q, z, p * 8)
    else:
        # float16 has 10 bits of mantissa, bfloat16 7: planes per shift, and the step of the shifts
        PER: tl.constexpr = (8 if DT == tl.float16 else 6) // LOW
        OFFSET: tl.constexpr = 1024.0 if DT == tl.float16 else 128.0
        MAGIC: tl.constexpr = "0x64006400" if DT == tl.float16 else "0x43004300"
        AT: tl.constexpr = LOW * (p % PER)
        SHIFT: tl.constexpr = LOW * (p - p % PER)
        v = _code_floats(q, SHIFT, ((1 << LOW) - 1) * (65537 << AT), MAGIC, DT)
        if BITS == 3:
            v = _with_high_bit(v, h, HIGH - (AT + 2), 65537 << (AT + 2), DT)
        return _centred(v, z, AT, OFFSET, DT)


@triton.jit
def xplane(xq, j: tl.constexpr, DT: tl.constexpr):
    """Value j of packed pairs (int32) or quadruples (int64) of 16-bit floats."""
    return (xq >> (16 * j)).to(tl.int16).to(DT, bitcast=True)


@triton.jit
def meta_zero(mt):
    """Zero points float32 of words of `meta`."""
    return (mt >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def meta_scale(mt):
    """Scales float32 of words of `meta`, where float16 holds them."""
    return mt.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
