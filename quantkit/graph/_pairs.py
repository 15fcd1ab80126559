"""Write what `quantkit.graph.regions` found into a graph: QuantizeLinear/DequantizeLinear, and operators on codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from quantkit.graph._integer import ARITHMETIC_OPERATORS, clip_range, constant_codes
from quantkit.types import ActParams, Array

if TYPE_CHECKING:
    from quantkit.graph.regions import Regions

Constant = Callable[[Array, str], ir.Value]
# What onnxruntime turns into integers by itself between two pairs: constant weights, with one scale for all of them,
# and averages, wrongly where they are not among the integer nodes.
SEIZED_OPERATORS = frozenset({"Conv", "ConvTranspose", "Gemm", "AveragePool"})
PAD_AXES = 3
"""Index of Pad's optional list of axes."""


def insert_pairs(model: ir.Model, regions: Regions, params: Mapping[str, ActParams], constant: Constant) -> None:
    """Write QuantizeLinear/DequantizeLinear for every value of the regions, in place.

    Args:
        model: the graph that `regions` was found on, or a clone of it.
        regions: see find_regions.
        params: group name -> scale and zero point.
        constant: makes (and shares) initializers.
    """
    outputs = {str(value.name): value for node in model.graph for value in node.outputs}
    for name in regions.absorbed:
        _remove_clip(outputs[name])
    for node in list(model.graph):
        if node.op_type == "Pad":
            _pad_all_axes(node, constant)
        elif node.op_type == "ReduceMean" and node.name in regions.integer_nodes:
            _pool_globally(node, constant)
        elif node.op_type in ("Add", "Mul") and node.name in regions.integer_nodes:
            _quantize_constants(node, constant)
    writer = _Writer(model.graph, regions)
    for name, group in regions.groups.items():
        scale, zero = _grid(params[group], group, constant)
        writer.write(name, scale, zero)
    for node in list(model.graph):
        if node.name in regions.code_nodes:
            _read_codes(node)
        elif node.op_type in SEIZED_OPERATORS and node.name not in regions.integer_nodes:
            _keep_float(node)


def _grid(act: ActParams, name: str, constant: Constant) -> tuple[ir.Value, ir.Value]:
    """Scale and zero point as initializers."""
    return (
        constant(np.array(act.scale, np.float32), f"{name}.scale"),
        constant(np.array(act.zero_point, np.uint8), f"{name}.zero_point"),
    )


def _pad_all_axes(node: ir.Node, constant: Constant) -> None:
    """Write out the axes that are not padded: onnxruntime's layout changes overlook the optional list of axes."""
    source, pads = node.inputs[0], node.inputs[1]
    axes = node.inputs[PAD_AXES] if len(node.inputs) > PAD_AXES else None
    if axes is None or axes.const_value is None or pads is None or pads.const_value is None:
        return
    if source is None or source.shape is None:
        return
    rank, chosen, amounts = len(source.shape), axes.const_value.numpy(), pads.const_value.numpy()
    full = np.zeros((2, rank), np.int64)
    full[:, chosen % rank] = amounts.reshape(2, -1)
    node.replace_input_with(1, constant(full.reshape(-1), f"{pads.name}.all"))
    node.replace_input_with(PAD_AXES, None)
    node.resize_inputs(PAD_AXES if node.inputs[2] is not None else 2)


def _pool_globally(node: ir.Node, constant: Constant) -> None:
    """ReduceMean over all axes behind the channels -> GlobalAveragePool, which has an integer kernel."""
    graph, result, source = node.graph, node.outputs[0], node.inputs[0]
    assert graph is not None and source is not None and source.shape is not None
    keeps = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1
    pool = ir.node("GlobalAveragePool", [source], name=node.name)
    new = [pool]
    if not keeps:
        axes = constant(np.arange(2, len(source.shape)), "axes")
        new.append(ir.node("Squeeze", [pool.outputs[0], axes]))
    graph.insert_before(node, new)
    _take_place(new[-1].outputs[0], result)
    graph.remove(node, safe=True)


def _take_place(value: ir.Value, old: ir.Value) -> None:
    """`value` gets the readers, the name and the type of `old`."""
    value.shape, value.type = old.shape, old.type
    old.replace_all_uses_with(value, replace_graph_outputs=old.is_graph_output())
    name = old.name
    old.name, value.name = f"{name}.old", name


def _quantize_constants(node: ir.Node, constant: Constant) -> None:
    """A constant summand or factor becomes codes on a grid of its own."""
    for index, value in enumerate(node.inputs):
        if value is None or value.const_value is None:
            continue
        found = constant_codes(value.const_value.numpy())
        assert found is not None and node.graph is not None
        scale, zero = _grid(found[1], str(value.name), constant)
        real = ir.node("DequantizeLinear", [constant(found[0], f"{value.name}.codes"), scale, zero])
        node.graph.insert_before(node, real)
        node.replace_input_with(index, real.outputs[0])


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


