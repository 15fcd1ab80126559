"""Sums, means, extremes and norms along axes; running sums and products."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import onnx_ir as ir
import torch

from quantkit.runtime.torch_backend._integers import MASKS, flip
from quantkit.runtime.torch_backend._types import Node, Op, Run, Table, ints

Reduce = Callable[[torch.Tensor, list[int], bool], torch.Tensor]
"""(x, axes, keepdims) -> reduced; no axes: nothing is put together."""


def _op(run: Reduce) -> Op:
    """Axes as an attribute before version 18 (ReduceSum: 13), an input afterwards; none of them: all, or nothing."""

    def convert(node: Node) -> Run:
        keep = bool(node.get("keepdims", 1))
        attribute, noop = node.get("axes"), bool(node.get("noop_with_empty_axes", 0))

        def reduced(x: torch.Tensor, axes: torch.Tensor | None = None) -> torch.Tensor:
            chosen = ints(axes) if attribute is None else list(attribute)
            if not chosen and not noop:
                chosen = list(range(x.ndim))
            return run(x, [axis % x.ndim if axis < 0 else axis for axis in chosen], keep)

        return _unsigned(reduced, node)

    return Op(convert, host=(1,))


def _unsigned(run: Run, node: Node) -> Run:
    """Right for the unsigned types, which live in wider signed ones."""
    dtype = node.input_types[0]
    if dtype == ir.DataType.UINT64 and node.op in ("ReduceMax", "ReduceMin"):
        return lambda x, *axes: flip(run(flip(x), *axes))
    if dtype in MASKS and node.op not in ("ReduceMax", "ReduceMin", "ReduceMean"):
        mask = MASKS[dtype]
        return lambda x, *axes: run(x, *axes) & mask
    return run


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Whole numbers as float64, for functions that leave them."""
    return x if x.is_floating_point() or x.is_complex() else x.to(torch.float64)


def total(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    return torch.sum(x, axes, keep, dtype=x.dtype) if axes else x


def mean(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    if not axes:
        return x
    if x.is_floating_point() or x.is_complex():
        return torch.mean(x, axes, keep)
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    return torch.div(torch.sum(x, axes, keep), count, rounding_mode="trunc").to(x.dtype)


def product(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    for axis in sorted(axes, reverse=True):  # one after the other: from the last, so that the others stay in place
        x = torch.prod(x, axis, keep, dtype=x.dtype)
    return x


def _is_empty(x: torch.Tensor, axes: list[int]) -> bool:
    return any(x.shape[axis] == 0 for axis in axes)


def _limit(dtype: torch.dtype, greatest: bool) -> float | int | bool:
    if dtype == torch.bool:
        return greatest
    if dtype.is_floating_point:
        return float("inf") if greatest else float("-inf")
    info = torch.iinfo(dtype)
    return info.max if greatest else info.min


def _extreme(x: torch.Tensor, axes: list[int], keep: bool, *, greatest: bool) -> torch.Tensor:
    """Over nothing: the value that every other beats."""
    if not axes:
        return x
    if _is_empty(x, axes):
        shape = torch.sum(x, axes, keep).shape
        return torch.full(shape, _limit(x.dtype, not greatest), dtype=x.dtype, device=x.device)
    return torch.amax(x, axes, keep) if greatest else torch.amin(x, axes, keep)


def norm1(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    return total(torch.abs(x), axes, keep)


def norm2(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    if not axes:
        return torch.abs(x)
    result: torch.Tensor = torch.linalg.vector_norm(_wide(x), 2, axes, keep)
    return result.to(x.dtype)


def total_of_squares(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    return total(x * x, axes, keep)


def log_of_total(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    return torch.log(_wide(total(x, axes, keep))).to(x.dtype)


def log_of_total_of_exponentials(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    return torch.logsumexp(_wide(x), axes, keep).to(x.dtype) if axes else x


def _extreme_place(run: Callable[..., torch.Tensor]) -> Op:
    """ArgMax, ArgMin: the first of several equals, or the last one with `select_last_index`."""

    def convert(node: Node) -> Run:
        axis, keep = int(node.get("axis", 0)), bool(node.get("keepdims", 1))
        last, unsigned = bool(node.get("select_last_index", 0)), node.input_types[0] == ir.DataType.UINT64

        def place(x: torch.Tensor) -> torch.Tensor:
            x = flip(x) if unsigned else x
            if last:
                return x.shape[axis] - 1 - run(torch.flip(x, (axis,)), axis, keep)
            return run(x, axis, keep)

        return place

    return Op(convert)


def _running(run: Callable[..., torch.Tensor], neutral: int) -> Op:
    """CumSum, CumProd."""

    def convert(node: Node) -> Run:
        exclusive, backwards = bool(node.get("exclusive", 0)), bool(node.get("reverse", 0))

        def cumulated(x: torch.Tensor, axis_input: torch.Tensor) -> torch.Tensor:
            (axis,) = ints(axis_input)
            if backwards:
                x = torch.flip(x, (axis,))
            if exclusive:
                first = torch.full_like(x.narrow(axis, 0, min(1, x.shape[axis])), neutral)
                x = torch.cat([first, x.narrow(axis, 0, max(0, x.shape[axis] - 1))], axis)
            result = run(x, axis, dtype=x.dtype)
            return torch.flip(result, (axis,)) if backwards else result

        mask = MASKS.get(node.input_types[0])
        return cumulated if mask is None else lambda x, axis: cumulated(x, axis) & mask

    return Op(convert, host=(1,))


TABLE: Table = {
    ("ArgMax", 1): _extreme_place(torch.argmax),
    ("ArgMin", 1): _extreme_place(torch.argmin),
    ("CumProd", 26): _running(torch.cumprod, 1),
    ("CumSum", 11): _running(torch.cumsum, 0),
    ("ReduceL1", 1): _op(norm1),
    ("ReduceL2", 1): _op(norm2),
    ("ReduceLogSum", 1): _op(log_of_total),
    ("ReduceLogSumExp", 1): _op(log_of_total_of_exponentials),
    ("ReduceMax", 1): _op(partial(_extreme, greatest=True)),
    ("ReduceMean", 1): _op(mean),
    ("ReduceMin", 1): _op(partial(_extreme, greatest=False)),
    ("ReduceProd", 1): _op(product),
    ("ReduceSum", 1): _op(total),
    ("ReduceSumSquare", 1): _op(total_of_squares),
}
