"""Operators that choose elements by their values: TopK, Unique, NonMaxSuppression."""

from __future__ import annotations

import torch

from quantkit.runtime.torch_backend._types import Node, Op, Run, Table, ints

SORTED_WHOLE = 512
"""Longest axis that TopK sorts without trying torch.topk first."""


def _top_k(node: Node) -> Run:
    axis, largest, fixed = node.get("axis", -1), bool(node.get("largest", 1)), node.get("k")

    def run(x: torch.Tensor, k: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        count = int(fixed) if k is None else ints(k)[0]
        length = x.shape[axis]
        # torch.topk leaves the order of ties open, ONNX wants the lower index first. Only without ties it will do;
        # to look costs a wait on other devices.
        if length > SORTED_WHOLE and count < length and x.device.type == "cpu":
            values, indices = torch.topk(x, count + 1, axis, largest)
            if bool((values.narrow(axis, 1, count) != values.narrow(axis, 0, count)).all()):
                return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)
        values, indices = torch.sort(x, dim=axis, descending=largest, stable=True)
        return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)

    return run


def _unique(node: Node) -> Run:
    axis, ordered, single = node.get("axis"), bool(node.get("sorted", 1)), len(node.output_types) == 1

    def run(x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        data, along = (x.reshape(-1), 0) if axis is None else (x, axis)
        inverse, counts = torch.unique(data.detach(), return_inverse=True, return_counts=True, dim=along)[1:]
        places = torch.arange(len(inverse), device=x.device)
        first = torch.full_like(counts, len(inverse)).scatter_reduce(0, inverse, places, "amin")
        if not ordered:
            order = first.argsort()
            first, counts = first[order], counts[order]
            inverse = order.argsort()[inverse]
        values = data.index_select(along, first)
        return values if single else (values, first, inverse, counts)

    return run


def _corners(boxes: torch.Tensor, center_point: bool) -> torch.Tensor:
    """[batch, boxes, 4]: low and high corner, from any two opposite corners or from middle and size."""
    a, b = boxes[..., :2], boxes[..., 2:]
    if center_point:
        a, b = a - b / 2, a + b / 2
    return torch.cat([torch.minimum(a, b), torch.maximum(a, b)], -1)


def _overlaps(box: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """[others] intersection over union; 0 where there is no intersection."""
    sides = (torch.minimum(box[2:], others[:, 2:]) - torch.maximum(box[:2], others[:, :2])).clamp(min=0)
    shared = sides.prod(-1)
    union = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(-1) - shared
    return torch.where(shared > 0, shared / union, 0)


def _kept(boxes: torch.Tensor, order: torch.Tensor, limit: int, threshold: float) -> list[int]:
    """Greedy: the best box left stays, all that overlap with it too much go."""
    kept: list[int] = []
    while len(order) and len(kept) < limit:
        best, order = order[0], order[1:]
        kept.append(int(best))
        order = order[_overlaps(boxes[best], boxes[order]) <= threshold]
    return kept


def _non_max_suppression(node: Node) -> Run:
    """Sizes of the output depend on the values: it runs on the CPU."""
    center_point = bool(node.get("center_point_box", 0))

    def run(
        boxes: torch.Tensor,
        scores: torch.Tensor,
        limit: torch.Tensor | None = None,
        threshold: torch.Tensor | None = None,
        lowest: torch.Tensor | None = None,
    ) -> torch.Tensor:
        count = 0 if limit is None else ints(limit)[0]
        overlap = 0.0 if threshold is None else float(threshold)
        corners, marks = _corners(boxes.detach().cpu(), center_point), scores.detach().cpu()
        rows = []
        for batch in range(marks.shape[0]):
            for kind in range(marks.shape[1]):
                order = marks[batch, kind].argsort(descending=True, stable=True)
                if lowest is not None:
                    order = order[marks[batch, kind][order] > float(lowest)]
                rows += [(batch, kind, box) for box in _kept(corners[batch], order, count, overlap)]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3).to(boxes.device)

    return run


TABLE: Table = {
    ("NonMaxSuppression", 10): Op(_non_max_suppression, host=(2, 3, 4)),
    ("TopK", 1): Op(_top_k, host=(1,)),
    ("Unique", 11): Op(_unique),
}
