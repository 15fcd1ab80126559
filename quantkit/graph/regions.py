"""Where static integer layers put their activations on a uint8 grid, so that the integer path is never broken.

A value is quantized when an integer layer reads it or a convolution makes it. Pooling, shape operators, Concat, Add and
the like between such values work on integers too: shape operators on the codes themselves, so that no needless pair
stands in the way; Relu and Clip in front of a pair vanish into its range. Everything else stays float.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from quantkit.types import ActParams

# These only move or pick elements: they run on the uint8 codes, and share one scale from end to end.
CODE_OPERATORS = frozenset(
    {"MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Pad", "Split", "Resize"}
    | {"DepthToSpace", "SpaceToDepth", "Identity"}
)
# onnxruntime has integer kernels for these when all inputs and the output are quantized.
ARITHMETIC_OPERATORS = frozenset(
    {"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu", "Softmax"}
)
CLIPPING_OPERATORS = frozenset({"Relu", "Clip"})


@dataclass(frozen=True)
class Regions:
    """The integer part of a graph.

    Attributes:
        groups: value name -> name of its group; one scale and zero point per group.
        produced: names of values that an integer operator makes (every reader sees the quantized value).
        absorbed: names of Relu/Clip nodes that the following range replaces, with the (low, high) they impose.
        code_nodes: names of shape operators that run on codes.
        integer_nodes: names of layers and arithmetic that run on integers.
    """

    groups: Mapping[str, str]
    produced: frozenset[str]
    absorbed: Mapping[str, tuple[float, float]]
    code_nodes: frozenset[str]
    integer_nodes: frozenset[str]

    def members(self, group: str) -> list[str]:
        return [name for name, owner in self.groups.items() if owner == group]

    def bounds(self, group: str) -> tuple[float, float]:
        """The range that absorbed Relu/Clip nodes leave for a group (-inf, inf when there are none)."""
        low, high = -np.inf, np.inf
        for name in self.members(group):
            if name in self.absorbed:
                low, high = max(low, self.absorbed[name][0]), min(high, self.absorbed[name][1])
        return low, high


class _Finder:
    """One walk over the main graph: which operators compute on integers."""

    def __init__(self, model: ir.Model, layers: Sequence[str]) -> None:
        self.graph = model.graph
        self.layers = frozenset(layers)
        self.wanted: dict[ir.Value, bool] = {}
        self.produced: dict[ir.Value, ir.Node] = {}

    def is_layer(self, node: ir.Node) -> bool:
        return node.name in self.layers

    def absorb(self, value: ir.Value) -> ir.Value:
        """The value after a Relu/Clip that is `value`'s only reader, else `value` itself."""
        readers = list(value.uses())
        if len(readers) != 1 or value.is_graph_output():
            return value
        node, index = readers[0]
        if node.op_type in CLIPPING_OPERATORS and index == 0 and clip_range(node) is not None:
            return node.outputs[0]
        return value

    def wants(self, value: ir.Value) -> bool:
        """True when somebody downstream computes on this value as an integer."""
        if value not in self.wanted:
            self.wanted[value] = False  # graphs have no cycles; this only guards against malformed ones
            self.wanted[value] = any(self._reader_wants(node, index) for node, index in value.uses())
        return self.wanted[value]

    def _reader_wants(self, node: ir.Node, index: int) -> bool:
        if node.graph is not self.graph:
            return False
        if self.is_layer(node):
            return index == 0
        if node.op_type in CODE_OPERATORS:
            return index == 0 and code_operator(node) and any(self.wants(out) for out in node.outputs)
        if node.op_type in ARITHMETIC_OPERATORS:
            return arithmetic_inputs(node) is not None and self.wants(self.absorb(node.outputs[0]))
        return False

    def integer(self, node: ir.Node) -> bool:
        """Does this node compute on integers, given what is known of its inputs?"""
        if self.is_layer(node):
            return True
        if node.op_type in CODE_OPERATORS:
            source = node.inputs[0]
            return code_operator(node) and source in self.produced and any(self.wants(out) for out in node.outputs)
        if node.op_type in ARITHMETIC_OPERATORS:
            inputs = arithmetic_inputs(node)
            if inputs is None or not any(value in self.produced for value in inputs):
                return False
            return self.wants(self.absorb(node.outputs[0]))
        return False


