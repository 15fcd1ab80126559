"""Pad: constants, mirrored, repeated or wrapped values around a tensor; negative widths crop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from quantkit.runtime.torch_backend._types import Node, Op, Run, Table, ints

TORCH_MODES = {"reflect": "reflect", "edge": "replicate"}


def _pad(node: Node) -> Run:
    """Opset 11 and later: widths, value and axes are inputs. The value is read as a number: no derivative by it."""
    mode = _mode(node)

    def run(
        x: torch.Tensor,
        pads: torch.Tensor,
        value: torch.Tensor | None = None,
        axes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        widths = ints(pads)
        count = len(widths) // 2
        before, after = [0] * x.ndim, [0] * x.ndim
        chosen = range(x.ndim) if axes is None else ints(axes)
        for position, axis in enumerate(chosen):
            before[axis], after[axis] = widths[position], widths[position + count]
        return padded(x, before, after, mode, 0 if value is None else value.reshape(()).item())

    return run


def _pad_2(node: Node) -> Run:
    """Widths and value are attributes (`paddings` in opset 1)."""
    mode, value = _mode(node), node.get("value", 0.0)
    widths = [int(width) for width in node.get("pads", node.get("paddings"))]
    count = len(widths) // 2
    return lambda x: padded(x, widths[:count], widths[count:], mode, value)


def _mode(node: Node) -> str:
    mode = str(node.get("mode", "constant"))
    if mode not in ("constant", "wrap", *TORCH_MODES):
        raise node.refuse(f"mode {mode!r} is none of constant, reflect, edge and wrap")
    return mode


def padded(x: torch.Tensor, before: Sequence[int], after: Sequence[int], mode: str, value: Any) -> torch.Tensor:
    """One width per axis on either side."""
    if mode == "constant":
        flat = [width for pair in zip(reversed(before), reversed(after), strict=True) for width in pair]
        return functional.pad(x, flat, value=value)
    for axis, pair in enumerate(zip(before, after, strict=True)):
        if min(pair) < 0:
            start, end = (max(0, -width) for width in pair)
            x = x.narrow(axis, start, x.shape[axis] - start - end)
    low, high = [max(0, width) for width in before], [max(0, width) for width in after]
    if _native(x, low, high, mode):
        flat = [width for pair in zip(reversed(low[2:]), reversed(high[2:]), strict=True) for width in pair]
        return functional.pad(x, flat, mode=TORCH_MODES[mode])
    for axis in range(x.ndim):
        if low[axis] or high[axis]:
            x = x.index_select(axis, _sources(x.shape[axis], low[axis], high[axis], mode, x.device))
    return x


def _native(x: torch.Tensor, low: Sequence[int], high: Sequence[int], mode: str) -> bool:
    """Whether torch's own function pads so: images, mirrored at most once."""
    if mode == "wrap" or not 3 <= x.ndim <= 5 or not x.dtype.is_floating_point or any((*low[:2], *high[:2])):
        return False
    reach = [max(pair) for pair in zip(low, high, strict=True)]
    return x.numel() > 0 and (mode == "edge" or all(r < n for r, n in zip(reach[2:], x.shape[2:], strict=True)))


def _sources(length: int, low: int, high: int, mode: str, device: torch.device) -> torch.Tensor:
    """[low + length + high] int64: the position that each output position copies."""
    positions = torch.arange(-low, length + high, device=device)
    if mode == "edge":
        return positions.clamp(0, length - 1)
    if mode == "wrap":
        return positions % length
    period = max(1, 2 * (length - 1))
    positions = positions % period
    return torch.minimum(positions, period - positions) if length > 1 else positions


TABLE: Table = {
    ("Pad", 1): Op(_pad_2),
    ("Pad", 11): Op(_pad, host=(1, 2, 3)),
}
