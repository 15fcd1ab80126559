"""Generated decoders of any size: random weights with the uneven channels of real ones, streamed to external data.

What matters here is how many bytes there are and how they are laid out: as exporters write them, MatMul weights [K, N],
one file of external data beside the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

OPSET = 21
EXPERT = 4
"""Width of the inner layer over the width of the model."""
MATRICES = (("q", 1, 1), ("k", 1, 1), ("v", 1, 1), ("o", 1, 1), ("up", 1, EXPERT), ("down", EXPERT, 1))


@dataclass(frozen=True)
class Shape:
    """A decoder.

    Attributes:
        width: of the residual stream.
        blocks: attention and feed-forward.
        vocabulary: rows of the embedding and outputs of the last layer.
        heads: of 64 values each when left out.
    """

    width: int
    blocks: int
    vocabulary: int = 32000

    @property
    def parameters(self) -> int:
        return self.blocks * sum(k * n for _, k, n in MATRICES) * self.width**2 + 2 * self.vocabulary * self.width


def shape_of(size: int, width: int) -> Shape:
    """The decoder of this width that comes nearest to so many bytes of float32."""
    empty = Shape(width, 0)
    block = Shape(width, 1).parameters - empty.parameters
    return Shape(width, max(round((size / 4 - empty.parameters) / block), 1))


def write(shape: Shape, path: Path, seed: int = 0) -> None:
    """The model as a file with its weights in `path.data`, never more than one of them in memory."""
    model = build(shape, seed)
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=1024)


def build(shape: Shape, seed: int = 0) -> ir.Model:
    """`ids` [batch, tokens] -> `logits` [batch, tokens, vocabulary]; weights are made when they are read."""
    graph = _Graph(seed)
    width, heads = shape.width, shape.width // 64
    ids = ir.val("ids", dtype=ir.DataType.INT64, shape=["batch", "tokens"])
    x = graph.op("Gather", [graph.weight("embedding", (shape.vocabulary, width), 1.0), ids])
    for block in range(shape.blocks):
        name = f"block{block}"
        y = graph.norm(x, f"{name}.norm1", width)
        q, k, v = (graph.heads(graph.linear(y, f"{name}.{part}", width, width), heads) for part in "qkv")
        scores = graph.op("MatMul", [q, graph.op("Transpose", [k], perm=[0, 1, 3, 2])])
        scores = graph.op("Softmax", [graph.op("Mul", [scores, graph.scalar(64**-0.5)])], axis=-1)
        mixed = graph.op("Transpose", [graph.op("MatMul", [scores, v])], perm=[0, 2, 1, 3])
        mixed = graph.op("Reshape", [mixed, graph.shape([0, 0, width])])
        x = graph.op("Add", [x, graph.linear(mixed, f"{name}.o", width, width)])
        y = graph.norm(x, f"{name}.norm2", width)
        y = graph.op("Relu", [graph.linear(y, f"{name}.up", width, EXPERT * width)])
        x = graph.op("Add", [x, graph.linear(y, f"{name}.down", EXPERT * width, width)])
    logits = graph.linear(graph.norm(x, "norm", width), "head", width, shape.vocabulary)
    logits.name, logits.dtype = "logits", ir.DataType.FLOAT
    logits.shape = ir.Shape(["batch", "tokens", shape.vocabulary])
    whole = ir.Graph([ids], [logits], nodes=graph.nodes, initializers=graph.values, opset_imports={"": OPSET})
    return ir.Model(whole, ir_version=10)


class _Graph:
    """Nodes and initializers as they come."""

    def __init__(self, seed: int) -> None:
        self.nodes: list[ir.Node] = []
        self.values: list[ir.Value] = []
        self._seed = seed

    def op(self, op_type: str, inputs: list[ir.Value], **attributes: object) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, name=f"{op_type}_{len(self.nodes)}")
        node.outputs[0].name = f"v{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def linear(self, data: ir.Value, name: str, num_inputs: int, num_outputs: int) -> ir.Value:
        value = self.op("MatMul", [data, self.weight(name, (num_inputs, num_outputs), num_inputs**-0.5)])
        self.nodes[-1].name = name
        return value

    def norm(self, data: ir.Value, name: str, width: int) -> ir.Value:
        ones = self._register(f"{name}.scale", (width,), lambda: np.ones(width, np.float32))
        zeros = self._register(f"{name}.bias", (width,), lambda: np.zeros(width, np.float32))
        return self.op("LayerNormalization", [data, ones, zeros], axis=-1)

    def heads(self, data: ir.Value, heads: int) -> ir.Value:
        split = self.op("Reshape", [data, self.shape([0, 0, heads, 64])])
        return self.op("Transpose", [split], perm=[0, 2, 1, 3])

    def shape(self, sizes: list[int]) -> ir.Value:
        return self._register(f"c{len(self.values)}", (len(sizes),), lambda: np.array(sizes, np.int64))

    def scalar(self, number: float) -> ir.Value:
        return self._register(f"c{len(self.values)}", (), lambda: np.array(number, np.float32))

    def weight(self, name: str, shape: tuple[int, int], scale: float) -> ir.Value:
        seed = [self._seed, len(self.values)]

        def make() -> np.ndarray:
            rng = np.random.default_rng(seed)
            channels = np.exp(0.5 * rng.standard_normal((shape[0], 1), np.float32)) * np.float32(scale)
            weight = rng.standard_normal(shape, np.float32)
            weight *= channels
            return weight

        return self._register(f"{name}.weight", shape, make)

    def _register(self, name: str, shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> ir.Value:
        integer = name.startswith("c") and bool(shape)
        dtype = ir.DataType.INT64 if integer else ir.DataType.FLOAT
        tensor = ir.LazyTensor(lambda: ir.tensor(make()), dtype, ir.Shape(shape), name=name)
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)
        self.values.append(value)
        return value