def find_regions(model: ir.Model, layers: Sequence[str], *, share_concat: bool = True) -> Regions:
    """Where the integer layers (node names, main graph) need quantized values, and what joins them.

    Args:
        model: normalised graph.
        layers: names of nodes that run as static integer kernels.
        share_concat: give the inputs of a Concat its output's scale, so that it is a plain copy.
    """
    finder = _Finder(model, layers)
    union = _Union()
    absorbed: dict[str, tuple[float, float]] = {}
    code_nodes: set[str] = set()
    integer_nodes: set[str] = set()
    produced: set[str] = set()
    for node in model.graph:
        if not finder.integer(node):
            continue
        inputs = _quantized_inputs(node, finder)
        if node.op_type in CODE_OPERATORS and not finder.is_layer(node):
            code_nodes.add(str(node.name))
            outputs = list(node.outputs)
            for value in outputs:
                union.join(inputs[0], value)
        else:
            integer_nodes.add(str(node.name))
            result = finder.absorb(node.outputs[0])
            keep_float = finder.is_layer(node) and node.op_type != "Conv" and not finder.wants(result)
            outputs = [] if keep_float else [result]
            if outputs and result is not node.outputs[0]:
                clip = result.producer()
                assert clip is not None
                bounds = clip_range(clip)
                assert bounds is not None
                absorbed[str(result.name)] = bounds
            joins = node.op_type == "Concat" and share_concat and result is node.outputs[0]
            # A Relu'd input must keep a range from 0, or its Relu could not be absorbed.
            if joins and len({union.bounds(value, absorbed) for value in inputs}) == 1:
                for value in inputs:
                    union.join(value, result)
        for value in [*inputs, *outputs]:
            union.add(value)
        finder.produced.update((value, node) for value in outputs)
        produced.update(str(value.name) for value in outputs)
    groups = {str(value.name): str(union.root(value).name) for value in union.order}
    return Regions(groups, frozenset(produced), absorbed, frozenset(code_nodes), frozenset(integer_nodes))


def _quantized_inputs(node: ir.Node, finder: _Finder) -> list[ir.Value]:
    if not finder.is_layer(node) and node.op_type in ARITHMETIC_OPERATORS:
        return arithmetic_inputs(node) or []
    value = node.inputs[0]
    assert value is not None
    return [value]


class _Union:
    """Disjoint sets of values, in the order they were met."""

    def __init__(self) -> None:
        self.parent: dict[ir.Value, ir.Value] = {}

    @property
    def order(self) -> list[ir.Value]:
        return list(self.parent)

    def add(self, value: ir.Value) -> None:
        self.parent.setdefault(value, value)

    def root(self, value: ir.Value) -> ir.Value:
        self.add(value)
        while self.parent[value] is not value:
            value = self.parent[value]
        return value

    def bounds(self, value: ir.Value, absorbed: Mapping[str, tuple[float, float]]) -> tuple[float, float] | None:
        """What the absorbed Relu/Clip of the value's group allow, or None."""
        root = self.root(value)
        found = {
            absorbed[str(other.name)] for other in self.parent if self.root(other) is root and other.name in absorbed
        }
        return min(found, key=lambda pair: pair[1]) if found else None

    def join(self, first: ir.Value, second: ir.Value) -> None:
        self.parent[self.root(second)] = self.root(first)


def arithmetic_inputs(node: ir.Node) -> list[ir.Value] | None:
    """The activations of an arithmetic operator, or None when a constant among them keeps it float."""
    inputs = [value for value in node.inputs if value is not None]
    if any(value.const_value is not None for value in inputs):
        return None
    return inputs


def code_operator(node: ir.Node) -> bool:
    """Can this shape operator run on uint8 codes just as on floats?"""
    if node.op_type == "MaxPool":
        return len(node.outputs) == 1
    if node.op_type == "Resize":
        mode = node.attributes.get("mode")
        return mode is None or mode.as_string() == "nearest"
    if node.op_type == "Pad":
        mode = node.attributes.get("mode")
        fill = node.inputs[2] if len(node.inputs) > 2 else None
        is_constant = mode is None or mode.as_string() == "constant"
        return is_constant and (fill is None or (fill.const_value is not None and not np.any(fill.const_value.numpy())))
    return True


def clip_range(node: ir.Node) -> tuple[float, float] | None:
    """(low, high) of a Relu or a Clip with constant bounds that contain 0 at an end, else None.

    Only a bound at 0 (Relu, Clip(0, 6)) falls on the grid exactly; other Clips stay in the graph.
    """
    if node.op_type == "Relu":
        return 0.0, float("inf")
    bounds = []
    for index, missing in ((1, -np.inf), (2, np.inf)):
        value = node.inputs[index] if len(node.inputs) > index else None
        if value is None:
            bounds.append(missing)
        elif value.const_value is None:
            return None
        else:
            bounds.append(float(value.const_value.numpy()))
    return (bounds[0], bounds[1]) if bounds[0] == 0.0 and bounds[1] > 0.0 else None


