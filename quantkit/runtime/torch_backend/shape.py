"""Operators that change the shape of a tensor, or make tensors from shapes. Views wherever torch has them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch

from quantkit.runtime.torch_backend._types import Node, Op, Run, Table, direct, ints


def _shape(node: Node) -> Run:
    start, end = node.get("start", 0), node.get("end")

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.array(x.shape[start:end], dtype=np.int64))  # four times as fast as torch.tensor

    return run


def _size(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64)


def _reshaped(x: torch.Tensor, sizes: list[int], allow_zero: bool) -> torch.Tensor:
    """0 copies the input's size at the same position unless zeros are allowed; -1 is what is left."""
    if 0 in sizes and not allow_zero:
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    if 0 in sizes and -1 in sizes:  # an empty batch: what is left of the other axes
        rest = math.prod(filter(None, x.shape)) // math.prod(size for size in sizes if size > 0)
        sizes = [rest if size == -1 else size for size in sizes]
    return x.reshape(sizes)


def _reshape(node: Node) -> Run:
    allow_zero = bool(node.get("allowzero", 0))
    return lambda x, shape: _reshaped(x, ints(shape), allow_zero)


def _reshape_1(node: Node) -> Run:
    sizes = [int(size) for size in node.get("shape", ())]
    return lambda x: _reshaped(x, sizes, False)


def _flatten(node: Node) -> Run:
    axis = node.get("axis", 1)

    def run(x: torch.Tensor) -> torch.Tensor:
        # Both products written out: -1 means nothing in an empty tensor.
        return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))

    return run


def _squeezed(x: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    return x.squeeze(tuple(axes))


def _squeeze(node: Node) -> Run:
    def run(x: torch.Tensor, axes: torch.Tensor | None = None) -> torch.Tensor:
        return x.squeeze() if axes is None else _squeezed(x, ints(axes))

    return run


def _squeeze_1(node: Node) -> Run:
    axes = node.get("axes")
    return torch.squeeze if axes is None else lambda x: _squeezed(x, axes)


def _unsqueezed(x: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    """Axes count in the output, negative ones from its end."""
    if len(axes) == 1:
        return x.unsqueeze(axes[0])
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _unsqueeze_1(node: Node) -> Run:
    axes = tuple(node.get("axes"))
    return lambda x: _unsqueezed(x, axes)


def _transpose(node: Node) -> Run:
    perm = node.get("perm")
    if perm is None:
        return lambda x: x.permute(tuple(range(x.ndim - 1, -1, -1)))
    order = tuple(perm)
    return lambda x: x.permute(order)


def _concat(node: Node) -> Run:
    axis = node.get("axis", 1)

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors, axis)

    return run


def _split(node: Node) -> Run:
    """Sizes from an input (opset 13, and 1), an attribute (1 to 11), or as even as can be, the last one smaller."""
    axis, count, fixed = node.get("axis", 0), len(node.output_types), node.get("split")

    def run(x: torch.Tensor, split: torch.Tensor | None = None) -> torch.Tensor | tuple[torch.Tensor, ...]:
        if split is not None:
            sizes = ints(split)
        elif fixed is not None:
            sizes = list(fixed)
        else:
            length = x.shape[axis]
            chunk = -(-length // count)
            sizes = [max(0, min(chunk, length - chunk * index)) for index in range(count)]
        parts = x.split_with_sizes(sizes, axis)
        return parts[0] if count == 1 else parts

    return run


def _expand(x: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    wanted = ints(shape)
    missing = x.ndim - len(wanted)
    if missing > 0:
        wanted = [1] * missing + wanted
    own = (*[1] * -missing, *x.shape)
    return x.expand([size if want == 1 else want for size, want in zip(own, wanted, strict=True)])


def _tile(x: torch.Tensor, repeats: torch.Tensor) -> torch.Tensor:
    return x.repeat(ints(repeats))


def _tile_1(x: torch.Tensor, tiles: torch.Tensor, axis: torch.Tensor) -> torch.Tensor:
    repeats = [1] * x.ndim
    repeats[int(axis)] = int(tiles)
    return x.repeat(repeats)


def _constant_of_shape(node: Node) -> Run:
    value = node.get("value")
    fill = torch.zeros((), dtype=node.dtypes(ir.DataType.FLOAT)) if value is None else value.reshape(())

    def run(shape: torch.Tensor) -> torch.Tensor:
        return fill.expand(ints(shape))  # one number in memory

    return run


def _range(start: torch.Tensor, limit: torch.Tensor, delta: torch.Tensor | None = None) -> torch.Tensor:
    first, last, step = start.item(), limit.item(), 1 if delta is None else delta.item()
    if not start.dtype.is_floating_point:
        count = max(0, -((first - last) // step))
        return torch.arange(first, first + count * step, step, dtype=start.dtype)
    count = max(0, math.ceil((last - first) / step))
    # torch.arange would round the count anew.
    return (first + step * torch.arange(count, dtype=torch.float64)).to(start.dtype)


def _eye_like(node: Node) -> Run:
    k, dtype = node.get("k", 0), node.dtype("dtype") if node.get("dtype") else None

    def run(x: torch.Tensor) -> torch.Tensor:
        rows, columns = (torch.arange(size, device=x.device) for size in x.shape)
        ones: torch.Tensor = columns - rows[:, None] == k
        return ones.to(dtype or x.dtype)

    return run


TABLE: Table = {
    ("Concat", 1): Op(_concat),
    ("ConstantOfShape", 9): Op(_constant_of_shape, host=(0,)),
    ("Expand", 8): Op(lambda node: _expand, host=(1,)),
    ("EyeLike", 9): Op(_eye_like),
    ("Flatten", 1): Op(_flatten),
    ("Identity", 1): direct(lambda x: x),
    ("Range", 11): Op(lambda node: _range, host=(0, 1, 2)),
    ("Reshape", 1): Op(_reshape_1),
    ("Reshape", 5): Op(_reshape, host=(1,)),
    ("Shape", 1): Op(_shape, to_host=True),
    ("Size", 1): Op(lambda node: _size, to_host=True),
    ("Split", 1): Op(_split, host=(1,)),
    ("Squeeze", 1): Op(_squeeze_1),
    ("Squeeze", 13): Op(_squeeze, host=(1,)),
    ("Tile", 1): Op(lambda node: _tile_1, host=(1, 2)),
    ("Tile", 6): Op(lambda node: _tile, host=(1,)),
    ("Transpose", 1): Op(_transpose),
    ("Unsqueeze", 1): Op(_unsqueeze_1),
    ("Unsqueeze", 13): Op(lambda node: lambda x, axes: _unsqueezed(x, ints(axes)), host=(1,)),
}
