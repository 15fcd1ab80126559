"""An ONNX graph as a torch module: differentiable twice, on any device, every intermediate value within reach."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes

from quantkit.errors import InputError
from quantkit.graph.load import open_model, quiet
from quantkit.runtime.torch_backend._compile import Compiled, compile_model
from quantkit.runtime.torch_backend._dtypes import Carriers
from quantkit.runtime.torch_backend._program import Placement
from quantkit.runtime.torch_backend._scope import State
from quantkit.runtime.torch_backend._types import Fused, Value

OVERRIDABLE = 4
"""First IR version in which a caller may replace an initializer; before, all of them had to be inputs."""
Watcher = Callable[[torch.Tensor], torch.Tensor | None]


class TorchModule(torch.nn.Module):
    """A compiled model. Floating initializers are parameters (not trainable until asked), the others buffers.

    Attributes:
        input_names, output_names: in the model's order; initializers that are also inputs are left out.
        input_types, output_types: ONNX element types, None where the model does not tell.
        keys: initializer name -> its name among the parameters and buffers (which may hold no dots). A name that a
            subgraph or function uses again means the main graph's.
    """

    def __init__(self, graph: ir.Graph, compiled: Compiled, state: State) -> None:
        super().__init__()
        formal = [value for value in graph.inputs if value.const_value is None]
        self.input_names = tuple(str(value.name) for value in formal)
        self.input_types = tuple(value.dtype for value in formal)
        self.output_names = tuple(str(value.name) for value in graph.outputs)
        self.output_types = tuple(value.dtype for value in graph.outputs)
        # The module alone holds the weights: what moves to another device must not stay behind.
        self._compiled, self._state = replace(compiled, constants={}), state
        self._placements: dict[torch.device, Placement] = {}
        self._watchers: dict[int, list[Watcher]] = {}
        self.keys: dict[str, str] = {}
        self._constants: list[tuple[int, str, bool]] = []
        for slot, constant in sorted(compiled.constants.items(), key=lambda item: item[1].nested):
            key = self._free_key(constant.name)
            trainable = constant.tensor.is_floating_point() and constant.tensor.element_size() > 1
            if trainable:
                self.register_parameter(key, torch.nn.Parameter(constant.tensor, requires_grad=False))
            else:
                self.register_buffer(key, constant.tensor)
            self.keys.setdefault(constant.name, key)
            self._constants.append((slot, key, trainable))

    def _free_key(self, name: str) -> str:
        key = base = re.sub(r"\W", "_", name) or "_"
        count = 1
        while hasattr(self, key):
            count += 1
            key = f"{base}_{count}"
        return key

    def forward(self, *args: Value, **kwargs: Value) -> Value:
        """Inputs by position or by name -> the output, or a tuple of all outputs.

        Raises:
            InputError: an input is missing, unknown or given twice.
        """
        outputs = self.run(self._named(args, kwargs))
        values = tuple(outputs[name] for name in self.output_names)
        return values[0] if len(values) == 1 else values

    def run(self, feeds: Mapping[str, Value], outputs: Sequence[str] | None = None) -> dict[str, Value]:
        """The values of these names (default: the model's outputs); any value of the main graph may be asked for.

        Raises:
            InputError: an input is missing or unknown, or there is no such value.
        """
        self._check_inputs(feeds)
        wanted = self.output_names if outputs is None else tuple(outputs)
        names = self._compiled.names
        known = {**names, **dict(zip(self.output_names, self._compiled.program.outputs, strict=True))}
        slots = {name: known[name] if name in known else self._slot(name) for name in wanted}
        env = self._execute(feeds, frozenset(slots.values()))
        return {name: env[slot] for name, slot in slots.items()}

    def watch(self, name: str, function: Watcher) -> Callable[[], None]:
        """Call `function` with the value whenever it is computed; what it returns, unless None, replaces the value.

        Returns:
            A function that ends the watching.

        Raises:
            InputError: the main graph computes no such value.
        """
        slot = self._slot(name)
        watcher = partial(function)  # equal to no other, should the same function watch twice
        self._watchers.setdefault(slot, []).append(watcher)

        def remove() -> None:
            if watcher in self._watchers.get(slot, []):
                self._watchers[slot].remove(watcher)
                if not self._watchers[slot]:
                    del self._watchers[slot]

        return remove

    def held_copies(self) -> tuple[torch.Tensor, ...]:
        """Small host tensors on the devices that the module ran on, which a captured CUDA graph must keep alive."""
        return tuple(tensor for placement in self._placements.values() for tensor in placement.held())

    def _slot(self, name: str) -> int:
        if name not in self._compiled.names:
            raise InputError(f"the main graph has no value {name!r}")
        return self._compiled.names[name]

    def _named(self, args: Sequence[Value], kwargs: Mapping[str, Value]) -> dict[str, Value]:
        if len(args) > len(self.input_names):
            raise InputError(f"the model has {len(self.input_names)} inputs, got {len(args)}")
        feeds = dict(zip(self.input_names, args, strict=False))
        twice = feeds.keys() & kwargs.keys()
        if twice:
            raise InputError(f"the input {min(twice)!r} is given by position and by name")
        return {**feeds, **kwargs}

    def _check_inputs(self, feeds: Mapping[str, Value]) -> None:
        missing = [name for name in self.input_names if name not in feeds]
        unknown = [name for name in feeds if name not in self._compiled.inputs]
        if missing or unknown:
            wrong = [f"{name!r} is missing" for name in missing] + [f"{name!r} is unknown" for name in unknown]
            raise InputError(f"inputs of the model are {', '.join(map(repr, self.input_names))}: {', '.join(wrong)}")
        for name, value in feeds.items():
            if not isinstance(value, (torch.Tensor, list, tuple, type(None))):
                raise InputError(f"the input {name!r} is a {type(value).__name__}, give a torch.Tensor")

    def _execute(self, feeds: Mapping[str, Value], keep: frozenset[int]) -> list[Value]:
        placement, before = self._placement(feeds), self._state.placement
        self._state.placement = placement
        program = self._compiled.program
        values: dict[int, Value] = dict(self._compiled.host)
        for slot, key, trainable in self._constants:
            values[slot] = self._parameters[key] if trainable else self._buffers[key]
        for name, slot in self._compiled.inputs.items():
            values[slot] = feeds[name] if name in feeds else values[self._compiled.defaults[name]]
        try:
            return program.execute(values, placement, self._watchers, keep)
        finally:
            self._state.placement = before  # a watcher may run the module inside a run

    def _placement(self, feeds: Mapping[str, Value]) -> Placement | None:
        """None when everything is on the CPU."""
        tensors = [value for value in feeds.values() if isinstance(value, torch.Tensor)]
        if self._constants:  # they all move together: one tells where
            _, key, trainable = self._constants[0]
            held = self._parameters[key] if trainable else self._buffers[key]
            tensors += [held] if held is not None else []
        device = next((item.device for item in tensors if item.device.type != "cpu"), None)
        if device is None:
            return None
        return self._placements.setdefault(device, Placement(device))


def to_torch(model: str | Path | onnx.ModelProto | ir.Model, *, dtype: torch.dtype | None = None) -> TorchModule:
    """Turn an ONNX model into a torch module on the CPU; `.to("cuda")` moves it.

    Args:
        model: file, protobuf or graph; never changed. External data stays memory-mapped, and what is written to such
            weights stays in memory. The module shares the weights of an onnx_ir.Model: to train it, copy it.
        dtype: compute type of all ordinary floats (float64 for derivative checks, float16 for a GPU); None keeps the
            model's own.

    Raises:
        InputError: the model is broken, or has operators that no converter and no function body defines (all named).
    """
    return compiled_module(open_graph(model), dtype)


def open_graph(model: str | Path | onnx.ModelProto | ir.Model) -> ir.Model:
    """The model as it is compiled, with its element types; a copy."""
    with quiet():
        opened, _, _ = open_model(model)
        if opened.ir_version < OVERRIDABLE:
            passes.RemoveInitializersFromInputsPass()(opened)
        passes.ShapeInferencePass(data_prop=False)(opened)  # only types are needed; packed weights are no shapes
    return opened


def compiled_module(
    opened: ir.Model,
    dtype: torch.dtype | None,
    fused: Mapping[ir.Node, Fused] | None = None,
    skipped: frozenset[ir.Node] = frozenset(),
) -> TorchModule:
    """The module of an opened graph; see `compile_model`."""
    with quiet():
        state = State()
        compiled = compile_model(opened, Carriers(dtype), state, fused, skipped)
    return TorchModule(opened.graph, compiled, state)
