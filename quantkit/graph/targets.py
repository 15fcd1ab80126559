"""Find the weights that can be quantized, each seen as a matrix W[N, K] whatever its operator stores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from quantkit.errors import InputError
from quantkit.graph._ignore import apply_ignore
from quantkit.graph._trace import Trace, follow, is_constant, static_shape, trace
from quantkit.types import Array, FloatArray, Layout, Target, Use

MIN_ELEMENTS = 256
"""Below this, scales, zero points and the extra nodes take more bytes than narrower codes save."""
MIN_TABLE = (16, 8)
"""Fewest rows and columns of an embedding table."""

# Operator -> for each weight it bears: (suffix of the target's name, index of the weight, index of the data).
WEIGHTS: dict[str, tuple[tuple[str, int, int], ...]] = {
    "MatMul": (("", 1, 0),),
    "Gemm": (("", 1, 0),),
    "Conv": (("", 1, 0),),
    "ConvTranspose": (("", 1, 0),),
    "Gather": (("", 0, 1),),
    "LSTM": ((".W", 1, 0), (".R", 2, 0)),
    "GRU": ((".W", 1, 0), (".R", 2, 0)),
    "RNN": ((".W", 1, 0), (".R", 2, 0)),
}
QUANTIZED_OPERATORS = frozenset(
    {"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "MatMulNBits", "MatMulBnb4", "MatMulFpQ4", "QGemm"}
    | {"DynamicQuantizeMatMul", "MatMulIntegerToFloat", "DynamicQuantizeLSTM", "GatherBlockQuantized", "QMoE"}
    | {"QAttention", "QEmbedLayerNormalization", "QOrderedMatMul", "QOrderedGelu", "QLinearLeakyRelu"}
)
DEFAULT_DOMAINS = ("", "ai.onnx")
DTYPE_NAMES = {ir.DataType.DOUBLE: "float64", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
MASK_VALUE = 1e30
"""From here on a number in a table stands for infinity."""


@dataclass(frozen=True)
class Untouched:
    """A node that bears weights (or could) and stays as it is, with the reason."""

    name: str
    op: str
    reason: str


@dataclass(frozen=True)
class _Found:
    """One weight of one node, before shared weights are joined. `key` is equal for uses that share one target."""

    target: Target
    key: tuple[object, ...]


def find_targets(model: ir.Model, ignore: Sequence[str] = ()) -> tuple[dict[str, Target], list[Untouched]]:
    """Every weight that can be quantized by name, in graph order, and every weight-bearing node that is left alone.

    Nodes inside If, Loop and Scan bodies count as well. Uses that read one initializer in the same way become one
    target with several `uses`; a weight read in two ways (a tied embedding) becomes two targets.

    Args:
        model: normalised by `load_model`; not changed.
        ignore: what to leave alone, each entry one of: the exact name of a node, of a target or of a weight;
            `re:PATTERN`, a regular expression that must match the whole of one of these names; `op:TYPE`, an operator.

    Raises:
        InputError: an entry of `ignore` that matches nothing, or a weight of a shape that its operator cannot read.
    """
    found: list[_Found] = []
    untouched: list[Untouched] = []
    for node in model.graph.all_nodes():
        for suffix, weight_index, data_index in _weights(node):
            result = _examine(node, suffix, Use(node, weight_index, data_index))
            if isinstance(result, Untouched):
                untouched.append(result)
            elif result is not None:
                found.append(result)
        reason = _other_reason(node)
        if reason:
            untouched.append(Untouched(_node_name(node), node.op_type, reason))
    targets = _join(found)
    ignored = apply_ignore(ignore, targets, [(row.name, row.op) for row in untouched])
    untouched += [Untouched(name, targets[name].op, "ignored by the user") for name in targets if name in ignored]
    return {name: target for name, target in targets.items() if name not in ignored}, untouched


def load_operand(target: Target) -> FloatArray:
    """The weight as the node reads it: the initializer, through `target.path`, as float32. Do not write to it."""
    assert target.weight.const_value is not None
    operand = follow(target.weight.const_value.numpy(), target.path)
    return np.asarray(operand, dtype=np.float32)


def weight_values(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Each constant that a weight-bearing node reads as a weight or a bias, with the node (repeats for shared ones)."""
    for node in model.graph.all_nodes():
        slots = [index for _, index, _ in _weights(node)]
        if slots and node.op_type != "Gather":
            slots = [index for index in range(len(node.inputs)) if index in slots or index > max(slots)]
        for index in slots:
            value = node.inputs[index] if index < len(node.inputs) else None
            if value is not None and is_constant(root := trace(value).root):
                yield node, root


