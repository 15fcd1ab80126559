"""onnx_ir graph -> Program: slots for values, converters for nodes, the last reader of every value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir
import torch

from quantkit.errors import InputError
from quantkit.runtime.torch_backend._dtypes import FLOATS, SUB_BYTE, Carriers, narrowed, to_torch_tensor
from quantkit.runtime.torch_backend._functions import Expansion, FunctionKey, expand
from quantkit.runtime.torch_backend._program import Program, Step
from quantkit.runtime.torch_backend._scope import INTEGERS, Compiler, Constant, Read, Scope, State
from quantkit.runtime.torch_backend._table import find
from quantkit.runtime.torch_backend._types import Fused, Node, Op, Value

MAX_NESTING = 64


@dataclass(frozen=True)
class CompiledBody:
    """A subgraph that a converter calls.

    Attributes:
        program: the subgraph.
        positions: which of the node's captured values it reads, in the order of `program.captured`.
        state: of the module.
    """

    program: Program
    positions: tuple[int, ...]
    state: State

    def __call__(self, formal: Sequence[Value], captured: Sequence[Value]) -> list[Value]:
        chosen = [captured[position] for position in self.positions]
        return self.program(list(formal), chosen, self.state.placement)


@dataclass
class Compiled:
    """The main program and what it needs.

    Attributes:
        constants: slot -> tensor that moves with the module.
        host: slot -> tensor that stays on the CPU: shapes, axes, counts.
        names: name of an input or a computed value of the main graph -> slot.
        inputs: input name -> slot.
        defaults: name of an input that is also an initializer -> slot of the initializer.
    """

    program: Program
    constants: Mapping[int, Constant]
    host: Mapping[int, torch.Tensor]
    names: Mapping[str, int]
    inputs: Mapping[str, int]
    defaults: Mapping[str, int]


def compile_model(
    model: ir.Model,
    carriers: Carriers,
    state: State,
    fused: Mapping[ir.Node, Fused] | None = None,
    skipped: frozenset[ir.Node] = frozenset(),
) -> Compiled:
    """Convert every node.

    Args:
        fused: nodes to be computed in another way than by their converters.
        skipped: nodes that are left out, since nobody needs what they compute.

    Raises:
        InputError: operators that nothing here computes, all of them named; a node that its converter refuses.
    """
    compiler = Compiler(model.graph, carriers, functions_of(model), state, fused or {}, skipped)
    scope = Scope(compiler, None, dict(model.opset_imports))
    graph = model.graph
    overridable = [value for value in graph.inputs if value.const_value is not None]
    defaults = {str(value.name): scope.reads(value, value.dtype in SUB_BYTE) for value in overridable}
    scope.outside.clear()  # from here on these names mean the inputs
    inputs = {str(value.name): scope.define(value) for value in graph.inputs}
    _add_nodes(scope, graph)
    _check_supported(compiler)
    outputs = tuple(scope.reads(value) for value in graph.outputs)
    program = _finished(scope, tuple(inputs.values()), (), outputs)
    computed = {str(value.name): slot for value, slot in scope.slots.items()}
    return Compiled(program, scope.constants, scope.host, computed, inputs, defaults)


def functions_of(model: ir.Model) -> dict[FunctionKey, onnx.FunctionProto]:
    """The model's own functions."""
    return {key: ir.serde.serialize_function(function) for key, function in model.functions.items()}


def evaluate(
    model: ir.Model, functions: Mapping[FunctionKey, onnx.FunctionProto], nodes: Sequence[ir.Node], value: ir.Value
) -> Value:
    """What these nodes of the main graph, in order, make of initializers alone; on the CPU, in the model's own types.

    Raises:
        InputError: as `compile_model`.
    """
    compiler = Compiler(model.graph, Carriers(), functions, State())
    scope = Scope(compiler, None, dict(model.opset_imports))
    _add_nodes(scope, nodes)
    _check_supported(compiler)
    slot = scope.reads(value)
    program = _finished(scope, (), (), (slot,))
    known = {**{place: constant.tensor for place, constant in scope.constants.items()}, **scope.host}
    return program.execute(known)[slot]


def _check_supported(compiler: Compiler) -> None:
    if compiler.unsupported:
        named = "; ".join(
            f"{op} (nodes {', '.join(repr(n) for n in names)})" for op, names in sorted(compiler.unsupported.items())
        )
        raise InputError(f"the torch backend has no converter for: {named}")


