"""Turn the weights of targets into inputs of the graph, so that one session tries many weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from quantkit.graph.targets import find_targets
from quantkit.types import Array, FloatArray, Target

PREFIX = "weight:"


@dataclass(frozen=True)
class Exposed:
    """A model whose targets' operands are inputs.

    Attributes:
        model: a copy; the targets' weights are no longer in it.
        targets: of the original model.
    """

    model: ir.Model
    targets: Mapping[str, Target]

    def feed(self, weights: Mapping[str, FloatArray]) -> dict[str, Array]:
        """Matrices W[N, K] as the inputs that stand for them."""
        return {input_name(name): self.targets[name].layout.to_operand(weight) for name, weight in weights.items()}


def input_name(target: str) -> str:
    return f"{PREFIX}{target}"


def expose(model: ir.Model, targets: Mapping[str, Target]) -> Exposed:
    """A copy of `model` in which the operands of these targets are graph inputs.

    Layers of subgraphs read them from the outer scope.
    """
    copy = model.clone()
    ours = find_targets(copy)[0]
    for name in targets:
        target = ours[name]
        operand = ir.Value(name=input_name(name))
        operand.shape, operand.dtype = ir.Shape(target.layout.operand_shape), ir.DataType.FLOAT
        copy.graph.inputs.append(operand)
        for use in target.uses:
            use.node.replace_input_with(use.weight_index, operand)
    _drop_unused(copy.graph)
    return Exposed(copy, targets)


def _drop_unused(graph: ir.Graph) -> None:
    """Constants, and the nodes that moved them about, that nobody reads any more."""
    for node in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            del graph.initializers[name]
