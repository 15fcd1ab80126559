"""How an operator reads its data input: as rows [groups, T, K], so that its output is rows @ W[N, K].T per group.

A convolution becomes rows by gathering, for each output position, the inputs under its kernel. Neighbouring positions
share most of their inputs, so a random part of them tells as much as all; only that part is ever gathered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.errors import InputError
from quantkit.types import Array, FloatArray

Indices = npt.NDArray[np.int64]


def to_rows(
    op: str,
    data: Array,
    *,
    operand_shape: Sequence[int],
    groups: int,
    attributes: Mapping[str, Any],
    limit: int | None,
    seed: int,
) -> FloatArray:
    """[groups, T, K] float32: what the operator multiplies with its weight.

    Args:
        operand_shape: shape of the weight as the node reads it.
        attributes: the node's attributes as plain values (pads, auto_pad, strides, dilations, transA).
        limit: most positions of a convolution to read, drawn with `seed`; None reads all. Other operators read all.
    """
    values = np.asarray(data, dtype=np.float32)
    if op == "Conv":
        return _conv_rows(values, operand_shape, groups, attributes, limit, seed)
    if op == "ConvTranspose":
        batch, channels, *spatial = values.shape
        chosen = sample_positions(batch * math.prod(spatial), limit, seed)
        item, place = np.divmod(chosen, math.prod(spatial))
        pixels = values.reshape(batch, channels, -1)[item, :, place]
        return _split(pixels, groups)
    if op == "Gemm" and attributes.get("transA", 0):
        values = values.T
    if op in ("MatMul", "Gemm", "LSTM", "GRU"):
        return values.reshape(1, -1, values.shape[-1])
    raise InputError(f"{op} multiplies no input rows with its weight; leave it out when collecting row statistics")


def sample_positions(total: int, limit: int | None, seed: int) -> Indices:
    """At most `limit` different numbers below `total`, ascending; the same ones for the same arguments."""
    if limit is None or total <= limit:
        return np.arange(total)
    generator = np.random.Generator(np.random.PCG64(seed))
    return np.sort(generator.choice(total, limit, replace=False, shuffle=False))


def _conv_rows(
    data: FloatArray,
    operand_shape: Sequence[int],
    groups: int,
    attributes: Mapping[str, Any],
    limit: int | None,
    seed: int,
) -> FloatArray:
    kernel = tuple(operand_shape[2:])
    rank = len(kernel)
    strides = tuple(attributes.get("strides") or (1,) * rank)
    dilations = tuple(attributes.get("dilations") or (1,) * rank)
    begins, outputs = _padding(data.shape[2:], kernel, strides, dilations, attributes)
    chosen = sample_positions(data.shape[0] * math.prod(outputs), limit, seed)
    item, *position = np.unravel_index(chosen, (data.shape[0], *outputs))
    # One index array per spatial axis, broadcasting to [T, *kernel]; outside the data it is clipped here, zeroed below.
    index: list[Indices] = []
    inside = np.ones((chosen.size,) + (1,) * rank, dtype=bool)
    for axis in range(rank):
        taps = np.arange(kernel[axis]) * dilations[axis] - begins[axis]
        reads = position[axis][:, None] * strides[axis] + taps  # [T, k]
        shape = [chosen.size] + [1] * rank
        shape[axis + 1] = kernel[axis]
        inside = inside & ((reads >= 0) & (reads < data.shape[axis + 2])).reshape(shape)
        index.append(np.clip(reads, 0, data.shape[axis + 2] - 1).reshape(shape))
    selection: tuple[Any, ...] = (item.reshape((-1,) + (1,) * rank), slice(None), *index)
    patches = data[selection]  # [T, *kernel, C]
    patches[~np.broadcast_to(inside, patches.shape[:-1])] = 0
    return _split(np.moveaxis(patches, -1, 1).reshape(chosen.size, -1), groups)


def _padding(
    inputs: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    attributes: Mapping[str, Any],
) -> tuple[list[int], list[int]]:
    """Zeros before each axis, and the output's size."""
    mode = attributes.get("auto_pad") or "NOTSET"
    mode = mode.decode() if isinstance(mode, bytes) else mode
    if mode not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
        raise InputError(f"auto_pad must be NOTSET, VALID, SAME_UPPER or SAME_LOWER, got {mode!r}; repair the node")
    rank = len(kernel)
    pads = tuple(attributes.get("pads") or (0,) * 2 * rank) if mode == "NOTSET" else (0,) * 2 * rank
    begins, outputs = [], []
    for axis in range(rank):
        extent = dilations[axis] * (kernel[axis] - 1) + 1
        if mode.startswith("SAME"):
            size = -(-inputs[axis] // strides[axis])
            total = max((size - 1) * strides[axis] + extent - inputs[axis], 0)
            begins.append(total // 2 if mode == "SAME_UPPER" else total - total // 2)
        else:
            size = (inputs[axis] + pads[axis] + pads[rank + axis] - extent) // strides[axis] + 1
            begins.append(pads[axis])
        outputs.append(size)
    return begins, outputs


def _split(rows: FloatArray, groups: int) -> FloatArray:
    """[T, C] -> [groups, T, C / groups], contiguous."""
    return np.ascontiguousarray(rows.reshape(rows.shape[0], groups, -1).transpose(1, 0, 2))
