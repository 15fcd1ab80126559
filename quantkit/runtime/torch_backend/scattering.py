"""Operators that write elements to computed places, into a copy."""

from __future__ import annotations

import torch

from quantkit.runtime.torch_backend._types import Node, Op, Run, Table
from quantkit.runtime.torch_backend.indexing import wrapped

REDUCTIONS = {"mul": "prod", "max": "amax", "min": "amin"}


def _reduction(node: Node) -> str:
    name = str(node.get("reduction", "none"))
    if name not in ("none", "add", *REDUCTIONS):
        raise node.refuse(f"reduction {name!r} is none of none, add, mul, max and min")
    return name


def _scattered(
    x: torch.Tensor, axis: int, indices: torch.Tensor, updates: torch.Tensor, reduction: str
) -> torch.Tensor:
    """Indices from 0 on, of the shape of the updates."""
    if reduction == "none":
        return x.scatter(axis, indices, updates)
    if reduction == "add":
        return x.scatter_add(axis, indices, updates)
    return x.scatter_reduce(axis, indices, updates, REDUCTIONS[reduction])


def _scatter_elements(node: Node) -> Run:
    axis, reduction = node.get("axis", 0), _reduction(node)

    def run(x: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
        return _scattered(x, axis, wrapped(indices, x.shape[axis]), updates, reduction)

    return run


def _scatter_nd(node: Node) -> Run:
    reduction = _reduction(node)

    def run(x: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
        place = indices.unbind(-1)
        if reduction in ("none", "add"):
            return x.index_put(place, updates, accumulate=reduction == "add")
        # One row per place: the leading axes as one, the rest as columns.
        depth = len(place)
        rows = torch.zeros((), dtype=torch.int64, device=x.device)
        for size, item in zip(x.shape, place, strict=False):
            rows = rows * size + wrapped(item, size)
        flat = x.flatten(0, depth - 1).reshape(x.shape[:depth].numel(), -1)
        new = updates.reshape(rows.numel(), -1)
        result = _scattered(flat, 0, rows.reshape(-1, 1).expand(new.shape), new, reduction)
        return result.reshape(x.shape)

    return run


def _tensor_scatter(node: Node) -> Run:
    """Writes a run of positions of a cache, from a start of its own in every sample of the batch."""
    axis, circular = node.get("axis", -2), node.get("mode", "linear") == "circular"

    def run(past: torch.Tensor, update: torch.Tensor, starts: torch.Tensor | None = None) -> torch.Tensor:
        along = axis % past.ndim
        steps = torch.arange(update.shape[along], device=past.device)
        steps = steps.reshape([-1 if a == along else 1 for a in range(past.ndim)])
        if starts is not None:
            steps = steps + starts.reshape([-1 if a == 0 else 1 for a in range(past.ndim)])
        if circular:
            steps = steps % past.shape[along]
        return past.scatter(along, steps.expand(update.shape), update)

    return run


TABLE: Table = {
    ("Scatter", 9): Op(_scatter_elements),
    ("ScatterElements", 11): Op(_scatter_elements),
    ("ScatterND", 11): Op(_scatter_nd),
    ("TensorScatter", 24): Op(_tensor_scatter),
}
