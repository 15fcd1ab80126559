"""Cut a graph into pieces that run one after the other: what lives at a cut, and the piece between two cuts."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir


def last_readers(model: ir.Model) -> dict[str, int]:
    """Value name -> position of the last node of the main graph that reads it, be it inside the node's subgraphs.

    Constants, and what is computed from nothing else, are not kept: either model makes them where it needs them.
    """
    last: dict[str, int] = {}
    fixed = {str(name) for name, value in model.graph.initializers.items() if not value.is_graph_input()}
    for position, node in enumerate(model.graph):
        graphs = [graph for attribute in node.attributes.values() for graph in _graphs(attribute)]
        inner = [value for graph in graphs for each in graph.all_nodes() for value in each.inputs]
        read = [*node.inputs, *inner]
        names = {str(value.name) for value in read if value is not None} - fixed
        last |= dict.fromkeys(names, position)
        if not names and not graphs:
            fixed |= {str(value.name) for value in node.outputs}
    return last


def segment(model: ir.Model, known: Sequence[str], asked: Sequence[str]) -> ir.Model:
    """What lies between values that are known and those asked for; inputs that nobody reads are left out."""
    graph = ir.convenience.extract(model.graph, known, asked)
    for value in list(graph.inputs):
        if not value.uses() and not value.is_graph_output():
            graph.inputs.remove(value)
    return ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))


def storable(value: ir.Value) -> bool:
    """Whether numpy holds the value: a tensor of numbers or truth values."""
    return isinstance(value.type, ir.TensorType) and value.type.dtype.numpy().kind in "biuf"


def _graphs(attribute: ir.Attr) -> Sequence[ir.Graph]:
    if attribute.type == ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    return attribute.as_graphs() if attribute.type == ir.AttributeType.GRAPHS else []