def insert_pairs(
    model: ir.Model, regions: Regions, params: Mapping[str, ActParams], constant: Callable[[np.ndarray, str], ir.Value]
) -> None:
    """Write QuantizeLinear/DequantizeLinear for every value of the regions, in place.

    Args:
        model: the graph that `regions` was found on, or a clone of it.
        regions: see find_regions.
        params: group name -> scale and zero point.
        constant: makes (and shares) initializers.
    """
    graph = model.graph
    nodes = {str(node.name): node for node in graph}
    outputs = {str(value.name): value for node in graph for value in node.outputs}
    for name in regions.absorbed:
        _remove_clip(outputs[name])
    values = {str(value.name): value for value in graph.inputs}
    values |= {str(value.name): value for node in graph for value in node.outputs}
    codes: dict[str, ir.Value] = {}
    for name, group in regions.groups.items():
        act = params[group]
        scale = constant(np.array(act.scale, np.float32), f"{group}.scale")
        zero = constant(np.array(act.zero_point, np.uint8), f"{group}.zero_point")
        value = values[name]
        producer = value.producer()
        if producer is not None and str(producer.name) in regions.code_nodes:
            _dequantize_codes(value, scale, zero, codes)
        else:
            _quantize_value(model, value, scale, zero, regions, codes)
    for name in regions.code_nodes:
        node = nodes[name]
        source = node.inputs[0]
        assert source is not None
        pair = source.producer()
        assert pair is not None and pair.op_type == "DequantizeLinear"
        node.replace_input_with(0, pair.inputs[0])
        if node.op_type == "Pad":
            _pad_with_zero_point(node, pair.inputs[2])


def _remove_clip(value: ir.Value) -> None:
    """Give the Relu/Clip's output name to its input and drop the node: the following range clips."""
    node = value.producer()
    assert node is not None and node.graph is not None
    source = node.inputs[0]
    assert source is not None and source.producer() is not None
    producer = source.producer()
    assert producer is not None
    name, index = value.name, producer.outputs.index(source)
    assert index == 0
    is_output = value.is_graph_output()
    value.replace_all_uses_with(source, replace_graph_outputs=is_output)
    node.graph.remove(node, safe=True)
    value.name = f"{name}.clipped"
    source.name = name


def _is_integer_reader(node: ir.Node, index: int, regions: Regions) -> bool:
    name = str(node.name)
    if name in regions.code_nodes:
        return index == 0
    if name not in regions.integer_nodes:
        return False
    return index == 0 or node.op_type in ARITHMETIC_OPERATORS


def _quantize_value(
    model: ir.Model, value: ir.Value, scale: ir.Value, zero: ir.Value, regions: Regions, codes: dict[str, ir.Value]
) -> None:
    """value -> QuantizeLinear -> DequantizeLinear; readers move over (all of them if integers made the value)."""
    everybody = value.name in regions.produced
    readers = [use for use in value.uses() if everybody or _is_integer_reader(use[0], use[1], regions)]
    quantize = ir.node("QuantizeLinear", [value, scale, zero])
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero])
    quantize.outputs[0].name, dequantize.outputs[0].name = f"{value.name}.q", f"{value.name}.dq"
    dequantize.outputs[0].shape, dequantize.outputs[0].type = value.shape, value.type
    producer = value.producer()
    if producer is None:
        model.graph.insert_before(model.graph[0], [quantize, dequantize])
    else:
        model.graph.insert_after(producer, [quantize, dequantize])
    for node, index in readers:
        node.replace_input_with(index, dequantize.outputs[0])
    if everybody and value.is_graph_output():
        position = list(model.graph.outputs).index(value)
        model.graph.outputs[position] = dequantize.outputs[0]
        name = value.name
        value.name = f"{name}.float"
        dequantize.outputs[0].name = name
    codes[str(value.name)] = quantize.outputs[0]


def _dequantize_codes(value: ir.Value, scale: ir.Value, zero: ir.Value, codes: dict[str, ir.Value]) -> None:
    """The output of a shape operator that now yields codes: readers see it dequantized."""
    producer = value.producer()
    assert producer is not None and producer.graph is not None
    dequantize = ir.node("DequantizeLinear", [value, scale, zero])
    real = dequantize.outputs[0]
    readers = list(value.uses())
    readers = [use for use in readers if use[0] is not dequantize]
    producer.graph.insert_after(producer, dequantize)
    real.shape, real.type = value.shape, value.type
    for node, index in readers:
        node.replace_input_with(index, real)
    name = str(value.name)
    if value.is_graph_output():
        outputs = producer.graph.outputs
        outputs[list(outputs).index(value)] = real
        real.name, value.name = name, f"{name}.q"
    else:
        real.name, value.name = f"{name}.dq", f"{name}.q"
    value.type = ir.TensorType(ir.DataType.UINT8)
    codes[name] = value


def _pad_with_zero_point(node: ir.Node, zero: ir.Value | None) -> None:
    """Padding with real 0 is padding with the code of 0."""
    if len(node.inputs) > 2:
        node.replace_input_with(2, zero)
        return
    replaced = ir.node("Pad", [*node.inputs, zero], dict(node.attributes), outputs=None, num_outputs=1, name=node.name)
    old, new = node.outputs[0], replaced.outputs[0]
    assert node.graph is not None
    node.graph.insert_before(node, replaced)
    new.shape, new.type = old.shape, old.type
    name = old.name
    old.replace_all_uses_with(new, replace_graph_outputs=old.is_graph_output())
    node.graph.remove(node, safe=True)
    old.name, new.name = f"{name}.old", name
