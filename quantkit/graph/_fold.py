"""Fold arithmetic that follows a layer into its weights: Gemm's alpha and beta, a bias Add, batch normalisation.

onnxscript has rules for some of these, but they pass over weights that are shared, biases that are added apart, and
MatMul, and they do not look at `training_mode`. Here every fold gives the layer its own copy of what changes.

    y = BN(W x + b) = g/sqrt(v+e) * (W x + b - m) + beta    =>    W' = s W,  b' = s (b - m) + beta,  s = g/sqrt(v+e)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from quantkit.graph._trace import follow, is_constant, static_shape, trace
from quantkit.types import Array

CONVOLUTIONS = ("Conv", "ConvTranspose")


def fold_layers(model: ir.Model) -> list[str]:
    """Fold in place, subgraphs too, until nothing changes; returns what was done, for the user."""
    steps: dict[str, tuple[str, Callable[[ir.Node, ir.Graph], bool]]] = {
        "Gemm": ("folded alpha/beta of {} Gemm", _fold_gemm_factors),
        "Add": ("merged {} bias Add into a convolution", _fold_bias),
        "BatchNormalization": ("folded {} BatchNormalization", _fold_batch_norm),
    }
    counts: Counter[str] = Counter()
    changed = True
    while changed:
        changed = False
        for node in list(model.graph.all_nodes()):
            if node.graph is None or node.domain != "" or node.op_type not in steps:
                continue
            text, fold = steps[node.op_type]
            if fold(node, model.graph):
                counts[text] += 1
                changed = True
    return [text.format(counts[text]) for text, _ in steps.values() if counts[text]]


def _constant(value: ir.Value | None) -> Array | None:
    """The value's array when it is a constant, seen through layout operators."""
    if value is None:
        return None
    origin = trace(value)
    if not is_constant(origin.root):
        return None
    assert origin.root.const_value is not None
    return follow(origin.root.const_value.numpy(), origin.path)


def _set(node: ir.Node, index: int, array: Array, main: ir.Graph, suffix: str) -> None:
    """Let the node read its own new constant; other readers of the old one are not touched."""
    old = node.inputs[index] if index < len(node.inputs) else None
    base = old.name if old is not None and old.name else f"{node.name}{suffix}"
    name, count = base, 1
    while name in main.initializers:
        count += 1
        name = f"{base}_{count}"
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    main.register_initializer(value)
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)


def _number(node: ir.Node, name: str, default: float) -> float:
    return node.attributes[name].as_float() if name in node.attributes else default


def _flag(node: ir.Node, name: str, default: int = 0) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _fold_gemm_factors(node: ir.Node, main: ir.Graph) -> bool:
    """alpha goes into a constant B, beta into a constant C."""
    changed = False
    alpha, beta = _number(node, "alpha", 1.0), _number(node, "beta", 1.0)
    if alpha != 1.0 and (weight := _constant(node.inputs[1])) is not None:
        _set(node, 1, (weight * np.float64(alpha)).astype(weight.dtype), main, ".weight")
        del node.attributes["alpha"]
        changed = True
    offset = node.inputs[2] if len(node.inputs) > 2 else None
    if beta == 1.0:
        return changed
    if offset is None or beta == 0.0:
        node.resize_inputs(2)
    elif (bias := _constant(offset)) is not None:
        _set(node, 2, (bias * np.float64(beta)).astype(bias.dtype), main, ".bias")
    else:
        _multiply_before(node, 2, beta, main)
    del node.attributes["beta"]
    return True


def _multiply_before(node: ir.Node, index: int, factor: float, main: ir.Graph) -> None:
    """Multiply an activation by a number before the node reads it."""
    data = node.inputs[index]
    assert data is not None and node.graph is not None
    multiply = ir.node("Mul", [data, None], name=f"{node.name}.Mul")
    multiply.outputs[0].name, multiply.outputs[0].shape = f"{node.name}.Mul.out", data.shape
    multiply.outputs[0].type = data.type
    node.graph.insert_before(node, multiply)
    _set(multiply, 1, np.array(factor, dtype=(data.dtype or ir.DataType.FLOAT).numpy()), main, ".factor")
    node.replace_input_with(index, multiply.outputs[0])


def _only_reader(value: ir.Value, node: ir.Node) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output() and node.graph is value.graph


def _take_over(layer: ir.Node, node: ir.Node) -> None:
    """The layer makes what `node` made, under its name; `node` goes."""
    old, new = node.outputs[0], layer.outputs[0]
    name, shape = old.name, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph = node.graph
    assert graph is not None
    graph.remove(node, safe=True)
    new.name, new.shape = name, shape if shape is not None else new.shape


def _layer_before(value: ir.Value | None, node: ir.Node, kinds: tuple[str, ...]) -> ir.Node | None:
    """The layer of one of these kinds that makes the value for `node` alone."""
    layer = value.producer() if value is not None else None
    if value is None or layer is None or layer.domain != "" or layer.op_type not in kinds:
        return None
    return layer if _only_reader(value, node) else None


def _num_outputs(layer: ir.Node, weight: Array) -> int:
    if layer.op_type == "ConvTranspose":
        return int(weight.shape[1]) * _flag(layer, "group", 1)
    if layer.op_type == "MatMul" or (layer.op_type == "Gemm" and not _flag(layer, "transB")):
        return int(weight.shape[-1])
    return int(weight.shape[0])


