"""Write scales into a copy of the model: every constant of a scale group times or divided by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from quantkit.errors import InputError
from quantkit.graph._trace import follow, static_shape, trace
from quantkit.graph.scaling import INSERTED, Edit, Group
from quantkit.graph.targets import path_key
from quantkit.types import Array

LARGE = 1 << 18
"""Elements from which a changed weight is computed each time it is read, instead of held in memory."""


def apply_scales(model: ir.Model, groups: Sequence[Group], scales: Mapping[str, Array]) -> ir.Model:
    """A copy of the model whose groups are scaled; it computes the same, up to float rounding.

    A constant that others read too is copied first; identical changes share one copy, and what nobody reads any more
    goes away, so that the model grows by no more than that takes.

    Args:
        model: where the groups were found; not changed.
        groups: all or some of them.
        scales: group name -> [size] positive numbers; a group that is left out is not scaled.

    Raises:
        InputError: scales of the wrong length, or not positive and finite.
    """
    writer = _Writer(model.clone(), model)
    for group in groups:
        if group.name not in scales:
            continue
        factors = np.asarray(scales[group.name], dtype=np.float64)
        if factors.shape != (group.size,) or not (np.isfinite(factors).all() and (factors > 0).all()):
            raise InputError(
                f"the scales of {group.name} must be {group.size} positive numbers, got shape {factors.shape} with "
                f"values from {factors.min(initial=np.inf):g} to {factors.max(initial=-np.inf):g}"
            )
        for edit in group.edits:
            writer.multiply(edit, factors, group.name)
        if group.kind == INSERTED:
            writer.insert(group, factors)
    passes.RemoveUnusedNodesPass()(writer.copy)
    return writer.copy


@dataclass
class _Writer:
    """Changes a copy; what it makes lazily reads from the original, which keeps all its nodes."""

    copy: ir.Model
    original: ir.Model
    made: dict[tuple[object, ...], ir.Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nodes = {str(node.name): node for node in self.copy.graph}
        self._sources = {str(node.name): node for node in self.original.graph}
        self._names = {str(value.name) for node in self.copy.graph.all_nodes() for value in node.outputs}
        self._names |= {*self.nodes, *self.copy.graph.initializers}
        self._names |= {str(value.name) for value in self.copy.graph.inputs}

    def multiply(self, edit: Edit, factors: Array, group: str) -> None:
        """Give the node its own changed constant, or the one that an identical change already made."""
        node = self.nodes[edit.node]
        operand, source = node.inputs[edit.index], self._sources[edit.node].inputs[edit.index]
        assert operand is not None and source is not None
        origin = trace(operand)
        path = trace(source).path if origin.path else ()
        key = (origin.root, path_key(path), group, edit.channels.tobytes(), edit.channels.shape, edit.power)
        if key not in self.made:
            tensor = origin.root.const_value
            assert tensor is not None
            self.made[key] = self._initializer(
                f"{origin.root.name}", tensor, path, factors[edit.channels] ** edit.power
            )
        node.replace_input_with(edit.index, self.made[key])

    def _initializer(self, base: str, tensor: ir.TensorProtocol, path: tuple[ir.Node, ...], values: Array) -> ir.Value:
        def compute() -> ir.TensorProtocol:
            return ir.tensor(np.ascontiguousarray(follow(tensor.numpy(), path) * values, dtype=np.float32))

        large = tensor.size >= LARGE
        before = static_shape(path[-1].outputs[0]) if path else tensor.shape.numpy()
        if large and before is not None:  # computed when it is read, so that weights larger than memory stay on disk
            shape = ir.Shape(np.broadcast_shapes(before, values.shape))
            lazy = ir.LazyTensor(compute, ir.DataType.FLOAT, shape)
        return self.register(base, lazy if large and before is not None else compute())

    def register(self, base: str, tensor: ir.TensorProtocol) -> ir.Value:
        name = tensor.name = self.name(f"{base}.scaled")
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        self.copy.graph.register_initializer(value)
        return value

    def insert(self, group: Group, factors: Array) -> None:
        """One Mul behind the value, for the group's readers alone."""
        readers = [self.nodes[name] for name in group.readers]
        value = readers[0].inputs[0]
        assert value is not None
        inverse = self.register(group.value, ir.tensor((1 / factors).astype(np.float32)))
        multiply = ir.node("Mul", [value, inverse], name=self.name(f"{group.value}.Mul"))
        result = multiply.outputs[0]
        result.name, result.type, result.shape = self.name(f"{multiply.name}.out"), value.type, value.shape
        first = next(node for node in self.copy.graph if node in set(readers))
        self.copy.graph.insert_before(first, multiply)
        for node in readers:
            node.replace_input_with(0, result)

    def name(self, wanted: str) -> str:
        name, count = wanted, 1
        while name in self._names:
            count += 1
            name = f"{wanted}_{count}"
        self._names.add(name)
        return name
