"""One function for every product and lookup of codes: quantkit_kernels' operators, which run torch on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch
from quantkit_kernels.ops import COUNTERS, gather_nbits, int8_linear, mixed_linear, nbits_linear
from quantkit_kernels.packing import MixedWeight, PackedWeight

from quantkit.runtime.executor._constants import Constants
from quantkit.runtime.executor._epilogue import Epilogue, epilogue
from quantkit.runtime.executor._products import Product, find_product
from quantkit.runtime.executor._stored import Stored, group_bits, num_bytes, packed, packed_rows
from quantkit.runtime.executor._tables import Lookup, find_lookup
from quantkit.runtime.executor.layers import Layer
from quantkit.runtime.torch_backend._types import Fused, Run, Value
from quantkit.types import Array

INT8_BITS = (4, 8)
Make = Callable[..., torch.Tensor]


@dataclass
class Fusion:
    """What becomes of a graph's products and lookups.

    Attributes:
        fused: node that makes the result -> the function that makes it instead.
        layers: node -> how its layer runs.
        inside: nodes whose work the functions do.
        reasons: node -> why no kernel took its weight of codes.
    """

    fused: dict[ir.Node, Fused] = field(default_factory=dict)
    layers: dict[ir.Node, Layer] = field(default_factory=dict)
    inside: set[ir.Node] = field(default_factory=set)
    reasons: dict[ir.Node, str] = field(default_factory=dict)


class Fuser:
    """Goes through a graph once."""

    def __init__(self, constants: Constants, dtype: torch.dtype, activations: str, kernels: bool) -> None:
        self._constants, self._dtype, self._activations, self._kernels = constants, dtype, activations, kernels
        self._packed: dict[tuple[Hashable, ...], PackedWeight | MixedWeight | str] = {}
        self._values: dict[int, list[ir.Value]] = {}
        self._counters = _value("counters", np.zeros(COUNTERS, np.int32))
        self.fusion = Fusion()

    def run(self) -> Fusion:
        for node in self._constants.model.graph.all_nodes():
            if self._constants.computes(node) or node in self.fusion.inside:
                continue
            product = find_product(self._constants, node, self._activations)
            if product is not None:
                self._add_product(node, product)
                continue
            lookup = find_lookup(self._constants, node) if self._kernels else None
            if lookup is not None:
                self._add_lookup(node, lookup)
        return self.fusion

    def _add_product(self, node: ir.Node, product: Product) -> None:
        weight = self._pack(product.key, product.weight, False) if self._kernels else "the kernels take half precision"
        if isinstance(weight, str):
            self.fusion.reasons[node] = weight
            if node.op_type == "MatMulNBits" and isinstance(product.weight, Stored):
                self._add_dense(node, product, product.weight, weight)
            return
        rest = epilogue(self._constants, product.end, product.bias, product.num_rows)
        data, make = list(product.data), product.make
        if product.pre_scale is not None:
            data.append(_value(f"{name_of(node)}.pre_scale", product.pre_scale))
            make = _divided
        tensors: list[ir.Value | None] = [*self._tensors(weight), self._counters]
        if rest.bias is not None:
            tensors.append(_value(f"{name_of(node)}.bias", rest.bias))
        kernel, run = _linear(weight, product.rounds, rest, make, len(data))
        self.fusion.fused[rest.end] = Fused((*data, *tensors), run)
        self.fusion.inside |= {node, product.end, rest.end}
        joined = [] if rest.bias is None else ["bias"]
        joined += [] if rest.activation == "none" else [rest.activation]
        note = f"with {' and '.join(joined)}" if joined else ""
        self._report(node, rest.end, kernel, weight, note)

    def _add_dense(self, node: ir.Node, product: Product, stored: Stored, reason: str) -> None:
        """A MatMulNBits whose weight is rebuilt once instead of in every run."""
        matrix = stored.dequantize()
        values: list[ir.Value | None] = [*product.data, _value(f"{name_of(node)}.float", matrix)]
        if product.bias is not None:
            values.append(_value(f"{name_of(node)}.bias", product.bias))
        self.fusion.fused[node] = Fused(tuple(values), torch.nn.functional.linear)
        size = matrix.size * self._dtype.itemsize
        self.fusion.layers[node] = Layer(name_of(node), node.op_type, "dequantized", (), size, reason)

    def _add_lookup(self, node: ir.Node, lookup: Lookup) -> None:
        weight = self._pack(lookup.key, lookup.weight, True)
        if isinstance(weight, str):
            self.fusion.reasons[node] = weight
            return
        assert isinstance(weight, PackedWeight)
        values: list[ir.Value | None] = [lookup.ids, *self._tensors(weight)]
        if lookup.pre_scale is not None:
            values.append(_value(f"{name_of(node)}.pre_scale", lookup.pre_scale))
        self.fusion.fused[lookup.end] = Fused(tuple(values), _gather(weight, self._dtype))
        self.fusion.inside |= {node, lookup.end}
        self._report(node, lookup.end, "gather_nbits", weight, "")

    def _pack(
        self, key: tuple[Hashable, ...], weight: Stored | PackedWeight, rows: bool
    ) -> PackedWeight | MixedWeight | str:
        """Once for all layers that share a weight."""
        if key not in self._packed:
            if isinstance(weight, PackedWeight):
                self._packed[key] = weight
            else:
                self._packed[key] = packed_rows(weight) if rows else packed(weight)
        return self._packed[key]

    def _tensors(self, weight: PackedWeight | MixedWeight) -> list[ir.Value]:
        """Codes, scales and zero points [, order of the groups] as constants of the graph."""
        if id(weight) not in self._values:  # `_packed` keeps the weight, and so its id
            arrays: list[Array] = [weight.codes, weight.meta] if isinstance(weight, PackedWeight) else []
            if isinstance(weight, MixedWeight):
                arrays = [*weight.codes, weight.meta, weight.table]
            self._values[id(weight)] = [_value("packed", array) for array in arrays]
        return self._values[id(weight)]

    def _report(self, node: ir.Node, end: ir.Node, kernel: str, weight: PackedWeight | MixedWeight, note: str) -> None:
        bits = tuple(group_bits(weight))
        self.fusion.layers[end] = Layer(name_of(end), node.op_type, kernel, bits, num_bytes(weight), note)


def name_of(node: ir.Node) -> str:
    """The node's own name, or that of what it makes: a copy numbers nodes that have none."""
    given = node.name if node.name and not node.name.startswith(f"node_{node.op_type}_") else None
    return given or str(node.outputs[0].name)


