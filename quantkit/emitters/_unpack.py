"""Packed weights and the standard operators that rebuild them when onnxruntime loads the model.

Storage of a width b: one flat byte string per bit plane (`quantkit.packing.planes`), codes padded to whole groups.
    codes   = Unpack(planes)                      uint8 [N, G, width]
            | Gather(Concat(Unpack(planes of each width)), place of each group)    where groups differ in width
    float   = (codes - zero_points) * scales      float [N, G, width] -> [N, K]
    int8    = codes - zero_point                  when one scale serves a row and the codes fit
            | round(float / s8), s8 = max|row|/127   otherwise ("requantized at load")
All of it is constant, so onnxruntime folds it before it looks for kernels. Two spellings compute the same: operators on
bits on `ort-cpu`; on `portable` arithmetic on int32, which takes twice the time and memory at load: OpenVINO has bit
operators at run time only, and multiplies wrongly by weights that it did not fold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from quantkit.emitters._builder import Body, Builder, Ops
from quantkit.packing import pack, planes
from quantkit.types import Array, FloatArray, Layout, QuantizedWeight

INT8_MAX = 127.0
Spelling = Callable[[Ops, ir.Value, int, int], ir.Value]


def signed_codes(weight: QuantizedWeight) -> tuple[Array, FloatArray] | None:
    """(int8 [N, K], scale [N]) that equals the weight exactly, or None when it needs requantizing.

    Half-integer zero points (mid-rise grids) become integers by doubling: q - 0.5 = (2q - 1) / 2.
    """
    if weight.scales.shape[1] != 1 or weight.pre_scale is not None:
        return None
    factor = 1 if np.all(weight.zero_points == np.floor(weight.zero_points)) else 2
    values = weight.codes.astype(np.float32) * factor - weight.zero_points * factor
    if np.abs(values).max(initial=0) > INT8_MAX or not np.array_equal(values, np.rint(values)):
        return None
    return values.astype(np.int8), (weight.scales[:, 0] / np.float32(factor)).astype(np.float32)


def requantize(matrix: FloatArray, least: FloatArray | None = None) -> tuple[Array, FloatArray]:
    """One int8 scale per row: (codes [N, K], scales [N]); the same float32 steps as the emitted operators.

    Args:
        matrix: [N, K].
        least: [N] lower bounds of the scales.
    """
    peak = np.abs(matrix).max(axis=1, keepdims=True)
    scale = np.where(peak > 0, peak / np.float32(INT8_MAX), np.float32(1.0)).astype(np.float32)
    if least is not None:
        scale = np.maximum(scale, least[:, None])
    return np.rint(matrix / scale).astype(np.int8), scale[:, 0]


def int8_codes(weight: QuantizedWeight, least: FloatArray | None = None) -> tuple[Array, FloatArray]:
    """(codes [N, K], scales [N]) of an int8 kernel; requantized where codes do not fit or `least` scales are given."""
    exact = signed_codes(weight) if least is None else None
    return exact if exact is not None else requantize(weight.dequantize(), least)


def int8_weight(weight: QuantizedWeight, least: FloatArray | None = None) -> FloatArray:
    """W[N, K] that an int8 kernel multiplies with."""
    if least is None and signed_codes(weight) is not None:
        return weight.dequantize()
    codes, scales = int8_codes(weight, least)
    return codes.astype(np.float32) * scales[:, None]


def storable_scales(scales: FloatArray) -> Array:
    """float16 when that loses nothing (the quantizers round scales so that it usually does not), else float32."""
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), scales) else scales


def scale_value(builder: Builder, scales: FloatArray, name: str) -> ir.Value:
    """float32 scales; stored as float16 where exact and worth a node."""
    stored = storable_scales(scales)
    if stored.dtype == np.float16 and stored.size >= 32:
        return builder.op("Cast", [builder.const(stored, name)], to=ir.DataType.FLOAT)
    return builder.const(scales, name)


def _unpack_body(bits: int, tail: bool, spelling: Spelling, join: str) -> Body:
    def body(ops: Ops, inputs: Sequence[ir.Value]) -> ir.Value:
        *stored, shape = inputs
        codes: ir.Value | None = None
        shift = 0
        for plane, width in zip(stored, planes(bits), strict=True):
            part = spelling(ops, plane, width, shift)
            if tail:  # each plane pads its own last byte
                end = ops.op("ReduceProd", [shape], keepdims=1)
                part = ops.op("Slice", [part, ops.const(np.array([0])), end])
            codes = part if codes is None else ops.op(join, [codes, part])
            shift += width
        return ops.op("Reshape", [codes, shape])

    return body


def _plane_by_bits(ops: Ops, plane: ir.Value, width: int, shift: int) -> ir.Value:
    """Bytes [L] -> uint8 codes [L * 8/width], the first from the lowest bits, moved up by `shift` bits."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[None, :]
    column = ops.op("Reshape", [plane, ops.const(np.array([-1, 1]))])
    spread = ops.op("BitShift", [column, ops.const(shifts)], direction="RIGHT")
    masked = ops.op("BitwiseAnd", [spread, ops.const(np.array((1 << width) - 1, np.uint8))])
    part = ops.op("Reshape", [masked, ops.const(np.array([-1]))])
    if not shift:
        return part
    return ops.op("BitShift", [part, ops.const(np.array(shift, np.uint8))], direction="LEFT")


