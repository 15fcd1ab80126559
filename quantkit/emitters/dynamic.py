"""Integer MatMul/Gemm with ranges taken at run time: 1-8 bit storage, rebuilt at load as one int8 weight per column.

onnxruntime fuses DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul (-> Add) to DynamicQuantizeMatMul or, when
several layers share one input, MatMulIntegerToFloat: int8 speed at every M, whatever width the file holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from quantkit.emitters._builder import Builder, Ops
from quantkit.emitters._unpack import int8_codes, int8_matrix, int8_weight
from quantkit.types import ActParams, Emitter, FloatArray, QuantizedWeight, QuantSpec, Target


@dataclass(frozen=True)
class Dynamic:
    """Dynamic uint8 activations (one scale per tensor), int8 weights per column."""

    def refuse(self, target: Target, spec: QuantSpec, runtime: str) -> str | None:
        del spec, runtime
        return refuse_matrix_product(target)

    def effective_weight(self, weight: QuantizedWeight) -> FloatArray:
        return int8_weight(weight)

    def fake_quantize(self, rows: FloatArray, weight: QuantizedWeight, act: ActParams | None) -> FloatArray:
        del weight, act
        low, high = min(float(rows.min()), 0.0), max(float(rows.max()), 0.0)
        scale = np.float32((high - low) / 255 or 1.0)
        zero_point = np.float32(np.clip(np.rint(-low / scale), 0, 255))
        codes = np.clip(np.rint(rows / scale) + zero_point, 0, 255)
        restored: FloatArray = ((codes - zero_point) * scale).astype(np.float32)
        return restored

    def simulate(self, builder: Builder, target: Target, weight: QuantizedWeight) -> None:
        """Whole numbers multiplied in float64: exact, as integer kernels are, so that no rounding differs."""
        codes, scales = int8_codes(weight)
        columns = builder.const(np.ascontiguousarray(codes.T), f"{target.name}.effective")
        for use in target.uses:
            centred, scale = _quantized_input(builder.at(use.node), use.data)
            wide = builder.op("Cast", [columns], to=ir.DataType.DOUBLE)
            total = builder.op("MatMul", [builder.op("Cast", [centred], to=ir.DataType.DOUBLE), wide])
            steps = builder.op("Mul", [scale, builder.const(scales, f"{target.name}.steps")])
            _finish(builder, use.node, builder.op("Cast", [total], to=ir.DataType.FLOAT), steps)

    def emit(self, builder: Builder, target: Target, weight: QuantizedWeight) -> None:
        codes, scales = int8_matrix(builder.at(builder.model.graph[0]), weight, target.name)
        columns = builder.op("Transpose", [codes], perm=[1, 0])  # [K, N]
        for use in target.uses:
            make = partial(builder.multi, "DynamicQuantizeLinear", [use.data], 3)
            quantized, data_scale, data_zero = builder.shared("dynamic", use, make)
            total = builder.at(use.node).op("MatMulInteger", [quantized, columns, data_zero])
            steps = builder.op("Mul", [data_scale, scales])
            _finish(builder, use.node, builder.op("Cast", [total], to=ir.DataType.FLOAT), steps)


def _finish(builder: Builder, node: ir.Node, total: ir.Value, steps: ir.Value) -> None:
    """total * steps (+ bias) takes the node's place."""
    product = builder.op("Mul", [total, steps])
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    builder.replace(node, product if bias is None else builder.op("Add", [product, bias]))


def _quantized_input(ops: Ops, data: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(codes - zero point, scale): the definition of DynamicQuantizeLinear in float operators."""
    zero, top = ops.const(np.array(0, np.float32)), ops.const(np.array(255, np.float32))
    low = ops.op("Min", [ops.op("ReduceMin", [data], keepdims=0), zero])
    high = ops.op("Max", [ops.op("ReduceMax", [data], keepdims=0), zero])
    scale = ops.op("Div", [ops.op("Sub", [high, low]), top])
    scale = ops.op("Where", [ops.op("Equal", [scale, zero]), ops.const(np.array(1, np.float32)), scale])
    point = ops.op("Round", [ops.op("Clip", [ops.op("Div", [ops.op("Neg", [low]), scale]), zero, top])])
    codes = ops.op("Add", [ops.op("Round", [ops.op("Div", [data, scale])]), point])
    return ops.op("Sub", [ops.op("Clip", [codes, zero, top]), point]), scale


def refuse_matrix_product(target: Target) -> str | None:
    """Why a target is no plain x @ W^T (+ bias), or None when it is."""
    if target.op not in ("MatMul", "Gemm"):
        return f"{target.op} is no matrix product"
    if len(target.layout.operand_shape) != 2:
        return "batched weights"
    for use in target.uses:
        attributes = use.node.attributes
        plain = (("transA", 0), ("alpha", 1.0), ("beta", 1.0))
        if any(name in attributes and attributes[name].value != value for name, value in plain):
            return "Gemm with transA, alpha or beta"
    return None


METHOD: type[Emitter] = Dynamic
