"""Pooling over regions of interest: MaxRoiPool and RoiAlign."""

from __future__ import annotations

import math

import torch

from quantkit.runtime.torch_backend._types import Node, Op, Run, Table

# Elements of the largest intermediate tensor: regions are worked through in groups that stay below.
LARGEST = 1 << 24


def _groups(regions: int, elements: int) -> list[slice]:
    """Slices of the regions, of which each needs so many elements."""
    step = max(1, LARGEST // max(1, elements))
    return [slice(start, start + step) for start in range(0, regions, step)]


def _max_roi_pool(node: Node) -> Run:
    """Maxima over whole pixels (https://arxiv.org/abs/1504.08083); an empty cell is 0."""
    scale = float(node.get("spatial_scale", 1.0))
    rows, columns = (int(size) for size in node.get("pooled_shape"))

    def run(x: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        parts = [x.new_zeros(0, x.shape[1], rows, columns)]
        for group in _groups(rois.shape[0], math.prod(x.shape[1:])):
            chosen = rois[group]
            # Halves go away from zero.
            edges = (chosen[:, 1:] * scale + 0.5).floor().long()
            images = x[chosen[:, 0].long()]
            down = _cells(edges[:, 1], edges[:, 3], rows, x.shape[2])
            across = _cells(edges[:, 0], edges[:, 2], columns, x.shape[3])
            parts.append(_cell_maxima(images, down, across))
        return torch.cat(parts)

    return run


def _cells(start: torch.Tensor, end: torch.Tensor, cells: int, size: int) -> torch.Tensor:
    """[regions, cells, size] bool: which pixels belong to which cell along one axis."""
    length = (end - start + 1).clamp(min=1).double()[:, None]
    number = torch.arange(cells, device=start.device)
    low = (number * length / cells).floor().long() + start[:, None]
    high = ((number + 1) * length / cells).ceil().long() + start[:, None]
    pixels = torch.arange(size, device=start.device)
    return (pixels >= low[..., None]) & (pixels < high[..., None])


def _cell_maxima(images: torch.Tensor, down: torch.Tensor, across: torch.Tensor) -> torch.Tensor:
    rows = torch.stack([images.masked_fill(~mask[:, None, :, None], -torch.inf).amax(2) for mask in down.unbind(1)], 2)
    cells = [rows.masked_fill(~mask[:, None, None, :], -torch.inf).amax(3) for mask in across.unbind(1)]
    empty = ~(down.any(2)[:, None, :, None] & across.any(2)[:, None, None, :])
    return torch.stack(cells, 3).masked_fill(empty, 0)


def _roi_align(node: Node) -> Run:
    """https://arxiv.org/abs/1703.06870. The mean of bilinear samples on a grid is a product of one matrix per axis."""
    mode = str(node.get("mode", "avg"))
    if mode not in ("avg", "max"):
        raise node.refuse(f"mode {mode!r} is neither avg nor max")
    default = "half_pixel" if node.version >= 16 else "output_half_pixel"
    half = node.get("coordinate_transformation_mode", default) == "half_pixel"
    cells = (int(node.get("output_height", 1)), int(node.get("output_width", 1)))
    ratio, scale = int(node.get("sampling_ratio", 0)), float(node.get("spatial_scale", 1.0))

    def run(x: torch.Tensor, rois: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        parts = [x.new_zeros(0, x.shape[1], *cells)]
        if rois.shape[0]:
            edges = rois.to(x.dtype) * scale - (0.5 if half else 0.0)
            samples = [
                _samples(edges[:, 1 - axis], edges[:, 3 - axis], cells[axis], x.shape[2 + axis], ratio, half)
                for axis in (0, 1)
            ]
            pool = _mean_of_samples if mode == "avg" else _max_of_samples
            grid = samples[0][0].shape[1:].numel() * samples[1][0].shape[1:].numel()
            needed = math.prod(x.shape[1:]) if mode == "avg" else x.shape[1] * grid
            for group in _groups(rois.shape[0], needed):
                down, across = ([item[group] for item in found] for found in samples)
                parts.append(pool(x, batch[group].long(), down, across))
        return torch.cat(parts)

    return run


def _samples(
    start: torch.Tensor, end: torch.Tensor, cells: int, size: int, ratio: int, half: bool
) -> tuple[torch.Tensor, ...]:
    """Along one axis, all [regions, cells, samples]: lower pixel, upper pixel, share of the upper one, validity.

    Validity: 1, 0 for samples outside the image, -1 for those that a smaller region does not have.
    """
    length = end - start
    if not half:
        length = length.clamp(min=1)
    width = length / cells
    count = torch.full_like(width, ratio) if ratio > 0 else width.detach().ceil().clamp(min=0)
    # How many samples there are depends on the regions themselves.
    most = ratio if ratio > 0 else max(1, int(count.max().item()))
    number = torch.arange(most, device=start.device)
    inner = (number + 0.5) * (width / count.clamp(min=1))[:, None]
    cell = torch.arange(cells, device=start.device) * width[:, None]
    places = start[:, None, None] + cell[:, :, None] + inner[:, None, :]
    valid = ((places >= -1) & (places <= size)).long()
    valid = valid.masked_fill((number >= count[:, None])[:, None, :], -1)
    places = places.clamp(0, size - 1)
    low = places.detach().floor().long()
    return low, (low + 1).clamp(max=size - 1), places - low, valid


def _mean_of_samples(
    x: torch.Tensor, batch: torch.Tensor, down: list[torch.Tensor], across: list[torch.Tensor]
) -> torch.Tensor:
    rows, columns = _matrix(down, x.shape[2]), _matrix(across, x.shape[3])
    if x.shape[0] == 1:
        halfway = (rows.flatten(0, 1) @ x[0].transpose(0, 1).flatten(1)).reshape(*rows.shape[:2], x.shape[1], -1)
        return (halfway @ columns.transpose(1, 2)[:, None]).transpose(1, 2)
    return rows[:, None] @ x[batch] @ columns.transpose(1, 2)[:, None]


def _matrix(samples: list[torch.Tensor], size: int) -> torch.Tensor:
    """[regions, cells, size]: the weight of every pixel in the mean of a cell."""
    low, high, share, valid = samples
    counts = (valid >= 0).sum(2, keepdim=True).clamp(min=1)
    kept = (valid > 0) / counts
    zeros = share.new_zeros(*low.shape[:2], size)
    return zeros.scatter_add(2, low, (1 - share) * kept).scatter_add(2, high, share * kept)


def _max_of_samples(
    x: torch.Tensor, batch: torch.Tensor, down: list[torch.Tensor], across: list[torch.Tensor]
) -> torch.Tensor:
    """The largest weighted corner of any sample: the four products of a sample are not added."""
    rows, columns = ([item.flatten(1) for item in found] for found in (down, across))
    there = ((rows[3] >= 0)[:, :, None] & (columns[3] >= 0)[:, None, :])[:, None]
    inside = ((rows[3] > 0)[:, :, None] & (columns[3] > 0)[:, None, :])[:, None]
    images, channels = batch[:, None, None, None], torch.arange(x.shape[1], device=x.device)[:, None, None]
    best: torch.Tensor | None = None
    for y_index, y_weight in ((rows[0], 1 - rows[2]), (rows[1], rows[2])):
        for x_index, x_weight in ((columns[0], 1 - columns[2]), (columns[1], columns[2])):
            corner = x[images, channels, y_index[:, None, :, None], x_index[:, None, None, :]]
            value = corner * (y_weight[:, :, None] * x_weight[:, None, :])[:, None] * inside
            best = value if best is None else torch.maximum(best, value)
    assert best is not None
    shape = (*best.shape[:2], *down[0].shape[1:], *across[0].shape[1:])
    cells = best.masked_fill(~there, -torch.inf).reshape(shape).amax((3, 5))
    largest: torch.Tensor = cells.masked_fill(cells == -torch.inf, 0)
    return largest


TABLE: Table = {
    ("MaxRoiPool", 1): Op(_max_roi_pool),
    ("RoiAlign", 10): Op(_roi_align),
}
