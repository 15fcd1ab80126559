"""Arithmetic and the mathematical functions of single elements."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import onnx_ir as ir
import torch

from quantkit.runtime.torch_backend._integers import divide_uint64, number, ordered, wrapped
from quantkit.runtime.torch_backend._types import Node, Op, Run, Table, direct

Unary = Callable[[torch.Tensor], torch.Tensor]


def legacy(op: Op) -> Op:
    """Before version 7: b is laid along a's axes from `axis` on, when `broadcast` is set."""

    def convert(node: Node) -> Run:
        run, axis = op.convert(node), node.get("axis")
        if axis is None or not node.get("broadcast", 0):
            return run

        def aligned(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            start = axis % x.ndim if x.ndim else 0
            result: torch.Tensor = run(x, y.reshape(*y.shape, *[1] * (x.ndim - start - y.ndim)))
            return result

        return aligned

    return Op(convert)


def _arithmetic(run: Run) -> Op:
    return Op(lambda node: wrapped(run, node.input_types[0]))


def _divide(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if x.is_floating_point() or x.is_complex():
        return torch.div(x, y)
    return torch.div(x, y, rounding_mode="trunc")


def divide(node: Node) -> Run:
    """Whole numbers are cut towards zero."""
    return divide_uint64 if node.input_types[0] == ir.DataType.UINT64 else _divide


def mod(node: Node) -> Run:
    """fmod=1 has the sign of the dividend, fmod=0 that of the divisor."""
    if node.input_types[0] == ir.DataType.UINT64:
        return lambda x, y: x - divide_uint64(x, y) * y
    if node.get("fmod", 0):
        return torch.fmod

    def remainder(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        result = torch.remainder(x, y)
        # A zero takes the divisor's sign as well.
        return torch.where(result == 0, torch.copysign(result, y), result) if x.is_floating_point() else result

    return remainder


def power(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """In the type of the base, whatever the exponent's."""
    if x.is_floating_point() or not y.is_floating_point():
        result = torch.pow(x, number(y))
    else:
        result = torch.pow(x.to(torch.float64), y.to(torch.float64))
    return result if result.dtype == x.dtype else result.to(x.dtype)


def mean(*args: torch.Tensor) -> torch.Tensor:
    return reduce(torch.add, args) / len(args)


def _fold(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Op:
    """A function of two tensors as one of any number of them."""

    def convert(node: Node) -> Run:
        run = ordered(function, node.input_types[0], back=True)
        return run if len(node.input_types) == 2 else lambda *args: reduce(run, args)

    return Op(convert)


def _sign(x: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.isnan(x), x, torch.sign(x)) if x.is_floating_point() else torch.sign(x)


def _magnitude(node: Node) -> Run:
    return (lambda x: x) if node.input_types[0] == ir.DataType.UINT64 else torch.abs


_UNARY: dict[str, tuple[int, Unary]] = {
    "Acos": (7, torch.acos),
    "Acosh": (9, torch.acosh),
    "Asin": (7, torch.asin),
    "Asinh": (9, torch.asinh),
    "Atan": (7, torch.atan),
    "Atanh": (9, torch.atanh),
    "Ceil": (1, torch.ceil),
    "Cos": (7, torch.cos),
    "Cosh": (9, torch.cosh),
    "Erf": (9, torch.erf),
    "Exp": (1, torch.exp),
    "Floor": (1, torch.floor),
    "Log": (1, torch.log),
    "Neg": (1, torch.neg),
    "Reciprocal": (1, torch.reciprocal),
    "Round": (11, torch.round),
    "Sign": (9, _sign),
    "Sin": (7, torch.sin),
    "Sinh": (9, torch.sinh),
    "Sqrt": (1, torch.sqrt),
    "Tan": (7, torch.tan),
}
_ADD, _SUB, _MUL = (_arithmetic(run) for run in (torch.add, torch.sub, torch.mul))

TABLE: Table = {
    **{(name, since): direct(run) for name, (since, run) in _UNARY.items()},
    ("Abs", 1): Op(_magnitude),
    ("Add", 1): legacy(_ADD),
    ("Add", 7): _ADD,
    ("Div", 1): legacy(Op(divide)),
    ("Div", 7): Op(divide),
    ("Max", 1): _fold(torch.maximum),
    ("Mean", 1): direct(mean),
    ("Min", 1): _fold(torch.minimum),
    ("Mod", 10): Op(mod),
    ("Mul", 1): legacy(_MUL),
    ("Mul", 7): _MUL,
    ("Pow", 1): legacy(direct(power)),
    ("Pow", 7): direct(power),
    ("Sub", 1): legacy(_SUB),
    ("Sub", 7): _SUB,
    ("Sum", 1): direct(lambda *args: reduce(torch.add, args)),
}
