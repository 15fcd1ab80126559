"""What estimators that differentiate share: samples, rounding errors in portions that memory holds, the user's loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from quantkit.allocators._table import Unit, weights_of
from quantkit.errors import InputError
from quantkit.methods import missing_extra
from quantkit.network import network_of
from quantkit.runtime.probe import Probe
from quantkit.types import AllocationProblem, FloatArray
from quantkit.userfunction import import_function

if TYPE_CHECKING:
    import torch

    from quantkit.allocators._derivatives import Derivatives

LIVE_BYTES = 1 << 29
"""Rounding errors held at a time; each further portion runs the network over all samples once more."""

Loss = Callable[[Mapping[str, Any], Mapping[str, Any]], Any]
"""(outputs, the float model's outputs) -> mean over the samples of the batch; torch tensors."""


@dataclass(frozen=True)
class Entry:
    """One place in the table.

    Attributes:
        unit, option: indices.
        errors: target name -> D[N, K] = Q(W) - W, for every member of the unit.
    """

    unit: int
    option: int
    errors: Mapping[str, FloatArray]

    @property
    def nbytes(self) -> int:
        return sum(error.nbytes for error in self.errors.values())


@dataclass(frozen=True)
class Change:
    """An entry's errors as nodes read them.

    Attributes:
        unit, option: indices.
        operands: target name -> tensor.
    """

    unit: int
    option: int
    operands: Mapping[str, torch.Tensor]


def samples(problem: AllocationProblem, name: str) -> Probe:
    """Where the allocator of this name tries changed weights.

    Raises:
        InputError: there is no calibration data, or the model is too large.
    """
    return network_of(problem.network, problem.stats, f"the allocator {name}").calibration


def entries(problem: AllocationProblem, units: Sequence[Unit]) -> Iterator[Entry]:
    """Every place in the table, unit by unit, with the errors of the rounder that will ship."""
    for index, unit in enumerate(units):
        floats = {name: problem.targets[name].load() for name in unit.members}
        for option, specs in enumerate(unit.options):
            rounded = weights_of(problem, specs)
            yield Entry(index, option, {name: rounded[name] - floats[name] for name in unit.members})


def portions(problem: AllocationProblem, units: Sequence[Unit]) -> Iterator[list[Entry]]:
    """`entries` in lists of about LIVE_BYTES."""
    held: list[Entry] = []
    for entry in entries(problem, units):
        if held and sum(item.nbytes for item in held) + entry.nbytes > LIVE_BYTES:
            yield held
            held = []
        held.append(entry)
    if held:
        yield held


def second_order(
    problem: AllocationProblem,
    units: Sequence[Unit],
    net: Derivatives,
    curvatures: Callable[[Sequence[Change], int], Sequence[float]],
) -> dict[str, tuple[float, ...]]:
    """Unit name -> half the mean curvature along the errors of each option; what is negative counts as 0.

    Args:
        curvatures: (changes, batch) -> d^T H d of each, added up over the samples of the batch.
    """
    table = [[0.0] * len(unit.options) for unit in units]
    with problem.progress.task("second derivatives", total=sum(map(len, table)) * len(net.counts)) as advance:
        for held in portions(problem, units):
            changes = [Change(entry.unit, entry.option, net.operands_of(entry.errors)) for entry in held]
            held.clear()
            for batch in range(len(net.counts)):
                for change, figure in zip(changes, curvatures(changes, batch), strict=True):
                    table[change.unit][change.option] += 0.5 * figure / net.samples
                advance(len(changes))
    return {unit.name: tuple(max(figure, 0.0) for figure in row) for unit, row in zip(units, table, strict=True)}


def has_torch() -> bool:
    return find_spec("torch") is not None


def derivatives(
    problem: AllocationProblem, units: Sequence[Unit], name: str, loss: str | None = None
) -> AbstractContextManager[Derivatives]:
    """The float model as a differentiable function of the units' weights, on the calibration samples.

    Args:
        name: of the allocator, for messages.
        loss: module:function in the place of the divergence.

    Raises:
        InputError: no calibration data, torch is not installed, the loss cannot be imported, or the torch backend does
            not have one of the model's operators.
    """
    probe = samples(problem, name)
    function = None if loss is None else import_function(loss, "loss")
    try:
        from quantkit.allocators._derivatives import opened
    except ModuleNotFoundError as error:
        sentence = missing_extra(error)
        if sentence is None:
            raise
        raise InputError(f"allocator {name!r}: {sentence}") from error
    return opened(probe, [member for unit in units for member in unit.members], function, loss or "")


def check_loss(text: str | None, name: str) -> None:
    """Raises: InputError when a loss is no module:function."""
    if text is not None and not all(text.partition(":")):
        raise InputError(f"{name}.loss must be module:function, got {text!r}")