def _fold_bias(node: ir.Node, main: ir.Graph) -> bool:
    """Add(Conv(x), constant per channel) -> Conv with that bias."""
    for index in (0, 1):
        layer = _layer_before(node.inputs[index], node, CONVOLUTIONS)
        extra = _constant(node.inputs[1 - index])
        if layer is None or extra is None:
            continue
        weight_value = layer.inputs[1]
        weight_shape = static_shape(weight_value) if weight_value is not None else None
        if weight_shape is None:
            continue
        groups = _flag(layer, "group", 1)
        channels = weight_shape[1] * groups if layer.op_type == "ConvTranspose" else weight_shape[0]
        bias = _per_channel(extra, len(weight_shape), channels)
        old = layer.inputs[2] if len(layer.inputs) > 2 else None
        old_bias = _constant(old)
        if bias is None or (old is not None and old_bias is None):
            continue
        total = bias if old_bias is None else bias.astype(np.float64) + old_bias
        _set(layer, 2, total.astype(extra.dtype), main, ".bias")
        _take_over(layer, node)
        return True
    return False


def _per_channel(array: Array, rank: int, channels: int) -> Array | None:
    """[channels] of a constant that broadcasts against [batch, channels, ...] along channels alone, or None."""
    if array.ndim > rank:
        return None
    shape = (1,) * (rank - array.ndim) + array.shape
    if shape[1] not in (1, channels) or any(dim != 1 for axis, dim in enumerate(shape) if axis != 1):
        return None
    return np.broadcast_to(array.reshape(-1), (channels,))


def _fold_batch_norm(node: ir.Node, main: ir.Graph) -> bool:
    if _flag(node, "training_mode") or any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return False
    parameters = [_constant(value) for value in node.inputs[1:5]]
    vectors = [array.astype(np.float64) for array in parameters if array is not None]
    if len(vectors) < 4 or len({vector.shape for vector in vectors}) != 1:
        return False
    gamma, beta, mean, variance = vectors
    scale = gamma / np.sqrt(variance + _number(node, "epsilon", 1e-5))
    data = node.inputs[0]
    layer = _layer_before(data, node, (*CONVOLUTIONS, "Gemm", "MatMul"))
    if layer is not None:
        return _scale_layer(layer, node, scale, beta - mean * scale, main)
    add = _layer_before(data, node, ("Add",))
    return add is not None and _scale_matmul_and_add(add, node, scale, beta - mean * scale, main)


def _scaled(layer: ir.Node, weight: Array, scale: Array) -> Array:
    """The weight with each output multiplied by its scale."""
    wide = weight.astype(np.float64)
    if layer.op_type == "ConvTranspose":  # [I, O/groups, ...]: group j of the inputs makes group j of the outputs
        groups, rest = _flag(layer, "group", 1), weight.ndim - 2
        split = wide.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        wide = (split * scale.reshape(groups, 1, -1, *(1,) * rest)).reshape(weight.shape)
    elif layer.op_type == "MatMul" or (layer.op_type == "Gemm" and not _flag(layer, "transB")):
        wide = wide * scale
    else:
        wide = wide * scale.reshape(-1, *(1,) * (weight.ndim - 1))
    return wide.astype(weight.dtype)


def _scale_layer(layer: ir.Node, node: ir.Node, scale: Array, shift: Array, main: ir.Graph) -> bool:
    weight = _constant(layer.inputs[1])
    if weight is None or _num_outputs(layer, weight) != scale.size:
        return False
    if layer.op_type == "MatMul":
        if weight.ndim != 2 or not _is_matrix(layer.outputs[0]):
            return False  # the channels of the normalisation are not the columns of the product
        _set(layer, 1, _scaled(layer, weight, scale), main, ".weight")
        _become_add(node, shift.astype(weight.dtype), main)
        return True
    old = layer.inputs[2] if len(layer.inputs) > 2 else None
    bias = _constant(old)
    if old is not None and (bias is None or not _is_row(bias, scale.size)):
        return False
    if layer.op_type == "Gemm" and _number(layer, "beta", 1.0) != 1.0:
        return False
    new_bias = shift if bias is None else np.broadcast_to(bias.reshape(-1), scale.shape) * scale + shift
    _set(layer, 1, _scaled(layer, weight, scale), main, ".weight")
    _set(layer, 2, new_bias.astype(weight.dtype), main, ".bias")
    _take_over(layer, node)
    return True


def _is_row(bias: Array, size: int) -> bool:
    """True for one number, or one number per output: [size], [1, size]."""
    return bias.size == 1 or (bias.size == size and bias.shape[-1] == size and bias.ndim <= 2)


def _is_matrix(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) == 2


def _become_add(node: ir.Node, shift: Array, main: ir.Graph) -> None:
    """BatchNormalization(x, ...) -> Add(x, shift), in the same place and under the same names."""
    node.op_type = "Add"
    node.attributes.clear()
    node.resize_outputs(1)
    node.resize_inputs(2)
    node.replace_input_with(1, None)
    _set(node, 1, shift, main, ".bias")


def _scale_matmul_and_add(add: ir.Node, node: ir.Node, scale: Array, shift: Array, main: ir.Graph) -> bool:
    """BatchNormalization(MatMul(x, W) + bias) -> MatMul(x, W') + bias'."""
    for index in (0, 1):
        layer = _layer_before(add.inputs[index], add, ("MatMul",))
        bias = _constant(add.inputs[1 - index])
        if layer is None or bias is None or not _is_matrix(layer.outputs[0]):
            continue
        weight = _constant(layer.inputs[1])
        if weight is None or weight.ndim != 2 or weight.shape[1] != scale.size or not _is_row(bias, scale.size):
            continue
        new_bias = np.broadcast_to(bias.reshape(-1), scale.shape) * scale + shift
        _set(layer, 1, _scaled(layer, weight, scale), main, ".weight")
        _set(add, 1 - index, new_bias.astype(weight.dtype), main, ".bias")
        _take_over(add, node)
        return True
    return False
