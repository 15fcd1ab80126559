"""Writes nodes and initializers into a graph: the tool that every emitter holds.

Weights are stored packed and rebuilt by standard operators that onnxruntime folds into one constant when it loads the
model. On `ort-cpu` those operators sit in model-local functions (one node a layer); `portable` has them inlined.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import onnx_ir as ir

from quantkit.types import Array, Use

DOMAIN = "quantkit"
CONTRIB = "com.microsoft"


class Ops(Protocol):
    """Where a function body is written: straight into the graph, or into a model-local function."""

    def op(self, op_type: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value: ...

    def const(self, array: Array) -> ir.Value: ...


Spill = Callable[[Array], Array]
Body = Callable[[Ops, Sequence[ir.Value]], ir.Value]


class _FunctionOps:
    """Collects a function body; constants become Constant nodes."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def op(self, op_type: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes or None)
        node.outputs[0].name = f"v{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def const(self, array: Array) -> ir.Value:
        return self.op("Constant", [], value=ir.tensor(array))


class Builder:
    """Edits one model for one runtime. Nodes go in front of `anchor`, which the caller moves with `at`.

    Attributes:
        model: the graph being written; the caller's own copy.
        runtime: `ort-cpu` (functions and contrib operators allowed) or `portable` (standard operators only).
    """

    def __init__(self, model: ir.Model, runtime: str, spill: Spill | None = None) -> None:
        """
        Args:
            spill: gives back an array that was made for the model, moved out of memory if it is large.
        """
        self.model = model
        self.runtime = runtime
        self._spill = spill or (lambda array: array)
        self._graph = model.graph
        self._anchor: ir.Node | None = None
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._shared: dict[tuple[str, ir.Graph, ir.Value], list[ir.Value]] = {}
        self._traced: set[str] = set()
        self._names = {value.name for graph in model.graphs() for value in _values(graph)}

    def start_trace(self) -> None:
        """Forget which names were made so far."""
        self._traced.clear()

    def trace(self) -> frozenset[str]:
        """Names made since `start_trace`."""
        return frozenset(self._traced)

    def at(self, node: ir.Node) -> Builder:
        """Following nodes are inserted in front of `node`, in its graph."""
        self._anchor = node
        return self

    def name(self, wanted: str) -> str:
        """`wanted`, made unique in the model."""
        name, count = wanted, 1
        while name in self._names:
            count += 1
            name = f"{wanted}.{count}"
        self._names.add(name)
        self._traced.add(name)
        return name

    def op(self, op_type: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
        return self.multi(op_type, inputs, 1, **attributes)[0]

    def multi(
        self, op_type: str, inputs: Sequence[ir.Value | None], num_outputs: int, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """Insert a node and give its outputs short unique names."""
        node = ir.node(op_type, inputs, attributes or None, domain=domain, num_outputs=num_outputs)
        for value in node.outputs:
            value.name = self.name(f"q{len(self._names)}")
        assert self._anchor is not None and self._anchor.graph is not None
        self._anchor.graph.insert_before(self._anchor, node)
        if domain:
            self.model.opset_imports.setdefault(domain, 1)
        return node.outputs

    def const(self, array: Array, name: str = "c") -> ir.Value:
        """An initializer of the main graph; equal arrays share one."""
        array = np.asarray(array, order="C")  # ascontiguousarray would give scalars an axis
        key = (array.dtype.str, array.shape, hashlib.sha256(array.reshape(-1).view(np.uint8).data).digest())
        if key not in self._constants:
            value = ir.Value(name=self.name(name), const_value=ir.tensor(self._spill(array)))
            value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
            self._graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    def native(self, codes: Array, bits: int, name: str) -> ir.Value:
        """An initializer of ONNX's own uint4 or uint8 type."""
        kinds = {4: (ir.DataType.UINT4, ml_dtypes.uint4), 8: (ir.DataType.UINT8, np.uint8)}
        dtype, numpy_type = kinds[bits]
        stored = self._spill(codes.astype(numpy_type))
        value = ir.Value(name=self.name(name), const_value=ir.Tensor(stored, dtype=dtype))
        value.shape, value.dtype = ir.Shape(codes.shape), dtype
        self._graph.register_initializer(value)
        return value

    def call(self, name: str, body: Body, inputs: Sequence[ir.Value]) -> ir.Value:
        """`body(inputs)`: as a call of the function `quantkit::name`, or inlined for the portable runtime."""
        if self.runtime == "portable":
            return body(self, inputs)
        identifier = (DOMAIN, name, "")
        if identifier not in self.model.functions:
            self.model.functions[identifier] = _function(name, body, len(inputs), self.model.opset_imports[""])
        return self.multi(name, inputs, 1, domain=DOMAIN)[0]

    def shared(self, kind: str, use: Use, make: Callable[[], Sequence[ir.Value]]) -> Sequence[ir.Value]:
        """Nodes derived from an activation once, for all layers of a graph that read it (its dynamic quantization)."""
        graph = use.node.graph
        assert graph is not None
        key = (kind, graph, use.data)
        if key not in self._shared:
            self._behind(use.data, graph)
            self._shared[key] = list(make())
        return self._shared[key]

    def _behind(self, value: ir.Value, graph: ir.Graph) -> None:
        """Following nodes are inserted in front of all readers of `value`, those of later layers included."""
        producer = value.producer()
        if producer is None or producer.graph is not graph:
            self.at(graph[0])
        else:
            nodes = list(graph)
            self.at(nodes[nodes.index(producer) + 1])

    def replace(self, node: ir.Node, value: ir.Value) -> None:
        """`value` takes the place and the name of the node's first output, also as graph output; the node goes away."""
        old = node.outputs[0]
        assert node.graph is not None
        value.shape, value.type = old.shape, old.type
        old.replace_all_uses_with(value, replace_graph_outputs=old.is_graph_output())
        old.name, value.name = self.name(f"{old.name}.float"), old.name
        node.graph.remove(node, safe=True)


def _values(graph: ir.Graph) -> list[ir.Value]:
    found = [*graph.inputs, *graph.initializers.values()]
    for node in graph:
        found.extend(node.outputs)
    return found


def _function(name: str, body: Body, num_inputs: int, opset: int) -> ir.Function:
    ops = _FunctionOps()
    inputs = [ir.Value(name=f"x{index}") for index in range(num_inputs)]
    output = body(ops, inputs)
    graph = ir.Graph(inputs, [output], nodes=ops.nodes, opset_imports={"": opset})
    return ir.Function(DOMAIN, name, graph=graph, attributes=[])
