"""Sampling images at given places, cropping, and trading channels for pixels."""

from __future__ import annotations

import torch
from torch.nn import functional

from quantkit.runtime.torch_backend._sampling import sample
from quantkit.runtime.torch_backend._types import Node, Op, Run, Table, ints
from quantkit.runtime.torch_backend._windows import flat_pads

GRID_MODES = {"bilinear": "linear", "linear": "linear", "nearest": "nearest", "bicubic": "cubic", "cubic": "cubic"}
TORCH_GRID = {"linear": "bilinear", "nearest": "nearest", "cubic": "bicubic"}
PADDINGS = ("zeros", "border", "reflection")
IMAGE, VOLUME = 4, 5


def _grid_sample(node: Node) -> Run:
    named, padding = str(node.get("mode", "linear")), str(node.get("padding_mode", "zeros"))
    corners = bool(node.get("align_corners", 0))
    if named not in GRID_MODES:
        raise node.refuse(f"mode {named!r} is none of {', '.join(GRID_MODES)}")
    if padding not in PADDINGS:
        raise node.refuse(f"padding_mode {padding!r} is none of {', '.join(PADDINGS)}")
    mode = GRID_MODES[named]

    def run(x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        kind = torch.promote_types(x.dtype, grid.dtype)
        values, places = x.to(kind), grid.to(kind)
        if x.ndim == IMAGE or (x.ndim == VOLUME and mode != "cubic"):
            return functional.grid_sample(values, places, TORCH_GRID[mode], padding, corners).to(x.dtype)
        # The last axis of the grid names the innermost axis of the image first.
        pixels = [
            (place + 1) / 2 * (size - 1) if corners else ((place + 1) * size - 1) / 2
            for place, size in zip(reversed(places.unbind(-1)), x.shape[2:], strict=True)
        ]
        return sample(values, pixels, mode, padding, corners).to(x.dtype)

    return run


def _affine_grid(node: Node) -> Run:
    corners = bool(node.get("align_corners", 0))
    return lambda theta, size: functional.affine_grid(theta, ints(size), corners)


def _center_crop_pad(node: Node) -> Run:
    axes = node.get("axes")

    def run(x: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
        before, after = [0] * x.ndim, [0] * x.ndim
        for axis, size in zip(range(x.ndim) if axes is None else axes, ints(shape), strict=True):
            more = size - x.shape[axis]
            # An odd element is cropped from the end, or added there.
            before[axis] = more // 2 if more >= 0 else -(-more // 2)
            after[axis] = more - before[axis]
        return functional.pad(x, flat_pads(before, after))

    return run


def _block_mode(node: Node) -> tuple[int, bool]:
    """Block size, and whether a pixel's channels are together (CRD) rather than a channel's pixels (DCR)."""
    mode = str(node.get("mode", "DCR"))
    if mode not in ("DCR", "CRD"):
        raise node.refuse(f"mode {mode!r} is neither DCR nor CRD")
    return int(node.get("blocksize")), mode == "CRD"


def _depth_to_space(node: Node) -> Run:
    block, channel_first = _block_mode(node)
    if channel_first:
        return lambda x: functional.pixel_shuffle(x, block)

    def run(x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        parts = x.reshape(batch, block, block, channels // block**2, height, width)
        return parts.permute(0, 3, 4, 1, 5, 2).reshape(batch, channels // block**2, height * block, width * block)

    return run


def _space_to_depth(node: Node) -> Run:
    block, channel_first = _block_mode(node)
    if channel_first:
        return lambda x: functional.pixel_unshuffle(x, block)

    def run(x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        parts = x.reshape(batch, channels, height // block, block, width // block, block)
        return parts.permute(0, 3, 5, 1, 2, 4).reshape(batch, channels * block**2, height // block, width // block)

    return run


TABLE: Table = {
    ("AffineGrid", 20): Op(_affine_grid, host=(1,)),
    ("CenterCropPad", 18): Op(_center_crop_pad, host=(1,)),
    ("DepthToSpace", 1): Op(_depth_to_space),
    ("GridSample", 16): Op(_grid_sample),
    ("SpaceToDepth", 1): Op(_space_to_depth),
}
