"""Operators that are defined by other operators: the model's own functions, and those that ONNX's schemas define."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir

FunctionKey = tuple[str, str, str]


@dataclass(frozen=True)
class Expansion:
    """A node's function body with the node's attributes filled in.

    Attributes:
        graph: its inputs are the function's parameters, with the element types of the node's inputs.
        opsets: domain -> version that the body is written in.
        produced: for each output of the function whether the body computes it; `graph.outputs` holds those alone.
    """

    graph: ir.Graph
    opsets: Mapping[str, int]
    produced: tuple[bool, ...]


def expand(
    node: ir.Node, opsets: Mapping[str, int], functions: Mapping[FunctionKey, onnx.FunctionProto]
) -> Expansion | None:
    """The body that defines this node's operator, or None when nothing does.

    Args:
        opsets: of the graph that the node stands in.
        functions: the model's own, by (domain, name, overload).
    """
    proto = ir.serde.serialize_node(node)
    own = functions.get((node.domain, node.op_type, node.overload))
    function = own if own is not None else _schema_function(node, proto, opsets)
    if function is None:
        return None
    given = {attribute.name: attribute for attribute in proto.attribute}
    given = {attribute.name: attribute for attribute in function.attribute_proto} | given
    if own is None:
        given = _schema_defaults(node, opsets) | given
    model = onnx.ModelProto(ir_version=onnx.IR_VERSION, opset_import=function.opset_import)
    names = dict.fromkeys(function.input, True)
    for position, name in enumerate(function.input):
        names[name] = position < len(node.inputs) and node.inputs[position] is not None
    for body_node in function.node:
        copy = model.graph.node.add()
        copy.CopyFrom(body_node)
        _fill(copy, given, names)
    for position, name in enumerate(function.input):
        value = model.graph.input.add(name=name)
        source = node.inputs[position] if position < len(node.inputs) else None
        if source is not None and source.type is not None:
            value.type.CopyFrom(_type_proto(source))
    computed = {*function.input, *(name for body_node in function.node for name in body_node.output)}
    for name in function.output:
        if name in computed:
            model.graph.output.add(name=name)
    graph = ir.from_proto(_inferred(model)).graph
    # A body may leave out domains it uses; they then mean what they mean around the node.
    imports = {**opsets, **{entry.domain: entry.version for entry in function.opset_import}}
    return Expansion(graph, imports, tuple(name in computed for name in function.output))


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """With element types where they can be told; a body that inference dislikes goes without."""
    try:
        return onnx.shape_inference.infer_shapes(model)
    except (onnx.shape_inference.InferenceError, RuntimeError):
        return model


def _type_proto(value: ir.Value) -> onnx.TypeProto:
    proto = onnx.TypeProto()
    assert value.type is not None
    ir.serde.serialize_type_into(proto, value.type)
    if value.shape is not None:
        ir.serde.serialize_shape_into(proto, value.shape)
    return proto


def _schema(node: ir.Node, opsets: Mapping[str, int]) -> Any:
    """onnx.defs.OpSchema, whose type stubs lack what is asked of it here; None for an unknown operator."""
    try:
        return onnx.defs.get_schema(node.op_type, opsets.get(node.domain, 1), node.domain)
    except onnx.defs.SchemaError:
        return None


def _schema_function(node: ir.Node, proto: onnx.NodeProto, opsets: Mapping[str, int]) -> onnx.FunctionProto | None:
    schema = _schema(node, opsets)
    if schema is None or not (schema.has_function or schema.has_context_dependent_function):
        return None
    wanted = opsets.get("", opsets.get(node.domain, 1))
    if schema.has_function:
        versions = [version for version in schema.function_opset_versions if version <= wanted]
        body = schema.get_function_with_opset_version(max(versions)) if versions else None
    else:
        versions = [version for version in schema.context_dependent_function_opset_versions if version <= wanted]
        if not versions or any(value is not None and value.type is None for value in node.inputs):
            return None
        types = [b"" if value is None else _type_proto(value).SerializeToString() for value in node.inputs]
        body = schema.get_context_dependent_function_with_opset_version(max(versions), proto.SerializeToString(), types)
    if not body:
        return None
    function = onnx.FunctionProto()
    function.ParseFromString(body if isinstance(body, bytes) else body.SerializeToString())
    return function if function.node else None


def _schema_defaults(node: ir.Node, opsets: Mapping[str, int]) -> dict[str, onnx.AttributeProto]:
    schema = _schema(node, opsets)
    assert schema is not None
    return {
        name: attribute.default_value
        for name, attribute in schema.attributes.items()
        if attribute.default_value.type != onnx.AttributeProto.UNDEFINED
    }


def _fill(node: onnx.NodeProto, given: Mapping[str, onnx.AttributeProto], present: Mapping[str, bool]) -> None:
    """Replace references to the function's attributes, and drop what the caller left out; in place."""
    for position, name in enumerate(node.input):
        if not present.get(name, True):
            node.input[position] = ""
    attributes = list(node.attribute)
    del node.attribute[:]
    for attribute in attributes:
        if attribute.ref_attr_name:
            if attribute.ref_attr_name in given:
                copy = node.attribute.add()
                copy.CopyFrom(given[attribute.ref_attr_name])
                copy.name = attribute.name
            continue
        copy = node.attribute.add()
        copy.CopyFrom(attribute)
        for graph in _subgraphs(copy):
            for inner in graph.node:
                _fill(inner, given, present)


def _subgraphs(attribute: onnx.AttributeProto) -> Sequence[onnx.GraphProto]:
    return [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