class _Writer:
    """Puts values on their grids, one after the other; names are kept unique."""

    def __init__(self, graph: ir.Graph, regions: Regions) -> None:
        self.graph = graph
        self.regions = regions
        self.values = {str(value.name): value for value in graph.inputs}
        self.values |= {str(value.name): value for node in graph for value in node.outputs}
        self.names = {*self.values, *graph.initializers}

    def write(self, name: str, scale: ir.Value, zero: ir.Value) -> None:
        value = self.values[name]
        producer = value.producer()
        if producer is not None and producer.name in self.regions.code_nodes:
            self._dequantize_codes(value, scale, zero)
        else:
            self._quantize(value, scale, zero)

    def _name(self, wanted: str) -> str:
        name, count = wanted, 1
        while name in self.names:
            count += 1
            name = f"{wanted}.{count}"
        self.names.add(name)
        return name

    def _is_integer_reader(self, node: ir.Node, index: int) -> bool:
        if node.name in self.regions.code_nodes:
            return index == 0
        if node.name not in self.regions.integer_nodes:
            return False
        return index == 0 or node.op_type in ARITHMETIC_OPERATORS

    def _quantize(self, value: ir.Value, scale: ir.Value, zero: ir.Value) -> None:
        """value -> QuantizeLinear -> DequantizeLinear; readers move over (all of them if integers made the value)."""
        everybody = value.name in self.regions.produced
        readers = [use for use in value.uses() if everybody or self._is_integer_reader(*use)]
        quantize = ir.node("QuantizeLinear", [value, scale, zero])
        dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero])
        real = dequantize.outputs[0]
        quantize.outputs[0].name, real.name = self._name(f"{value.name}.q"), self._name(f"{value.name}.dq")
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], [quantize, dequantize])
        else:
            self.graph.insert_after(producer, [quantize, dequantize])
        self._move(value, real, readers, everybody, "float")

    def _dequantize_codes(self, value: ir.Value, scale: ir.Value, zero: ir.Value) -> None:
        """The output of a shape operator that now yields codes: readers see it dequantized."""
        producer, readers, is_output = value.producer(), list(value.uses()), value.is_graph_output()
        assert producer is not None
        dequantize = ir.node("DequantizeLinear", [value, scale, zero])
        dequantize.outputs[0].name = self._name(f"{value.name}.dq")
        self.graph.insert_after(producer, dequantize)
        self._move(value, dequantize.outputs[0], readers, True, "q")
        if not is_output:
            value.name = self._name(f"{value.name}.q")
        value.type = ir.TensorType(ir.DataType.UINT8)

    def _move(
        self, value: ir.Value, real: ir.Value, readers: Sequence[tuple[ir.Node, int]], outputs: bool, suffix: str
    ) -> None:
        """Readers of `value` read `real` instead; as a graph output, `real` takes over the name."""
        real.shape, real.type = value.shape, value.type
        for node, index in readers:
            node.replace_input_with(index, real)
        for position, output in enumerate(self.graph.outputs):
            if outputs and output is value:
                self.graph.outputs[position] = real
        if outputs and real.is_graph_output():
            value.name, real.name = self._name(f"{value.name}.{suffix}"), value.name


def _read_codes(node: ir.Node) -> None:
    """A shape operator behind a pair reads the codes themselves."""
    source = node.inputs[0]
    pair = source.producer() if source is not None else None
    assert pair is not None and pair.op_type == "DequantizeLinear"
    node.replace_input_with(0, pair.inputs[0])
    if node.op_type == "Pad":  # padding with real 0 is padding with the code of 0
        node.resize_inputs(max(len(node.inputs), PAD_AXES))
        node.replace_input_with(2, pair.inputs[2])


def _keep_float(node: ir.Node) -> None:
    """Separate a float operator from the pair before it, when the next pair follows it directly.

    A Sum of one value does nothing, and no optimization looks through it.
    """
    source = node.inputs[0]
    before = source.producer() if source is not None else None
    if before is None or before.op_type != "DequantizeLinear":
        return
    result = node.outputs[0]
    while len(result.uses()) == 1 and not result.is_graph_output():
        ((reader, _),) = result.uses()
        if reader.op_type == "QuantizeLinear":
            assert node.graph is not None
            barrier = ir.node("Sum", [source])
            node.graph.insert_before(node, barrier)
            node.replace_input_with(0, barrier.outputs[0])
            return
        if clip_range(reader) is None:
            return
        result = reader.outputs[0]