def _plane_by_division(ops: Ops, plane: ir.Value, width: int, shift: int) -> ir.Value:
    """The same in int32."""
    powers = 1 << np.arange(0, 8, width, dtype=np.int32)[None, :]
    numbers = ops.op("Cast", [plane], to=ir.DataType.INT32)
    column = ops.op("Reshape", [numbers, ops.const(np.array([-1, 1]))])
    spread = ops.op("Div", [column, ops.const(powers)])
    rest = ops.op("Mod", [spread, ops.const(np.array(1 << width, np.int32))])
    part = ops.op("Reshape", [rest, ops.const(np.array([-1]))])
    return ops.op("Mul", [part, ops.const(np.array(1 << shift, np.int32))]) if shift else part


def codes_value(builder: Builder, codes: Array, bits: int, shape: Sequence[int], name: str) -> ir.Value:
    """uint8 codes of the given shape, `bits` bits each in the file."""
    if bits == 8:
        return builder.const(codes.astype(np.uint8).reshape(shape), name)
    flat = np.ascontiguousarray(codes, dtype=np.uint8).reshape(-1)
    stored = [builder.const(plane, name) for plane in pack(flat, bits)]
    tail = any(flat.size * width % 8 for width in planes(bits))
    inputs = [*stored, builder.const(np.array(shape, np.int64), "shape")]
    if builder.runtime == "portable":
        numbers = _unpack_body(bits, tail, _plane_by_division, "Add")(builder, inputs)
        return builder.op("Cast", [numbers], to=ir.DataType.UINT8)
    body = _unpack_body(bits, tail, _plane_by_bits, "BitwiseOr")
    return builder.call(f"Unpack{bits}{'Tail' if tail else ''}", body, inputs)


def uniform_bits(weight: QuantizedWeight) -> int | None:
    """The width that all groups have, or None where they differ."""
    first = int(weight.group_bits[0])
    return first if np.all(weight.group_bits == first) else None


def group_codes(builder: Builder, weight: QuantizedWeight, name: str) -> ir.Value:
    """uint8 codes [N, G, width], the last group filled up; in the file, groups of one width lie together."""
    codes, name = grouped_codes(weight), f"{name}.codes"
    parts = []
    for bits in np.unique(weight.group_bits):
        part = codes[:, weight.group_bits == bits]
        parts.append(codes_value(builder, part, int(bits), part.shape, name))
    return _regrouped(builder, parts, weight.group_bits)


def _regrouped(builder: Builder, parts: Sequence[ir.Value], group_bits: Array) -> ir.Value:
    """The groups of each width, [N, G_width, ...] narrow to wide, as [N, G, ...] in their own order."""
    if len(parts) == 1:
        return parts[0]
    joined = builder.op("Concat", parts, axis=1)
    places = np.argsort(np.argsort(group_bits, kind="stable"), kind="stable")
    if np.array_equal(places, np.arange(places.size)):
        return joined
    return builder.op("Gather", [joined, builder.const(places.astype(np.int64), "groups")], axis=1)


