"""Static integer layers: uint8 activations x int8 weights per channel, int32 bias, as QuantizeLinear/DequantizeLinear.

The activations' pairs are placed for the whole graph by `quantkit.graph.regions`; this file writes the weight and the
bias, at the weight's own width in the file. onnxruntime turns the pattern into QLinearConv, QGemm, QLinearMatMul.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from quantkit.emitters._builder import Builder
from quantkit.emitters._simulate import simulate_weight
from quantkit.emitters._unpack import channel_axis, int8_codes, int8_matrix, int8_weight
from quantkit.types import ActParams, Emitter, FloatArray, QuantizedWeight, QuantSpec, Target

OPERATORS = ("Conv", "Gemm", "MatMul")
BIAS_CODES = 2**30  # largest code of a bias: int32 with room for the products
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class QDQ:
    """Static uint8 activations, int8 weights per output channel."""

    def refuse(self, target: Target, spec: QuantSpec, runtime: str) -> str | None:
        del spec, runtime
        if target.op not in OPERATORS:
            return f"onnxruntime has no integer kernel for {target.op}"
        if channel_axis(target.layout) is None:
            return "batched weights have no integer kernel"
        for use in target.uses:
            if use.node.graph is not target.weight.graph:
                return "activations inside a subgraph stay float"
            attributes = use.node.attributes
            if target.op == "Gemm" and any(
                name in attributes and attributes[name].value != plain
                for name, plain in (("transA", 0), ("alpha", 1.0), ("beta", 1.0))
            ):
                return "Gemm with transA, alpha or beta has no integer kernel"
        return None

    def effective_weight(self, weight: QuantizedWeight) -> FloatArray:
        return int8_weight(weight)

    def fake_quantize(self, rows: FloatArray, weight: QuantizedWeight, act: ActParams | None) -> FloatArray:
        del weight
        assert act is not None
        scale = np.float32(act.scale)
        codes = np.clip(np.rint(rows / scale) + np.float32(act.zero_point), 0, 255)
        restored: FloatArray = ((codes - np.float32(act.zero_point)) * scale).astype(np.float32)
        return restored

    def simulate(self, builder: Builder, target: Target, weight: QuantizedWeight) -> None:
        """The simulated graph carries the same activation pairs; weight and bias are plain constants."""
        least = _least_scales(target, weight)
        _, scales = int8_codes(weight, least)
        simulate_weight(builder, target, int8_weight(weight, least))
        for use in target.uses:
            bias = _bias_slot(use.node, weight.shape[0])
            if bias is not None:
                codes, steps = _bias_codes(bias, _input_pair(use.data)[1], scales)
                real = builder.const((codes * steps).astype(np.float32), f"{bias.value.name}.effective")
                bias.node.replace_input_with(bias.index, real)

    def emit(self, builder: Builder, target: Target, weight: QuantizedWeight) -> None:
        least = _least_scales(target, weight)
        _, per_channel = int8_codes(weight, least)
        builder.at(builder.model.graph[0])
        operand, scales = int8_matrix(builder, weight, target.name, target.layout, least)
        axis = channel_axis(target.layout)
        # onnxruntime 1.31 makes QGemm (of MatMul and Add, too) only where the weight's zero point is written down.
        zero = [builder.const(np.zeros(weight.shape[0], np.int8), "zeros")] if target.op != "Conv" else []
        real = builder.op("DequantizeLinear", [operand, scales, *zero], axis=axis)
        real.shape, real.dtype = ir.Shape(target.layout.operand_shape), ir.DataType.FLOAT
        for use in target.uses:
            use.node.replace_input_with(use.weight_index, real)
            _quantize_bias(builder.at(use.node), use.node, use.data, scales, per_channel)


def _least_scales(target: Target, weight: QuantizedWeight) -> FloatArray | None:
    """[N] scales with which every bias fits int32; None when the weight's own will do.

    A channel whose weights are all but zero would need a bias code of 2**40: its scale grows, and its weights, worth
    next to nothing beside that bias, lose digits.
    """
    _, scales = int8_codes(weight)
    least = scales
    for use in target.uses:
        bias = _bias_slot(use.node, weight.shape[0])
        if bias is not None:
            needed = np.abs(bias.numbers) / (BIAS_CODES * np.float64(np.float32(_input_pair(use.data)[1])))
            least = np.maximum(least, needed.astype(np.float32))
    return None if np.array_equal(least, scales) else least


@dataclass(frozen=True)
class _Bias:
    """A constant bias, [N] or [1, N], and where it is read."""

    node: ir.Node
    index: int
    value: ir.Value
    numbers: FloatArray


def _bias_slot(node: ir.Node, num_rows: int) -> _Bias | None:
    """The bias of a layer; a MatMul's is the constant that an Add puts on it, since onnxruntime makes Gemm of both."""
    reader, index = node, 2
    if node.op_type == "MatMul":
        uses = list(node.outputs[0].uses())
        if len(uses) != 1 or uses[0].node.op_type != "Add" or node.outputs[0].is_graph_output():
            return None
        reader, index = uses[0].node, 1 - uses[0].idx
    value = reader.inputs[index] if len(reader.inputs) > index else None
    if value is None or value.const_value is None or value.const_value.size != num_rows:
        return None
    numbers = value.const_value.numpy()
    if numbers.shape != (num_rows,) and (node.op_type == "MatMul" or numbers.shape != (1, num_rows)):
        return None
    return _Bias(reader, index, value, numbers.reshape(-1))


def _bias_codes(bias: _Bias, input_scale: float, scales: FloatArray) -> tuple[Doubles, Doubles]:
    """([N] int32 codes as float64, their steps)."""
    steps = np.float64(np.float32(input_scale)) * scales.astype(np.float64)
    return np.rint(bias.numbers.astype(np.float64) / steps), steps


def _input_pair(data: ir.Value) -> tuple[ir.Value, float]:
    """The scale of the pair that makes a static layer's input."""
    pair = data.producer()
    assert pair is not None and pair.op_type == "DequantizeLinear"
    scale = pair.inputs[1]
    assert scale is not None and scale.const_value is not None
    return scale, float(scale.const_value.numpy())


def _quantize_bias(builder: Builder, node: ir.Node, data: ir.Value, scales: ir.Value, per_channel: FloatArray) -> None:
    """Replace a constant float bias by int32 codes with scale = input scale x weight scale, as the kernels add it."""
    bias = _bias_slot(node, len(per_channel))
    if bias is None:
        return
    input_scale, step = _input_pair(data)
    codes, _ = _bias_codes(bias, step, per_channel)
    scale = builder.op("Mul", [input_scale, scales])
    stored = builder.const(codes.astype(np.int32), f"{bias.value.name}.codes")
    bias.node.replace_input_with(bias.index, builder.op("DequantizeLinear", [stored, scale], axis=0))


METHOD: type[Emitter] = QDQ
