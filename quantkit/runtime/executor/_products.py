"""Finds the nodes that multiply by, or look up, a matrix of codes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from quantkit_kernels.packing import PackedWeight, from_matmulnbits

from quantkit.runtime.executor._constants import Constants, is_initializer
from quantkit.runtime.executor._epilogue import only_reader
from quantkit.runtime.executor._stored import Stored, from_blob
from quantkit.runtime.executor._weights import attribute, integers, made_by, operand, requantized
from quantkit.types import FloatArray

BITS = (2, 4, 8)


@dataclass(frozen=True)
class Product:
    """x W^T + bias.

    Attributes:
        end: the node that makes it.
        data: values that x is made of.
        make: (*data) -> x; None where data is x.
        weight: the matrix; already packed where the file holds the kernel's own bytes.
        pre_scale: [K] that x is divided by.
        bias: [N], or None.
        key: what tells this weight from others.
        rounds: x is rounded to 8 bits at run time, with one scale for all of it.
    """

    end: ir.Node
    data: tuple[ir.Value, ...]
    weight: Stored | PackedWeight
    key: tuple[Hashable, ...]
    make: Callable[..., torch.Tensor] | None = None
    pre_scale: FloatArray | None = None
    bias: FloatArray | None = None
    rounds: bool = False

    @property
    def num_rows(self) -> int:
        return self.weight.shape[0]


def find_product(constants: Constants, node: ir.Node, activations: str) -> Product | None:
    """The product that this node computes, when its weight comes from codes.

    Args:
        activations: see `quantkit.runtime.session.InferenceSession`.
    """
    kind = (node.domain, node.op_type)
    if kind == ("", "MatMul"):
        return _matmul(constants, node)
    if kind == ("", "Gemm"):
        return _gemm(constants, node)
    if kind == ("com.microsoft", "MatMulNBits"):
        return _matmul_nbits(constants, node)
    if kind == ("", "MatMulInteger"):
        return _dynamic(constants, node, activations)
    return None


def _matmul(constants: Constants, node: ir.Node) -> Product | None:
    data, value = node.inputs[0], node.inputs[1]
    if data is None or value is None or data in constants:
        return None
    weight = operand(constants, value, False)
    if weight is None:
        return None
    return Product(node, (data,), weight.stored, (value, False), pre_scale=weight.pre_scale)


def _gemm(constants: Constants, node: ir.Node) -> Product | None:
    """Plain ones: no transA, alpha or beta; C absent or a constant with one number for each column."""
    data, value = node.inputs[0], node.inputs[1]
    plain = all(
        name not in node.attributes or node.attributes[name].value == default
        for name, default in (("transA", 0), ("alpha", 1.0), ("beta", 1.0))
    )
    if data is None or value is None or data in constants or not plain:
        return None
    added = node.inputs[2] if len(node.inputs) > 2 else None
    if added is not None and added not in constants:
        return None
    rows_first = bool(attribute(node, "transB", 0))
    weight = operand(constants, value, rows_first)
    if weight is None:
        return None
    bias = None
    if added is not None:
        bias = constants.array(added)
        if bias.size != weight.stored.shape[0] or bias.shape[-1:] != (bias.size,):
            return None
        bias = bias.reshape(-1).astype(np.float32)
    return Product(node, (data,), weight.stored, (value, rows_first), pre_scale=weight.pre_scale, bias=bias)


def _matmul_nbits(constants: Constants, node: ir.Node) -> Product | None:
    """Of 2, 4 or 8 bits, in the blocks of the file (no column order, no weights packed for another kernel)."""
    inputs = [*node.inputs, *[None] * 6][:6]
    data, blob, scales, points, order, added = inputs
    if data is None or blob is None or scales is None or order is not None or data in constants:
        return None
    if any(item is not None and item not in constants for item in (blob, scales, points, added)):
        return None
    bits, block = attribute(node, "bits", 4), attribute(node, "block_size", 0)
    shape = (attribute(node, "N", 0), attribute(node, "K", 0))
    if bits not in BITS or attribute(node, "weight_prepacked", 0):
        return None
    steps = constants.array(scales).astype(np.float32)
    zero = None if points is None else constants.array(points)
    codes = constants.array(blob)
    weight: Stored | PackedWeight | None = None
    if is_initializer(blob):  # the kernel's own bytes; what is computed was widened
        weight = _as_it_is(codes, steps, zero, bits, block, shape)
    if weight is None:
        weight = from_blob(codes, steps, zero, bits, block, shape)
    bias = None if added is None else constants.array(added).reshape(-1).astype(np.float32)
    return Product(node, (data,), weight, (blob, scales, points, bits, block, shape), bias=bias)


def _as_it_is(
    codes: np.ndarray, scales: FloatArray, points: np.ndarray | None, bits: int, block: int, shape: tuple[int, int]
) -> PackedWeight | None:
    try:
        return from_matmulnbits(codes, scales, points, bits, block, shape)
    except ValueError:  # zero points that are no codes
        return None


def _dynamic(constants: Constants, node: ir.Node, activations: str) -> Product | None:
    """MatMulInteger(DynamicQuantizeLinear(x), W) -> Cast -> Mul(scale of x * scales of W)."""
    quantized, value, point = [*node.inputs, None][:3]
    source = made_by(quantized, "DynamicQuantizeLinear")
    cast = only_reader(node, "Cast")
    end = None if cast is None else only_reader(cast, "Mul")
    zeroed = len(node.inputs) > 3 and node.inputs[3] is not None
    if source is None or cast is None or end is None or value is None or zeroed or value not in constants:
        return None
    data = source.inputs[0]
    steps = next((item for item in end.inputs if item is not cast.outputs[0]), None)
    product = made_by(steps, "Mul")
    if data is None or product is None or point is not source.outputs[2]:
        return None
    if source.outputs[1] not in product.inputs:
        return None
    scales = next((item for item in product.inputs if item is not source.outputs[1]), None)
    if scales is None or scales not in constants:
        return None
    stored = integers(constants, value, constants.array(scales))
    if stored is None:
        return None
    if activations == "file":
        return Product(end, tuple(source.outputs), stored, (value, scales), make=_restored)
    wide = requantized(constants, value) if activations == "float" else None
    if wide is not None:
        return Product(end, (data,), wide.stored, (value, "float"), pre_scale=wide.pre_scale)
    return Product(end, (data,), stored, (value, scales), rounds=activations == "int8")


def _restored(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """The numbers that codes stand for, of the scale's type; the products of integers are theirs."""
    return (codes.to(scale.dtype) - zero_point.to(scale.dtype)) * scale
