"""Which operators onnxruntime runs on integers, and what they need for it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from quantkit.calibration.accumulators import act_params
from quantkit.types import ActParams, Array

# These only move or pick elements: they run on the uint8 codes, and share one scale from end to end.
CODE_OPERATORS = frozenset(
    {"MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Pad", "Split", "Resize"}
    | {"DepthToSpace", "SpaceToDepth", "Identity"}
)
# onnxruntime has integer kernels for these when all inputs and the output are quantized; ReduceMean becomes
# GlobalAveragePool.
ARITHMETIC_OPERATORS = frozenset(
    {"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "ReduceMean", "Sigmoid", "LeakyRelu", "Softmax"}
)
CLIPPING_OPERATORS = frozenset({"Relu", "Clip"})
DEFAULT_DOMAINS = ("", "ai.onnx")
# Largest relative squared error of a constant factor or summand on the uint8 grid (40 dB).
CONSTANT_NOISE = 1e-4


def is_code_operator(node: ir.Node) -> bool:
    """Can this operator run on uint8 codes just as on floats?"""
    if node.domain not in DEFAULT_DOMAINS or node.op_type not in CODE_OPERATORS:
        return False
    if node.op_type == "MaxPool":
        return len(node.outputs) == 1
    if node.op_type == "Resize":  # tf_crop_and_resize writes a number of its own where it leaves the input
        places = _text(node, "coordinate_transformation_mode", "half_pixel")
        return _text(node, "mode", "nearest") == "nearest" and places != "tf_crop_and_resize"
    if node.op_type == "Pad":
        fill = node.inputs[2] if len(node.inputs) > 2 else None
        is_zero = fill is None or (fill.const_value is not None and not np.any(fill.const_value.numpy()))
        return _text(node, "mode", "constant") == "constant" and is_zero
    return True


def _text(node: ir.Node, name: str, default: str) -> str:
    return node.attributes[name].as_string() if name in node.attributes else default


def arithmetic_inputs(node: ir.Node) -> list[ir.Value] | None:
    """The activations of an arithmetic operator, or None when something keeps it float."""
    if node.domain not in DEFAULT_DOMAINS or node.op_type not in ARITHMETIC_OPERATORS:
        return None
    inputs = [value for value in node.inputs if value is not None]
    if node.op_type == "ReduceMean":
        return inputs[:1] if averages_space(node) else None
    if node.op_type == "AveragePool" and not _averages_plainly(node):
        return None
    constants = [value.const_value.numpy() for value in inputs if value.const_value is not None]
    if constants and (node.op_type not in ("Add", "Mul") or any(constant_codes(array) is None for array in constants)):
        return None
    return [value for value in inputs if value.const_value is None] or None


def constant_codes(array: Array) -> tuple[Array, ActParams] | None:
    """(uint8 codes, grid) of a constant operand; None when the grid is too coarse for it."""
    if array.size == 0 or not np.isfinite(array).all():
        return None
    act = act_params(float(array.min()), float(array.max()))
    codes = np.clip(np.rint(array / np.float32(act.scale)) + act.zero_point, 0, 255).astype(np.uint8)
    error = (codes.astype(np.float64) - act.zero_point) * act.scale - array
    if np.square(error).sum() > CONSTANT_NOISE * np.square(array, dtype=np.float64).sum():
        return None
    return codes, act


def averages_space(node: ir.Node) -> bool:
    """Does this ReduceMean average over all axes behind the channels, as GlobalAveragePool does?"""
    value = node.inputs[0]
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    if value is None or value.shape is None or len(value.shape) < 3 or axes is None or axes.const_value is None:
        return False
    rank = len(value.shape)
    return sorted(int(axis) % rank for axis in axes.const_value.numpy().reshape(-1)) == list(range(2, rank))


def _averages_plainly(node: ir.Node) -> bool:
    """False where onnxruntime's integer kernel knows no dilations, or divides by the wrong count at the border."""
    dilations = node.attributes["dilations"].as_ints() if "dilations" in node.attributes else ()
    counts = [_number(node, name) for name in ("ceil_mode", "count_include_pad")]
    return all(step == 1 for step in dilations) and not all(counts)


def _number(node: ir.Node, name: str) -> int:
    return node.attributes[name].as_int() if name in node.attributes else 0


def clip_range(node: ir.Node) -> tuple[float, float] | None:
    """(low, high) of a Relu, or of a Clip with constant bounds around 0 as every activation grid is; else None."""
    if node.domain not in DEFAULT_DOMAINS or node.op_type not in CLIPPING_OPERATORS:
        return None
    if node.op_type == "Relu":
        return 0.0, float("inf")
    bounds = []
    for index, missing in ((1, -np.inf), (2, np.inf)):
        value = node.inputs[index] if len(node.inputs) > index else None
        if value is None:
            bounds.append(missing)
        elif value.const_value is None:
            return None
        else:
            bounds.append(float(value.const_value.numpy().reshape(-1)[0]))
    return (bounds[0], bounds[1]) if bounds[0] <= 0.0 <= bounds[1] and bounds[0] < bounds[1] else None
