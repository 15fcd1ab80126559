"""What changed in the default domain between opset 7 and 18, one small function for each change that matters.

An adapter edits its node in place from the version before to the version it is registered for. Changes that only
allow more types or add optional attributes need none.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from quantkit.graph._trace import is_constant, static_shape
from quantkit.types import Array


class BlockedError(Exception):
    """A node cannot be upgraded; the text names it."""


def label(node: ir.Node) -> str:
    return f"{node.op_type} '{node.name}'"


class Editor:
    """Adds constants and nodes around a node, with names that are not taken."""

    def __init__(self, main: ir.Graph) -> None:
        self._main = main
        self._taken = {value.name for node in main.all_nodes() for value in node.outputs}
        self._taken |= {node.name for node in main.all_nodes()} | set(main.initializers)
        self._taken |= {value.name for value in main.inputs}
        self._tried: Counter[str] = Counter()

    def name(self, base: str) -> str:
        name = base
        while name in self._taken:
            self._tried[base] += 1
            name = f"{base}_{self._tried[base] + 1}"
        self._taken.add(name)
        return name

    def constant(self, node: ir.Node, what: str, array: Array) -> ir.Value:
        """A new initializer for one of the node's inputs."""
        name = self.name(f"{node.name}.{what}")
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self._main.register_initializer(value)
        return value

    def before(
        self, node: ir.Node, op: str, inputs: Sequence[ir.Value], attributes: Mapping[str, Any] | None = None
    ) -> ir.Value:
        """A new node in front of `node`; returns what it makes."""
        new = ir.node(op, inputs, attributes, name=self.name(f"{node.name}.{op}"))
        new.outputs[0].name = self.name(f"{new.name}.out")
        assert node.graph is not None
        node.graph.insert_before(node, new)
        return new.outputs[0]

    def after(self, node: ir.Node, op: str, extra: ir.Value) -> None:
        """A new node behind `node` that makes, under its name, what the graph read so far."""
        old = node.outputs[0]
        new = ir.node(op, [old, extra], name=self.name(f"{node.name}.{op}"))
        made = new.outputs[0]
        made.type, made.shape, old.shape = old.type, old.shape, None
        uses = [use for use in old.uses() if use.node is not new]
        for use in uses:
            use.node.replace_input_with(use.idx, made)
        graph = node.graph
        assert graph is not None
        for index, output in enumerate(graph.outputs):
            if output is old:
                graph.outputs[index] = made
        graph.insert_after(node, new)
        name = old.name
        old.name = self.name(f"{node.name}.out")
        made.name = name


def _set_input(node: ir.Node, index: int, value: ir.Value | None) -> None:
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)


def _to_input(name: str, index: int) -> Callable[[ir.Node, Editor], None]:
    """The adapter for an attribute of integers that became an input."""

    def adapt(node: ir.Node, editor: Editor) -> None:
        if name in node.attributes:
            numbers = np.array(node.attributes.pop(name).as_ints(), dtype=np.int64)
            _set_input(node, index, editor.constant(node, name, numbers))

    return adapt


def _float_dtype(node: ir.Node) -> Any:
    """The numpy type of the node's data."""
    dtype = node.inputs[0].dtype if node.inputs and node.inputs[0] is not None else None
    return (dtype or ir.DataType.FLOAT).numpy()


def _batch_norm_9(node: ir.Node, editor: Editor) -> None:
    if "spatial" in node.attributes and node.attributes.pop("spatial").as_int() != 1:
        raise BlockedError(f"{label(node)} has spatial=0, which newer opsets do not know")


def _batch_norm_14(node: ir.Node, editor: Editor) -> None:
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        raise BlockedError(f"{label(node)} is in training mode")
    node.resize_outputs(1)


def _clip_11(node: ir.Node, editor: Editor) -> None:
    for index, name in enumerate(("min", "max"), start=1):
        if name in node.attributes:
            bound = np.array(node.attributes.pop(name).as_float(), dtype=_float_dtype(node))
            _set_input(node, index, editor.constant(node, name, bound))


def _dropout_10(node: ir.Node, editor: Editor) -> None:
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        raise BlockedError(f"{label(node)} returns its mask, which is boolean in newer opsets")


def _dropout_12(node: ir.Node, editor: Editor) -> None:
    node.attributes.pop("ratio", None)  # no effect without training


def _pad_11(node: ir.Node, editor: Editor) -> None:
    _to_input("pads", 1)(node, editor)
    if "value" in node.attributes:
        value = np.array(node.attributes.pop("value").as_float(), dtype=_float_dtype(node))
        _set_input(node, 2, editor.constant(node, "value", value))


def _resize_11(node: ir.Node, editor: Editor) -> None:
    """Opset 10 knew one way to map coordinates, `asymmetric`, and rounded down when growing and up when shrinking."""
    mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "nearest"
    scales = node.inputs[1]
    if mode == "nearest":
        if scales is None or not is_constant(scales) or scales.const_value is None:
            raise BlockedError(f"{label(node)} computes its scales, so how it rounds is not known")
        factors = scales.const_value.numpy()
        if (factors > 1).any() and (factors < 1).any():
            raise BlockedError(f"{label(node)} grows one axis and shrinks another")
        node.attributes["nearest_mode"] = ir.AttrString("nearest_mode", "ceil" if (factors < 1).any() else "floor")
    name = "coordinate_transformation_mode"
    node.attributes[name] = ir.AttrString(name, "asymmetric")
    node.resize_inputs(3)
    node.replace_input_with(1, None)
    node.replace_input_with(2, scales)


