"""Weight-only MatMul/Gemm that stays packed at run time: onnxruntime's MatMulNBits, int8 activations per block.

2, 4 and 8 bits are stored as the kernel reads them; 1 and 3 bits are widened to 4, and 5 to 7 bits to 8, when the
model is loaded; groups of different widths are widened to the one that holds them all. The portable spelling is a
blocked DequantizeLinear, which onnxruntime fuses to the same kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx_ir as ir

from quantkit.emitters._builder import CONTRIB, Builder, Ops
from quantkit.emitters._simulate import simulate_weight
from quantkit.emitters._unpack import group_codes, grouped_codes, uniform_bits, whole_codes
from quantkit.emitters.dynamic import refuse_matrix_product
from quantkit.errors import InputError
from quantkit.packing import blob, pack_zero_points
from quantkit.types import ActParams, Array, Emitter, FloatArray, QuantizedWeight, QuantSpec, Target

BLOCKS = (16, 32, 64, 128, 256)
ACCURACY_LEVEL = 4  # int8 activations per block: the only fast level for 2 and 8 bits
SLOW_BLOCK = 16  # with 2 bits onnxruntime 1.31 computes in floats, 25 times slower than a float layer
NATIVE_BITS = (2, 4, 8)
PORTABLE_BITS = (4, 8)


def kernel_bits(*widths: int) -> int:
    """The width that the kernel computes with, for groups of one or several widths."""
    widest = max(widths)
    return widest if widest in NATIVE_BITS else 4 if widest < 4 else 8


@dataclass(frozen=True)
class MatMulNBits:
    """Packed at run time."""

    def refuse(self, target: Target, spec: QuantSpec, runtime: str) -> str | None:
        reason = refuse_matrix_product(target)
        if reason is not None:
            return reason
        if spec.group_width(target.shape[1]) not in BLOCKS:
            return f"groups of {spec.group_width(target.shape[1])} (the kernel has {', '.join(map(str, BLOCKS))})"
        widths = set(spec.widths(target.shape[1]).tolist())
        if runtime == "ort-cpu" and widths == {2} and spec.group_width(target.shape[1]) == SLOW_BLOCK:
            return f"2 bits in groups of {SLOW_BLOCK}: onnxruntime has no fast kernel"
        if runtime == "portable":
            return _refuse_blocked(target, spec)
        return "mid-rise grid" if 1 in widths else None

    def effective_weight(self, weight: QuantizedWeight) -> FloatArray:
        return weight.dequantize()

    def fake_quantize(self, rows: FloatArray, weight: QuantizedWeight, act: ActParams | None) -> FloatArray:
        del act
        num_inputs = rows.shape[-1]
        width = weight.spec.group_width(num_inputs)
        factor = np.float32(1) if weight.pre_scale is None else weight.pre_scale
        rows = rows / factor
        padded = np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, -num_inputs % width)])
        blocks = padded.reshape(*rows.shape[:-1], -1, width)
        scale = np.maximum(np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127), np.float32(1e-30))
        rounded: FloatArray = (np.rint(blocks / scale) * scale).reshape(padded.shape).astype(np.float32)
        restored: FloatArray = rounded[..., :num_inputs] * factor
        return restored

    def simulate(self, builder: Builder, target: Target, weight: QuantizedWeight) -> None:
        stored = replace(weight, pre_scale=None)
        simulate_weight(builder, target, stored.dequantize(), partial(_rounded_input, weight, target.name))

    def emit(self, builder: Builder, target: Target, weight: QuantizedWeight) -> None:
        if builder.runtime == "portable":
            _emit_blocked(builder, target, weight)
            return
        num_rows, num_inputs = target.shape
        bits = kernel_bits(*weight.group_bits.tolist())
        builder.at(builder.model.graph[0])
        codes, zero_points = _kernel_operands(builder, weight, bits, target.name)
        # Never float16 behind a Cast: where constants are not folded (optimisation disabled), onnxruntime 1.31's kernel
        # returns zeros at accuracy level 4 for scales that are no initializer.
        scales = builder.const(weight.scales.reshape(-1), f"{target.name}.scales")
        for use in target.uses:
            bias = use.node.inputs[2] if len(use.node.inputs) > 2 else None
            data = _scaled_input(builder.at(use.node), use.data, weight, target.name)
            (product,) = builder.multi(
                "MatMulNBits",
                [data, codes, scales, zero_points],
                1,
                CONTRIB,
                K=num_inputs,
                N=num_rows,
                bits=bits,
                block_size=weight.spec.group_width(num_inputs),
                accuracy_level=ACCURACY_LEVEL,
            )
            builder.replace(use.node, product if bias is None else builder.op("Add", [product, bias]))


def _refuse_blocked(target: Target, spec: QuantSpec) -> str | None:
    """Where a blocked DequantizeLinear cannot hold the layer, or onnxruntime would not make MatMulNBits of it."""
    widths = set(spec.widths(target.shape[1]).tolist())
    if len(widths) > 1 or not widths <= set(PORTABLE_BITS) or target.shape[1] % spec.group_width(target.shape[1]):
        return "blocked DequantizeLinear holds 4 and 8 bits in whole groups"
    if len(target.uses) > 1:
        return "onnxruntime does not fuse blocked DequantizeLinear for a weight that several layers read"
    if target.node.graph is not target.weight.graph:
        return "onnxruntime does not fuse blocked DequantizeLinear inside a subgraph"
    if not _has_plain_bias(target.node):
        return "onnxruntime fuses blocked DequantizeLinear only with a bias of one dimension"
    return None


def _has_plain_bias(node: ir.Node) -> bool:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return True
    shape = bias.shape if bias.const_value is None else bias.const_value.shape
    return shape is not None and len(shape) == 1


def _scaled_input(builder: Builder, data: ir.Value, weight: QuantizedWeight, name: str) -> ir.Value:
    """The kernel has no place for `pre_scale`: the input is divided by it, as it was when the codes were made."""
    if weight.pre_scale is None:
        return data
    return builder.op("Div", [data, builder.const(weight.pre_scale, f"{name}.pre_scale")])


def _rounded_input(weight: QuantizedWeight, name: str, builder: Builder, data: ir.Value) -> ir.Value:
    num_inputs = weight.shape[1]
    scaled = _scaled_input(builder, data, weight, name)
    return _rounded_blocks(num_inputs, weight.spec.group_width(num_inputs), builder, scaled)


def _rounded_blocks(num_inputs: int, width: int, ops: Ops, data: ir.Value) -> ir.Value:
    """int8 activations per block of `width`, as the kernel makes them, in float operators."""
    pad = -num_inputs % width
    last = ops.const(np.array([-1]))
    padded = ops.op("Pad", [data, ops.const(np.array([0, pad])), None, last]) if pad else data
    shape = ops.op("Shape", [data])
    lead = ops.op("Slice", [shape, ops.const(np.array([0])), last])
    blocked = ops.op("Concat", [lead, ops.const(np.array([-1, width]))], axis=0)
    blocks = ops.op("Reshape", [padded, blocked])
    peak = ops.op("ReduceMax", [ops.op("Abs", [blocks]), last], keepdims=1)
    scale = ops.op("Div", [peak, ops.const(np.array(127, np.float32))])
    scale = ops.op("Max", [scale, ops.const(np.array(1e-30, np.float32))])
    rounded = ops.op("Mul", [ops.op("Round", [ops.op("Div", [blocks, scale])]), scale])
    flat = ops.op("Reshape", [rounded, ops.op("Concat", [lead, last], axis=0)])
    if not pad:
        return flat
    return ops.op("Slice", [flat, ops.const(np.array([0])), ops.const(np.array([num_inputs])), last])


def _kernel_operands(
    builder: Builder, weight: QuantizedWeight, bits: int, name: str
) -> tuple[ir.Value, ir.Value | None]:
    """(B [N, G, width*bits/8], zero points or None for the kernel's default of the middle code)."""
    middle = 1 << (bits - 1)
    default = bool(np.all(weight.zero_points == middle))
    zero_points = None
    if not default:
        zero_points = builder.const(pack_zero_points(weight.zero_points, bits), f"{name}.zero_points")
    width = weight.spec.group_width(weight.shape[1])
    if uniform_bits(weight) == bits:
        stored = blob(grouped_codes(weight).reshape(weight.shape[0], -1), bits, width, 0)
        return builder.const(stored, f"{name}.codes"), zero_points
    codes = group_codes(builder, weight, name)
    if bits == 4:
        codes = builder.call("PackNibbles", _nibbles_body, [codes])
        shape = np.array([*weight.scales.shape, width // 2], np.int64)
        codes = builder.op("Reshape", [codes, builder.const(shape, "shape")])
    return codes, zero_points


def _nibbles_body(ops: Ops, inputs: Sequence[ir.Value]) -> ir.Value:
    """uint8 codes below 16, [..., width] -> [*, 1] bytes: even positions low, odd positions high."""
    pairs = ops.op("Reshape", [inputs[0], ops.const(np.array([-1, 2]))])
    low = ops.op("Gather", [pairs, ops.const(np.array([0]))], axis=1)
    high = ops.op("Gather", [pairs, ops.const(np.array([1]))], axis=1)
    return ops.op("BitwiseOr", [low, ops.op("BitShift", [high, ops.const(np.array(4, np.uint8))], direction="LEFT")])


def _emit_blocked(builder: Builder, target: Target, weight: QuantizedWeight) -> None:
    """DequantizeLinear(axis=0, block_size) -> MatMul, in native 4- or 8-bit types, [K, N] as the operator wants."""
    num_inputs, bits = target.shape[1], int(weight.group_bits[0])
    builder.at(builder.model.graph[0])
    codes = builder.native(np.ascontiguousarray(weight.codes.T), bits, f"{target.name}.codes")
    points: Array = np.ascontiguousarray(weight.zero_points.T)
    if not whole_codes(points, bits):
        raise InputError(f"{target.name}: DequantizeLinear holds whole zero points of {bits} bits only")
    zero_points = builder.native(points.astype(np.uint8), bits, f"{target.name}.zero_points")
    scales = builder.const(np.ascontiguousarray(weight.scales.T), f"{target.name}.scales")  # [G, N]
    width = weight.spec.group_width(num_inputs)
    for use in target.uses:
        bias = use.node.inputs[2] if len(use.node.inputs) > 2 else None
        data = _scaled_input(builder.at(use.node), use.data, weight, target.name)
        real = builder.op("DequantizeLinear", [codes, scales, zero_points], axis=0, block_size=width)
        product = builder.op("MatMul", [data, real])
        builder.replace(use.node, product if bias is None else builder.op("Add", [product, bias]))


METHOD: type[Emitter] = MatMulNBits
