"""Convolutions. Equal pads on both sides, the ordinary case, are one call of torch's without a padded copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from quantkit.runtime.torch_backend._sampling import sample
from quantkit.runtime.torch_backend._types import Node, Op, Run, Table, ints
from quantkit.runtime.torch_backend._windows import auto_pad, explicit_pads, flat_pads, per_axis, same_pads

Convolve = Callable[..., torch.Tensor]
CONVOLUTIONS: Mapping[int, Convolve] = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}
TRANSPOSED: Mapping[int, Convolve] = {
    1: torch.conv_transpose1d,
    2: torch.conv_transpose2d,
    3: torch.conv_transpose3d,
}


def _spatial_rank(node: Node) -> int | None:
    """How many axes the kernel slides along; None when no attribute tells (then all of them have their defaults)."""
    for name, axes in (("kernel_shape", 1), ("strides", 1), ("dilations", 1), ("pads", 2), ("output_shape", 1)):
        if node.get(name):
            rank = len(node.get(name)) // axes
            _function(node, CONVOLUTIONS, rank)
            return rank
    return None


def _function(node: Node, table: Mapping[int, Convolve], rank: int) -> Convolve:
    if rank not in table:
        raise node.refuse(f"torch convolves along 1 to 3 axes, not {rank}")
    return table[rank]


def _by_rank(node: Node, make: Callable[[int], Run]) -> Run:
    """What `make` returns for the number of spatial axes, which only the weights may tell."""
    auto_pad(node)
    known = _spatial_rank(node)
    return make(known) if known is not None else lambda x, w, *rest: make(w.ndim - 2)(x, w, *rest)


def _conv(node: Node) -> Run:
    return _by_rank(node, lambda rank: _conv_nd(node, rank))


def _conv_nd(node: Node, rank: int) -> Run:
    convolve, auto, group = _function(node, CONVOLUTIONS, rank), auto_pad(node), int(node.get("group", 1))
    strides, dilations = per_axis(node, "strides", rank), per_axis(node, "dilations", rank)

    def placed(
        x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, before: Sequence[int], after: Sequence[int]
    ) -> torch.Tensor:
        if before == after and min(before) >= 0:
            return convolve(x, w, b, strides, before, dilations, group)
        return convolve(functional.pad(x, flat_pads(before, after)), w, b, strides, 0, dilations, group)

    def same(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        extents = [(size - 1) * step + 1 for size, step in zip(w.shape[2:], dilations, strict=True)]
        return placed(x, w, b, *same_pads(x.shape[2:], extents, strides, auto == "SAME_UPPER", 0))

    if auto in ("SAME_UPPER", "SAME_LOWER"):
        return same
    before, after = explicit_pads(node, rank)
    if before == after and min(before) >= 0:
        return lambda x, w, b=None: convolve(x, w, b, strides, before, dilations, group)
    return lambda x, w, b=None: placed(x, w, b, before, after)


def _conv_transpose(node: Node) -> Run:
    return _by_rank(node, lambda rank: _conv_transpose_nd(node, rank))


def _conv_transpose_nd(node: Node, rank: int) -> Run:
    convolve, auto, group = _function(node, TRANSPOSED, rank), auto_pad(node), int(node.get("group", 1))
    strides, dilations = per_axis(node, "strides", rank), per_axis(node, "dilations", rank)
    extra = per_axis(node, "output_padding", rank, 0)
    wanted = node.get("output_shape")
    # Some exporters name the batch and the channels too.
    shape = None if not wanted else [int(size) for size in wanted][-rank:]
    steps = [max(pair) for pair in zip(strides, dilations, strict=True)]
    explicit = explicit_pads(node, rank)

    def pads(x: torch.Tensor, w: torch.Tensor) -> tuple[Sequence[int], Sequence[int]]:
        if shape is None and auto in ("NOTSET", "VALID"):
            return explicit
        sizes = shape if shape is not None else [n * stride for n, stride in zip(x.shape[2:], strides, strict=True)]
        totals = [
            stride * (n - 1) + more + (size - 1) * step + 1 - target
            for n, size, stride, step, more, target in zip(
                x.shape[2:], w.shape[2:], strides, dilations, extra, sizes, strict=True
            )
        ]
        # Fewer than none are more elements after the end, whatever `auto` says.
        small, large = [max(0, total) // 2 for total in totals], [total - max(0, total) // 2 for total in totals]
        if auto == "SAME_UPPER":
            return small, large
        return [max(0, pad) for pad in large], [pad if pad < 0 else low for pad, low in zip(large, small, strict=True)]

    def run(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        before, after = pads(x, w)
        # torch drops `before` on both sides and then adds to the end.
        more = [add + low - high for add, low, high in zip(extra, before, after, strict=True)]
        if min(before) >= 0 and all(0 <= count < step for count, step in zip(more, steps, strict=True)):
            return convolve(x, w, b, strides, before, more, group, dilations)
        whole = convolve(x, w, None, strides, 0, 0, group, dilations)
        ends = [add - high for add, high in zip(extra, after, strict=True)]
        y = functional.pad(whole, flat_pads([-low for low in before], ends))
        return y if b is None else y + b.reshape(-1, *[1] * rank)

    return run


def _deform_conv(node: Node) -> Run:
    """Two spatial axes (https://arxiv.org/abs/1811.11168): samples by bilinear interpolation, then one product."""
    rank = _spatial_rank(node)
    if rank not in (None, 2):
        raise node.refuse(f"deformable convolutions have 2 spatial axes, not {rank}")
    strides, dilations = per_axis(node, "strides", 2), per_axis(node, "dilations", 2)
    before, _ = explicit_pads(node, 2)
    group, offset_group = int(node.get("group", 1)), int(node.get("offset_group", 1))

    def run(
        x: torch.Tensor,
        w: torch.Tensor,
        offset: torch.Tensor,
        b: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        batch, channels, *lengths = x.shape
        kernel, out = w.shape[2:], offset.shape[2:]
        taps = math.prod(kernel)
        shifts = offset.reshape(batch * offset_group, taps, 2, *out)
        places = []
        for axis in (0, 1):
            # [taps, out] along this axis: where a window starts, and where in it an element lies.
            starts = torch.arange(out[axis], device=x.device) * strides[axis] - before[axis]
            inner = torch.arange(kernel[axis], device=x.device) * dilations[axis]
            inner = inner[:, None].expand(*kernel) if axis == 0 else inner.expand(*kernel)
            starts = starts[:, None] if axis == 0 else starts
            places.append(inner.reshape(taps, 1, 1) + starts + shifts[:, :, axis])
        parts = x.reshape(batch * offset_group, channels // offset_group, *lengths)
        found = sample(parts, places, "linear", "zeros")
        found = found.reshape(batch, offset_group, channels // offset_group, taps, *out)
        if mask is not None:
            found = found * mask.reshape(batch, offset_group, 1, taps, *out)
        columns = found.reshape(batch, group, channels // group * taps, out[0] * out[1])
        y = (w.reshape(group, w.shape[0] // group, -1) @ columns).reshape(batch, w.shape[0], *out)
        return y if b is None else y + b.reshape(-1, 1, 1)

    return run


def _col2im(node: Node) -> Run:
    """[N, C * block, blocks] -> [N, C, *image]: overlapping blocks are summed, along any number of axes."""

    def run(x: torch.Tensor, image_shape: torch.Tensor, block_shape: torch.Tensor) -> torch.Tensor:
        image, block = ints(image_shape), ints(block_shape)
        rank = len(image)
        strides, dilations = per_axis(node, "strides", rank), per_axis(node, "dilations", rank)
        before, after = explicit_pads(node, rank)
        if rank == 2 and before == after:
            return functional.fold(x, tuple(image), tuple(block), dilations, before, strides)
        return _folded(x, image, block, strides, dilations, before, after)

    return run


def _folded(x: torch.Tensor, image: list[int], block: list[int], *geometry: Sequence[int]) -> torch.Tensor:
    strides, dilations, before, after = geometry
    index: Any = 0
    padded = [size + low + high for size, low, high in zip(image, before, after, strict=True)]
    count = len(image)
    for axis, (size, width) in enumerate(zip(padded, block, strict=True)):
        blocks = (size - (width - 1) * dilations[axis] - 1) // strides[axis] + 1
        inner = torch.arange(width, device=x.device) * dilations[axis]
        outer = torch.arange(blocks, device=x.device) * strides[axis]
        view = [1] * (2 * count)
        view[axis], view[count + axis] = width, blocks
        index = index * size + (inner[:, None] + outer).reshape(view)
    channels = x.shape[1] // math.prod(block)
    flat = x.reshape(x.shape[0], channels, -1)
    whole = flat.new_zeros(x.shape[0], channels, math.prod(padded)).index_add(2, index.reshape(-1), flat)
    return functional.pad(
        whole.reshape(*whole.shape[:2], *padded), flat_pads([-p for p in before], [-p for p in after])
    )


TABLE: Table = {
    ("Col2Im", 18): Op(_col2im, host=(1, 2)),
    ("Conv", 1): Op(_conv),
    ("ConvTranspose", 1): Op(_conv_transpose),
    ("DeformConv", 19): Op(_deform_conv),
}
