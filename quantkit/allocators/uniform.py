"""One width for every layer: the widest within size, bit operations and time, or the narrowest that keeps the accuracy.

Without a budget: 8 bits. A fractional average-bits budget is rounded down, since one width cannot meet it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from quantkit.allocators._drop import SPARE_ERRORS, keeps
from quantkit.allocators._table import DOUBT, predicted_ms
from quantkit.types import AllocationProblem, Allocator, QuantSpec

DEFAULT_BITS = 8


@dataclass(frozen=True)
class Uniform:
    """The floor that every other allocator is measured against."""

    stats: ClassVar[frozenset[str]] = frozenset()

    def allocate(self, problem: AllocationProblem) -> Mapping[str, QuantSpec]:
        widths = sorted({spec.bits for specs in problem.candidates.values() for spec in specs})
        if not widths:
            return {}
        fitting = _quick(problem, [bits for bits in widths if _fits(problem, bits)] or widths[:1])
        if problem.budget.max_drop is None:
            return _assign(problem, min(fitting[-1], max(DEFAULT_BITS, widths[0])))
        for errors in (SPARE_ERRORS, 0.0):
            for bits in fitting:  # narrow to wide: the first that keeps the accuracy is the smallest
                if keeps(problem, problem.evaluate(_assign(problem, bits)), errors):
                    return _assign(problem, bits)
        return _assign(problem, fitting[-1])


def _assign(problem: AllocationProblem, bits: int) -> dict[str, QuantSpec]:
    """Every target at `bits`, or at its nearest wider candidate where it has no such width."""
    chosen = {}
    for name, specs in problem.candidates.items():
        wider = [spec for spec in specs if spec.bits >= bits] or list(specs)
        chosen[name] = min(wider, key=lambda spec: spec.bits)
    return chosen


def _quick(problem: AllocationProblem, widths: list[int]) -> list[int]:
    """Those that are predicted to keep the latency budget, else those that are predicted to be as fast as any."""
    times = {bits: predicted_ms(problem, _assign(problem, bits)) for bits in widths}
    known = {bits: time for bits, time in times.items() if time is not None}
    if not known or problem.model_ms is None or problem.budget.max_latency is None:
        return widths
    bound = problem.budget.max_latency * problem.model_ms
    most = bound if min(known.values()) <= bound else min(known.values()) + DOUBT * problem.model_ms
    return [bits for bits in widths if known[bits] <= most]


def _fits(problem: AllocationProblem, bits: int) -> bool:
    specs = _assign(problem, bits)
    weights = {name: target.shape[0] * target.shape[1] for name, target in problem.targets.items()}
    budget = problem.budget
    if budget.avg_bits is not None:
        average = sum(spec.bits * weights[name] for name, spec in specs.items()) / sum(weights[n] for n in specs)
        if average > budget.avg_bits + 1e-9:
            return False
    if budget.max_bops is not None and problem.bops is not None:
        count = problem.bops
        most = budget.max_bit_operations(sum(count(target, None) for target in problem.targets.values()))
        if most is not None and sum(count(problem.targets[name], spec) for name, spec in specs.items()) > most:
            return False
    limit = budget.max_bytes(problem.float_size)
    size = problem.fixed_size + sum(problem.size(problem.targets[name], spec) for name, spec in specs.items())
    return limit is None or size <= limit


METHOD: type[Allocator] = Uniform
