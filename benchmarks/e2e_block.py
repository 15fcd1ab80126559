"""A transformer block of a language model, as a quantized ONNX graph and directly in torch, with the same numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from quantkit.packing import unpack

HEAD = 128
EPSILON = 1e-5
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Matrix:
    """Random codes in the layout of MatMulNBits, with the middle code as zero point.

    Attributes:
        blob: uint8 [N, G, bytes of a group].
        scales: float32 [N, G], float16 holds them.
    """

    bits: int
    group_size: int
    blob: Bytes
    scales: npt.NDArray[np.float32]

    def dense(self) -> npt.NDArray[np.float32]:
        """W [N, K]."""
        rows, groups, _ = self.blob.shape
        codes = unpack((self.blob.reshape(-1),), self.bits, rows * groups * self.group_size)
        centred = codes.reshape(rows, groups, -1).astype(np.float32) - np.float32(1 << (self.bits - 1))
        weight: npt.NDArray[np.float32] = (centred * self.scales[:, :, None]).reshape(rows, -1)
        return weight


@dataclass(frozen=True)
class BlockModel:
    """The graph and what it is made of."""

    model: ir.Model
    matrices: dict[str, Matrix]
    norms: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


def matrix(rng: np.random.Generator, rows: int, columns: int, bits: int, group_size: int) -> Matrix:
    groups = columns // group_size
    blob = rng.integers(0, 256, (rows, groups, group_size * bits // 8), dtype=np.uint8)
    spread = rng.uniform(0.5, 1.5, (rows, groups)) / (1 << (bits - 1)) / np.sqrt(columns)
    return Matrix(bits, group_size, blob, spread.astype(np.float16).astype(np.float32))


class _Writer:
    """Collects nodes and initializers."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []

    def const(self, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
        value = ir.val(name, const_value=ir.tensor(array))
        self.initializers.append(value)
        return value

    def op(self, op_type: str, *inputs: ir.Value, domain: str = "", **attributes: object) -> ir.Value:
        node = ir.node(op_type, inputs, attributes or None, domain=domain)
        node.outputs[0].name = f"v{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def linear(self, x: ir.Value, name: str, weight: Matrix) -> ir.Value:
        rows, groups, _ = weight.blob.shape
        return self.op(
            "MatMulNBits",
            x,
            self.const(f"{name}.codes", weight.blob),
            self.const(f"{name}.scales", weight.scales.reshape(-1)),
            domain="com.microsoft",
            N=rows,
            K=groups * weight.group_size,
            bits=weight.bits,
            block_size=weight.group_size,
        )


def block_model(width: int, inner: int, bits: int, group_size: int, seed: int = 0) -> BlockModel:
    """x [B, S, width] -> x + attention(norm(x)) and then + down(silu(gate) * up): no mask, no positions.

    Raises:
        ValueError: a width that is no multiple of 128.
    """
    if width % HEAD:
        raise ValueError(f"the width must be a multiple of {HEAD}, got {width}")
    rng = np.random.default_rng(seed)
    shapes = dict.fromkeys(("query", "key", "value", "output"), (width, width))
    shapes |= {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
    matrices = {name: matrix(rng, *shape, bits, group_size) for name, shape in shapes.items()}
    norms = (rng.uniform(0.5, 1.5, width).astype(np.float32), rng.uniform(0.5, 1.5, width).astype(np.float32))
    writer = _Writer()
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=["B", "S", width])
    first = writer.op("RMSNormalization", x, writer.const("norm.0", norms[0]), axis=-1, epsilon=EPSILON)
    split, joined = (writer.const(name, np.array(dims)) for name, dims in (("s", [0, 0, -1, HEAD]), ("j", [0, 0, -1])))
    parts = []
    for name, perm in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3])):
        part = writer.linear(first, name, matrices[name])
        parts.append(writer.op("Transpose", writer.op("Reshape", part, split), perm=perm))
    root = writer.const("root", np.array(HEAD**-0.5, np.float32))
    scores = writer.op("Mul", writer.op("MatMul", parts[0], parts[1]), root)
    mixed = writer.op("MatMul", writer.op("Softmax", scores, axis=-1), parts[2])
    heads = writer.op("Reshape", writer.op("Transpose", mixed, perm=[0, 2, 1, 3]), joined)
    middle = writer.op("Add", x, writer.linear(heads, "output", matrices["output"]))
    second = writer.op("RMSNormalization", middle, writer.const("norm.1", norms[1]), axis=-1, epsilon=EPSILON)
    gate = writer.linear(second, "gate", matrices["gate"])
    gated = writer.op("Mul", gate, writer.op("Sigmoid", gate))
    product = writer.op("Mul", gated, writer.linear(second, "up", matrices["up"]))
    y = writer.op("Add", middle, writer.linear(product, "down", matrices["down"]))
    y.name, y.dtype, y.shape = "y", ir.DataType.FLOAT, ir.Shape(["B", "S", width])
    opsets = {"": 23, "com.microsoft": 1}
    graph = ir.Graph([x], [y], nodes=writer.nodes, initializers=writer.initializers, opset_imports=opsets, name="block")
    return BlockModel(ir.Model(graph, ir_version=10), matrices, norms)


class Block(torch.nn.Module):
    """The same in torch; attention written out, as in the graph."""

    def __init__(self, made: BlockModel) -> None:
        super().__init__()
        for name, weight in made.matrices.items():
            self.register_buffer(name, torch.from_numpy(weight.dense()).half())
        for index, norm in enumerate(made.norms):
            self.register_buffer(f"norm{index}", torch.from_numpy(norm))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        first = functional.rms_norm(x, (width,), self.norm0, EPSILON)

        def heads(name: str) -> Tensor:
            weight: Tensor = getattr(self, name)
            return functional.linear(first, weight.to(x.dtype)).view(batch, tokens, -1, HEAD).transpose(1, 2)

        scores = heads("query") @ heads("key").transpose(2, 3) * HEAD**-0.5
        mixed = (scores.softmax(dim=-1) @ heads("value")).transpose(1, 2).reshape(batch, tokens, width)
        middle = x + functional.linear(mixed, self._weight("output", x))
        second = functional.rms_norm(middle, (width,), self.norm1, EPSILON)
        gate = functional.silu(functional.linear(second, self._weight("gate", x)))
        product = gate * functional.linear(second, self._weight("up", x))
        return middle + functional.linear(product, self._weight("down", x))

    def _weight(self, name: str, x: Tensor) -> Tensor:
        weight: Tensor = getattr(self, name)
        return weight.to(x.dtype)
