"""Values of a graph that are known before it runs, computed one at a time: packed weights are rebuilt here at load."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch

from quantkit.runtime.torch_backend._compile import evaluate, functions_of
from quantkit.runtime.torch_backend._dtypes import to_numpy
from quantkit.runtime.torch_backend._table import find
from quantkit.types import Array

RANDOM = frozenset(
    ("Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
)


class Constants:
    """Initializers that no caller can replace, and what the main graph computes from them alone.

    Attributes:
        model: whose graph it looks at; never changed.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self._functions = functions_of(model)
        self._order: dict[ir.Node, int] = {}
        for position, node in enumerate(model.graph):
            if self._is_known(node):
                self._order[node] = position

    def __contains__(self, value: ir.Value | None) -> bool:
        return value is not None and (is_initializer(value) or value.producer() in self._order)

    def _is_known(self, node: ir.Node) -> bool:
        if node.op_type == "Constant" and node.domain == "":
            return True
        domain = "" if node.domain == "ai.onnx" else node.domain
        version = self.model.opset_imports.get(domain, 1)
        known = (node.domain, node.op_type, node.overload) in self._functions or find(domain, node.op_type, version)
        graphs = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        plain = not any(item.type in graphs for item in node.attributes.values())
        tensors = all(value.type is None or isinstance(value.type, ir.TensorType) for value in node.outputs)
        return (
            bool(known)
            and plain
            and tensors
            and not (domain == "" and node.op_type in RANDOM)
            and all(value is None or value in self for value in node.inputs)
        )

    def computes(self, node: ir.Node) -> bool:
        """Whether a node of the main graph has nothing but constants to read."""
        return node in self._order

    def array(self, value: ir.Value) -> Array:
        """The constant's numbers.

        Raises:
            InputError: an operator on the way there is refused by its converter.
        """
        if value.const_value is not None:
            return np.asarray(value.const_value.numpy())
        found = evaluate(self.model, self._functions, self._slice(value), value)
        assert isinstance(found, torch.Tensor)
        return to_numpy(found, value.dtype)

    def _slice(self, value: ir.Value) -> Sequence[ir.Node]:
        """The nodes that compute the value, in the graph's order."""
        found: set[ir.Node] = set()
        waiting = [value]
        while waiting:
            node = waiting.pop().producer()
            if node is None or node in found or node not in self._order:
                continue
            found.add(node)
            waiting += [item for item in node.inputs if item is not None and item.const_value is None]
        return sorted(found, key=self._order.__getitem__)


def is_initializer(value: ir.Value) -> bool:
    """Holds its numbers itself, and no caller can replace them."""
    return value.const_value is not None and not value.is_graph_input()
