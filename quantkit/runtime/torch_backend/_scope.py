"""Graphs while they are compiled: where each value is read from, and the data of constants."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from quantkit.errors import InputError
from quantkit.runtime.torch_backend._dtypes import (
    FLOATS,
    SUB_BYTE,
    Carriers,
    Packed,
    narrowed,
    packed_bytes,
    to_torch_tensor,
)
from quantkit.runtime.torch_backend._functions import FunctionKey
from quantkit.runtime.torch_backend._program import Placement, Step
from quantkit.runtime.torch_backend._types import Fused
from quantkit.types import Array

INTEGERS = frozenset({ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL})
"""Element types of shapes, indices, counts and conditions."""
MOST_AXES = 64
Read = tuple[ir.Value, bool]
"""A value of an outer graph, and whether it is read as numbers."""


class State(threading.local):
    """What nested programs need while they run; one per module and its copies, and in each thread its own."""

    placement: Placement | None = None

    def __deepcopy__(self, memo: Mapping[int, Any]) -> State:
        # The programs of a copied module are functions, which are not copied: they go on reading this one.
        return self


@dataclass(frozen=True)
class Constant:
    """An initializer that the program reads.

    Attributes:
        name: of its value.
        tensor: the data; bytes where `packed`.
        packed: how to unpack it.
        nested: it stands in a subgraph or function, where names may come again.
    """

    name: str
    tensor: torch.Tensor
    packed: Packed | None
    nested: bool


@dataclass
class Compiler:
    """What all graphs of one model share.

    Attributes:
        fused: nodes that a function computes from other values than they read.
        skipped: nodes whose outputs nobody needs.
    """

    graph: ir.Graph
    carriers: Carriers
    functions: Mapping[FunctionKey, onnx.FunctionProto]
    state: State
    fused: Mapping[ir.Node, Fused] = field(default_factory=dict)
    skipped: frozenset[ir.Node] = frozenset()
    unsupported: dict[str, list[str]] = field(default_factory=dict)
    tensors: dict[ir.Value, tuple[torch.Tensor, Packed | None]] = field(default_factory=dict)

    def tensor(self, value: ir.Value) -> tuple[torch.Tensor, Packed | None]:
        """An initializer's data, read once."""
        if value not in self.tensors:
            source = value.const_value
            assert source is not None
            external = isinstance(source, ir.ExternalTensor) and source.size > 0
            if source.dtype in SUB_BYTE:
                shape = tuple(int(size) for size in source.shape.numpy())
                data = torch.from_numpy(_mapped(source, as_bytes=True)) if external else packed_bytes(source)
                self.tensors[value] = (data, Packed(source.dtype, shape))
            else:
                plain = external and source.dtype != ir.DataType.FLOAT4E2M1  # two of which share a byte
                data = to_torch_tensor(_mapped(source) if plain else source.numpy(), source.dtype)
                if source.dtype in FLOATS and data.dtype != self.carriers(source.dtype):
                    data = narrowed(data, self.carriers(source.dtype))
                self.tensors[value] = (data, None)
        return self.tensors[value]


def _mapped(tensor: Any, as_bytes: bool = False) -> Array:
    """External data mapped from its file; what is written to it stays in memory (onnx_ir's own mapping would crash)."""
    dtype = np.dtype(np.uint8) if as_bytes else np.dtype(tensor.dtype.numpy()).newbyteorder("<")
    shape = (tensor.nbytes,) if as_bytes else tuple(int(size) for size in tensor.shape.numpy())
    return np.memmap(tensor.path, dtype, "c", tensor.offset or 0, shape)


class Scope:
    """One graph being compiled."""

    def __init__(self, compiler: Compiler, parent: Scope | None, opsets: Mapping[str, int]) -> None:
        self.compiler, self.parent, self.opsets = compiler, parent, opsets
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.slots: dict[ir.Value, int] = {}
        self.bound: dict[ir.Value, ir.Value] = {}
        self.outside: dict[Read, int] = {}
        self.constants: dict[int, Constant] = {}
        self.host: dict[int, torch.Tensor] = {}
        self.on_host: set[ir.Value] = set()
        self.steps: list[Step] = []
        self.count = 0

    def new(self) -> int:
        self.count += 1
        return self.count - 1

    def define(self, value: ir.Value) -> int:
        self.slots[value] = self.new()
        return self.slots[value]

    def bind(self, parameter: ir.Value, argument: ir.Value) -> None:
        """A function's parameter means this value of the graph that calls it."""
        self.bound[parameter] = argument

    def reads(self, value: ir.Value, as_number: bool = False) -> int:
        """The slot to read a value from; what this graph does not define comes from outside.

        Args:
            as_number: the input is a shape, axis or count: a constant then never leaves the CPU.
        """
        if value in self.slots:
            return self.slots[value]
        meant = self._meant(value)
        read = (meant, as_number and meant.const_value is not None)
        if read not in self.outside:
            self.outside[read] = self.new() if self.parent is not None else self._constant(*read)
        return self.outside[read]

    def is_constant(self, value: ir.Value) -> bool:
        """Known before anything runs; a caller may replace initializers that are inputs as well."""
        meant = self._meant(value)
        return meant.const_value is not None and not meant.is_graph_input()

    def is_short(self, value: ir.Value) -> bool:
        """A constant that can be a shape, by its type and size."""
        found = self._meant(value).const_value
        return found is not None and found.dtype in INTEGERS and found.size <= MOST_AXES

    def is_on_host(self, value: ir.Value) -> bool:
        """A shape or count, computed from shapes."""
        if value in self.on_host:
            return True
        if value in self.slots or self.parent is None:
            return False
        return self.parent.is_on_host(self.bound.get(value, value))

    def _meant(self, value: ir.Value) -> ir.Value:
        """What the parameters of this function, and of those that it stands in, are bound to."""
        scope: Scope | None = self
        while scope is not None:
            value = scope.bound.get(value, value)
            scope = scope.parent
        return value

    def _constant(self, value: ir.Value, as_number: bool) -> int:
        if value.const_value is None:
            raise InputError(f"the model reads {value.name!r}, which nothing defines")
        tensor, packed = self.compiler.tensor(value)
        slot = self.new()
        if as_number:
            self.host[slot] = tensor if packed is None else packed.unpack(tensor)
            return slot
        self.constants[slot] = Constant(str(value.name), tensor, packed, value.graph is not self.compiler.graph)
        if packed is None:
            return slot
        # Unpacked right before its first reader and forgotten after the last one.
        unpacked = self.new()
        self.steps.append(Step(packed.unpack, (slot,), (unpacked,), (), (), (), f"unpack {value.name}"))
        return unpacked