def _add_nodes(scope: Scope, nodes: Iterable[ir.Node]) -> None:
    for node in nodes:
        if node in scope.compiler.skipped:
            continue
        if node.op_type == "Constant" and node.domain == "":
            _make_constant(node)
            continue
        _add_node(scope, node)


def _make_constant(node: ir.Node) -> None:
    """The node's output becomes an initializer of the outermost graph: nothing there defines it."""
    output = node.outputs[0]
    if output.const_value is not None:
        return
    (attribute,) = (item for item in node.attributes.values() if item.name.startswith(("value", "sparse_value")))
    kinds = {"value_float": ir.DataType.FLOAT, "value_floats": ir.DataType.FLOAT}
    if attribute.name == "value":
        output.const_value = attribute.as_tensor()
    elif attribute.name in ("value_float", "value_floats", "value_int", "value_ints"):
        dtype = kinds.get(attribute.name, ir.DataType.INT64)
        output.const_value = ir.tensor(attribute.value, dtype=dtype, name=output.name)
    else:
        raise InputError(f"the torch backend has no {attribute.name} constants (node {node.name!r})")


def _add_node(scope: Scope, node: ir.Node) -> None:
    if node in scope.compiler.fused:
        _add_fused(scope, node, scope.compiler.fused[node])
        return
    domain = "" if node.domain == "ai.onnx" else node.domain
    version = scope.opsets.get(domain, 1)
    op = (
        None
        if (node.domain, node.op_type, node.overload) in scope.compiler.functions
        else find(domain, node.op_type, version)
    )
    if op is None:
        expansion = expand(node, scope.opsets, scope.compiler.functions) if scope.depth < MAX_NESTING else None
        if expansion is not None:
            _add_expansion(scope, node, expansion)
            return
        label = node.op_type if domain == "" else f"{domain}.{node.op_type}"
        scope.compiler.unsupported.setdefault(label, []).append(_name(node))
        for value in node.outputs:
            scope.define(value)
        return
    _add_step(scope, node, op, version)


def _add_fused(scope: Scope, node: ir.Node, fused: Fused) -> None:
    slots = tuple(None if value is None else scope.reads(value) for value in fused.values)
    moved = tuple(position for position, slot in enumerate(slots) if slot is not None)
    outputs = (scope.define(node.outputs[0]),)
    scope.steps.append(Step(fused.run, slots, outputs, (), moved, (), f"{node.op_type} {_name(node)!r}"))


def _name(node: ir.Node) -> str:
    """For messages: many exporters name no nodes."""
    return node.name or next((str(value.name) for value in node.outputs if value.name), "")


def _add_step(scope: Scope, node: ir.Node, op: Op, version: int) -> None:
    attributes, captured = _attributes(scope, node)
    values = list(node.inputs)
    described = Node(
        op=node.op_type,
        version=version,
        name=_name(node),
        attributes=attributes,
        input_types=tuple(None if value is None else value.dtype for value in values),
        output_types=tuple(value.dtype for value in node.outputs),
        num_captured=len(captured),
        dtypes=scope.compiler.carriers,
    )
    run = op.convert(described)
    host = tuple(position for position in op.host if position < len(values) and values[position] is not None)
    data = [value for position, value in enumerate(values) if value is not None and position not in op.host]
    # What a subgraph computes lies where the values lie that it captures.
    stays = not any(isinstance(item, CompiledBody) for item in attributes.values()) and _stays_on_host(
        scope, node, op, data
    )
    slots: list[int | None] = []
    for position, value in enumerate(values):
        if value is None:
            slots.append(None)
        else:
            slots.append(scope.reads(value, position in host or stays))
    slots += [scope.reads(*read) for read in captured]
    # Captured values are placed by the steps that read them, inside.
    moved = (
        () if stays or op.to_host else tuple(p for p in range(len(values)) if p not in host and values[p] is not None)
    )
    outputs = tuple(scope.define(value) if value.name else None for value in node.outputs)
    if stays or op.to_host:
        scope.on_host.update(node.outputs)
    scope.steps.append(Step(run, tuple(slots), outputs, host, moved, (), f"{node.op_type} {described.name!r}"))


