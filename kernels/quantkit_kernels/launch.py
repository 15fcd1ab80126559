"""Host side of the kernels: views, tiles, workspaces, grids. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional

from quantkit_kernels import config
from quantkit_kernels.act8 import act8, round_rows
from quantkit_kernels.config import Case, Tile
from quantkit_kernels.dequant import dequant
from quantkit_kernels.gemm import gemm, sort_planes
from quantkit_kernels.mixed import mixed
from quantkit_kernels.ops import COUNTERS
from quantkit_kernels.packing import WIDTHS
from quantkit_kernels.reference import activate, group_counts
from quantkit_kernels.skinny import skinny

CHUNK_BYTES = (
    24 << 20
)  # of dequantized weights at once: they stay in the second-level cache until the product reads them


def nbits_linear(
    x: Tensor,
    codes: Tensor,
    meta: Tensor,
    bits: int,
    group_size: int,
    bias: Tensor | None = None,
    activation: str = "none",
    counters: Tensor | None = None,
    tile: Tile | None = None,
    kernel: str | None = None,
) -> Tensor:
    """`ops.nbits_linear` by the kernel for its number of rows; `kernel` and `tile` choose by hand."""
    rows = _rows(x)
    out = x.new_empty((rows.shape[0], codes.shape[0]))
    if rows.shape[0] == 0 or codes.shape[0] == 0:
        return out.reshape(*x.shape[:-1], out.shape[1])
    grouping = 0 if meta.shape[-2] == 1 else group_size
    chosen = kernel or kernel_for(rows.shape[0])
    if chosen == "dequant":
        _dequant_linear(rows, codes, meta, bits, group_size, bias, activation, out)
        return out.reshape(*x.shape[:-1], out.shape[1])
    if tile is None:
        case = Case(chosen, bits, grouping, codes.shape[0], x.shape[-1], rows.shape[0], str(x.dtype).split(".")[-1])
        tile = choose(case, x)
    launch = _gemm if chosen == "gemm" else _skinny
    launch(rows, codes, meta, bits, grouping, bias, activation, counters, tile, out)
    return out.reshape(*x.shape[:-1], out.shape[1])


def kernel_for(rows: int) -> str:
    """The kernel for a number of rows of x."""
    if rows <= config.SKINNY_ROWS:
        return "skinny"
    return "gemm" if rows <= config.GEMM_ROWS else "dequant"


def mixed_linear(
    x: Tensor,
    codes: Sequence[Tensor],
    meta: Tensor,
    table: Tensor,
    group_size: int,
    bias: Tensor | None = None,
    activation: str = "none",
    counters: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """`ops.mixed_linear` in one launch."""
    num_rows, num_inputs, num_groups = codes[0].shape[0], x.shape[-1], meta.shape[-2]
    out = x.new_empty((x.numel() // num_inputs, num_rows))
    if out.numel() == 0:
        return out.reshape(*x.shape[:-1], out.shape[1])
    counts = group_counts([part.shape[1] for part in codes], group_size, num_groups, table.shape[0])
    if tile is None and out.shape[0] > config.MIXED_ROWS:
        _mixed_dense(_rows(x), codes, meta, table[:num_groups], counts, group_size, bias, activation, out)
        return out.reshape(*x.shape[:-1], out.shape[1])
    rows = _aligned(_rows(x), 4)
    if tile is None:
        dtype = str(x.dtype).split(".")[-1]
        case = Case("mixed", 0, group_size, num_rows, num_inputs, rows.shape[0], dtype)
        tile = choose(case, x)
    shapes = config.mixed_shapes(group_size, counts, num_inputs)
    grid, ws, cnt = _split_space(out, tile, counters)
    x4, x2 = rows.view(torch.int64), rows.view(torch.int32)
    mixed[(*grid, triton.cdiv(rows.shape[0], tile.BM))](
        x4, x2, rows, *codes, meta, table, out if bias is None else bias, out, ws, cnt, rows.shape[0], num_rows,
        rows.shape[1], x4.shape[1], x2.shape[1], *counts, *(part.stride(0) for part in codes), x4.stride(0),
        x2.stride(0), rows.stride(0), num_groups * num_rows, GS=group_size, S2=shapes[0], S3=shapes[1], S4=shapes[2],
        S8=shapes[3], R=shapes[0][2], BM=tile.BM, BN=tile.BN, SPLIT=tile.split, WIDE=meta.ndim == 3,
        **_ending(bias, activation, x), **_options(tile),
    )  # fmt: skip
    return out.reshape(*x.shape[:-1], out.shape[1])


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
    tile: Tile | None = None,
) -> Tensor:
    """`ops.int8_linear`: one launch rounds the rows, one multiplies."""
    rows = _rows(x)
    num_rows, num_inputs, (num_groups, num_outputs) = rows.shape[0], x.shape[-1], meta.shape[-2:]
    out = x.new_empty((num_rows, num_outputs))
    if out.numel() == 0:
        return out.reshape(*x.shape[:-1], out.shape[1])
    grouping = 0 if num_groups == 1 else group_size
    if tile is None:
        case = Case("act8", bits, grouping, num_outputs, num_inputs, num_rows, str(x.dtype).split(".")[-1])
        tile = choose(case, x)
    words, unroll = config.bytes_and_tiles(bits, grouping)
    span = words * unroll * (8 // bits)
    padded = triton.cdiv(num_inputs, span) * span
    quantized = torch.empty((num_rows, padded), dtype=torch.int8, device=x.device)
    scales = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    whole = grouping == 0
    sums = torch.empty((1 if whole else padded * bits // (8 * words), num_rows), dtype=torch.int32, device=x.device)
    block = min(4096, max(1024, triton.next_power_of_2(padded)))
    round_rows[(num_rows,)](
        rows, quantized, scales, sums, scales if x_scale is None else x_scale.float(), num_rows, num_inputs, padded,
        rows.stride(0), P=8 // bits, C=words, BLOCK=block, STATIC=x_scale is not None, WHOLE=whole, num_warps=4,
    )  # fmt: skip
    blocks = triton.cdiv(num_rows, tile.BM) * triton.cdiv(num_outputs, tile.BN)
    ws, cnt = _workspace(out, tile, counters, blocks)
    data = codes.view(torch.int8)
    act8[(blocks, tile.split)](
        quantized, scales, sums, data, meta, out if bias is None else bias, out, ws, cnt, num_rows, num_outputs,
        num_inputs, data.stride(0), padded, num_groups * num_outputs, BITS=bits, GS=grouping, C=words, U=unroll,
        BM=tile.BM, BN=tile.BN, SPLIT=tile.split, EVEN=num_inputs % span == 0, WIDE=meta.ndim == 3,
        **_ending(bias, activation, x), **_options(tile),
    )  # fmt: skip
    return out.reshape(*x.shape[:-1], out.shape[1])


def gather_nbits(
    ids: Tensor, codes: Tensor, meta: Tensor, bits: int, group_size: int, num_inputs: int, dtype: torch.dtype
) -> Tensor:
    """`ops.gather_nbits`."""
    out = torch.empty((*ids.shape, num_inputs), dtype=dtype, device=ids.device)
    if out.numel():
        flat = ids.reshape(-1).contiguous()
        _dequant(flat, codes, meta, bits, group_size, num_inputs, out.view(-1, num_inputs), 1)
    return out


def dequantize(codes: Tensor, meta: Tensor, bits: int, group_size: int, num_inputs: int, dtype: torch.dtype) -> Tensor:
    """W [N, K] in `dtype`."""
    out = torch.empty((codes.shape[0], num_inputs), dtype=dtype, device=codes.device)
    _dequant(None, codes, meta, bits, group_size, num_inputs, out, 16)
    return out


def choose(case: Case, x: Tensor) -> Tile:
    """The tile for a case on the device of x; CPU tensors, in Triton's interpreter, take the rule's."""
    if not x.is_cuda:
        return config.rule(case, 90)
    major, minor = torch.cuda.get_device_capability(x.device)
    return config.choose(case, torch.cuda.get_device_name(x.device), 10 * major + minor, triton.__version__)


def _skinny(
    rows: Tensor, codes: Tensor, meta: Tensor, bits: int, grouping: int, bias: Tensor | None, activation: str,
    counters: Tensor | None, tile: Tile, out: Tensor,
) -> None:  # fmt: skip
    num_rows, num_inputs = rows.shape
    words, unroll, shared = config.words_and_tiles(bits, grouping)
    packed = rows if bits < 4 else _aligned(rows, 4).view(torch.int32 if bits == 8 else torch.int64)
    grid, ws, cnt = _split_space(out, tile, counters)
    step = words * unroll * 16 // bits
    skinny[(*grid, triton.cdiv(num_rows, tile.BM))](
        packed, codes, meta, out if bias is None else bias, out, ws, cnt, num_rows, out.shape[1], num_inputs,
        packed.shape[1], codes.stride(0), packed.stride(0), meta.shape[-2] * out.shape[1],
        BITS=bits, GS=grouping, C=words, U=unroll, R=shared, BM=tile.BM, BN=tile.BN, SPLIT=tile.split,
        EVEN=num_inputs % step == 0, WIDE=meta.ndim == 3, **_ending(bias, activation, rows), **_options(tile),
    )  # fmt: skip


def _gemm(
    rows: Tensor, codes: Tensor, meta: Tensor, bits: int, grouping: int, bias: Tensor | None, activation: str,
    counters: Tensor | None, tile: Tile, out: Tensor,
) -> None:  # fmt: skip
    num_rows, num_inputs = rows.shape
    words, unroll, shared = config.gemm_words(bits, grouping)
    step = words * unroll * 16 // bits
    padded = triton.cdiv(num_inputs, step) * step
    if bits < 4:
        planes = _aligned(rows, step)
    else:
        planes = rows.new_empty((num_rows, padded))
        sort_planes[(triton.cdiv(num_rows, 8), padded * bits // (16 * words))](
            rows.view(torch.int16), planes.view(torch.int16), num_rows, num_inputs, rows.stride(0), padded,
            P=16 // bits, C=words, BM=8, num_warps=4,
        )  # fmt: skip
    blocks = triton.cdiv(num_rows, tile.BM) * triton.cdiv(out.shape[1], tile.BN)
    ws, cnt = _workspace(out, tile, counters, blocks)
    gemm[(blocks, tile.split)](
        planes, codes, meta, out if bias is None else bias, out, ws, cnt, num_rows, out.shape[1], num_inputs,
        codes.stride(0), planes.stride(0), meta.shape[-2] * out.shape[1], BITS=bits, GS=grouping,
        C=words, U=unroll, R=shared, BM=tile.BM, BN=tile.BN, SPLIT=tile.split, EVEN=num_inputs % step == 0,
        WIDE=meta.ndim == 3, **_ending(bias, activation, rows), **_options(tile),
    )  # fmt: skip


def _dequant_linear(
    rows: Tensor, codes: Tensor, meta: Tensor, bits: int, group_size: int, bias: Tensor | None, activation: str,
    out: Tensor,
) -> None:  # fmt: skip
    num_outputs, num_inputs = out.shape[1], rows.shape[1]
    chunk = max(128, CHUNK_BYTES // (2 * num_inputs) // 128 * 128)
    for first in range(0, num_outputs, chunk):
        part = slice(first, min(first + chunk, num_outputs))
        weight = torch.empty((part.stop - first, num_inputs), dtype=rows.dtype, device=rows.device)
        _dequant(None, codes[part], meta[..., part].contiguous(), bits, group_size, num_inputs, weight, 16)
        product = functional.linear(rows, weight, None if bias is None else bias[part])
        out[:, part] = activate(product, activation)


def _mixed_dense(
    rows: Tensor, codes: Sequence[Tensor], meta: Tensor, table: Tensor, counts: tuple[int, ...], group_size: int,
    bias: Tensor | None, activation: str, out: Tensor,
) -> None:  # fmt: skip
    """Many rows: the columns of x are brought into the order of the groups, the weights are dequantized first."""
    width = table.shape[0] * group_size
    columns = (table[:, None] * group_size + torch.arange(group_size, device=table.device)).reshape(-1)
    ordered = functional.pad(rows, (0, width - rows.shape[1]))[:, columns]
    weight = rows.new_empty((out.shape[1], width))
    first = 0
    for part, bits, count in zip(codes, WIDTHS, counts, strict=True):
        if count:
            words = meta[..., first : first + count, :].contiguous()
            block = weight[:, first * group_size : (first + count) * group_size]
            _dequant(None, part, words, bits, group_size, count * group_size, block, 16)
            first += count
    product = functional.linear(ordered, weight, bias)
    out.copy_(activate(product, activation))


def _dequant(
    ids: Tensor | None, codes: Tensor, meta: Tensor, bits: int, group_size: int, num_inputs: int, out: Tensor, BN: int
) -> None:
    words = 16 * bits if bits < 4 else 8 * bits
    tiles = triton.cdiv(num_inputs, words * 16 // bits)
    dequant[(triton.cdiv(out.shape[0], BN), tiles)](
        meta if ids is None else ids, codes, meta, out, out.shape[0], codes.shape[0], num_inputs, codes.stride(0),
        out.stride(0), meta.shape[-2] * codes.shape[0], BITS=bits,
        GS=0 if meta.shape[-2] == 1 else group_size, C=words, BN=BN, WIDE=meta.ndim == 3, IDS=ids is not None,
        num_warps=4,
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """[M, K] with adjacent values in every row."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _aligned(rows: Tensor, per_load: int) -> Tensor:
    """The activations such that `per_load` values are one aligned load; a copy only where they are not."""
    rest = -rows.shape[1] % per_load
    if rest:
        return functional.pad(rows, (0, rest))
    if rows.stride(0) % per_load or rows.data_ptr() % 16:
        return rows.clone(memory_format=torch.contiguous_format)
    return rows


def _split_space(out: Tensor, tile: Tile, counters: Tensor | None) -> tuple[tuple[int, int], Tensor, Tensor]:
    """Grid (output tiles, parts), workspace, counters; one counter per output tile and block of rows."""
    blocks = triton.cdiv(out.shape[1], tile.BN) * triton.cdiv(out.shape[0], tile.BM)
    return (triton.cdiv(out.shape[1], tile.BN), tile.split), *_workspace(out, tile, counters, blocks)


def _workspace(out: Tensor, tile: Tile, counters: Tensor | None, blocks: int) -> tuple[Tensor, Tensor]:
    if tile.split == 1:
        return out, out
    ws = torch.empty((tile.split, *out.shape), dtype=torch.float32, device=out.device)
    if counters is not None and blocks <= COUNTERS:
        return ws, counters
    return ws, torch.zeros(blocks, dtype=torch.int32, device=out.device)


def _ending(bias: Tensor | None, activation: str, x: Tensor) -> dict[str, Any]:
    """ASM: Triton's interpreter, which CPU tensors go through, has no inline assembly."""
    return {"HAS_BIAS": bias is not None, "ACT": activation, "ASM": x.is_cuda}


def _options(tile: Tile) -> dict[str, Any]:
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