def _weights(node: ir.Node) -> tuple[tuple[str, int, int], ...]:
    return WEIGHTS.get(node.op_type, ()) if node.domain in DEFAULT_DOMAINS else ()


def _node_name(node: ir.Node) -> str:
    return node.name or f"{node.op_type}/{node.outputs[0].name}"


def _examine(node: ir.Node, suffix: str, use: Use) -> _Found | Untouched | None:
    """One weight of one node; None when the node reads no weight there at all."""
    operand = node.inputs[use.weight_index] if use.weight_index < len(node.inputs) else None
    if operand is None:
        return None
    origin = trace(operand)
    if node.op_type == "Gather" and not _is_float(origin):
        return None  # a lookup among shapes, indices and the like
    shape: tuple[int, ...] = ()
    if is_constant(origin.root):
        reason = _root_reason(origin)
        if reason is None:
            shape = static_shape(operand) or follow(_array(origin.root), origin.path).shape
            reason = _shape_reason(node, shape) or _mask_reason(node, origin)
    else:
        reason = _unknown_reason(node, origin)
        if reason is None:
            return None
    name = _node_name(node) + suffix
    if reason is not None:
        return Untouched(name, node.op_type, reason)
    _check_shape(node, origin.root, shape)
    matrix, groups, layout = _orientation(node, shape)
    target = Target(name, node.op_type, (use,), origin.root, matrix, groups, layout, origin.path)
    return _Found(target, (origin.root, node.op_type, suffix, matrix, groups, layout, path_key(origin.path)))


def _is_float(origin: Trace) -> bool:
    dtype = origin.root.dtype
    return dtype is None or dtype.is_floating_point()


def _array(value: ir.Value) -> Array:
    assert value.const_value is not None
    return value.const_value.numpy()


def _unknown_reason(node: ir.Node, origin: Trace) -> str | None:
    """Why there is no constant at the end of the walk back; None when the node is an ordinary lookup."""
    root, producer = origin.root, origin.root.producer()
    if root.is_initializer() and root.is_graph_input():
        return "the weight is also a graph input, so a caller may override it"
    if producer is not None and producer.op_type == "DequantizeLinear":
        codes = producer.inputs[0]
        if codes is not None and trace(codes).root.is_initializer():
            return f"already quantized (DequantizeLinear '{_node_name(producer)}')"
    if node.op_type == "Gather":
        return None
    if node.op_type == "MatMul":
        left = node.inputs[0]
        if left is not None and is_constant(trace(left).root):
            return "the constant is the left operand"
        return "both operands are activations"
    if producer is not None:
        return f"the weight is computed by {producer.op_type} '{_node_name(producer)}'"
    return f"the weight '{root.name}' is an input, not a constant"


def _root_reason(origin: Trace) -> str | None:
    if origin.root.is_graph_output():
        return "the weight is also a graph output"
    assert origin.root.const_value is not None
    dtypes = [origin.root.const_value.dtype, *(_cast_type(node) for node in origin.path if node.op_type == "Cast")]
    for dtype in dtypes:
        if not dtype.is_floating_point():
            return f"integer weight ({dtype.name.lower()})"
        if dtype.bitwidth < 16:
            return f"already quantized ({dtype.name.lower()} weight)"
    if dtypes[-1] != ir.DataType.FLOAT:
        return f"{DTYPE_NAMES[dtypes[-1]]} weight: convert the model to float32 first"
    return None


def _cast_type(node: ir.Node) -> ir.DataType:
    to = node.attributes["to"].as_int()
    try:
        return ir.DataType(to)
    except ValueError as error:
        raise InputError(f"Cast '{node.name}' makes the unknown data type {to}: export the model again") from error


def _shape_reason(node: ir.Node, shape: tuple[int, ...]) -> str | None:
    if node.op_type == "Gather":
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        if len(shape) != 2:
            return f"the table has {len(shape)} dimensions, not 2"
        if axis not in (0, -2):
            return f"it looks up along axis {axis}, not along the rows"
        if shape[0] < MIN_TABLE[0] or shape[1] < MIN_TABLE[1]:
            return f"too small to gain ({shape[0]} x {shape[1]})"
    elif len(shape) < 2:
        return "the weight is a vector"
    size = math.prod(shape)
    return f"too small to gain ({size} elements)" if size < MIN_ELEMENTS else None


