"""A compiled graph: numbered slots and the steps that fill them, each forgotten after its last reader."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from quantkit.runtime.torch_backend._types import Run, Value

Watchers = Mapping[int, Sequence[Callable[[torch.Tensor], torch.Tensor | None]]]
# A captured CUDA graph goes on reading the copies it met, so the oldest are let go only when there are very many.
COPIES = 4096
LARGEST_COPY = 1 << 16


@dataclass(frozen=True)
class Step:
    """One node.

    Attributes:
        run: what the converter returned.
        inputs: slots it reads; None = absent.
        outputs: slots it fills; None = nobody reads it.
        host: positions of `inputs` to bring to the CPU.
        device: positions of `inputs` to bring to the device the program runs on (shape arithmetic stays where it is).
        frees: slots that nobody reads after this step.
        label: operator and node name, for messages.
    """

    run: Run
    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]
    host: tuple[int, ...]
    device: tuple[int, ...]
    frees: tuple[int, ...]
    label: str


class Placement:
    """Brings small host tensors to a device; the copies of shapes seen before are kept, so a CUDA graph can capture."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies: dict[tuple[torch.dtype, tuple[int, ...], bytes], torch.Tensor] = {}

    def held(self) -> tuple[torch.Tensor, ...]:
        """The copies; a captured CUDA graph that holds them goes on reading right numbers whatever is let go here."""
        return tuple(self._copies.values())

    def __call__(self, value: Value) -> Value:
        if isinstance(value, list):
            return [self(item) for item in value]
        if not isinstance(value, torch.Tensor) or value.device == self.device:
            return value
        if value.requires_grad or value.device.type != "cpu" or value.numel() > LARGEST_COPY:
            return value.to(self.device)
        content = value.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        key = (value.dtype, tuple(value.shape), content)
        if key not in self._copies:
            if len(self._copies) >= COPIES:
                self._copies.pop(next(iter(self._copies)))
            self._copies[key] = value.to(self.device)
        return self._copies[key]


@dataclass(frozen=True)
class Program:
    """Steps in order.

    Attributes:
        inputs: slots of the formal inputs.
        captured: slots of the values that come from outer graphs.
        outputs: slots of the outputs.
        slots: how many there are.
    """

    steps: tuple[Step, ...]
    inputs: tuple[int, ...]
    captured: tuple[int, ...]
    outputs: tuple[int, ...]
    slots: int

    def execute(
        self,
        values: Mapping[int, Value],
        placement: Placement | None = None,
        watchers: Watchers | None = None,
        keep: frozenset[int] = frozenset(),
    ) -> list[Value]:
        """All slots after the run; freed ones are None.

        Args:
            values: slot -> value of everything that no step computes: inputs, constants, captured values.
            placement: None when everything is on the CPU.
            watchers: slot -> functions that see the value, and replace it when they return one.
            keep: slots not to be freed.
        """
        env: list[Value] = [None] * self.slots
        for slot, value in values.items():
            env[slot] = value
        if watchers:
            for slot in self.inputs:
                _watch(env, slot, watchers)
        args: list[Value] = []
        try:
            for step in self.steps:
                args = [None if slot is None else env[slot] for slot in step.inputs]
                if placement is not None:
                    _place(step, args, placement)
                result = step.run(*args)
                # A converter may return optional extras that this node does not name.
                results = (result,) if len(step.outputs) == 1 else result
                item = None
                for target, item in zip(step.outputs, results, strict=False):
                    if target is not None:
                        env[target] = item
                        if watchers:
                            _watch(env, target, watchers)
                for slot in step.frees:
                    if slot not in keep:
                        env[slot] = None
                del result, results, item
        except Exception as error:
            error.add_note(f"in {step.label} of {', '.join(map(_described, args)) or 'nothing'}")
            raise
        return env

    def __call__(
        self, formal: Sequence[Value], captured: Sequence[Value], placement: Placement | None = None
    ) -> list[Value]:
        """The outputs."""
        values = dict(zip((*self.inputs, *self.captured), (*formal, *captured), strict=True))
        env = self.execute(values, placement)
        return [env[slot] for slot in self.outputs]


def _place(step: Step, args: list[Value], placement: Placement) -> None:
    for position in step.host:
        value = args[position]
        if isinstance(value, torch.Tensor) and value.device.type != "cpu":
            args[position] = value.cpu()
    for position in step.device:
        args[position] = placement(args[position])


def _described(value: Value) -> str:
    """For messages: float32[2, 3]."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return type(value).__name__


def _watch(env: list[Value], slot: int, watchers: Watchers) -> None:
    for function in tuple(watchers.get(slot, ())):  # some end their own watching
        replaced = function(env[slot])
        if replaced is not None:
            env[slot] = replaced