def grouped_codes(weight: QuantizedWeight) -> Array:
    """[N, G, width]: the last group filled up with codes that are cut off or, in MatMulNBits, worth 0."""
    num_rows, num_inputs = weight.shape
    width = weight.spec.group_width(num_inputs)
    num_groups = weight.scales.shape[1]
    pad = num_groups * width - num_inputs
    if not pad:
        return weight.codes.reshape(num_rows, num_groups, width)
    last = np.clip(np.floor(weight.zero_points[:, -1:]), 0, (1 << int(weight.group_bits[-1])) - 1)
    filler = np.repeat(last.astype(np.uint8), pad, axis=1)
    return np.concatenate([weight.codes, filler], axis=1).reshape(num_rows, num_groups, width)


def whole_codes(points: FloatArray, bits: int) -> bool:
    """Can these zero points be stored as codes?"""
    return bool(np.all((points == np.rint(points)) & (points >= 0) & (points < 1 << bits)))


def zero_point_value(builder: Builder, weight: QuantizedWeight, name: str) -> ir.Value:
    """Float zero points [N, G, 1]; [1, G, 1] or [1, 1, 1] where rows or all agree (symmetric grids store none)."""
    points = weight.zero_points[:, :, None]
    if np.all(points == points[0, 0]):
        return builder.const(points[:1, :1], "zero")
    if uniform_bits(weight) is None and np.all(points == points[:1]):
        return builder.const(points[:1], "zero")
    parts = []
    for bits in np.unique(weight.group_bits):
        parts.append(_zero_point_part(builder, points[:, weight.group_bits == bits], int(bits), name))
    return _regrouped(builder, parts, weight.group_bits)


def _zero_point_part(builder: Builder, points: FloatArray, bits: int, name: str) -> ir.Value:
    """Float zero points [N, G_width, 1] of the groups of one width."""
    if np.all(points == points[0, 0]):
        shape = builder.const(np.array(points.shape, np.int64), "shape")
        return builder.op("Expand", [builder.const(points[:1, :1], "zero"), shape])
    if not whole_codes(points, bits):
        return scale_value(builder, points, name)
    codes = codes_value(builder, points.astype(np.uint8), bits, points.shape, name)
    return builder.op("Cast", [codes], to=ir.DataType.FLOAT)


def _dequantize_body(ops: Ops, inputs: Sequence[ir.Value]) -> ir.Value:
    codes, zero_points, scales = inputs
    centred = ops.op("Sub", [ops.op("Cast", [codes], to=ir.DataType.FLOAT), zero_points])
    widened = ops.op("Unsqueeze", [scales, ops.const(np.array([-1]))])
    return ops.op("Mul", [centred, widened])


def float_matrix(builder: Builder, weight: QuantizedWeight, name: str) -> ir.Value:
    """W[N, K] float32, equal to `weight.dequantize()` bit for bit."""
    num_rows, num_inputs = weight.shape
    codes = group_codes(builder, weight, name)
    if builder.runtime == "portable":  # OpenVINO keeps uint8 -> float at run time, where LSTM wants a constant
        codes = builder.op("Cast", [codes], to=ir.DataType.INT32)
    zero_points = zero_point_value(builder, weight, f"{name}.zero_points")
    scales = scale_value(builder, weight.scales, f"{name}.scales")
    blocks = builder.call("Dequantize", _dequantize_body, [codes, zero_points, scales])
    matrix = builder.op("Reshape", [blocks, builder.const(np.array([num_rows, -1]), "shape")])
    if weight.scales.shape[1] * weight.spec.group_width(num_inputs) != num_inputs:
        bounds = [np.array([0]), np.array([num_inputs]), np.array([1])]
        matrix = builder.op("Slice", [matrix, *(builder.const(bound, "bound") for bound in bounds)])
    if weight.pre_scale is not None:
        matrix = builder.op("Div", [matrix, builder.const(weight.pre_scale, f"{name}.pre_scale")])
    return matrix


def _peak_body(ops: Ops, inputs: Sequence[ir.Value]) -> ir.Value:
    """Scale per row: max|row| / 127, and 1 for rows of zeros."""
    peak = ops.op("ReduceMax", [ops.op("Abs", [inputs[0]]), ops.const(np.array([1]))], keepdims=1)
    scale = ops.op("Div", [peak, ops.const(np.array(INT8_MAX, np.float32))])
    empty = ops.op("Equal", [peak, ops.const(np.array(0, np.float32))])
    return ops.op("Where", [empty, ops.const(np.array(1, np.float32)), scale])


