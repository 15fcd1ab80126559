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
from quantkit.emitters._unpack import channel_axis, int8_matrix, int8_weight, requantize, signed_codes
from quantkit.types import ActParams, Emitter, FloatArray, QuantizedWeight, QuantSpec, Target

OPERATORS = ("Conv", "Gemm", "MatMul")
INT32_MAX = 2**31 - 1
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
        simulate_weight(builder, target, int8_weight(weight))
        for use in target.uses:
            bias = _constant_bias(use.node)
            if bias is None or bias.const_value is None:
                continue
            codes, steps = _bias_codes(bias.const_value.numpy(), _input_pair(use.data)[1], channel_scales(weight))
            if codes is not None:
                real = (codes * steps).astype(np.float32)
                use.node.replace_input_with(2, builder.const(real, f"{bias.name}.effective"))

    def emit(self, builder: Builder, target: Target, weight: QuantizedWeight) -> None:
        builder.at(builder.model.graph[0])
        operand, scales = int8_matrix(builder, weight, target.name, target.layout)
        axis = channel_axis(target.layout)
        real = builder.op("DequantizeLinear", [operand, scales], axis=axis)
        real.shape, real.dtype = ir.Shape(target.layout.operand_shape), ir.DataType.FLOAT
        for use in target.uses:
            use.node.replace_input_with(use.weight_index, real)
            _quantize_bias(builder.at(use.node), use.node, use.data, scales, channel_scales(weight))


def channel_scales(weight: QuantizedWeight) -> FloatArray:
    """[N] scales of the int8 weight."""
    exact = signed_codes(weight)
    return exact[1] if exact is not None else requantize(weight.dequantize())[1]


def _bias_codes(bias: FloatArray, input_scale: float, scales: FloatArray) -> tuple[Doubles | None, Doubles]:
    """(int32 codes as float64, their steps); codes are None when they do not fit."""
    steps = np.float64(np.float32(input_scale)) * scales.astype(np.float64)
    if bias.shape != steps.shape:
        return None, steps
    codes = np.rint(bias.astype(np.float64) / steps)
    return (codes if np.abs(codes).max(initial=0) <= INT32_MAX else None), steps


def _constant_bias(node: ir.Node) -> ir.Value | None:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return None if bias is None or bias.const_value is None else bias


def _input_pair(data: ir.Value) -> tuple[ir.Value, float]:
    """The scale of the pair that makes a static layer's input."""
    pair = data.producer()
    assert pair is not None and pair.op_type == "DequantizeLinear"
    scale = pair.inputs[1]
    assert scale is not None and scale.const_value is not None
    return scale, float(scale.const_value.numpy())


def _quantize_bias(builder: Builder, node: ir.Node, data: ir.Value, scales: ir.Value, per_channel: FloatArray) -> None:
    """Replace a constant float bias by int32 codes with scale = input scale x weight scale, as the kernels add it."""
    bias = _constant_bias(node)
    if bias is None or bias.const_value is None:
        return
    input_scale, step = _input_pair(data)
    codes, _ = _bias_codes(bias.const_value.numpy(), step, per_channel)
    if codes is None:
        return  # stays a float bias: onnxruntime quantizes it itself where it can
    scale = builder.op("Mul", [input_scale, scales])
    stored = builder.const(codes.astype(np.int32), f"{bias.name}.codes")
    node.replace_input_with(2, builder.op("DequantizeLinear", [stored, scale], axis=0))


METHOD: type[Emitter] = QDQ
