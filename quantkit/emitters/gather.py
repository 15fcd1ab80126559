"""Embedding tables: rows are looked up packed and dequantized one by one, so the table stays small at run time too.

`ort-cpu` uses GatherBlockQuantized for 4 and 8 bits; everything else gathers codes, scales and zero points with
standard operators (3-bit codes and the like are widened to bytes at load).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from quantkit.emitters._builder import CONTRIB, Builder
from quantkit.emitters._simulate import simulate_weight
from quantkit.emitters._unpack import (
    codes_value,
    group_codes,
    scale_value,
    storable_scales,
    uniform_bits,
    whole_codes,
    zero_point_value,
)
from quantkit.packing import blob, pack_zero_points
from quantkit.types import ActParams, Emitter, FloatArray, QuantizedWeight, QuantSpec, Target

BLOCKED_BITS = (4, 8)


@dataclass(frozen=True)
class Gather:
    """Packed rows."""

    def refuse(self, target: Target, spec: QuantSpec, runtime: str) -> str | None:
        del spec, runtime
        return None if target.op == "Gather" else f"{target.op} is no table lookup"

    def effective_weight(self, weight: QuantizedWeight) -> FloatArray:
        return weight.dequantize()

    def fake_quantize(self, rows: FloatArray, weight: QuantizedWeight, act: ActParams | None) -> FloatArray:
        del weight, act
        return rows

    def simulate(self, builder: Builder, target: Target, weight: QuantizedWeight) -> None:
        simulate_weight(builder, target, weight.dequantize())

    def emit(self, builder: Builder, target: Target, weight: QuantizedWeight) -> None:
        num_inputs = target.shape[1]
        width = weight.spec.group_width(num_inputs)
        bits = uniform_bits(weight)
        blocked = (
            builder.runtime != "portable"
            and bits in BLOCKED_BITS
            and width in (16, 32, 64, 128, 256)
            and num_inputs % width == 0
            and weight.pre_scale is None
            and whole_codes(weight.zero_points, bits)
        )
        builder.at(builder.model.graph[0])
        if blocked:
            _emit_blocked(builder, target, weight)
        else:
            _emit_standard(builder, target, weight)


def _emit_blocked(builder: Builder, target: Target, weight: QuantizedWeight) -> None:
    num_rows, num_inputs = target.shape
    bits, width = int(weight.group_bits[0]), weight.spec.group_width(num_inputs)
    codes = builder.const(blob(weight.codes, bits, width, 0).reshape(num_rows, -1), f"{target.name}.codes")
    scales = scale_value(builder, weight.scales, f"{target.name}.scales")
    zero_points = None
    if not np.all(weight.zero_points == 1 << (bits - 1)):
        packed = pack_zero_points(weight.zero_points, bits).reshape(num_rows, -1)
        zero_points = builder.const(packed, f"{target.name}.zero_points")
    for use in target.uses:
        (rows,) = builder.at(use.node).multi(
            "GatherBlockQuantized",
            [codes, use.data, scales, zero_points],
            1,
            CONTRIB,
            bits=bits,
            block_size=width,
            gather_axis=0,
            quantize_axis=1,
        )
        builder.replace(use.node, rows)


def _emit_standard(builder: Builder, target: Target, weight: QuantizedWeight) -> None:
    """rows = (codes[ids] - zero_points[ids]) * scales[ids], group by group."""
    num_inputs = target.shape[1]
    table = group_codes(builder, weight, target.name)
    scales = builder.const(storable_scales(weight.scales)[:, :, None], f"{target.name}.scales")
    points = weight.zero_points
    zero_table = None if np.all(points == points[:1]) else _zero_table(builder, weight, f"{target.name}.zero_points")
    for use in target.uses:
        builder.at(use.node)
        ids = use.data
        codes = builder.op("Cast", [builder.op("Gather", [table, ids], axis=0)], to=ir.DataType.FLOAT)
        if zero_table is None:
            same = bool(np.all(points == points[0, 0]))
            zero: ir.Value = builder.const(points[0, 0] if same else points[0][:, None], "zero")
        else:
            zero = builder.op("Cast", [builder.op("Gather", [zero_table, ids], axis=0)], to=ir.DataType.FLOAT)
        scale = builder.op("Cast", [builder.op("Gather", [scales, ids], axis=0)], to=ir.DataType.FLOAT)
        blocks = builder.op("Mul", [builder.op("Sub", [codes, zero]), scale])  # [..., G, width]
        lead = builder.op("Shape", [ids])
        flat = builder.op("Concat", [lead, builder.const(np.array([-1]), "shape")], axis=0)
        rows = builder.op("Reshape", [blocks, flat])
        if points.shape[1] * weight.spec.group_width(num_inputs) != num_inputs:
            bounds = [np.array([0]), np.array([num_inputs]), np.array([-1])]
            rows = builder.op("Slice", [rows, *(builder.const(bound, "bound") for bound in bounds)])
        if weight.pre_scale is not None:
            rows = builder.op("Div", [rows, builder.const(weight.pre_scale, f"{target.name}.pre_scale")])
        builder.replace(use.node, rows)


def _zero_table(builder: Builder, weight: QuantizedWeight, name: str) -> ir.Value:
    """Zero points [N, G, 1], in the smallest type that holds them at run time."""
    points, bits = weight.zero_points, uniform_bits(weight)
    if bits is None:
        return zero_point_value(builder, weight, name)
    if whole_codes(points, bits):
        return codes_value(builder, points.astype(np.uint8), bits, (*points.shape, 1), name)
    return builder.const(storable_scales(points)[:, :, None], name)


METHOD: type[Emitter] = Gather
