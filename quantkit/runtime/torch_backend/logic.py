"""Comparisons, logic, bits, choices."""

from __future__ import annotations

import onnx_ir as ir
import torch

from quantkit.runtime.torch_backend._integers import ordered, wrapped
from quantkit.runtime.torch_backend._types import Node, Op, Run, Table, direct
from quantkit.runtime.torch_backend.casting import plain
from quantkit.runtime.torch_backend.elementwise import legacy


def _comparison(run: Run) -> Op:
    return Op(lambda node: ordered(run, node.input_types[0]))


def _bits(run: Run) -> Op:
    return Op(lambda node: wrapped(run, node.input_types[0]))


def bit_shift(node: Node) -> Run:
    """Shifts by more bits than there are leave zeros, or the sign."""
    dtype = node.input_types[0]
    if node.attributes["direction"] == "LEFT":
        return wrapped(torch.bitwise_left_shift, dtype)
    if dtype == ir.DataType.UINT64:
        return _right_shift_uint64
    return torch.bitwise_right_shift


def _right_shift_uint64(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    kept = torch.bitwise_left_shift(torch.ones_like(y), 64 - y) - 1
    shifted = torch.where(y == 0, x, torch.bitwise_right_shift(x, y) & kept)
    return torch.where((y < 0) | (y >= 64), 0, shifted)


def is_nan(x: torch.Tensor) -> torch.Tensor:
    return torch.isnan(plain(x))


def is_inf(node: Node) -> Run:
    positive, negative = bool(node.get("detect_positive", 1)), bool(node.get("detect_negative", 1))
    if positive and negative:
        return lambda x: torch.isinf(plain(x))
    if positive:
        return lambda x: torch.isposinf(plain(x))
    if negative:
        return lambda x: torch.isneginf(plain(x))
    return lambda x: torch.zeros_like(x, dtype=torch.bool)


def where(condition: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.where(condition, x, y)


_AND, _OR, _XOR = (direct(run) for run in (torch.logical_and, torch.logical_or, torch.logical_xor))
_EQUAL, _GREATER, _LESS = direct(torch.eq), _comparison(torch.gt), _comparison(torch.lt)

TABLE: Table = {
    ("And", 1): legacy(_AND),
    ("And", 7): _AND,
    ("BitShift", 11): Op(bit_shift),
    ("BitwiseAnd", 18): direct(torch.bitwise_and),
    ("BitwiseNot", 18): _bits(torch.bitwise_not),
    ("BitwiseOr", 18): direct(torch.bitwise_or),
    ("BitwiseXor", 18): direct(torch.bitwise_xor),
    ("Equal", 1): legacy(_EQUAL),
    ("Equal", 7): _EQUAL,
    ("Greater", 1): legacy(_GREATER),
    ("Greater", 7): _GREATER,
    ("GreaterOrEqual", 12): _comparison(torch.ge),
    ("IsInf", 10): Op(is_inf),
    ("IsNaN", 9): direct(is_nan),
    ("Less", 1): legacy(_LESS),
    ("Less", 7): _LESS,
    ("LessOrEqual", 12): _comparison(torch.le),
    ("Not", 1): direct(torch.logical_not),
    ("Or", 1): legacy(_OR),
    ("Or", 7): _OR,
    ("Where", 9): direct(where),
    ("Xor", 1): legacy(_XOR),
    ("Xor", 7): _XOR,
}
