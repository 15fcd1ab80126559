"""onnxruntime's operators on packed weights: a matrix product and a table lookup. Bytes stay bytes until the run."""

from __future__ import annotations

import onnx_ir as ir
import torch

from quantkit.runtime.torch_backend._affine import dequantized
from quantkit.runtime.torch_backend._types import Node, Op, Run, Table
from quantkit.runtime.torch_backend.quantization import spread

BITS = (2, 4, 8)


def unpacked(data: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes [..., L] -> uint8 codes [..., L * 8/bits], the first from the lowest bits."""
    if bits == 8:
        return data
    if bits == 4:
        return torch.stack([data & 15, data >> 4], -1).flatten(-2)
    parts = [(data >> shift) & 3 for shift in (0, 2, 4, 6)]
    return torch.stack(parts, -1).flatten(-2)


def _bits(node: Node, default: int) -> int:
    bits = int(node.get("bits", default))
    if bits not in BITS:
        raise node.refuse(f"{bits} bits, only {', '.join(map(str, BITS))}")
    return bits


def matmul_nbits(node: Node) -> Run:
    """a [..., K] @ W [N, K]^T (+ bias), W = (codes - zero points) * scales in blocks along K."""
    rows, columns = int(node.attributes["N"]), int(node.attributes["K"])
    bits, block = _bits(node, 4), int(node.attributes["block_size"])
    if node.get("weight_prepacked", 0):
        raise node.refuse("weights packed for one GPU kernel")
    groups = -(-columns // block)

    def points(zero_points: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        """[N, groups], or the middle code for all."""
        if zero_points is None:
            return torch.full((1, 1), 1 << (bits - 1), dtype=like.dtype, device=like.device)
        if zero_points.is_floating_point():
            return zero_points.reshape(rows, groups)
        return unpacked(zero_points.reshape(rows, -1), bits)[:, :groups].to(like.dtype)

    def run(
        a: torch.Tensor,
        b: torch.Tensor,
        scales: torch.Tensor,
        zero_points: torch.Tensor | None = None,
        group_of: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        codes = unpacked(b.reshape(rows, groups, -1), bits)
        steps = scales.reshape(rows, groups)
        zero = points(zero_points, steps)
        if group_of is None:
            weight = (codes.to(steps.dtype) - zero[..., None]) * steps[..., None]
            weight = weight.reshape(rows, groups * block)[:, :columns]
        else:
            place = group_of.to(torch.int64)[:columns]
            flat = codes.reshape(rows, groups * block)[:, :columns].to(steps.dtype)
            weight = (flat - zero.expand(rows, groups)[:, place]) * steps[:, place]
        return torch.nn.functional.linear(a, weight.to(a.dtype), bias)

    return run


def gather_block_quantized(node: Node) -> Run:
    """Slices of `data`, dequantized in blocks; those with an index out of range are 0."""
    gather_axis, quantize_axis = int(node.get("gather_axis", 0)), int(node.get("quantize_axis", 1))
    block, kind = int(node.get("block_size", 128)), node.input_types[0]
    bits = _bits(node, 4) if kind in (ir.DataType.UINT8, None) else 8
    packed = kind in (ir.DataType.UINT8, None)

    def run(
        data: torch.Tensor, indices: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None = None
    ) -> torch.Tensor:
        axis, along = gather_axis % data.ndim, quantize_axis % data.ndim
        size = data.shape[axis]
        wanted = indices.to(torch.int64)
        inside = (wanted >= -size) & (wanted < size)
        place = torch.where(inside, torch.remainder(wanted, max(size, 1)), 0).reshape(-1)

        def chosen(table: torch.Tensor) -> torch.Tensor:
            if table.shape[axis] == 1 != size:
                return table
            if table.dtype.itemsize == 1 and table.is_floating_point():
                return table.view(torch.uint8).index_select(axis, place).view(table.dtype)
            return table.index_select(axis, place)

        codes, steps, zero = data, scales, zero_points
        if axis != along:  # few rows first, then their numbers
            codes, steps, zero = chosen(codes), chosen(steps), None if zero is None else chosen(zero)
        if packed:
            codes = unpacked(codes, bits)
            middle = torch.full((), 1 << (bits - 1), dtype=torch.uint8, device=data.device)
            zero = middle if zero is None else unpacked(zero, bits)
        length = codes.shape[along]
        width = block if block else length
        if zero is not None and zero.ndim:
            zero = spread(zero.narrow(along, 0, steps.shape[along]), along, width, length)
        values = dequantized(codes, spread(steps, along, width, length), zero)
        values = chosen(values) if axis == along else values
        kept = inside.reshape([-1 if item == axis else 1 for item in range(values.ndim)])
        values = torch.where(kept, values, 0)
        return values.reshape(*values.shape[:axis], *indices.shape, *values.shape[axis + 1 :])

    return run


MICROSOFT: Table = {
    ("GatherBlockQuantized", 1): Op(gather_block_quantized),
    ("MatMulNBits", 1): Op(matmul_nbits),
}
