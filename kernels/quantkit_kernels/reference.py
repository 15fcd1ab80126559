"""What the kernels compute, in plain torch and float32: the path of CPU tensors and the yardstick of the tests.

Tensors are laid out as in `packing`: codes int16 [N, words], meta int32 [(2,) G, N].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from quantkit_kernels.packing import RUNS, WIDTHS

ACTIVATIONS = ("none", "relu", "gelu", "silu")
INT8_MAX = 127


def unpack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 [N, padded K] from words int16 [N, words]."""
    if bits == 2:
        tiles = codes.reshape(codes.shape[0], -1, 1, 16).to(torch.int32)
        shifts = torch.arange(0, 16, 2, device=codes.device)[:, None]
        return ((tiles >> shifts) & 3).to(torch.uint8).reshape(codes.shape[0], -1)
    if bits != 3:
        return _fields(codes, bits)
    tiles = codes.reshape(codes.shape[0], -1, 3, 1, 16).to(torch.int32) & 0xFFFF
    shifts = torch.arange(0, 15, 3, device=codes.device)[:, None]
    planes = ((tiles >> shifts) & 7).flatten(2, 3)
    weight = torch.tensor([1, 2, 4], device=codes.device)[:, None]
    last = ((tiles[..., 0, :] >> 15) * weight).sum(2, keepdim=True)
    return torch.cat([planes, last], 2).to(torch.uint8).reshape(codes.shape[0], -1)


def scales_and_points(meta: Tensor) -> tuple[Tensor, Tensor]:
    """(scales float32 [G, N], zero points float32 [G, N])."""
    narrow = meta if meta.ndim == 2 else meta[0]
    halves = narrow.contiguous().view(torch.float16).reshape(*narrow.shape, 2).float()
    return halves[..., 0] if meta.ndim == 2 else meta[1].contiguous().view(torch.float32), halves[..., 1]


def dequantize(codes: Tensor, meta: Tensor, bits: int, group_size: int, num_inputs: int) -> Tensor:
    """W float32 [N, K]; exact but for the product's rounding."""
    scales, points = scales_and_points(meta)
    values = unpack_codes(codes, bits)[:, :num_inputs].float()
    group = torch.arange(num_inputs, device=codes.device) // group_size
    return (values - points.T[:, group]) * scales.T[:, group]


def dequantize_mixed(codes: Sequence[Tensor], meta: Tensor, table: Tensor, group_size: int, num_inputs: int) -> Tensor:
    """W float32 [N, K] of a mixed weight: one tensor of codes for each of 2, 3, 4, 8 bits, meta in sorted order."""
    num_groups = meta.shape[-2]
    counts = group_counts([part.shape[1] for part in codes], group_size, num_groups, table.shape[0])
    parts = [
        unpack_codes(part, bits)[:, : count * group_size]
        for part, bits, count in zip(codes, WIDTHS, counts, strict=True)
        if count
    ]
    scales, points = scales_and_points(meta)
    values = torch.cat(parts, dim=1).float().reshape(-1, num_groups, group_size)
    groups = (values - points.T[:, :, None]) * scales.T[:, :, None]
    restored = torch.empty_like(groups)
    restored[:, table[:num_groups].long()] = groups
    return restored.reshape(values.shape[0], -1)[:, :num_inputs]


def group_counts(words: Sequence[int], group_size: int, num_groups: int, entries: int) -> tuple[int, ...]:
    """Groups of each width, from the words per row, the groups and the entries of the table.

    What rows of 2 and 3 bits are filled up with counts for nothing; for 2 bits the table has an entry for each.
    """
    counts = [count * 16 // (bits * group_size) for count, bits in zip(words, WIDTHS, strict=True)]
    filling = entries - num_groups
    counts[0] -= filling
    counts[1] = num_groups - counts[0] - counts[2] - counts[3]
    held = counts[0] >= 0 and 0 <= counts[1] * group_size * 3 <= words[1] * 16
    if len(words) != len(WIDTHS) or not held or not 0 <= filling * group_size < RUNS[2]:
        raise ValueError(
            f"codes of {tuple(words)} words and a table of {entries} do not hold {num_groups} groups of {group_size}"
        )
    return tuple(counts)


def activate(values: Tensor, activation: str) -> Tensor:
    """relu, gelu (by the error function), silu or none."""
    if activation == "none":
        return values
    if activation == "relu":
        return functional.relu(values)
    if activation == "gelu":
        return functional.gelu(values)
    if activation == "silu":
        return functional.silu(values)
    raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """act(x weightᵀ + bias) in float32, in the type of x; x [..., K], weight float32 [N, K]."""
    product = functional.linear(x.float(), weight, None if bias is None else bias.float())
    return activate(product, activation).to(x.dtype)


def quantize_rows(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """(int8 [M, K] as float32, scales float32 [M, 1]): round half to even, symmetric, max|row| / 127 unless given."""
    rows = x.float()
    if scale is None:
        peak = rows.abs().amax(dim=1, keepdim=True) / INT8_MAX
        scales = torch.where(peak == 0, torch.ones_like(peak), peak)
    else:
        scales = scale.float().reshape(1, 1).expand(rows.shape[0], 1)
    return torch.round(rows / scales).clamp(-INT8_MAX, INT8_MAX), scales


def int8_linear(
    x: Tensor,
    codes: Tensor,
    meta: Tensor,
    bits: int,
    group_size: int,
    x_scale: Tensor | None,
    bias: Tensor | None,
    activation: str,
) -> Tensor:
    """As `linear`, of x rounded to int8: exact integer sums per group, then scales in float32."""
    rows = x.reshape(-1, x.shape[-1])
    quantized, row_scales = quantize_rows(rows, x_scale)
    scales, points = scales_and_points(meta)
    values = unpack_codes(codes, bits)[:, : rows.shape[1]].float()
    total = torch.zeros(rows.shape[0], codes.shape[0], device=x.device)
    for group in range(scales.shape[0]):
        part = slice(group * group_size, (group + 1) * group_size)
        # float64 holds every sum of a row: 2^15 * K < 2^53
        sums = quantized[:, part].double() @ (values[:, part] - points[group][:, None]).double().T
        total += sums.float() * scales[group]
    total *= row_scales
    if bias is not None:
        total += bias.float()
    return activate(total, activation).to(x.dtype).reshape(*x.shape[:-1], -1)


def _fields(words: Tensor, width: int) -> Tensor:
    """[N, words] int16 -> uint8 [N, words * 16 // width]."""
    data = words.contiguous().view(torch.uint8)
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=words.device)
    return ((data[:, :, None] >> shifts) & ((1 << width) - 1)).reshape(words.shape[0], -1)
