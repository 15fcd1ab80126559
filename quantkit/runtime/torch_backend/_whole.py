"""Products and convolutions of 8-bit numbers without rounding errors, with the float kernels that torch has.

A float32 holds whole numbers up to 2^24, so sums of at most 256 products of two numbers below 256 are exact in it;
longer sums are put together from such pieces in int32. Where a gradient passes, all of it is one float64 product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812

from quantkit.runtime.torch_backend._affine import is_followed, numbers
from quantkit.runtime.torch_backend._types import Node, Run
from quantkit.runtime.torch_backend.casting import is_float8

EXACT_TERMS = 256
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def rows(values: torch.Tensor | None) -> torch.Tensor | None:
    """Values of single rows [M], laid along a matrix's rows."""
    return values if values is None or values.ndim != 1 or values.numel() == 1 else values[:, None]


def whole_product(
    a: torch.Tensor, b: torch.Tensor, a_zero: torch.Tensor | None = None, b_zero: torch.Tensor | None = None
) -> torch.Tensor:
    """(a - a_zero) @ (b - b_zero): int32, or float64 where a gradient passes, or float32 of floats of 8 bits.

    Args:
        a, b: codes [..., M, K] and [..., K, N].
        a_zero, b_zero: per tensor, row of a or column of b.
    """
    terms = a.shape[-1]
    dtype = torch.float64 if is_followed(a) or is_followed(b) else torch.float32
    left, right = numbers(a, rows(a_zero), dtype), numbers(b, b_zero, dtype)
    if dtype == torch.float64 or is_float8(a):
        return torch.matmul(left, right)
    if terms <= EXACT_TERMS:
        return torch.matmul(left, right).to(torch.int32)
    matrix = right.ndim > 1
    pieces = [
        torch.matmul(
            left[..., start : start + EXACT_TERMS],
            right[..., start : start + EXACT_TERMS, :] if matrix else right[start : start + EXACT_TERMS],
        ).to(torch.int32)
        for start in range(0, terms, EXACT_TERMS)
    ]
    return torch.stack(pieces).sum(0, dtype=torch.int32)


def whole_convolution(node: Node) -> Run:
    """(x, w, x_zero, w_zero) -> sum of (x - x_zero) * (w - w_zero): int32, or float64 where a gradient passes.

    x [N, C, ...], w [M, C/group, ...], x_zero a scalar, w_zero a scalar or [M]; padding counts as x_zero.
    """
    group = int(node.get("group", 1))

    def run(
        x: torch.Tensor,
        w: torch.Tensor,
        x_zero: torch.Tensor | None = None,
        w_zero: torch.Tensor | None = None,
    ) -> torch.Tensor:
        rank = w.ndim - 2
        if rank not in _CONVOLUTIONS:
            raise node.refuse(f"{rank} spatial axes")
        per_channel, channels = math.prod(w.shape[2:]), w.shape[1]
        exact = per_channel * channels <= EXACT_TERMS
        at_once = channels if exact else EXACT_TERMS // per_channel
        double = is_followed(x) or is_followed(w) or at_once == 0 or (group > 1 and not exact)
        dtype = torch.float64 if double else torch.float32
        strides, dilations = (list(node.get(key, [1] * rank)) for key in ("strides", "dilations"))
        data = padded(numbers(x, x_zero, dtype), window_pads(node, x.shape[2:], w.shape[2:], dilations))
        zero = w_zero if w_zero is None or w_zero.numel() == 1 else w_zero.reshape(-1, *[1] * (rank + 1))
        weight = numbers(w, None if zero is None else zero if zero.ndim else zero.reshape(()), dtype)
        convolve = _CONVOLUTIONS[rank]
        if double:
            total = convolve(data, weight, None, strides, 0, dilations, group)
            return total if is_followed(total) else torch.round(total).to(torch.int32)
        pieces = [
            torch.round(
                convolve(
                    data if exact else data[:, start : start + at_once],
                    weight[:, start : start + at_once],
                    None,
                    strides,
                    0,
                    dilations,
                    group,
                )
            ).to(torch.int32)
            for start in range(0, channels, at_once)
        ]
        return pieces[0] if exact else torch.stack(pieces).sum(0, dtype=torch.int32)

    return run


def window_pads(
    node: Node, sizes: Sequence[int], kernel: Sequence[int], dilations: Sequence[int]
) -> tuple[list[int], list[int]]:
    """(before, after) of every spatial axis."""
    rank, auto = len(kernel), node.get("auto_pad", "NOTSET")
    if auto in ("NOTSET", ""):
        pads = [int(pad) for pad in node.get("pads", [0] * (2 * rank))]
        return pads[:rank], pads[rank:]
    if auto == "VALID":
        return [0] * rank, [0] * rank
    before, after = [], []
    strides = node.get("strides", [1] * rank)
    for size, width, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (width - 1) * dilation + 1 - size, 0)
        less, more = total // 2, total - total // 2
        before.append(less if auto == "SAME_UPPER" else more)
        after.append(more if auto == "SAME_UPPER" else less)
    return before, after


def padded(x: torch.Tensor, pads: tuple[Sequence[int], Sequence[int]], value: float = 0.0) -> torch.Tensor:
    """Along the last axes."""
    flat = [pad for pair in zip(reversed(pads[0]), reversed(pads[1]), strict=True) for pad in pair]
    return F.pad(x, flat, value=value) if any(flat) else x
