"""Changing element types: by value, and by reading the same bits anew."""

from __future__ import annotations

import onnx_ir as ir
import torch

from quantkit.runtime.torch_backend._dtypes import FLOATS, SUB_BYTE, Carriers
from quantkit.runtime.torch_backend._integers import MASKS, float_to_uint64, uint64_to_float
from quantkit.runtime.torch_backend._types import Node, Op, Run, Table

FLOAT8 = frozenset(
    {
        ir.DataType.FLOAT8E4M3FN,
        ir.DataType.FLOAT8E4M3FNUZ,
        ir.DataType.FLOAT8E5M2,
        ir.DataType.FLOAT8E5M2FNUZ,
    }
)
UNSIGNED = frozenset({ir.DataType.UINT2, ir.DataType.UINT4})
E8M0_BIAS, E8M0_MAX, E8M0_NAN = 127, 254, 255
E4M3FN_OVERFLOW = 464.0
"""Half way from the greatest number to what would be the next one; the half itself rounds down."""
E2M1_MAX, E2M1_EVEN_BELOW, E2M1_TWO_STEPS = 6.0, 2.0, 4.0


def cast(node: Node) -> Run:
    """By value."""
    return caster(node, node.input_types[0], ir.DataType(node.attributes["to"]))


def cast_like(node: Node) -> Run:
    """By value, to the type of the second input."""
    target = node.input_types[1] if node.input_types[1] is not None else node.output_types[0]
    if target is None:
        return lambda x, like: x.to(like.dtype)
    run = caster(node, node.input_types[0], target)
    return lambda x, like: run(x)


def caster(node: Node, source: ir.DataType | None, target: ir.DataType) -> Run:
    """The function that casts from one type to another; attributes `saturate` and `round_mode` are the node's."""
    if ir.DataType.STRING in (source, target):
        raise node.refuse("a torch tensor holds no strings")
    dtype = node.dtypes(target)
    saturate = bool(node.get("saturate", 1))
    if target in FLOAT8:
        run: Run = _to_float8(dtype, saturate)
    elif target == ir.DataType.FLOAT8E8M0:
        run = _to_e8m0(node, saturate)
    elif target == ir.DataType.FLOAT4E2M1:
        run = to_e2m1
    elif target == ir.DataType.BOOL:
        run = _is_not_zero
    elif target in SUB_BYTE:
        run = _to_sub_byte(target)
    elif target in MASKS:
        mask = MASKS[target]
        run = lambda x: (x.to(torch.int64) & mask).to(dtype)  # noqa: E731
    elif target == ir.DataType.UINT64:
        run = lambda x: float_to_uint64(x) if x.is_floating_point() else x.to(dtype)  # noqa: E731
    else:
        run = lambda x: x.to(dtype)  # noqa: E731
    if source == ir.DataType.UINT64 and target.is_floating_point():
        wide = dtype if target in FLOATS else torch.float32
        return lambda x: run(uint64_to_float(x, wide))
    return run


def is_float8(x: torch.Tensor) -> bool:
    return x.is_floating_point() and x.dtype.itemsize == 1


def plain(x: torch.Tensor) -> torch.Tensor:
    """Floats of 8 bits, for which torch has no arithmetic, as float32; anything else as it is."""
    return x.to(torch.float32) if is_float8(x) else x


def as_float(x: torch.Tensor) -> torch.Tensor:
    return plain(x) if x.is_floating_point() else x.to(torch.float32)


def _is_not_zero(x: torch.Tensor) -> torch.Tensor:
    return plain(x) != 0


def _to_float8(dtype: torch.dtype, saturate: bool) -> Run:
    limit = torch.finfo(dtype).max

    def run(x: torch.Tensor) -> torch.Tensor:
        wide = as_float(x)
        if saturate:
            return torch.clamp(wide, -limit, limit).to(dtype)
        if dtype == torch.float8_e4m3fn:  # torch saturates this type, and no other
            wide = torch.where(wide.abs() > E4M3FN_OVERFLOW, torch.nan, wide)
        return wide.to(dtype)

    return run


def _to_e8m0(node: Node, saturate: bool) -> Run:
    """Powers of two, 2^-127 to 2^127."""
    # x = fraction * 2^exponent, 0.5 <= fraction < 1: the power below x is 2^(exponent - 1).
    above = {"up": 0.5, "nearest": 0.75, "down": 1.0}
    mode = node.get("round_mode", "up")
    if mode not in above:
        raise node.refuse(f"no round_mode {mode!r}, only {', '.join(above)}")

    def run(x: torch.Tensor) -> torch.Tensor:
        wide = as_float(x)
        fraction, exponent = torch.frexp(wide)
        rounds_up = fraction >= above[mode] if mode == "nearest" else fraction > above[mode]
        codes = exponent.to(torch.int64) - 1 + rounds_up.to(torch.int64) + E8M0_BIAS
        codes = torch.where(torch.isposinf(wide), E8M0_NAN, codes)
        outside = (codes < 0) | (codes > E8M0_MAX) | (wide == 0)
        saturated = torch.where(wide == 0, 0, codes.clamp(0, E8M0_MAX))
        codes = saturated if saturate else torch.where(outside, E8M0_NAN, codes)
        codes = torch.where(torch.isnan(wide), E8M0_NAN, codes)
        return codes.to(torch.uint8).view(torch.float8_e8m0fnu)

    return run


def to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, ties to the even code; NaN is -0."""
    wide = as_float(x)
    size = torch.nan_to_num(wide.abs(), nan=0.0).clamp(max=E2M1_MAX)
    fine, coarse = torch.round(size * 2) / 2, torch.round(size)
    widest = torch.round(size / 2) * 2
    size = torch.where(size < E2M1_EVEN_BELOW, fine, torch.where(size < E2M1_TWO_STEPS, coarse, widest))
    sign = torch.where(torch.isnan(wide), -1.0, wide)
    return torch.copysign(size, sign).to(torch.float32)


def _to_sub_byte(target: ir.DataType) -> Run:
    """The lowest bits."""
    bits = SUB_BYTE[target]
    mask, half = (1 << bits) - 1, 1 << (bits - 1)

    def run(x: torch.Tensor) -> torch.Tensor:
        codes = plain(x).to(torch.int32) & mask
        return codes.to(torch.uint8) if target in UNSIGNED else ((codes ^ half) - half).to(torch.int8)

    return run


def bit_cast(node: Node) -> Run:
    """The same bits as another type of the same width."""
    source, target = node.input_types[0], ir.DataType(node.attributes["to"])
    if source is None:
        raise node.refuse("the element type of its input is not known")
    if source.bitwidth != target.bitwidth:
        raise node.refuse(f"{source.name} and {target.name} differ in width")
    if source == target:
        return lambda x: x
    if ir.DataType.FLOAT4E2M1 in (source, target):
        raise node.refuse("float4e2m1 is not kept as bits")
    if source in SUB_BYTE:
        return _to_sub_byte(target)
    native = Carriers()
    inner = _BITS.get(source, native(source))
    outer = _BITS.get(target, native(target))
    carrier = node.dtypes(target)

    def run(x: torch.Tensor) -> torch.Tensor:
        bits = x.to(inner).view(outer)
        return bits.to(carrier) & MASKS[target] if target in MASKS else bits.to(carrier)

    return run


_BITS = {ir.DataType.UINT16: torch.int16, ir.DataType.UINT32: torch.int32}

TABLE: Table = {
    ("BitCast", 26): Op(bit_cast),
    ("Cast", 1): Op(cast),
    ("CastLike", 15): Op(cast_like),
}
