"""QuantizeLinear, DequantizeLinear, DynamicQuantizeLinear; onnxruntime's spellings of them."""

from __future__ import annotations

import onnx_ir as ir
import torch

from quantkit.runtime.torch_backend._affine import dequantized, grid_of, is_followed, through
from quantkit.runtime.torch_backend._types import Node, Op, Run, Table, direct
from quantkit.runtime.torch_backend.casting import plain

UINT8_MAX = 255.0


def quantize(node: Node) -> Run:
    """Per tensor, along an axis, or in blocks along it; the scale's type is that of the division."""
    named = node.get("output_dtype", 0)
    zero_type = node.input_types[2] if len(node.input_types) > 2 else None
    grid = grid_of(node, ir.DataType(named) if named else zero_type, node.output_types[0])
    wanted = node.get("precision", 0)
    precision = node.dtypes(ir.DataType(wanted)) if wanted else None

    def run(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None) -> torch.Tensor:
        if precision is not None:
            dtype = precision
        elif scale.is_floating_point() and scale.dtype.itemsize > 1:
            dtype = scale.dtype
        else:  # powers of two, or whole numbers
            dtype = x.dtype if x.is_floating_point() else torch.float32
        return grid.codes(x.to(dtype) / plain(scale).to(dtype), zero_point)

    return _laid(node, run)


def dequantize(node: Node) -> Run:
    named = node.get("output_dtype", 0)
    dtype = node.dtypes(ir.DataType(named)) if named else None

    def run(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None) -> torch.Tensor:
        wide = plain(scale)
        return dequantized(codes, wide if dtype is None else wide.to(dtype), zero_point)

    return _laid(node, run)


def _laid(node: Node, run: Run) -> Run:
    """`run` on scales and zero points that are laid along the axis of the first input they belong to."""
    axis, block = int(node.get("axis", 1)), int(node.get("block_size", 0))

    def aligned(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None) -> torch.Tensor:
        others = [scale] if zero_point is None else [scale, zero_point]
        if scale.numel() == 1 and (not block or x.ndim != scale.ndim):
            return run(x, *(other.reshape(()) for other in others))  # type: ignore[no-any-return]
        place = min(axis, x.ndim - 1) if axis >= 0 else axis + x.ndim
        if block:
            return _in_blocks(run, x, others, place, block)
        shape = [1] * x.ndim
        shape[place] = -1
        return run(x, *(other.reshape(shape) for other in others))  # type: ignore[no-any-return]

    return aligned


def _in_blocks(run: Run, x: torch.Tensor, others: list[torch.Tensor], axis: int, block: int) -> torch.Tensor:
    """Each scale for `block` neighbours along the axis; the last block may be shorter."""
    length = x.shape[axis]
    if others[0].shape[axis] * block == length:
        split = x.reshape(*x.shape[:axis], length // block, block, *x.shape[axis + 1 :])
        result: torch.Tensor = run(split, *(other.unsqueeze(axis + 1) for other in others))
        return result.flatten(axis, axis + 1)
    return run(x, *(spread(other, axis, block, length) for other in others))  # type: ignore[no-any-return]


def spread(x: torch.Tensor, axis: int, block: int, length: int) -> torch.Tensor:
    """Every element `block` times along the axis, `length` in all."""
    repeated = x.unsqueeze(axis + 1).expand(*x.shape[: axis + 1], block, *x.shape[axis + 1 :])
    return repeated.flatten(axis, axis + 1).narrow(axis, 0, length)


def dynamic_range(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero point) that lay uint8 codes over the numbers and 0, both scalars of x's type."""
    low = torch.clamp(torch.amin(x), max=0.0) if x.numel() else x.new_zeros(())
    high = torch.clamp(torch.amax(x), min=0.0) if x.numel() else x.new_zeros(())
    scale = (high - low) / UINT8_MAX
    scale = torch.where(scale == 0, 1.0, scale)
    return scale, torch.round(torch.clamp(-low / scale, 0.0, UINT8_MAX))


def dynamic_quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, scale, zero point)."""
    scale, zero_point = dynamic_range(x)
    stored = zero_point.to(torch.uint8)
    steps = x / scale
    if not is_followed(steps):
        return torch.clamp(torch.round(steps) + zero_point, 0.0, UINT8_MAX).to(torch.uint8), scale, stored
    whole = through(torch.round(steps), steps) + zero_point.detach()
    return torch.clamp(whole, 0.0, UINT8_MAX), scale, stored


TABLE: Table = {
    ("DequantizeLinear", 10): Op(dequantize),
    ("DynamicQuantizeLinear", 11): direct(dynamic_quantize),
    ("QuantizeLinear", 10): Op(quantize),
}
MICROSOFT: Table = {
    ("DequantizeLinear", 1): Op(dequantize),
    ("QuantizeLinear", 1): Op(quantize),
}
