"""Upgrade the default domain, node by node, with weights left where they are.

Opset 7 to 18 is done by the adapters of `_adapters.py`, and 18 and up by onnxscript's converter. The converter in
onnx itself would need the whole model serialised, and changes results silently: linear Resize-10 and Upsample-9 (it
leaves out the coordinate mode), Hardmax-11 and Scan-8.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import version_converter

from quantkit.graph._adapters import ADAPTERS, BlockedError, Editor, label
from quantkit.graph._schema import find_schema
from quantkit.graph._trace import static_shape

__all__ = ["BlockedError", "upgrade"]

BRIDGE = 18
"""onnxscript converts from this opset on."""
IR_VERSIONS = ((7, 8), (19, 9), (21, 10), (23, 11), (24, 12), (25, 13))
"""(first opset, the IR version that its types need)."""


def upgrade(model: ir.Model, opset: int) -> None:
    """In place; functions must be inlined, shapes inferred, and every node named.

    Raises:
        BlockedError: names the node that cannot be upgraded; the model is then half done and must be dropped.
    """
    source = model.opset_imports[""]
    bridge = max(source, min(opset, BRIDGE))
    known = [node for node in model.graph.all_nodes() if node.domain == "" and find_schema(node.op_type, source)]
    if source < bridge:
        editor = Editor(model.graph)
        for node in known:
            _adapt(node, source, bridge, editor)
        _set_version(model, bridge)
    if bridge < opset:
        for node in known:
            _check_group_normalization(node, bridge, opset)
        try:
            version_converter.convert_version(model, opset)
        except ValueError as error:
            raise BlockedError(" ".join(str(error).split())) from error
        _set_version(model, opset)
    for node in known:
        if node.graph is not None:
            _check_schema(node, opset)
    model.ir_version = max([model.ir_version, *(ir_version for first, ir_version in IR_VERSIONS if first <= opset)])


def _adapt(node: ir.Node, source: int, target: int, editor: Editor) -> None:
    """Apply the adapters for every version between the two; one may turn the node into another operator."""
    for version in range(source + 1, target + 1):
        adapter = ADAPTERS.get((node.op_type, version))
        if adapter is not None:
            adapter(node, editor)


def _set_version(model: ir.Model, version: int) -> None:
    model.opset_imports[""] = version
    for graph in model.graphs():
        if "" in graph.opset_imports:
            graph.opset_imports[""] = version
        for node in graph:
            if node.domain == "":
                node.version = version


def _check_schema(node: ir.Node, opset: int) -> None:
    """The node is valid in the new opset as far as names and counts go."""
    schema = find_schema(node.op_type, opset)
    if schema is None or schema.deprecated:
        raise BlockedError(f"opset {opset} has no operator {label(node)}")
    strange = sorted(set(node.attributes) - set(schema.attributes))
    if strange:
        raise BlockedError(f"{label(node)} has the attribute '{strange[0]}', which opset {opset} does not know")
    if not schema.min_input <= len(node.inputs) <= schema.max_input:
        raise BlockedError(f"{label(node)} has {len(node.inputs)} inputs, which opset {opset} does not allow")


def _check_group_normalization(node: ir.Node, source: int, opset: int) -> None:
    """From opset 21 on, scale and bias are per channel; onnxscript leaves the node wrong when shapes are unknown."""
    if node.op_type != "GroupNormalization" or not source < 21 <= opset:
        return
    data, scale, bias = node.inputs[:3]
    channels = data.shape[1] if data is not None and data.shape is not None and len(data.shape) > 1 else None
    shapes = [static_shape(value) for value in (scale, bias) if value is not None]
    if not isinstance(channels, int) or len(shapes) != 2 or None in shapes:
        raise BlockedError(f"{label(node)} reads values of unknown shape")
