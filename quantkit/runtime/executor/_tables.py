"""Finds lookups of rows in a table of codes."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from quantkit_kernels.packing import PackedWeight, from_matmulnbits

from quantkit.runtime.executor._constants import Constants
from quantkit.runtime.executor._epilogue import only_reader
from quantkit.runtime.executor._stored import Stored
from quantkit.runtime.executor._weights import attribute, made_by
from quantkit.types import Array, FloatArray

BLOCKED = (4, 8)


@dataclass(frozen=True)
class Lookup:
    """W[ids], divided by pre_scale [K] where there is one.

    Attributes:
        end: the node that makes the rows.
        ids: [...] from -N to N - 1.
        key: what tells this table from others.
    """

    end: ir.Node
    ids: ir.Value
    weight: Stored | PackedWeight
    key: tuple[Hashable, ...]
    pre_scale: FloatArray | None = None


def find_lookup(constants: Constants, node: ir.Node) -> Lookup | None:
    """The lookup that begins (Gather) or is (GatherBlockQuantized) at this node."""
    if (node.domain, node.op_type) == ("com.microsoft", "GatherBlockQuantized"):
        return _blocked(constants, node)
    if (node.domain, node.op_type) == ("", "Gather") and attribute(node, "axis", 0) == 0:
        return _written_out(constants, node)
    return None


def _blocked(constants: Constants, node: ir.Node) -> Lookup | None:
    """onnxruntime's operator on bytes [N, K * bits / 8]."""
    data, ids, scales, points = [*node.inputs, None][:4]
    bits, block = attribute(node, "bits", 4), attribute(node, "block_size", 128)
    axes = (attribute(node, "gather_axis", 0), attribute(node, "quantize_axis", 1))
    if data is None or ids is None or scales is None or ids in constants or data.dtype != ir.DataType.UINT8:
        return None
    if any(item is not None and item not in constants for item in (data, scales, points)):
        return None
    codes, steps = constants.array(data), constants.array(scales)
    if axes not in ((0, 1), (0, -1)) or bits not in BLOCKED or codes.ndim != 2:
        return None
    shape = (codes.shape[0], codes.shape[1] * 8 // bits)
    zero = None if points is None else constants.array(points)
    try:
        weight = from_matmulnbits(codes, steps.astype(np.float32), zero, bits, block, shape)
    except ValueError:  # blocks that the kernels do not have
        return None
    return Lookup(node, ids, weight, (data, scales, points, bits, block))


def _written_out(constants: Constants, node: ir.Node) -> Lookup | None:
    """Reshape((table[ids] - zero points) * scales[ids]) [-> Slice] [-> Div], as the emitter `gather` writes it."""
    table, ids = node.inputs[0], node.inputs[1]
    if table is None or ids is None or table not in constants or ids in constants or table.dtype != ir.DataType.UINT8:
        return None
    cast = only_reader(node, "Cast")
    centred = None if cast is None else only_reader(cast, "Sub")
    scaled = None if centred is None else only_reader(centred, "Mul")
    flat = None if scaled is None else only_reader(scaled, "Reshape")
    if cast is None or centred is None or scaled is None or flat is None or centred.inputs[0] is not cast.outputs[0]:
        return None
    codes = constants.array(table)
    if codes.ndim != 3 or flat.inputs[0] is not scaled.outputs[0] or not _keeps_lead(constants, flat, ids):
        return None
    rows, groups, width = codes.shape
    steps = _looked_up(constants, _second(scaled, centred), ids, rows, groups)
    points = _looked_up(constants, centred.inputs[1], ids, rows, groups)
    if steps is None or points is None:
        return None
    end, columns = flat, groups * width
    cut = only_reader(flat, "Slice")
    if cut is not None:
        bounds = [None if item is None else constants.array(item).tolist() for item in cut.inputs[1:]]
        if len(bounds) != 3 or bounds[0] != [0] or bounds[1] is None or bounds[2] != [-1]:
            return None
        end, columns = cut, int(bounds[1][0])
    if not (groups - 1) * width < columns <= groups * width:
        return None
    pre_scale = None
    divided = only_reader(end, "Div")
    if divided is not None and divided.inputs[1] in constants and divided.inputs[0] is end.outputs[0]:
        assert divided.inputs[1] is not None
        divisor = constants.array(divided.inputs[1])
        if divisor.shape == (columns,):
            end, pre_scale = divided, divisor.astype(np.float32)
    whole = np.ascontiguousarray(codes.reshape(rows, -1)[:, :columns])
    stored = Stored(whole, steps, points, columns if groups == 1 else width)
    return Lookup(end, ids, stored, (end,), pre_scale)


def _second(scaled: ir.Node, centred: ir.Node) -> ir.Value | None:
    return scaled.inputs[1] if scaled.inputs[0] is centred.outputs[0] else None


def _looked_up(
    constants: Constants, value: ir.Value | None, ids: ir.Value, rows: int, groups: int
) -> FloatArray | None:
    """float32 [N, G]: a constant that all rows share, or Cast(table [N, G, 1] [ids])."""
    if value is None:
        return None
    if value in constants:
        array = constants.array(value)
        shared = array.size == 1 or array.shape == (groups, 1)
        return _filled(array.reshape(1, -1), rows, groups) if shared else None
    cast = made_by(value, "Cast")
    gather = None if cast is None else made_by(cast.inputs[0], "Gather")
    table = None if gather is None else gather.inputs[0]
    if gather is None or table is None or gather.inputs[1] is not ids or attribute(gather, "axis", 0) != 0:
        return None
    if table not in constants:
        return None
    array = constants.array(table)
    return None if array.shape != (rows, groups, 1) else _filled(array[:, :, 0], rows, groups)


def _filled(array: Array, rows: int, groups: int) -> FloatArray:
    return np.ascontiguousarray(np.broadcast_to(array.astype(np.float32), (rows, groups)))


def _keeps_lead(constants: Constants, flat: ir.Node, ids: ir.Value) -> bool:
    """Whether a Reshape joins the last two axes: its shape is Concat(Shape(ids), [-1])."""
    joined = made_by(flat.inputs[1], "Concat")
    shape = None if joined is None or len(joined.inputs) != 2 else made_by(joined.inputs[0], "Shape")
    if joined is None or shape is None or shape.inputs[0] is not ids or shape.attributes:
        return False
    last = joined.inputs[1]
    return last is not None and last in constants and constants.array(last).tolist() == [-1]
