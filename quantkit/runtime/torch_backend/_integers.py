"""Integers that torch lacks: uint16 and uint32 live in wider signed types, uint64 in the 64 bits of an int64."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import torch

from quantkit.runtime.torch_backend._types import Run

RANGES: Mapping[ir.DataType, tuple[int, int]] = {
    ir.DataType.INT2: (-2, 1),
    ir.DataType.INT4: (-8, 7),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.INT16: (-(1 << 15), (1 << 15) - 1),
    ir.DataType.INT32: (-(1 << 31), (1 << 31) - 1),
    ir.DataType.INT64: (-(1 << 63), (1 << 63) - 1),
    ir.DataType.UINT2: (0, 3),
    ir.DataType.UINT4: (0, 15),
    ir.DataType.UINT8: (0, 255),
    ir.DataType.UINT16: (0, (1 << 16) - 1),
    ir.DataType.UINT32: (0, (1 << 32) - 1),
    ir.DataType.UINT64: (0, (1 << 64) - 1),
}
"""Least and greatest value."""
MASKS: Mapping[ir.DataType | None, int] = {ir.DataType.UINT16: (1 << 16) - 1, ir.DataType.UINT32: (1 << 32) - 1}
"""Bits of the types that live in a wider one."""
TOP = -(1 << 63)
"""The highest bit of 64, as an int64."""


def wrapped(run: Run, dtype: ir.DataType | None) -> Run:
    """The function with its result cut to the bits that its element type has."""
    if dtype not in MASKS:
        return run
    mask = MASKS[dtype]

    def cut(*args: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = run(*args)
        return result & mask

    return cut


def flip(x: torch.Tensor) -> torch.Tensor:
    """uint64 bits -> int64 in the same order, and back."""
    return x ^ TOP


def ordered(run: Run, dtype: ir.DataType | None, back: bool = False) -> Run:
    """A function that only compares its inputs, right for uint64 as well; `back`: its result is one of them."""
    if dtype != ir.DataType.UINT64:
        return run

    def compare(*args: torch.Tensor | None) -> torch.Tensor:
        result: torch.Tensor = run(*(None if x is None else flip(x) for x in args))
        return flip(result) if back else result

    return compare


def divide_uint64(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Bits of x // y, both unsigned; y may not be 0."""
    large = y < 0
    safe = torch.where(large, 1, y)
    half = ((x >> 1) & ~TOP) // safe
    quotient = half << 1
    quotient = quotient + (flip(x - quotient * safe) >= flip(safe)).to(torch.int64)
    return torch.where(large, (flip(x) >= flip(y)).to(torch.int64), quotient)


def uint64_to_float(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint64 bits as numbers."""
    # Halved, with the lowest bit kept in sight for the rounding, then doubled again.
    halved = ((x >> 1) & ~TOP) | (x & 1)
    return torch.where(x < 0, halved.to(dtype) * 2, x.to(dtype))


def float_to_uint64(x: torch.Tensor) -> torch.Tensor:
    """Numbers, cut towards zero, as uint64 bits."""
    limit = 2.0**63
    wide = x.to(torch.float64)
    return torch.where(wide >= limit, flip((wide - limit).to(torch.int64)), wide.to(torch.int64))


def number(tensor: torch.Tensor) -> float | int | torch.Tensor:
    """A constant scalar as a plain number, with which torch computes faster, where reading it costs nothing."""
    plain = tensor.ndim == 0 and tensor.device.type == "cpu" and not tensor.requires_grad
    if not plain or torch.compiler.is_compiling():
        return tensor
    value: float | int = tensor.item()
    return value
