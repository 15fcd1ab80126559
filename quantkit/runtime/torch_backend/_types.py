"""What a converter sees and returns. A converter turns one ONNX node into a plain function of torch tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import onnx_ir as ir
import torch

from quantkit.errors import InputError

Value = Any
"""A torch.Tensor; None for an absent input; a list for a sequence; whatever an optional holds."""

Run = Callable[..., Value]
"""(*inputs) -> the output, or a tuple of outputs when the node has several. Must not change its inputs."""


class Body(Protocol):
    """A compiled subgraph (the attribute of an If, Loop or Scan)."""

    def __call__(self, formal: Sequence[Value], captured: Sequence[Value]) -> list[Value]:
        """Outputs for these formal inputs; `captured` are the values of outer graphs, as the node received them."""


@dataclass(frozen=True)
class Node:
    """One ONNX node with everything that is known before it runs.

    Attributes:
        op: operator type.
        version: opset version of the operator's domain.
        name: for messages.
        attributes: numbers, strings, lists of them, tensors as torch tensors, subgraphs as `Body`.
        input_types, output_types: ONNX element types; None where unknown, absent or not a tensor.
        num_captured: how many of the trailing inputs are values that subgraphs read from outer graphs.
        dtypes: ONNX element type -> the torch type that carries it here (see `_dtypes.Carriers`).
    """

    op: str
    version: int
    name: str
    attributes: Mapping[str, Any]
    input_types: tuple[ir.DataType | None, ...]
    output_types: tuple[ir.DataType | None, ...]
    num_captured: int
    dtypes: Callable[[ir.DataType], torch.dtype]

    def get(self, name: str, default: Any = None) -> Any:
        """The attribute, or the default where the node leaves it out."""
        return self.attributes.get(name, default)

    def dtype(self, name: str, default: ir.DataType = ir.DataType.FLOAT) -> torch.dtype:
        """The torch type for an attribute that names an ONNX element type."""
        return self.dtypes(ir.DataType(self.attributes.get(name, default)))

    def body(self, name: str) -> Body:
        found: Body = self.attributes[name]
        return found

    def refuse(self, what: str) -> InputError:
        """The error for something a converter does not do; raised while converting, before anything runs."""
        return InputError(f"the torch backend cannot run {self.op} {self.name!r}: {what}")


@dataclass(frozen=True)
class Op:
    """How to convert one operator.

    Attributes:
        convert: called once per node.
        host: positions of inputs that are read as numbers (shapes, axes, counts): they arrive on the CPU.
        to_host: the outputs are shapes or counts, on the CPU whatever device the input is on (Shape, Size).
    """

    convert: Callable[[Node], Run]
    host: tuple[int, ...] = ()
    to_host: bool = False


@dataclass(frozen=True)
class Fused:
    """One function in the place of several nodes.

    Attributes:
        values: what it reads, in order; None = absent.
        run: (*values) -> the output of the node that it stands for.
    """

    values: tuple[ir.Value | None, ...]
    run: Run


Table = Mapping[tuple[str, int], Op]
"""(operator type, first opset version it is right for) -> how to convert it."""


def direct(run: Run) -> Op:
    """An operator without attributes that one function computes."""
    return Op(lambda node: run)


def ints(tensor: torch.Tensor | None) -> list[int]:
    """A host tensor as numbers; an absent one is empty."""
    return [] if tensor is None else [int(item) for item in tensor.reshape(-1).tolist()]
