"""Where static integer layers put their activations on a uint8 grid, so that the integer path is never broken.

A value is quantized when an integer layer reads it or a convolution makes it. Pooling, shape operators, Concat, Add and
the like between such values work on integers too: shape operators on the codes themselves, so that no needless pair
stands in the way; Relu and Clip in front of a pair vanish into its range. Everything else stays float.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from quantkit.graph._integer import arithmetic_inputs, clip_range, is_code_operator
from quantkit.graph._pairs import insert_pairs

__all__ = ["Regions", "find_regions", "insert_pairs"]


@dataclass(frozen=True)
class Regions:
    """The integer part of a graph.

    Attributes:
        groups: value name -> name of its group; one scale and zero point per group.
        produced: names of values that an integer operator makes (every reader sees the quantized value).
        absorbed: names of Relu/Clip nodes that the following range replaces, with the (low, high) they impose.
        code_nodes: names of shape operators that run on codes.
        integer_nodes: names of layers and arithmetic that run on integers.
    """

    groups: Mapping[str, str]
    produced: frozenset[str]
    absorbed: Mapping[str, tuple[float, float]]
    code_nodes: frozenset[str]
    integer_nodes: frozenset[str]

    def members(self, group: str) -> list[str]:
        return [name for name, owner in self.groups.items() if owner == group]

    def bounds(self, group: str) -> tuple[float, float]:
        """The range that absorbed Relu/Clip nodes leave for a group (-inf, inf when there are none)."""
        low, high = -np.inf, np.inf
        for name in self.members(group):
            if name in self.absorbed:
                low, high = max(low, self.absorbed[name][0]), min(high, self.absorbed[name][1])
        return low, high


def moved(model: ir.Model, name: str, regions: Regions) -> bool:
    """Whether a value is what a shape operator made of codes: the value before it has told everything."""
    return any(
        str(node.name) in regions.code_nodes and any(str(value.name) == name for value in node.outputs)
        for node in model.graph
    )


class _Finder:
    """One walk over the main graph: which operators compute on integers."""

    def __init__(self, model: ir.Model, layers: Sequence[str]) -> None:
        self.graph = model.graph
        self.layers = frozenset(layers)
        self.wanted: dict[ir.Value, bool] = {}
        self.produced: dict[ir.Value, ir.Node] = {}
        self.union = _Union()
        self.absorbed: dict[str, tuple[float, float]] = {}

    def is_layer(self, node: ir.Node) -> bool:
        return node.name in self.layers

    def clips(self, value: ir.Value) -> list[ir.Node]:
        """The Relu/Clip nodes behind `value`, as long as each is the only reader of what comes before it."""
        found: list[ir.Node] = []
        while _read_once(value):
            ((node, index),) = value.uses()
            if index != 0 or node.graph is not self.graph or clip_range(node) is None:
                break
            found.append(node)
            value = node.outputs[0]
        return found

    def absorb(self, value: ir.Value) -> ir.Value:
        """The value behind the Relu/Clip nodes that follow, or `value` itself."""
        clips = self.clips(value)
        return clips[-1].outputs[0] if clips else value

    def wants(self, value: ir.Value) -> bool:
        """True when somebody downstream computes on this value as an integer."""
        if value not in self.wanted:
            self.wanted[value] = False  # graphs have no cycles; this only guards against malformed ones
            self.wanted[value] = any(self._reader_wants(node, index) for node, index in value.uses())
        return self.wanted[value]

    def _reader_wants(self, node: ir.Node, index: int) -> bool:
        if node.graph is not self.graph:
            return False
        if self.is_layer(node):
            return index == 0
        if is_code_operator(node):
            return index == 0 and self._results_wanted(node)
        return arithmetic_inputs(node) is not None and self._results_wanted(node)

    def _results_wanted(self, node: ir.Node) -> bool:
        return any(self.wants(self.absorb(value)) for value in node.outputs)

    def integer(self, node: ir.Node) -> bool:
        """Does this node compute on integers, given what is known of its inputs?"""
        if self.is_layer(node):
            return True
        return any(value in self.produced for value in self.inputs(node)) and self._results_wanted(node)

    def inputs(self, node: ir.Node) -> list[ir.Value]:
        """The values that the node reads as integers when it computes on them; empty when it cannot."""
        if self.is_layer(node) or is_code_operator(node):
            return [value for value in node.inputs[:1] if value is not None]
        return arithmetic_inputs(node) or []

    def move(self, node: ir.Node) -> list[ir.Value]:
        """A code operator: its results share the source's grid. A Relu behind it may as well stand in front of it."""
        ((source, *_), results) = (self.inputs(node), list(node.outputs))
        if len(results) == 1 and all(_read_once(value) for value in self.union.members(source)):
            results = [self._take_clips(results[0])]
        for value in results:
            self.union.join(source, value)
        return results

    def compute(self, node: ir.Node, share_concat: bool) -> list[ir.Value]:
        """A layer or arithmetic: its result gets a grid of its own, or that of a Concat's inputs."""
        result = self.absorb(node.outputs[0])
        if self.is_layer(node) and node.op_type != "Conv" and not self.wants(result):
            return []
        plain = result is node.outputs[0]
        result = self._take_clips(node.outputs[0])
        inputs = self.inputs(node)
        # A Relu'd input must keep a range from 0, or its Relu could not be absorbed.
        if node.op_type == "Concat" and share_concat and plain and len({self._bounds(value) for value in inputs}) == 1:
            for value in inputs:
                self.union.join(value, result)
        return [result]

    def _take_clips(self, value: ir.Value) -> ir.Value:
        """Absorb the Relu/Clip nodes behind `value`; returns what is left of them."""
        low, high = -np.inf, np.inf
        for clip in self.clips(value):
            bounds = clip_range(clip)
            assert bounds is not None
            low, high = max(low, bounds[0]), min(high, bounds[1])
            value = clip.outputs[0]
            self.absorbed[str(value.name)] = (low, high)
        return value

    def _bounds(self, value: ir.Value) -> tuple[float, float]:
        """What the absorbed Relu/Clip of the value's group allow."""
        found = [self.absorbed[str(other.name)] for other in self.union.members(value) if other.name in self.absorbed]
        return max((low for low, _ in found), default=-np.inf), min((high for _, high in found), default=np.inf)