def _resize_13(node: ir.Node, editor: Editor) -> None:
    name = "coordinate_transformation_mode"
    if name in node.attributes and node.attributes[name].as_string() == "tf_half_pixel_for_nn":
        raise BlockedError(f"{label(node)} has {name}=tf_half_pixel_for_nn, which newer opsets do not know")


def _roi_align_16(node: ir.Node, editor: Editor) -> None:
    name = "coordinate_transformation_mode"
    node.attributes[name] = ir.AttrString(name, "output_half_pixel")


def _scan_9(node: ir.Node, editor: Editor) -> None:
    """Scan-8 runs over a batch: an outer Scan over axis 0 around a Scan-9 with the same body."""
    if node.inputs[0] is not None:
        raise BlockedError(f"{label(node)} has sequence lengths, which newer opsets do not know")
    body, num_scan = node.attributes.pop("body"), node.attributes["num_scan_inputs"].as_int()
    arguments = [value for value in node.inputs[1:] if value is not None]
    slices = [
        ir.Value(
            name=editor.name(f"{node.name}.slice{index}"),
            type=value.type,
            shape=ir.Shape(list(value.shape)[1:]) if value.shape is not None else None,
        )
        for index, value in enumerate(arguments)
    ]
    attributes = [ir.AttrGraph("body", body.as_graph()), ir.AttrInt64("num_scan_inputs", num_scan)]
    directions = node.attributes.pop("directions", None)
    if directions is not None:
        attributes.append(ir.AttrInt64s("scan_input_directions", list(directions.as_ints())))
    name = editor.name(f"{node.name}.item")
    inner = ir.Node("", "Scan", slices, attributes, num_outputs=len(node.outputs), name=name)
    for index, (made, whole) in enumerate(zip(inner.outputs, node.outputs, strict=True)):
        made.name, made.type = editor.name(f"{name}.out{index}"), whole.type
        made.shape = ir.Shape(list(whole.shape)[1:]) if whole.shape is not None else None
    outer = ir.Graph(slices, inner.outputs, nodes=[inner], name=editor.name(f"{node.name}.batch"))
    node.attributes["body"] = ir.AttrGraph("body", outer)
    node.attributes["num_scan_inputs"] = ir.AttrInt64("num_scan_inputs", len(arguments))
    for index, value in enumerate(arguments):
        node.replace_input_with(index, value)
    node.resize_inputs(len(arguments))


def _scatter_11(node: ir.Node, editor: Editor) -> None:
    node.op_type = "ScatterElements"


def _slice_10(node: ir.Node, editor: Editor) -> None:
    for index, name in enumerate(("starts", "ends", "axes"), start=1):
        _to_input(name, index)(node, editor)


def _softmax_13(node: ir.Node, editor: Editor) -> None:
    """Before opset 13, everything from `axis` on was one long row."""
    axis = node.attributes.pop("axis").as_int() if "axis" in node.attributes else 1
    data = node.inputs[0]
    assert data is not None
    rank = len(data.shape) if data.shape is not None else None
    if axis < 0 and rank is not None:
        axis += rank
    shape = static_shape(data) or tuple(
        dim if isinstance(dim, int) else -1 for dim in (data.shape if data.shape is not None else ())
    )
    if axis == -1 or (rank is not None and math.prod(shape[axis + 1 :]) == 1 and -1 not in shape[axis + 1 :]):
        node.attributes["axis"] = ir.AttrInt64("axis", axis)
        return
    whole = editor.before(node, "Shape", [data])
    node.replace_input_with(0, editor.before(node, "Flatten", [data], {"axis": axis}))
    node.attributes["axis"] = ir.AttrInt64("axis", 1)
    editor.after(node, "Reshape", whole)


def _split_18(node: ir.Node, editor: Editor) -> None:
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))


def _top_k_10(node: ir.Node, editor: Editor) -> None:
    k = np.array([node.attributes.pop("k").as_int()], dtype=np.int64)
    _set_input(node, 1, editor.constant(node, "k", k))


def _upsample_9(node: ir.Node, editor: Editor) -> None:
    scales = np.array(node.attributes.pop("scales").as_floats(), dtype=np.float32)
    _set_input(node, 1, editor.constant(node, "scales", scales))


def _upsample_10(node: ir.Node, editor: Editor) -> None:
    node.op_type = "Resize"


ADAPTERS: Mapping[tuple[str, int], Callable[[ir.Node, Editor], None]] = {
    ("BatchNormalization", 9): _batch_norm_9,
    ("BatchNormalization", 14): _batch_norm_14,
    ("Clip", 11): _clip_11,
    ("Dropout", 10): _dropout_10,
    ("Dropout", 12): _dropout_12,
    ("Hardmax", 13): _softmax_13,
    ("LogSoftmax", 13): _softmax_13,
    ("Pad", 11): _pad_11,
    **{
        (f"Reduce{kind}", 18): _to_input("axes", 1)
        for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
    },
    ("ReduceSum", 13): _to_input("axes", 1),
    ("Resize", 11): _resize_11,
    ("Resize", 13): _resize_13,
    ("RoiAlign", 16): _roi_align_16,
    ("Scan", 9): _scan_9,
    ("Scatter", 11): _scatter_11,
    ("Slice", 10): _slice_10,
    ("Softmax", 13): _softmax_13,
    ("Split", 13): _to_input("split", 1),
    ("Split", 18): _split_18,
    ("Squeeze", 13): _to_input("axes", 1),
    ("TopK", 10): _top_k_10,
    ("Unsqueeze", 13): _to_input("axes", 1),
    ("Upsample", 9): _upsample_9,
    ("Upsample", 10): _upsample_10,
}
