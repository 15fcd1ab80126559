"""The operators: `torch.ops.quantkit.*`, for torch.compile and CUDA graphs. CUDA tensors run the kernels, others torch.

Every operator is deterministic, allocates only through torch and never waits for the device. x is float16 or bfloat16
on CUDA; products accumulate in float32 and the result has the type of x. `codes`, `meta` and `table` are the arrays of
`packing` as tensors.

`counters`: split-K lets the last program to finish add up the parts, in a fixed order. It counts them in int32 zeros of
`COUNTERS` entries and leaves zeros behind. A layer that brings its own counters saves one small launch per call; two
calls that may overlap (streams, graphs replayed side by side) must not share them. None makes new ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit_kernels import reference

COUNTERS = 4096


def make_counters(device: torch.device | str) -> Tensor:
    """int32 zeros for one layer."""
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


@torch.library.custom_op("quantkit::nbits_linear", mutates_args=())
def nbits_linear(
    x: Tensor,
    codes: Tensor,
    meta: Tensor,
    bits: int,
    group_size: int,
    bias: Tensor | None = None,
    activation: str = "none",
    counters: Tensor | None = None,
) -> Tensor:
    """act(x Wᵀ + bias) [..., N] of a weight of one width.

    Args:
        x: [..., K].
        codes: int16 [N, words].
        meta: int32 [(2,) G, N].
        bits: 2, 3, 4 or 8.
        group_size: 16, 32, 64, 128, 256, or K for one scale per row.
        bias: [N].
        activation: none, relu, gelu (by the error function) or silu.

    Raises:
        ValueError: tensors that do not fit each other, or an unknown activation.
    """
    _check_weight(codes, meta, bits, group_size, x.shape[-1])
    _check_rest(x, codes.shape[0], bias, activation)
    if x.is_cuda:
        from quantkit_kernels import launch

        return launch.nbits_linear(x, codes, meta, bits, group_size, bias, activation, counters)
    weight = reference.dequantize(codes, meta, bits, group_size, x.shape[-1])
    return reference.linear(x, weight, bias, activation)


@torch.library.custom_op("quantkit::mixed_linear", mutates_args=())
def mixed_linear(
    x: Tensor,
    codes: Sequence[Tensor],
    meta: Tensor,
    table: Tensor,
    group_size: int,
    bias: Tensor | None = None,
    activation: str = "none",
    counters: Tensor | None = None,
) -> Tensor:
    """act(x Wᵀ + bias) [..., N] of a weight whose groups have 2, 3, 4 or 8 bits.

    Args:
        codes: four tensors int16 [N, words], for 2, 3, 4 and 8 bits; [N, 0] where no group has the width.
        meta: int32 [(2,) G, N], groups sorted by width.
        table: int32 [G + F], the group of K that each sorted group is, and F zeros, one for each group that fills up
            the codes of 2 bits.
        group_size: 16, 32, 64, 128 or 256.

    Raises:
        ValueError: as `nbits_linear`.
    """
    reference.group_counts([part.shape[1] for part in codes], group_size, meta.shape[-2], table.shape[0])
    if meta.shape[-2] != -(-x.shape[-1] // group_size):
        raise ValueError(f"{meta.shape[-2]} groups of {group_size} do not fit K = {x.shape[-1]}")
    _check_rest(x, codes[0].shape[0], bias, activation)
    if x.is_cuda:
        from quantkit_kernels import launch

        return launch.mixed_linear(x, codes, meta, table, group_size, bias, activation, counters)
    weight = reference.dequantize_mixed(codes, meta, table, group_size, x.shape[-1])
    return reference.linear(x, weight, bias, activation)


@torch.library.custom_op("quantkit::int8_linear", mutates_args=())
def int8_linear(
    x: Tensor,
    codes: Tensor,
    meta: Tensor,
    bits: int,
    group_size: int,
    x_scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    counters: Tensor | None = None,
) -> Tensor:
    """act(x̂ Wᵀ + bias) [..., N] with x̂ = x rounded to int8 and products on integer tensor cores.

    Args:
        bits: 4 or 8.
        x_scale: float32, one element: x̂ = clip(round(x / x_scale), -127, 127) * x_scale; None takes max|row| / 127 of
            every row of x.

    Raises:
        ValueError: as `nbits_linear`.
    """
    if bits not in (4, 8):
        raise ValueError(f"int8_linear has weights of 4 and 8 bits, got {bits}")
    if group_size < min(32, x.shape[-1]):
        raise ValueError(f"int8_linear has groups of 32 or more, got {group_size}")
    _check_weight(codes, meta, bits, group_size, x.shape[-1])
    _check_rest(x, codes.shape[0], bias, activation)
    if x_scale is not None and x_scale.numel() != 1:
        raise ValueError(f"x_scale must have one element, got {x_scale.numel()}")
    if x.is_cuda:
        from quantkit_kernels import launch

        return launch.int8_linear(x, codes, meta, bits, group_size, x_scale, bias, activation, counters)
    return reference.int8_linear(x, codes, meta, bits, group_size, x_scale, bias, activation)


@torch.library.custom_op("quantkit::gather_nbits", mutates_args=())
def gather_nbits(
    ids: Tensor,
    codes: Tensor,
    meta: Tensor,
    bits: int,
    group_size: int,
    num_inputs: int,
    dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Rows W[ids] of a packed table, [*ids.shape, num_inputs] in `dtype`.

    Args:
        ids: int32 or int64, from 0 to N - 1; not checked on CUDA.
        num_inputs: K, since packed rows may be filled up.

    Raises:
        ValueError: as `nbits_linear`.
    """
    _check_weight(codes, meta, bits, group_size, num_inputs)
    if ids.is_cuda:
        from quantkit_kernels import launch

        return launch.gather_nbits(ids, codes, meta, bits, group_size, num_inputs, dtype)
    rows = reference.dequantize(
        codes[ids.reshape(-1)], meta[..., ids.reshape(-1)].contiguous(), bits, group_size, num_inputs
    )
    return rows.to(dtype).reshape(*ids.shape, num_inputs)


