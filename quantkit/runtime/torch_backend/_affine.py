"""Numbers on a grid: code = round(x / scale) + zero point, and back.

Rounding is straight-through (Bengio et al. 2013, arXiv:1308.3432): a gradient passes where the number lies inside the
grid. Integer tensors carry no gradients, so codes that have one stay in a float type: whole numbers all the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch.autograd import forward_ad

from quantkit.runtime.torch_backend._integers import RANGES
from quantkit.runtime.torch_backend._types import Node, Run
from quantkit.runtime.torch_backend.casting import FLOAT8, caster, plain, to_e2m1

HALVES = (torch.float16, torch.bfloat16)


def is_followed(x: torch.Tensor) -> bool:
    """Whether a derivative passes, backward or forward (torch.func.jvp)."""
    return x.requires_grad or forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def through(rounded: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The values of the one with the gradient of the other; both finite."""
    return rounded.detach() + (x - x.detach())


@dataclass(frozen=True)
class Grid:
    """What codes are stored in.

    Attributes:
        low, high: least and greatest code.
        dtype: that carries them.
        convert: for grids of floats: number -> code; None for whole numbers.
    """

    low: float
    high: float
    dtype: torch.dtype
    convert: Run | None = None

    def codes(self, x: torch.Tensor, zero_point: torch.Tensor | None) -> torch.Tensor:
        """Numbers in units of a step -> codes; float where a gradient passes."""
        if x.dtype in HALVES:
            x = x.to(torch.float32)
        if self.convert is not None:
            return self._floats(x if zero_point is None else x + plain(zero_point).to(x.dtype))
        if not is_followed(x):
            codes = torch.round(x)  # new memory, which nobody else sees: the rest may happen in place
            if zero_point is not None:
                codes.add_(zero_point.to(x.dtype))
            return codes.clamp_(self.low, self.high).to(self.dtype)
        if zero_point is None:
            inside = torch.clamp(x, self.low, self.high)
            return through(torch.round(inside), inside)
        zero = zero_point.to(x.dtype)
        inside = torch.maximum(torch.minimum(x, self.high - zero), self.low - zero)
        return through(torch.round(inside), inside) + zero

    def _floats(self, x: torch.Tensor) -> torch.Tensor:
        assert self.convert is not None
        codes: torch.Tensor = self.convert(x)
        if not is_followed(x):
            return codes
        return through(plain(codes).to(x.dtype), torch.clamp(x, self.low, self.high))


def grid_of(node: Node, *candidates: ir.DataType | None) -> Grid:
    """The grid of the first element type that is known; uint8 when none is.

    Raises:
        InputError: no codes are stored in this type.
    """
    kind = next((item for item in candidates if item is not None), ir.DataType.UINT8)
    dtype = node.dtypes(kind)
    if kind in RANGES:
        low, high = RANGES[kind]
        return Grid(low, high, dtype)
    if kind in FLOAT8:
        limit = torch.finfo(dtype).max
        return Grid(-limit, limit, dtype, caster(node, ir.DataType.FLOAT, kind))
    if kind == ir.DataType.FLOAT4E2M1:
        return Grid(-6.0, 6.0, dtype, to_e2m1)
    raise node.refuse(f"codes of type {kind.name}")


def numbers(codes: torch.Tensor, zero_point: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """codes - zero point, exact, in a float type."""
    wide = plain(codes).to(torch.float32 if dtype in HALVES else dtype)
    if zero_point is not None:
        wide = wide - plain(zero_point).to(wide.dtype)
    return wide.to(dtype)


def dequantized(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None) -> torch.Tensor:
    return numbers(codes, zero_point, scale.dtype) * scale
