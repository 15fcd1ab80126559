"""Sensitivity measured: one unit quantized at a time, everything else float, KL to the float model's outputs.

No gradients, no labels, no assumption on the network but that losses of different units add up. What lies in front of
the unit is computed once, so a table costs about half a forward pass for each of its entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from quantkit.allocators._table import Allocation, Scores, Unit, allocate_by, weights_of
from quantkit.network import network_of
from quantkit.types import AllocationProblem, Allocator, FloatArray


@dataclass(frozen=True)
class Measured:
    """The table of single-unit divergences, in nats per sample."""

    stats: ClassVar[frozenset[str]] = frozenset()

    def scores(self, problem: AllocationProblem, units: Sequence[Unit]) -> Scores:
        network = network_of(problem.network, problem.stats, "the allocator measured")
        trials = {unit.members: partial(_trials, problem, unit) for unit in units}
        found = network.calibration.losses(trials, problem.progress)
        return Scores(
            {unit.name: tuple(row) for unit, row in zip(units, found, strict=True)}, "nats per sample", nats=True
        )

    def allocate(self, problem: AllocationProblem) -> Allocation:
        return allocate_by(problem, "measured", self)


def _trials(problem: AllocationProblem, unit: Unit) -> Iterator[Mapping[str, FloatArray]]:
    for option in unit.options:
        yield weights_of(problem, option)


METHOD: type[Allocator] = Measured
