"""A graph made ready for one device: weights packed for kernels, other constants computed once, the rest as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch

from quantkit.runtime.executor._constants import Constants, is_initializer
from quantkit.runtime.executor._fuse import Fuser, Fusion, name_of
from quantkit.runtime.executor.layers import Layer
from quantkit.runtime.torch_backend._dtypes import FLOATS
from quantkit.runtime.torch_backend.module import TorchModule, compiled_module

WEIGHTED = frozenset(
    [
        "Conv",
        "ConvInteger",
        "ConvTranspose",
        "DynamicQuantizeMatMul",
        "FusedConv",
        "FusedGemm",
        "FusedMatMul",
        "GRU",
        "Gather",
        "GatherBlockQuantized",
        "Gemm",
        "LSTM",
        "MatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
        "RNN",
    ]
)
"""Operators that a report calls a layer when they read a constant of two or more dimensions."""


@dataclass(frozen=True)
class Prepared:
    """A module on the CPU and what its layers are."""

    module: TorchModule
    layers: tuple[Layer, ...]


def prepare(opened: ir.Model, dtype: torch.dtype, activations: str, kernels: bool) -> Prepared:
    """Compile an opened graph, which is used up.

    Args:
        dtype: compute type of all ordinary floats.
        activations: see `quantkit.runtime.session.InferenceSession`.
        kernels: whether weights of codes go to quantkit_kernels.
    """
    constants = Constants(opened)
    fusion = Fuser(constants, dtype, activations, kernels).run()
    live = _live(opened, constants, fusion)
    layers = tuple(_layers(opened, constants, fusion, live, dtype))
    computed = [_stored(constants, value, dtype) for value in live.constants]
    for value, tensor in zip(live.constants, computed, strict=True):  # not before: some are made of others
        value.const_value = tensor
    skipped = frozenset(node for node in opened.graph.all_nodes() if node not in live.nodes)
    return Prepared(compiled_module(opened, dtype, fusion.fused, skipped), layers)


def _stored(constants: Constants, value: ir.Value, dtype: torch.dtype) -> ir.TensorProtocol:
    array = constants.array(value)
    tensor = ir.tensor(array, dtype=value.dtype, name=value.name)
    if tensor.dtype not in FLOATS or dtype.itemsize >= array.dtype.itemsize or array.ndim < 2:
        return tensor
    # Large float weights become half as large at once, not when all of them have been rebuilt.
    kind = {torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}[dtype]
    return ir.Tensor(array.astype(kind.numpy()), dtype=kind, name=value.name)


@dataclass(frozen=True)
class _Live:
    """What the outputs need.

    Attributes:
        nodes: that run.
        constants: computed values that they read.
    """

    nodes: set[ir.Node]
    constants: list[ir.Value]


def _live(model: ir.Model, constants: Constants, fusion: Fusion) -> _Live:
    nodes: set[ir.Node] = set()
    found: dict[ir.Value, None] = {}
    waiting: list[ir.Value] = list(model.graph.outputs)
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if node is None or is_initializer(value):
            continue
        if constants.computes(node):
            found[value] = None
        elif node not in nodes:
            nodes.add(node)
            fused = fusion.fused.get(node)
            waiting += [item for item in (_reads(node, nodes) if fused is None else fused.values) if item is not None]
    return _Live(nodes, list(found))


def _reads(node: ir.Node, nodes: set[ir.Node]) -> Iterator[ir.Value | None]:
    """The node's inputs, and what its subgraphs read and give; all nodes inside run with it."""
    yield from node.inputs
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph().all_nodes():
                yield from inner.inputs
            yield from attribute.as_graph().outputs


def _layers(model: ir.Model, constants: Constants, fusion: Fusion, live: _Live, dtype: torch.dtype) -> Iterator[Layer]:
    """Layers in the graph's order: those of the kernels, and all others that read weights."""
    for node in model.graph.all_nodes():
        if node not in live.nodes:
            continue
        if node in fusion.layers:
            yield fusion.layers[node]
            continue
        weights = [value for value in node.inputs if value in constants and _is_matrix(value)]
        if node.op_type not in WEIGHTED or node in fusion.fused or not weights:
            continue
        rebuilt = [value for value in weights if value is not None and not is_initializer(value)]
        size = sum(_num_bytes(value, dtype) for value in weights if value is not None)
        reason = fusion.reasons.get(node, _reason(node, bool(rebuilt)))
        yield Layer(name_of(node), node.op_type, "dequantized" if rebuilt else "torch", (), size, reason)


def _is_matrix(value: ir.Value | None) -> bool:
    """Of two or more dimensions; the last of scales and zero points that stand beside a table has one element."""
    return value is not None and value.shape is not None and len(value.shape) >= 2 and value.shape[-1] != 1


def _reason(node: ir.Node, rebuilt: bool) -> str:
    if not rebuilt:
        return "its weight is no matrix of codes"
    return f"no kernel for {node.op_type}" if node.op_type not in ("MatMul", "Gemm") else "codes in an unknown layout"


def _num_bytes(value: ir.Value, dtype: torch.dtype) -> int:
    size = 1
    dims: Sequence[object] = () if value.shape is None else tuple(value.shape)
    for dim in dims:
        size *= dim if isinstance(dim, int) else 1
    if value.dtype in FLOATS or value.dtype is None:
        return size * dtype.itemsize
    return int(size * value.dtype.itemsize)