def _value(name: str, array: Array) -> ir.Value:
    """A constant that no graph holds: the compiler reads it like an initializer."""
    return ir.Value(name=name, const_value=ir.tensor(np.ascontiguousarray(array)))


def _divided(*data: torch.Tensor) -> torch.Tensor:
    x, scale = data
    return x / scale


def _linear(
    weight: PackedWeight | MixedWeight, rounds: bool, rest: Epilogue, make: Make | None, count: int
) -> tuple[str, Run]:
    """(kernel's name, function of data, codes..., meta[, table], counters[, bias])."""
    activation, size = rest.activation, weight.group_size

    def split(args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        data, tensors = args[:count], args[count:]
        return (data[0] if make is None else make(*data)), tensors

    if isinstance(weight, MixedWeight):

        def mixed(*args: torch.Tensor) -> Value:
            x, (two, three, four, eight, meta, table, counters, *bias) = split(args)
            return mixed_linear(
                x, [two, three, four, eight], meta, table, size, bias[0] if bias else None, activation, counters
            )

        return "mixed_linear", mixed
    bits = weight.bits
    if rounds and bits in INT8_BITS:

        def rounded(*args: torch.Tensor) -> Value:
            x, (codes, meta, counters, *bias) = split(args)
            return int8_linear(x, codes, meta, bits, size, None, bias[0] if bias else None, activation, counters)

        return "int8_linear", rounded

    def plain(*args: torch.Tensor) -> Value:
        x, (codes, meta, counters, *bias) = split(args)
        return nbits_linear(x, codes, meta, bits, size, bias[0] if bias else None, activation, counters)

    return "nbits_linear", plain


def _gather(weight: PackedWeight, dtype: torch.dtype) -> Run:
    """(ids, codes, meta[, pre_scale]) -> rows; those of ids that are out of range are 0, and nothing else is read."""
    bits, size, (num_rows, num_inputs) = weight.bits, weight.group_size, weight.shape

    def run(
        ids: torch.Tensor, codes: torch.Tensor, meta: torch.Tensor, pre_scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        place = torch.where(ids < 0, ids + num_rows, ids)
        inside = (place >= 0) & (place < num_rows)
        rows = gather_nbits(place.clamp(0, num_rows - 1), codes, meta, bits, size, num_inputs, dtype)
        rows = torch.where(inside[..., None], rows, 0)
        return rows if pre_scale is None else rows / pre_scale

    return run
