"""One layer alone as a model, with its own attributes and input shape: what is timed, and nothing around it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from quantkit.graph._trace import follow, is_constant, trace
from quantkit.types import FloatArray, Target

NAME = "layer"
OPSET, IR_VERSION = 21, 10


def single_layer(target: Target, data_shape: Sequence[int], operand: FloatArray) -> ir.Model:
    """The first use of a target: its data is the only input, everything else a constant.

    Constants beside the weight (a bias, the other weight of an LSTM) are the node's own; what other layers would feed
    (initial states, lengths, a computed bias) is left out where the operator can do without.

    Args:
        data_shape: of the data input.
        operand: what stands for the weight, as the node reads it.
    """
    use = target.uses[0]
    dtype = ir.DataType.INT64 if target.op == "Gather" else ir.DataType.FLOAT
    data = ir.val("x", dtype=dtype, shape=list(data_shape))
    inputs: list[ir.Value | None] = []
    for index, value in enumerate(use.node.inputs):
        if index == use.data_index:
            inputs.append(data)
        elif index == use.weight_index:
            inputs.append(ir.val("weight", const_value=ir.tensor(np.ascontiguousarray(operand))))
        else:
            inputs.append(_constant(value, f"constant_{index}"))
    node = ir.node(use.node.op_type, inputs, attributes=use.node.attributes, num_outputs=1, name=NAME)
    result = node.outputs[0]
    result.name, result.dtype = "y", ir.DataType.FLOAT
    constants = [value for value in inputs if value is not None and value is not data]
    graph = ir.Graph([data], [result], nodes=[node], initializers=constants, opset_imports={"": OPSET}, name=NAME)
    return ir.Model(graph, ir_version=IR_VERSION)


def _constant(value: ir.Value | None, name: str) -> ir.Value | None:
    if value is None:
        return None
    origin = trace(value)
    if not is_constant(origin.root):
        return None
    assert origin.root.const_value is not None
    array = follow(origin.root.const_value.numpy(), origin.path)
    return ir.val(name, const_value=ir.tensor(np.ascontiguousarray(array)))


def codes_at_borders(model: ir.Model) -> None:
    """Let a model read and return the codes behind the pairs at its borders: there a region's neighbours go on."""
    graph = model.graph
    for place, value in enumerate(list(graph.inputs)):
        readers = [node for node, _ in value.uses()]
        if len(readers) == 1 and readers[0].op_type == "QuantizeLinear":
            codes = ir.Value(name=f"{value.name}.codes", shape=value.shape, type=ir.TensorType(ir.DataType.UINT8))
            readers[0].outputs[0].replace_all_uses_with(codes)
            graph.remove(readers[0], safe=True)
            graph.inputs[place] = codes
    for place, value in enumerate(list(graph.outputs)):
        producer = value.producer()
        source = producer.inputs[0] if producer is not None and producer.op_type == "DequantizeLinear" else None
        if producer is not None and source is not None and not source.is_initializer():
            source.type = ir.TensorType(ir.DataType.UINT8)
            graph.outputs[place] = source
            graph.remove(producer, safe=True)
