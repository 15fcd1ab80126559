"""Poolings. Pads that torch's own functions know are one call; others are written out around the input first."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.nn import functional

from quantkit.runtime.torch_backend._types import Node, Op, Run, Table, direct, ints
from quantkit.runtime.torch_backend._windows import Windows, flat_pads, windows_of

Pool = Callable[..., torch.Tensor]
MAX: Mapping[int, Pool] = {1: torch.max_pool1d, 2: torch.max_pool2d, 3: torch.max_pool3d}
MAX_WITH_INDICES: Mapping[int, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    1: functional.max_pool1d_with_indices,
    2: functional.max_pool2d_with_indices,
    3: functional.max_pool3d_with_indices,
}
AVERAGE: Mapping[int, Pool] = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}
MAX_AXES = 3


def _windows(node: Node) -> Windows:
    windows = windows_of(node)
    if len(windows.kernel) > MAX_AXES:
        raise node.refuse(f"torch pools along 1 to {MAX_AXES} axes, not {len(windows.kernel)}")
    return windows


def _max_pool(node: Node) -> Run:
    windows = _windows(node)
    w, rank = windows, len(windows.kernel)
    if len(node.output_types) > 1:
        return _max_pool_with_indices(windows, bool(node.get("storage_order", 0)))
    pool = MAX[rank]

    def native(x: torch.Tensor) -> torch.Tensor:
        return pool(x, w.kernel, w.strides, w.before, w.dilations, w.ceil)

    def general(x: torch.Tensor) -> torch.Tensor:
        before, after = w.pads(x.shape[2:])
        if not w.ceil and w.torch_has(before, after):
            return pool(x, w.kernel, w.strides, before, w.dilations)
        reach = w.reach(x.shape[2:], before, after)
        return pool(
            functional.pad(x, flat_pads(before, reach), value=_lowest(x.dtype)), w.kernel, w.strides, 0, w.dilations
        )

    run = native if w.fixed and w.torch_has(w.before, w.after) else general
    kind = node.input_types[0]
    if kind is not None and not kind.is_floating_point():
        return lambda x: run(x) if not x.is_cuda and rank > 1 else run(x.float()).to(x.dtype)
    return run


def _lowest(dtype: torch.dtype) -> float | int:
    return -math.inf if dtype.is_floating_point else torch.iinfo(dtype).min


def _max_pool_with_indices(windows: Windows, column_major: bool) -> Run:
    """Indices count in the whole input, [0, N C D1 ... Dn); `column_major` swaps the order of the spatial axes only."""
    rank, w = len(windows.kernel), windows
    pool = MAX_WITH_INDICES[rank]

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = x.shape[2:]
        before, after = w.pads(lengths)
        values = x if x.dtype.is_floating_point else x.float()
        if w.torch_has(before, after) and w.fixed:
            y, index = pool(values, w.kernel, w.strides, before, w.dilations, w.ceil)
            padded, shift = list(lengths), [0] * rank
        else:
            reach = w.reach(lengths, before, after)
            values = functional.pad(values, flat_pads(before, reach), value=-math.inf)
            y, index = pool(values, w.kernel, w.strides, 0, w.dilations)
            padded, shift = list(values.shape[2:]), list(before)
        plane = math.prod(lengths)
        planes = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape(*x.shape[:2], *[1] * rank)
        if column_major or padded != list(lengths):
            index = _recounted(index, padded, shift, lengths, column_major)
        return y.to(x.dtype), index + planes * plane

    return run


def _recounted(
    index: torch.Tensor, padded: Sequence[int], shift: Sequence[int], lengths: Sequence[int], column_major: bool
) -> torch.Tensor:
    """Row-major positions in a padded plane, as positions in the plane itself."""
    places = []
    for axis in range(len(padded) - 1, -1, -1):
        places.append(index % padded[axis] - shift[axis])
        index = index // padded[axis]
    order = range(len(padded)) if column_major else range(len(padded) - 1, -1, -1)
    found, step = torch.zeros_like(index), 1
    for axis in order:
        found = found + places[len(padded) - 1 - axis] * step
        step *= lengths[axis]
    return found


def _means(x: torch.Tensor, w: Windows) -> torch.Tensor:
    """Over all windows of an input that is padded already."""
    if all(step == 1 for step in w.dilations):
        return AVERAGE[len(w.kernel)](x, w.kernel, w.strides)
    # Views: [N, C, windows..., kernel...].
    for axis, (extent, stride, dilation) in enumerate(zip(w.extents, w.strides, w.dilations, strict=True)):
        x = x.unfold(2 + axis, extent, stride)[..., ::dilation]
    return x.mean(tuple(range(-len(w.kernel), 0)))


def _counts(w: Windows, axis: int, windows: int, low: int, high: int, device: torch.device) -> torch.Tensor:
    """[windows]: how many elements of each lie in [low, high) along one axis."""
    starts = torch.arange(windows, device=device) * w.strides[axis] - w.before[axis]
    places = starts[:, None] + torch.arange(w.kernel[axis], device=device) * w.dilations[axis]
    return ((places >= low) & (places < high)).sum(1)


def _average_pool(node: Node) -> Run:
    w = _windows(node)
    include = bool(node.get("count_include_pad", 0))
    rank = len(w.kernel)
    pool, plain = AVERAGE[rank], all(step == 1 for step in w.dilations)
    if w.fixed and plain and w.torch_has(w.before, w.after):
        return lambda x: pool(x, w.kernel, w.strides, w.before, w.ceil, include)

    def run(x: torch.Tensor) -> torch.Tensor:
        lengths = x.shape[2:]
        before, after = w.pads(lengths)
        if plain and not w.ceil and w.torch_has(before, after):
            return pool(x, w.kernel, w.strides, before, False, include)
        placed = Windows(w.kernel, w.strides, w.dilations, before, after, "NOTSET", w.ceil)
        y = _means(functional.pad(x, flat_pads(before, placed.reach(lengths, before, after))), placed)
        for axis in range(rank):
            low, high = (-before[axis], lengths[axis] + after[axis]) if include else (0, lengths[axis])
            counts = _counts(placed, axis, y.shape[2 + axis], low, high, x.device)
            ratio = (w.kernel[axis] / counts).to(y.dtype)
            y = y * ratio.reshape(-1, *[1] * (rank - 1 - axis))
        return y

    return run


def _lp_pool(node: Node) -> Run:
    """(sum over a window of |x|^p)^(1/p); pads count nothing."""
    w, p = _windows(node), float(node.get("p", 2))
    count = math.prod(w.kernel)

    def run(x: torch.Tensor) -> torch.Tensor:
        powers = x.abs() if p == 1 else x * x if p == 2 else x.abs().pow(p)
        before, after = w.pads(x.shape[2:])
        sums = _means(functional.pad(powers, flat_pads(before, w.reach(x.shape[2:], before, after))), w) * count
        if p == 1:
            return sums
        # The root has no slope at 0: a window of zeros passes none on.
        positive = sums > 0
        return torch.where(positive, sums, torch.ones_like(sums)).pow(1 / p) * positive

    return run


def _spatial(x: torch.Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


def _global_average(x: torch.Tensor) -> torch.Tensor:
    return x.mean(_spatial(x), keepdim=True)


def _global_max(x: torch.Tensor) -> torch.Tensor:
    return x.amax(_spatial(x), keepdim=True)


def _global_lp(node: Node) -> Run:
    p = float(node.get("p", 2))
    return lambda x: torch.linalg.vector_norm(x, p, _spatial(x), keepdim=True)


def _max_unpool(node: Node) -> Run:
    """Indices count in the shape that the attributes tell; a larger `output_shape` is filled with zeros at the ends."""
    w = _windows(node)

    def run(x: torch.Tensor, index: torch.Tensor, output_shape: torch.Tensor | None = None) -> torch.Tensor:
        sizes = [
            (length - 1) * stride + size - low - high
            for length, stride, size, low, high in zip(x.shape[2:], w.strides, w.kernel, w.before, w.after, strict=True)
        ]
        shape = [*x.shape[:2], *sizes]
        y = x.new_zeros(math.prod(shape)).scatter(0, index.reshape(-1), x.reshape(-1)).reshape(shape)
        if output_shape is None:
            return y
        wanted = ints(output_shape)
        return functional.pad(
            y, flat_pads([0] * len(shape), [more - size for more, size in zip(wanted, shape, strict=True)])
        )

    return run


TABLE: Table = {
    ("AveragePool", 1): Op(_average_pool),
    ("GlobalAveragePool", 1): direct(_global_average),
    ("GlobalLpPool", 1): Op(_global_lp),
    ("GlobalMaxPool", 1): direct(_global_max),
    ("LpPool", 1): Op(_lp_pool),
    ("MaxPool", 1): Op(_max_pool),
    ("MaxUnpool", 9): Op(_max_unpool, host=(2,)),
}
