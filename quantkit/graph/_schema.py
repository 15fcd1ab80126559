"""Refuse nodes that are no operator of ONNX: attributes of another type, missing ones, what its checker finds."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from quantkit.errors import InputError

CAUSE_LENGTH = 300
"""Characters of an error of ONNX that ours repeats."""


def check_schema(model: ir.Model, where: str) -> None:
    """ONNX's own checker, with large weights left out."""
    try:
        passes.CheckerPass()(model)
    except (onnx.checker.ValidationError, ir.passes.PassError, ir.serde.SerdeError) as error:
        raise InputError(f"{where} is not a valid ONNX model: {cause_of(error)}; export it again") from error


def check_attributes(model: ir.Model, where: str) -> None:
    """Every operator of the default domain has its required attributes, and all attributes have the right type."""
    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1))
    for node in _nodes(model):
        schema = find_schema(node.op_type, version) if node.domain in ("", "ai.onnx") else None
        if schema is None:
            continue
        label = f"node '{node.name or node.op_type}' of {where} ({node.op_type})"
        for name, wanted in schema.attributes.items():
            attribute = node.attributes.get(name)
            if attribute is None and wanted.required:
                raise InputError(f"{label} has no attribute '{name}': export it again")
            kind = str(wanted.type).rpartition(".")[2]  # AttrType.INTS
            if attribute is not None and attribute.type.name != kind:
                raise InputError(
                    f"{label} has the attribute '{name}' of type {attribute.type.name}, but the operator takes "
                    f"{kind}: export it again"
                )


def find_schema(op_type: str, version: int) -> onnx.defs.OpSchema | None:
    """Of an operator of the default domain; None when that opset has none of this name."""
    try:
        return onnx.defs.get_schema(op_type, version, "")
    except (onnx.defs.SchemaError, TypeError):  # TypeError: a version beyond 32 bits
        return None


def cause_of(error: BaseException) -> str:
    """What is at the bottom of an error, in one line: the layers above repeat whole nodes."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:CAUSE_LENGTH] or type(error).__name__


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()