def _read_once(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def find_regions(model: ir.Model, layers: Sequence[str], *, share_concat: bool = True) -> Regions:
    """Where the integer layers (node names, main graph) need quantized values, and what joins them.

    Args:
        model: normalised graph.
        layers: names of nodes that run as static integer kernels.
        share_concat: give the inputs of a Concat its output's scale, so that it is a plain copy.
    """
    finder = _Finder(model, layers)
    code_nodes: set[str] = set()
    integer_nodes: set[str] = set()
    produced: set[str] = set()
    for node in model.graph:
        if not finder.integer(node):
            continue
        inputs = finder.inputs(node)
        if is_code_operator(node) and not finder.is_layer(node):
            code_nodes.add(str(node.name))
            outputs = finder.move(node)
        else:
            integer_nodes.add(str(node.name))
            outputs = finder.compute(node, share_concat)
        for value in [*inputs, *outputs]:
            finder.union.add(value)
        finder.produced.update((value, node) for value in outputs)
        produced.update(str(value.name) for value in outputs)
    groups = {str(value.name): str(finder.union.root(value).name) for value in finder.union.parent}
    return Regions(groups, frozenset(produced), finder.absorbed, frozenset(code_nodes), frozenset(integer_nodes))


class _Union:
    """Disjoint sets of values, in the order they were met."""

    def __init__(self) -> None:
        self.parent: dict[ir.Value, ir.Value] = {}

    def add(self, value: ir.Value) -> None:
        self.parent.setdefault(value, value)

    def root(self, value: ir.Value) -> ir.Value:
        self.add(value)
        while self.parent[value] is not value:
            value = self.parent[value]
        return value

    def members(self, value: ir.Value) -> list[ir.Value]:
        root = self.root(value)
        return [other for other in self.parent if self.root(other) is root]

    def join(self, first: ir.Value, second: ir.Value) -> None:
        self.parent[self.root(second)] = self.root(first)
