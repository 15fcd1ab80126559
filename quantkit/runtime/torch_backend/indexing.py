"""Operators that read elements at computed places."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quantkit.runtime.torch_backend._types import Node, Op, Run, Table, ints


def wrapped(indices: torch.Tensor, size: int) -> torch.Tensor:
    """int64 indices from 0 on; negative ones count from the end."""
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


def _gather(node: Node) -> Run:
    axis = node.get("axis", 0)

    def run(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        if indices.ndim == 0 and indices.device.type == "cpu":
            return x.select(axis, int(indices))
        # index_select copies whole rows: five times faster than indexing. To index with one number alone would make
        # torch read it, and wait for the device.
        along = axis % x.ndim
        found = x.index_select(along, wrapped(indices, x.shape[along]).reshape(-1))
        return found if indices.ndim == 1 else found.reshape(x.shape[:along] + indices.shape + x.shape[along + 1 :])

    return run


def _gather_elements(node: Node) -> Run:
    axis = node.get("axis", 0)
    return lambda x, indices: torch.gather(x, axis, wrapped(indices, x.shape[axis]))


def _gather_nd(node: Node) -> Run:
    batch_dims = node.get("batch_dims", 0)

    def run(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        place = indices.unbind(-1)
        if batch_dims == 0:
            return x[place]
        outer = x.shape[:batch_dims]
        flat = x.reshape(-1, *x.shape[batch_dims:])
        rest = indices.shape[batch_dims:-1]
        batch = torch.arange(flat.shape[0], device=x.device).reshape(-1, *[1] * len(rest))
        found = flat[(batch, *(item.reshape(-1, *rest) for item in place))]
        return found.reshape(*outer, *found.shape[1:])

    return run


def _sliced(x: torch.Tensor, ranges: Sequence[tuple[int, slice]]) -> torch.Tensor:
    """A view, except where the step is negative."""
    flips = []
    place = [slice(None)] * x.ndim
    for axis, wanted in ranges:
        positions = range(*wanted.indices(x.shape[axis]))
        if positions.step > 0:
            place[axis] = wanted
        elif len(positions) == 0:
            place[axis] = slice(0, 0)
        else:
            place[axis] = slice(positions[-1], positions[0] + 1, -positions.step)
            flips.append(axis)
    x = x[tuple(place)]
    return x.flip(flips) if flips else x


def _slice(
    x: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    axes: torch.Tensor | None = None,
    steps: torch.Tensor | None = None,
) -> torch.Tensor:
    first, last = ints(starts), ints(ends)
    chosen = range(len(first)) if axes is None else ints(axes)
    stride = [1] * len(first) if steps is None else ints(steps)
    return _sliced(x, [(axis, slice(*part)) for axis, *part in zip(chosen, first, last, stride, strict=True)])


def _slice_1(node: Node) -> Run:
    starts, ends = node.get("starts"), node.get("ends")
    axes = node.get("axes", range(len(starts)))
    ranges = [(axis, slice(start, end)) for axis, start, end in zip(axes, starts, ends, strict=True)]
    return lambda x: _sliced(x, ranges)


def _one_hot(node: Node) -> Run:
    axis = node.get("axis", -1)

    def run(indices: torch.Tensor, depth: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        (count,) = ints(depth)
        position = axis % (indices.ndim + 1)
        places = torch.arange(count, device=indices.device).reshape(-1, *[1] * (indices.ndim - position))
        wanted = torch.where(indices < 0, indices + count, indices).unsqueeze(position)
        return torch.where(wanted == places, values[1], values[0])

    return run


def _compress(node: Node) -> Run:
    axis = node.get("axis")

    def run(x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        chosen = condition.nonzero().squeeze(1)  # the condition may be shorter than the axis
        return x.reshape(-1).index_select(0, chosen) if axis is None else x.index_select(axis, chosen)

    return run


def _reverse_sequence(node: Node) -> Run:
    batch_axis, time_axis = node.get("batch_axis", 1), node.get("time_axis", 0)

    def run(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        batch, time = batch_axis % x.ndim, time_axis % x.ndim
        steps = torch.arange(x.shape[time], device=x.device).reshape([-1 if a == time else 1 for a in range(x.ndim)])
        ends = lengths.long().reshape([-1 if a == batch else 1 for a in range(x.ndim)])
        source = torch.where(steps < ends, ends - 1 - steps, steps)
        return torch.gather(x, time, source.expand(x.shape))

    return run


def _trilu(node: Node) -> Run:
    cut = torch.triu if node.get("upper", 1) else torch.tril

    def run(x: torch.Tensor, k: torch.Tensor | None = None) -> torch.Tensor:
        # Beyond the corners nothing changes, and torch's diagonals are 32 bits wide in places.
        diagonal = 0 if k is None else max(-x.shape[-2] - 1, min(x.shape[-1] + 1, int(k)))
        return cut(x, diagonal)

    return run


TABLE: Table = {
    ("Compress", 9): Op(_compress),
    ("Gather", 1): Op(_gather),
    ("GatherElements", 11): Op(_gather_elements),
    ("GatherND", 11): Op(_gather_nd),
    ("NonZero", 9): Op(lambda node: lambda x: x.nonzero().t()),
    ("OneHot", 9): Op(_one_hot, host=(1,)),
    ("ReverseSequence", 10): Op(_reverse_sequence),
    ("Slice", 1): Op(_slice_1),
    ("Slice", 10): Op(lambda node: _slice, host=(1, 2, 3, 4)),
    ("Trilu", 14): Op(_trilu, host=(1,)),
}
