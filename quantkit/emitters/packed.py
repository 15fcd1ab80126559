"""Any width, any operator, weights only: packed in the file, a plain float weight once onnxruntime has loaded it.

Exactly the arithmetic of `QuantizedWeight.dequantize()`; speed and run-time memory are those of the float model.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from quantkit.emitters._builder import Builder
from quantkit.emitters._simulate import simulate_weight
from quantkit.emitters._unpack import float_matrix, to_operand
from quantkit.types import ActParams, Emitter, FloatArray, QuantizedWeight, QuantSpec, Target


@dataclass(frozen=True)
class Packed:
    """Unpacked to float at load."""

    def refuse(self, target: Target, spec: QuantSpec, runtime: str) -> str | None:
        del spec, runtime
        return "a table of rows is looked up, not multiplied" if target.op == "Gather" else None

    def effective_weight(self, weight: QuantizedWeight) -> FloatArray:
        return weight.dequantize()

    def fake_quantize(self, rows: FloatArray, weight: QuantizedWeight, act: ActParams | None) -> FloatArray:
        del weight, act
        return rows

    def simulate(self, builder: Builder, target: Target, weight: QuantizedWeight) -> None:
        simulate_weight(builder, target, weight.dequantize())

    def emit(self, builder: Builder, target: Target, weight: QuantizedWeight) -> None:
        first = builder.model.graph[0]
        matrix = float_matrix(builder.at(first), weight, target.name)
        operand = to_operand(builder, matrix, target.layout)
        operand.shape, operand.dtype = ir.Shape(target.layout.operand_shape), ir.DataType.FLOAT
        for use in target.uses:
            use.node.replace_input_with(use.weight_index, operand)


METHOD: type[Emitter] = Packed
