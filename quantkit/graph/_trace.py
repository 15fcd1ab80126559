"""From the operand that a node reads back to the initializer it comes from, through operators that only re-arrange."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from quantkit.errors import InputError
from quantkit.types import Array

LAYOUT_OPERATORS = frozenset({"Transpose", "Reshape", "Identity", "Cast", "Squeeze", "Unsqueeze", "Flatten"})


@dataclass(frozen=True)
class Trace:
    """Where an operand comes from.

    Attributes:
        root: the value at which the walk back ended.
        path: the layout nodes from root to the operand, in order.
    """

    root: ir.Value
    path: tuple[ir.Node, ...]


def trace(value: ir.Value) -> Trace:
    """Walk back from an operand through layout operators whose other inputs are constants."""
    path: list[ir.Node] = []
    node = value.producer()
    while node is not None and is_layout_node(node):
        path.append(node)
        data = node.inputs[0]
        assert data is not None
        value, node = data, data.producer()
    return Trace(value, tuple(reversed(path)))


def is_layout_node(node: ir.Node) -> bool:
    if node.domain not in ("", "ai.onnx") or node.op_type not in LAYOUT_OPERATORS:
        return False
    if not node.inputs or node.inputs[0] is None:
        return False
    return all(extra is None or is_constant(extra) for extra in node.inputs[1:])


def is_constant(value: ir.Value) -> bool:
    """True for an initializer that no caller can override."""
    return value.const_value is not None and value.is_initializer() and not value.is_graph_input()


def follow(array: Array, path: tuple[ir.Node, ...]) -> Array:
    """What the layout nodes make of the root's array; a view of it wherever numpy can.

    Raises:
        InputError: a node does not fit the array, as a Transpose along axes that it has not.
    """
    for node in path:
        try:
            array = _STEPS[node.op_type](array, node)
        except (ArithmeticError, LookupError, MemoryError, TypeError, ValueError) as error:
            raise InputError(
                f"{node.op_type} '{node.name}' cannot re-arrange a weight of shape {list(array.shape)} ({error}): "
                "export the model again"
            ) from error
    return array


def static_shape(value: ir.Value) -> tuple[int, ...] | None:
    """The value's shape when every dimension is a known number."""
    if value.shape is None:
        return None
    dims = [dim for dim in value.shape if isinstance(dim, int)]
    return tuple(dims) if len(dims) == len(value.shape) else None


def _ints(node: ir.Node, name: str, index: int) -> tuple[int, ...] | None:
    """A list of integers that is an attribute in old opsets and an input in new ones."""
    if name in node.attributes:
        return tuple(node.attributes[name].as_ints())
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None or value.const_value is None:
        return None
    return tuple(int(number) for number in np.ravel(value.const_value.numpy()))


def _transpose(array: Array, node: ir.Node) -> Array:
    return array.transpose(_ints(node, "perm", len(node.inputs)))


def _reshape(array: Array, node: ir.Node) -> Array:
    shape = list(_ints(node, "shape", 1) or ())
    allow_zero = "allowzero" in node.attributes and node.attributes["allowzero"].as_int() == 1
    if not allow_zero:
        shape = [array.shape[axis] if dim == 0 else dim for axis, dim in enumerate(shape)]
    return array.reshape(shape)


def _cast(array: Array, node: ir.Node) -> Array:
    return array.astype(ir.DataType(node.attributes["to"].as_int()).numpy(), copy=False)


def _squeeze(array: Array, node: ir.Node) -> Array:
    return array.squeeze(_ints(node, "axes", 1))


def _unsqueeze(array: Array, node: ir.Node) -> Array:
    return np.expand_dims(array, _ints(node, "axes", 1) or ())


def _flatten(array: Array, node: ir.Node) -> Array:
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    axis += array.ndim if axis < 0 else 0
    rows = int(np.prod(array.shape[:axis]))
    return array.reshape(rows, array.size // rows if rows else 0)


_STEPS: dict[str, Any] = {
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Identity": lambda array, node: array,
    "Cast": _cast,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Flatten": _flatten,
}
