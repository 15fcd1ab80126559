"""From the operand that a node reads back to codes, scales and zero points, through what unpacks them.

    MatMul operand [K, N] = [Transpose] <- [Div pre_scale] <- [Slice] <- Reshape <- (codes - zero_points) * scales
                          | [Transpose] <- DequantizeLinear(integers)
Only what was checked node by node is taken; anything else stays a float matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from quantkit.emitters._builder import DOMAIN
from quantkit.runtime.executor._constants import Constants
from quantkit.runtime.executor._stored import Stored, from_integers
from quantkit.types import Array, FloatArray

INTEGERS = {
    ir.DataType.INT2: -2,
    ir.DataType.UINT2: 0,
    ir.DataType.INT4: -8,
    ir.DataType.UINT4: 0,
    ir.DataType.INT8: -128,
    ir.DataType.UINT8: 0,
}
"""Element types of codes, with their least value."""


@dataclass(frozen=True)
class Weight:
    """W[N, K], divided by `pre_scale` [K] where there is one."""

    stored: Stored
    pre_scale: FloatArray | None = None


def attribute(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def made_by(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    """The node that makes the value, when it is this operator."""
    node = None if value is None else value.producer()
    return node if node is not None and (node.op_type, node.domain) == (op_type, domain) else None


def operand(constants: Constants, value: ir.Value, rows_first: bool) -> Weight | None:
    """The matrix that a node reads, or None where it does not come from codes.

    Args:
        rows_first: the value is W[N, K]; else it is [K, N].
    """
    if value not in constants:
        return None
    same = made_by(value, "Identity")
    if same is not None and same.inputs[0] is not None:
        return operand(constants, same.inputs[0], rows_first)
    turned = made_by(value, "Transpose")
    if turned is not None and turned.inputs[0] is not None:
        perm = turned.attributes["perm"].as_ints() if "perm" in turned.attributes else [1, 0]
        return operand(constants, turned.inputs[0], not rows_first) if list(perm) == [1, 0] else None
    real = made_by(value, "DequantizeLinear")
    if real is not None:
        stored = _dequantized(constants, real, rows_first)
        return None if stored is None else Weight(stored)
    return matrix(constants, value) if rows_first else None


def matrix(constants: Constants, value: ir.Value) -> Weight | None:
    """W[N, K] as `quantkit.emitters._unpack.float_matrix` writes it."""
    pre_scale: FloatArray | None = None
    divided = made_by(value, "Div")
    if divided is not None and divided.inputs[0] is not None and divided.inputs[1] is not None:
        divisor = constants.array(divided.inputs[1])
        if divisor.ndim != 1:
            return None
        pre_scale, value = divisor.astype(np.float32), divided.inputs[0]
    num_inputs: int | None = None
    cut = made_by(value, "Slice")
    if cut is not None and cut.inputs[0] is not None:
        num_inputs, value = _columns(constants, cut), cut.inputs[0]
        if num_inputs is None:
            return None
    flat = made_by(value, "Reshape")
    parts = _blocks(flat.inputs[0]) if flat is not None and flat.inputs[0] is not None else None
    if flat is None or parts is None or flat.inputs[1] is None:
        return None
    codes, points, scales = (constants.array(part) for part in parts)
    wanted = constants.array(flat.inputs[1]).tolist()
    if codes.ndim != 3 or scales.shape != codes.shape[:2] or wanted != [codes.shape[0], -1]:
        return None
    rows, groups, width = codes.shape
    columns = groups * width if num_inputs is None else num_inputs
    if not (groups - 1) * width < columns <= groups * width or (pre_scale is not None and pre_scale.size != columns):
        return None
    zero_points = np.broadcast_to(points.astype(np.float32), (rows, groups, 1))[:, :, 0]
    whole = np.ascontiguousarray(codes.reshape(rows, -1)[:, :columns])
    size = columns if groups == 1 else width
    return Weight(Stored(whole, scales.astype(np.float32), np.ascontiguousarray(zero_points), size), pre_scale)


def _columns(constants: Constants, cut: ir.Node) -> int | None:
    """K of a Slice [:, :K]."""
    bounds = [None if item is None else constants.array(item).tolist() for item in cut.inputs[1:]]
    if len(bounds) != 3 or bounds[0] != [0] or bounds[2] != [1] or bounds[1] is None:
        return None
    return int(bounds[1][0])


def _blocks(value: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """(codes, zero points, scales [N, G]) of (codes - zero points) * scales, as a function or written out."""
    call = made_by(value, "Dequantize", DOMAIN)
    if call is not None:
        codes, points, scales = call.inputs
    else:
        product = made_by(value, "Mul")
        centred = None if product is None else made_by(product.inputs[0], "Sub")
        widened = None if product is None else made_by(product.inputs[1], "Unsqueeze")
        if centred is None or widened is None:
            return None
        codes, points, scales = centred.inputs[0], centred.inputs[1], widened.inputs[0]
    while codes is not None and codes.dtype != ir.DataType.UINT8:
        cast = made_by(codes, "Cast")
        codes = None if cast is None else cast.inputs[0]
    if codes is None or points is None or scales is None:
        return None
    return codes, points, scales


def _dequantized(constants: Constants, node: ir.Node, rows_first: bool) -> Stored | None:
    """(integers - zero points) * scales: one scale for all, per row of W, or per block of a row."""
    source, scale = node.inputs[0], node.inputs[1]
    if source is None or scale is None or source.dtype not in INTEGERS:
        return None
    point = node.inputs[2] if len(node.inputs) > 2 else None
    values, steps = constants.array(source), constants.array(scale)
    points = np.zeros(steps.shape, np.int16) if point is None else constants.array(point).astype(np.int16)
    if values.ndim != 2 or points.shape != steps.shape:
        return None
    along, block = attribute(node, "axis", 1) % 2, attribute(node, "block_size", 0)
    inputs_axis = 1 if rows_first else 0
    laid = [_laid(item, values.shape, rows_first, along, block) for item in (steps, points)]
    if laid[0] is None or laid[1] is None:
        return None
    codes = np.ascontiguousarray(values if rows_first else values.T)
    size = block if block and laid[0].shape[1] > 1 else values.shape[inputs_axis]
    low = INTEGERS[source.dtype]
    if low:
        return from_integers(codes, laid[0].astype(np.float32), laid[1], size)
    return Stored(codes.astype(np.uint8), laid[0].astype(np.float32), laid[1].astype(np.float32), size)


def _laid(values: Array, shape: tuple[int, ...], rows_first: bool, along: int, block: int) -> Array | None:
    """Scales or zero points as [N, G]; None where they vary in a way that rows and groups do not."""
    rows = shape[0 if rows_first else 1]
    inputs_axis = 1 if rows_first else 0
    if block:
        if along != inputs_axis or values.ndim != 2:
            return None
        return np.ascontiguousarray(values if rows_first else values.T)
    if values.size == 1:
        return np.full((rows, 1), values.reshape(-1)[0])
    if along == inputs_axis or values.shape != (rows,):
        return None
    return values[:, None]


def integers(constants: Constants, value: ir.Value, scales: Array) -> Stored | None:
    """int8 [K, N] with a scale per column [N], as integer kernels read it."""
    values = constants.array(value)
    if values.ndim != 2 or values.dtype != np.int8 or scales.size not in (1, values.shape[1]):
        return None
    steps = np.broadcast_to(scales.reshape(-1, 1).astype(np.float32), (values.shape[1], 1))
    return from_integers(np.ascontiguousarray(values.T), steps, np.zeros(steps.shape, np.int16), values.shape[0])


def requantized(constants: Constants, value: ir.Value) -> Weight | None:
    """The matrix that int8 [K, N] was rounded from at load, where that came from narrower codes."""
    turned = made_by(value, "Transpose")
    source = value if turned is None else turned.inputs[0]
    call = made_by(source, "Requantize", DOMAIN)
    if call is None:
        cast = made_by(source, "Cast")
        rounded = None if cast is None else made_by(cast.inputs[0], "Round")
        call = None if rounded is None else made_by(rounded.inputs[0], "Div")
    if turned is None or call is None or call.inputs[0] is None:
        return None
    return operand(constants, call.inputs[0], True)