@nbits_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    meta: Tensor,
    bits: int,
    group_size: int,
    bias: Tensor | None = None,
    activation: str = "none",
    counters: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@mixed_linear.register_fake
def _(
    x: Tensor,
    codes: Sequence[Tensor],
    meta: Tensor,
    table: Tensor,
    group_size: int,
    bias: Tensor | None = None,
    activation: str = "none",
    counters: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes[0].shape[0]))


@int8_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    meta: Tensor,
    bits: int,
    group_size: int,
    x_scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    counters: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@gather_nbits.register_fake
def _(
    ids: Tensor,
    codes: Tensor,
    meta: Tensor,
    bits: int,
    group_size: int,
    num_inputs: int,
    dtype: torch.dtype = torch.float16,
) -> Tensor:
    return ids.new_empty((*ids.shape, num_inputs), dtype=dtype)


def _check_weight(codes: Tensor, meta: Tensor, bits: int, group_size: int, num_inputs: int) -> None:
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"the kernels have 2, 3, 4 and 8 bits, got {bits}")
    if codes.dtype != torch.int16 or meta.dtype != torch.int32:
        raise ValueError(f"codes must be int16 and meta int32, got {codes.dtype} and {meta.dtype}")
    if codes.shape[1] * 16 < num_inputs * bits:
        raise ValueError(f"rows of {codes.shape[1]} words do not hold {num_inputs} codes of {bits} bits")
    if meta.shape[-2:] != (-(-num_inputs // group_size), codes.shape[0]):
        raise ValueError(
            f"meta must be [(2,) G, N] with G = {-(-num_inputs // group_size)} and N = {codes.shape[0]}, "
            f"got {tuple(meta.shape)}"
        )


def _check_rest(x: Tensor, num_rows: int, bias: Tensor | None, activation: str) -> None:
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(reference.ACTIVATIONS)}, got {activation!r}")
    if bias is not None and bias.shape != (num_rows,):
        raise ValueError(f"bias must be [N] = [{num_rows}], got {list(bias.shape)}")
    if x.is_cuda and x.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"the kernels take float16 and bfloat16, got {x.dtype}")