def _stays_on_host(scope: Scope, node: ir.Node, op: Op, data: Sequence[ir.Value]) -> bool:
    """Whether the node is shape arithmetic: nothing that it reads lies on the device."""
    computed = [value for value in data if not scope.is_constant(value)]
    if computed:
        return all(scope.is_on_host(value) for value in computed)
    if op.to_host or not all(value.dtype in INTEGERS for value in node.outputs):
        return False
    # Only numbers in: Range, ConstantOfShape, arithmetic on a constant shape. Integers out are mostly shapes again.
    return all(scope.is_short(value) for value in data) if data else bool(op.host)


def _attributes(scope: Scope, node: ir.Node) -> tuple[dict[str, Any], list[Read]]:
    """Attributes as plain values, and what their subgraphs read from outside."""
    plain: dict[str, Any] = {}
    programs: dict[str, tuple[Program, list[Read]]] = {}
    for name, attribute in node.attributes.items():
        if attribute.type == ir.AttributeType.GRAPH:
            programs[name] = _body(scope, attribute.as_graph(), scope.opsets)
        elif attribute.type == ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            data = to_torch_tensor(tensor.numpy(), tensor.dtype)
            plain[name] = narrowed(data, scope.compiler.carriers(tensor.dtype)) if tensor.dtype in FLOATS else data
        else:
            plain[name] = attribute.value
    captured = list(dict.fromkeys(read for _, reads in programs.values() for read in reads))
    for name, (program, reads) in programs.items():
        positions = tuple(captured.index(read) for read in reads)
        plain[name] = CompiledBody(program, positions, scope.compiler.state)
    return plain, captured


def _body(scope: Scope, graph: ir.Graph, opsets: Mapping[str, int]) -> tuple[Program, list[Read]]:
    """A nested graph, and the values of outer graphs that it reads."""
    inner = Scope(scope.compiler, scope, opsets)
    inputs = tuple(inner.define(value) for value in graph.inputs)
    _add_nodes(inner, graph)
    outputs = tuple(inner.reads(value) for value in graph.outputs)
    program = _finished(inner, inputs, tuple(inner.outside.values()), outputs)
    return program, list(inner.outside)


def _add_expansion(scope: Scope, node: ir.Node, expansion: Expansion) -> None:
    """A function's body: like a subgraph that captures its arguments, so that shapes stay shapes inside."""
    inner = Scope(scope.compiler, scope, expansion.opsets)
    arguments = (*node.inputs, *[None] * (len(expansion.graph.inputs) - len(node.inputs)))
    for parameter, argument in zip(expansion.graph.inputs, arguments, strict=True):
        if argument is None:
            inner.define(parameter)  # and nothing ever fills it
        else:
            inner.bind(parameter, argument)
    _add_nodes(inner, expansion.graph)
    results = tuple(inner.reads(value) for value in expansion.graph.outputs)
    program = _finished(inner, (), tuple(inner.outside.values()), results)
    state, produced, single = scope.compiler.state, expansion.produced, len(node.outputs) == 1

    def run(*captured: Value) -> Value:
        found = iter(program((), captured, state.placement))
        values = tuple(next(found) if there else None for there in produced)
        return values[0] if single else values

    slots = tuple(scope.reads(*read) for read in inner.outside)
    outputs = tuple(scope.define(value) if value.name else None for value in node.outputs)
    computed = iter(expansion.graph.outputs)
    for value, there in zip(node.outputs, expansion.produced, strict=False):
        if there and inner.is_on_host(next(computed)):
            scope.on_host.add(value)
    label = f"{node.op_type} {_name(node)!r}"
    scope.steps.append(Step(run, slots, outputs, (), (), (), label))


def _finished(scope: Scope, inputs: tuple[int, ...], captured: tuple[int, ...], outputs: tuple[int, ...]) -> Program:
    """With the last reader of every slot known."""
    kept = {*outputs, *scope.constants, *scope.host}
    last: dict[int, int] = {}
    for index, step in enumerate(scope.steps):
        for slot in (*step.inputs, *step.outputs):
            if slot is not None and slot not in kept:
                last[slot] = index
    frees: dict[int, list[int]] = {}
    for slot, index in last.items():
        frees.setdefault(index, []).append(slot)
    steps = tuple(
        Step(s.run, s.inputs, s.outputs, s.host, s.device, tuple(frees.get(index, ())), s.label)
        for index, s in enumerate(scope.steps)
    )
    return Program(steps, inputs, captured, outputs, scope.count)