def _mask_reason(node: ir.Node, origin: Trace) -> str | None:
    """A float table with infinities, or numbers that stand for them, is an attention mask and no embedding."""
    if node.op_type == "Gather" and not (np.abs(_array(origin.root)) < MASK_VALUE).all():
        return "the table holds infinities, as a mask does"
    return None


def _check_shape(node: ir.Node, root: ir.Value, shape: tuple[int, ...]) -> None:
    """The operator can read a weight of this shape at all."""
    ranks = {"Gemm": (2,), "LSTM": (3,), "GRU": (3,), "RNN": (3,), "Conv": range(3, 9), "ConvTranspose": range(3, 9)}
    groups = node.attributes["group"].as_int() if "group" in node.attributes else 1
    whole = node.op_type not in ("Conv", "ConvTranspose") or (groups > 0 and shape[0] % groups == 0)
    if len(shape) not in ranks.get(node.op_type, (len(shape),)) or not whole:
        grouped = f" in {groups} groups" if groups != 1 else ""
        raise InputError(
            f"{node.op_type} '{_node_name(node)}' cannot read the weight '{root.name}' of shape {list(shape)}{grouped}"
            ": export the model again"
        )


def _orientation(node: ir.Node, shape: tuple[int, ...]) -> tuple[tuple[int, int], int, Layout]:
    """(N, K), groups and layout of an operand."""
    axes = tuple(range(len(shape)))
    if node.op_type == "MatMul":  # [..., K, N]; the slices of a batched constant become further rows
        size = math.prod(shape)
        return (size // shape[-2], shape[-2]), 1, Layout(shape, shape, (*axes[:-2], axes[-1], axes[-2]))
    if node.op_type == "Gemm":
        if "transB" in node.attributes and node.attributes["transB"].as_int():
            return (shape[0], shape[1]), 1, Layout(shape, shape, axes)
        return (shape[1], shape[0]), 1, Layout(shape, shape, (1, 0))
    groups = node.attributes["group"].as_int() if "group" in node.attributes else 1
    if node.op_type == "ConvTranspose":  # [I, O/groups, *kernel] -> rows (group, O/groups, *kernel), columns I/groups
        view = (groups, shape[0] // groups, *shape[1:])
        rows = groups * math.prod(shape[1:])
        return (rows, shape[0] // groups), groups, Layout(shape, view, (0, *range(2, len(view)), 1))
    if node.op_type in ("LSTM", "GRU", "RNN"):  # [directions, gates*hidden, K]
        return (shape[0] * shape[1], shape[2]), 1, Layout(shape, shape, axes)
    return (shape[0], math.prod(shape[1:])), groups, Layout(shape, shape, axes)  # Conv, Gather


def path_key(path: tuple[ir.Node, ...]) -> tuple[object, ...]:
    """Equal for two paths that do the same, node for node."""
    key: list[object] = []
    for node in path:
        attributes = tuple(sorted((name, str(attribute.value)) for name, attribute in node.attributes.items()))
        extras = tuple(
            extra.const_value.tobytes() for extra in node.inputs[1:] if extra is not None and extra.const_value
        )
        key.append((node.op_type, attributes, extras))
    return tuple(key)


def _join(found: Sequence[_Found]) -> dict[str, Target]:
    """One target per key, named uniquely."""
    joined: dict[tuple[object, ...], Target] = {}
    for item in found:
        known = joined.get(item.key)
        joined[item.key] = replace(known, uses=known.uses + item.target.uses) if known else item.target
    targets: dict[str, Target] = {}
    for target in joined.values():
        name, count = target.name, 1
        while name in targets:
            count += 1
            name = f"{target.name}_{count}"
        targets[name] = replace(target, name=name)
    return targets


def _other_reason(node: ir.Node) -> str | None:
    """Why an operator outside WEIGHTS that reads a matrix of parameters stays; None when it reads none."""
    if node.op_type in QUANTIZED_OPERATORS:
        return "already quantized"
    if _weights(node) or (node.domain in DEFAULT_DOMAINS and node.op_type not in ("Einsum", "DeformConv")):
        return None
    for value in node.inputs:
        tensor = trace(value).root.const_value if value is not None else None
        if tensor is None or not tensor.dtype.is_floating_point() or len(tensor.shape) < 2:
            continue
        if tensor.size >= MIN_ELEMENTS:
            operator = node.op_type if node.domain in DEFAULT_DOMAINS else f"{node.domain}.{node.op_type}"
            return f"no form for the operator {operator}"
    return None
