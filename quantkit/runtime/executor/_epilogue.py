"""What follows a matrix product and can be computed with it: a bias, an activation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from quantkit.runtime.executor._constants import Constants
from quantkit.types import FloatArray

ERF_SLOPE = math.sqrt(0.5)
CLOSE = 1e-3
"""Of constants that exporters write in half precision."""


@dataclass(frozen=True)
class Epilogue:
    """Attributes:
    end: the node that makes the result.
    bias: [N] float32, or None.
    activation: none, relu, gelu or silu.
    """

    end: ir.Node
    bias: FloatArray | None
    activation: str


def epilogue(constants: Constants, node: ir.Node, bias: FloatArray | None, num_rows: int) -> Epilogue:
    """Everything behind `node` (whose first output is [..., N]) that nobody else reads the middle of."""
    added = None if bias is not None else _bias(constants, node, num_rows)
    if added is not None:
        node, bias = added
    for name, find in (("relu", _relu), ("gelu", _gelu), ("silu", _silu)):
        end = find(constants, node)
        if end is not None:
            return Epilogue(end, bias, name)
    return Epilogue(node, bias, "none")


def readers(node: ir.Node) -> tuple[ir.Node, ...]:
    """Who reads the node's only output, in the same graph; none when it is read elsewhere too."""
    value = node.outputs[0]
    nodes = tuple(use.node for use in value.uses())
    if value.is_graph_output() or any(item.graph is not node.graph for item in nodes):
        return ()
    return nodes


def only_reader(node: ir.Node, op_type: str) -> ir.Node | None:
    found = readers(node)
    return found[0] if len(found) == 1 and _is(found[0], op_type) else None


def _is(node: ir.Node, op_type: str) -> bool:
    return node.op_type == op_type and node.domain == ""


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The other input of a node with two; None when both are the same."""
    first, second = node.inputs[0], node.inputs[1]
    if first is second:
        return None
    return second if first is value else first


def _bias(constants: Constants, node: ir.Node, num_rows: int) -> tuple[ir.Node, FloatArray] | None:
    add = only_reader(node, "Add")
    value = None if add is None else _other(add, node.outputs[0])
    if add is None or value is None or value not in constants or value.shape is None:
        return None
    if list(value.shape) != [num_rows]:
        return None
    numbers = constants.array(value)
    return None if numbers.dtype.kind == "i" else (add, numbers.astype(np.float32))


def _relu(constants: Constants, node: ir.Node) -> ir.Node | None:
    del constants
    return only_reader(node, "Relu")


def _silu(constants: Constants, node: ir.Node) -> ir.Node | None:
    """v * Sigmoid(v)."""
    del constants
    found = readers(node)
    gate = next((item for item in found if _is(item, "Sigmoid")), None)
    product = None if gate is None else only_reader(gate, "Mul")
    if gate is None or product is None or len(found) != 2 or product not in found:
        return None
    return product if {*product.inputs} == {node.outputs[0], gate.outputs[0]} else None


def _gelu(constants: Constants, node: ir.Node) -> ir.Node | None:
    """Gelu, of the standard or of onnxruntime, or 0.5 * v * (1 + Erf(v / sqrt(2))) in any order."""
    found = readers(node)
    if len(found) == 1 and found[0].op_type == "Gelu" and found[0].domain in ("", "com.microsoft"):
        attributes = found[0].attributes
        exact = "approximate" not in attributes or attributes["approximate"].as_string() == "none"
        return found[0] if exact else None
    if len(found) != 2:
        return None
    value = node.outputs[0]
    for scaled in found:
        one_more = _one_plus_erf(constants, scaled, value)
        end = None if one_more is None else _half_product(constants, one_more, value)
        if end is not None:
            return end
    return None


def _one_plus_erf(constants: Constants, scaled: ir.Node, value: ir.Value) -> ir.Node | None:
    """The node that makes 1 + Erf(value / sqrt(2)), when `scaled` is the first step to it."""
    factor = _factor(constants, scaled, value)
    if factor is None or abs(factor - ERF_SLOPE) > CLOSE:
        return None
    erf = only_reader(scaled, "Erf")
    add = None if erf is None else only_reader(erf, "Add")
    if erf is None or add is None:
        return None
    one = _number(constants, _other(add, erf.outputs[0]))
    return add if one == 1 else None


def _half_product(constants: Constants, one_more: ir.Node, value: ir.Value) -> ir.Node | None:
    """The node that makes value * (1 + erf) * 0.5; the three factors in any order."""
    first = only_reader(one_more, "Mul")
    if first is None:
        return None
    second = only_reader(first, "Mul")
    for end, inner in ((first, None), (second, first)):
        if end is None:
            continue
        factors: list[ir.Value | None] = []
        for item in end.inputs:
            maker = None if item is None else item.producer()
            expand = maker is not None and (maker is inner or (item is not value and _scales(constants, maker, value)))
            factors += [*maker.inputs] if expand and maker is not None else [item]
        rest = [item for item in factors if item is not value and item is not one_more.outputs[0]]
        if len(factors) == 3 and len(rest) == 1 and _number(constants, rest[0]) == 0.5:
            return end
    return None


def _scales(constants: Constants, node: ir.Node, value: ir.Value) -> bool:
    """Whether the node is value * number, for one reader."""
    return _is(node, "Mul") and len(readers(node)) == 1 and _factor(constants, node, value) is not None


def _factor(constants: Constants, node: ir.Node, value: ir.Value) -> float | None:
    """c of value * c, or of value / (1/c)."""
    if not (_is(node, "Mul") or _is(node, "Div")) or value not in node.inputs:
        return None
    number = _number(constants, _other(node, value))
    if number is None or (node.op_type == "Div" and (node.inputs[0] is not value or number == 0)):
        return None
    return 1 / number if node.op_type == "Div" else number


def _number(constants: Constants, value: ir.Value | None) -> float | None:
    """A constant with a single element."""
    if value is None or value not in constants or value.shape is None:
        return None
    if any(not isinstance(dim, int) or dim != 1 for dim in value.shape):
        return None
    array = constants.array(value)
    return float(array.reshape(-1)[0]) if array.size == 1 else None
