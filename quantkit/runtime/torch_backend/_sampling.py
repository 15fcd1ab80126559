"""Values of images between their pixels, along any number of axes; differentiable by image and place."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

CUBIC = -0.75


def sample(
    x: torch.Tensor, places: Sequence[torch.Tensor], mode: str, padding: str, corners: bool = False
) -> torch.Tensor:
    """[N, C, D1, ..., Dr] at r tensors [N, *out], one per axis, in pixels: [N, C, *out].

    Args:
        mode: nearest, linear or cubic.
        padding: of places outside: zeros, border (the edge) or reflection.
        corners: whether reflection is at the centres of the edge pixels rather than at their outer sides.
    """
    lengths, out = x.shape[2:], places[0].shape[1:]
    taps = [_taps(place, size, mode, padding, corners) for place, size in zip(places, lengths, strict=True)]
    flat = x.flatten(2)
    total: torch.Tensor | None = None
    for chosen in itertools.product(*taps):
        index, weight = chosen[0]
        for (more, factor), size in zip(chosen[1:], lengths[1:], strict=True):
            index, weight = index * size + more, weight * factor
        index = index.reshape(x.shape[0], 1, -1).expand(-1, x.shape[1], -1)
        part = flat.gather(2, index) * weight.reshape(x.shape[0], 1, -1).to(x.dtype)
        total = part if total is None else total + part
    assert total is not None
    return total.reshape(*x.shape[:2], *out)


def _taps(
    place: torch.Tensor, size: int, mode: str, padding: str, corners: bool
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(index, weight) of every pixel that counts along one axis."""
    if mode == "nearest":
        place = place.round()
    first = place.detach().floor()
    ratio = place - first
    if mode == "nearest":
        found = [(first, torch.ones_like(place))]
    elif mode == "linear":
        found = [(first, 1 - ratio), (first + 1, ratio)]
    else:
        found = [(first + step, cubic(ratio - step, CUBIC)) for step in (-1, 0, 1, 2)]
    return [_inside(index, weight, size, padding, corners) for index, weight in found]


def _inside(
    index: torch.Tensor, weight: torch.Tensor, size: int, padding: str, corners: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kernels are symmetric: to fold back the pixels around a place is to fold back the place."""
    if padding == "zeros":
        weight = weight * ((index >= 0) & (index < size))
    elif padding == "reflection":
        index = _reflected(index, size, corners)
    return index.clamp(0, size - 1).long(), weight


def _reflected(place: torch.Tensor, size: int, corners: bool) -> torch.Tensor:
    """Folded back at the edges until it is inside."""
    low, span = (0.0, float(size - 1)) if corners else (-0.5, float(size))
    if span == 0:
        return torch.zeros_like(place)
    offset = (place - low).abs().remainder(2 * span)
    return (torch.minimum(offset, 2 * span - offset) + low).clamp(0, size - 1)


def cubic(distance: torch.Tensor, a: float) -> torch.Tensor:
    """Keys's kernel: a piecewise cubic of support 2."""
    x = distance.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def linear(distance: torch.Tensor) -> torch.Tensor:
    """A triangle of support 1."""
    return (1 - distance.abs()).clamp(min=0)