def _round_body(ops: Ops, inputs: Sequence[ir.Value]) -> ir.Value:
    return ops.op("Cast", [ops.op("Round", [ops.op("Div", list(inputs))])], to=ir.DataType.INT8)


def _centre_body(ops: Ops, inputs: Sequence[ir.Value]) -> ir.Value:
    signed = ops.op("Cast", [inputs[0]], to=ir.DataType.INT8)
    return ops.op("Sub", [signed, inputs[1]])


def int8_matrix(
    builder: Builder,
    weight: QuantizedWeight,
    name: str,
    layout: Layout | None = None,
    least: FloatArray | None = None,
) -> tuple[ir.Value, ir.Value]:
    """(int8 codes, float32 scale [N]) whose product is `int8_weight(weight, least)`; stored at the weight's own width.

    The codes come as [N, K], or as the node's operand when its layout is given.
    """
    exact = signed_codes(weight) if least is None else None
    if exact is None:
        matrix = float_matrix(builder, weight, name)
        scales = builder.call("RowScale", _peak_body, [matrix])
        if least is not None:
            scales = builder.op("Max", [scales, builder.const(least[:, None], f"{name}.least")])
        codes = builder.call("Requantize", _round_body, [matrix, scales])
        flat_scales = builder.op("Reshape", [scales, builder.const(np.array([-1]), "shape")])
        return (codes if layout is None else to_operand(builder, codes, layout)), flat_scales
    values, scales_array = exact
    scales = scale_value(builder, scales_array, f"{name}.scales")
    bits = int(weight.group_bits[0])  # one group
    if bits == 8:
        stored = values if layout is None else layout.to_operand(values)
        return builder.const(stored, f"{name}.codes"), scales
    direct = layout is not None and layout.is_identity  # a reshape of [N, K]: unpack straight into it
    shape = layout.operand_shape if layout is not None and direct else weight.shape
    codes = codes_value(builder, weight.codes, bits, shape, f"{name}.codes")
    codes = _centred(builder, weight, codes, name, len(shape))
    return (codes if layout is None or direct else to_operand(builder, codes, layout)), scales


def _centred(builder: Builder, weight: QuantizedWeight, codes: ir.Value, name: str, rank: int) -> ir.Value:
    """int8 codes minus their rows' zero points; `rank` = rank of codes, whose first axis runs over rows."""
    points = weight.zero_points[:, 0].reshape(-1, *[1] * (rank - 1))
    if not np.all(points == np.floor(points)):  # q - 0.5 -> 2q - 1
        codes = builder.op("BitShift", [codes, builder.const(np.array(1, np.uint8))], direction="LEFT")
        points = 2 * points
    if np.all(points == points.flat[0]):
        zero = builder.const(np.array(points.flat[0], np.int8), "zero")
    else:
        stored = codes_value(builder, points.astype(np.uint8), 8, points.shape, f"{name}.zero_points")
        zero = builder.op("Cast", [stored], to=ir.DataType.INT8)
    return builder.call("Centre", _centre_body, [codes, zero])


def to_operand(builder: Builder, matrix: ir.Value, layout: Layout) -> ir.Value:
    """The matrix back in the shape that the node reads."""
    permuted = [layout.view[axis] for axis in layout.perm]
    value = matrix
    if len(permuted) != 2:
        value = builder.op("Reshape", [value, builder.const(np.array(permuted, np.int64), "shape")])
    if not layout.is_identity:
        value = builder.op("Transpose", [value], perm=[int(axis) for axis in np.argsort(layout.perm)])
    if tuple(layout.view) != tuple(layout.operand_shape):
        value = builder.op("Reshape", [value, builder.const(np.array(layout.operand_shape, np.int64), "shape")])
    return value


def channel_axis(layout: Layout) -> int | None:
    """The operand axis that runs over W's rows, when W is the operand up to one transpose; else None."""
    if layout.view != layout.operand_shape or not layout.perm:
        return None
    rest = list(layout.perm[1:])
    return layout.perm[0] if rest == sorted(rest) else None
