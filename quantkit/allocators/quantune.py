"""Bits by learning from measured plans: Quantune's surrogate (arXiv 2202.05048) on top of the default allocator.

The plan of `auto` and the uniform one are the first trials; gradient-boosted trees then propose steps around them, and
around the solver's front, stretch by stretch of the network. Every trial is emitted and run. What is kept has to lose
clearly less than `auto`'s plan on held-out samples, because the least of many noisy figures is too low by chance.
`quantkit tune` searches everything else (calibrator, quantizer, transforms, group size) in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np

from quantkit.allocators._ilp import Limit, total
from quantkit.allocators._table import Allocation, Unit, choice_of, joined, limits, losses, units_of
from quantkit.allocators.auto import Auto
from quantkit.allocators.uniform import Uniform
from quantkit.errors import InputError
from quantkit.methods import make
from quantkit.tuning.search import Limits, Outcome, State, Tuner, search
from quantkit.tuning.space import Point, Space
from quantkit.tuning.widths import Widths, make_widths, same_bits
from quantkit.types import AllocationProblem, Allocator, Array

FRONT = 6
LEAST = 1e-12


@dataclass(frozen=True)
class Quantune:
    """Learn from measurements.

    Attributes:
        trials: plans to measure, beside those that `auto` measures.
        search: the tuner.
        margin: a plan has to lose this share less than `auto`'s to take its place.
    """

    trials: int = 24
    search: str = "quantune"
    margin: float = 0.05

    stats: ClassVar[frozenset[str]] = Auto.stats

    def __post_init__(self) -> None:
        if self.trials < 2:
            raise InputError(f"quantune.trials must be at least 2, got {self.trials}")
        if not 0 <= self.margin < 1:
            raise InputError(f"quantune.margin must be at least 0 and below 1, got {self.margin}")

    def allocate(self, problem: AllocationProblem) -> Allocation:
        tuner: Tuner = make("tuners", self.search, {})
        found = Auto().allocate(problem)
        units = found.units or units_of(problem)
        best = choice_of(units, found)
        # With an accuracy alone to keep, `auto` walks down the front already: there is no loss to make small.
        if problem.network is None or best is None or not found.scores or problem.budget.max_drop is not None:
            return found
        widths = make_widths(problem, units, self._plans(problem, units, found, best))
        tried = _Trials(problem, widths, losses(units, next(iter(found.scores.values())).raw))
        state = State(tried.space, (), (), tried.features, tried.allowed, seed=problem.seed)
        with problem.progress.task("learning from trials", total=self.trials) as advance:

            def measure(points: Sequence[Point]) -> list[Outcome]:
                outcomes = [tried.measure(point) for point in points]
                advance(len(points))
                return outcomes

            first = [tried.space.point(widths.plain(name)) for name in widths.plans]
            searched = search(state, tuner, measure, Limits(self.trials), first)
        ours = searched.outcomes[0]
        note = f"quantune: {len(searched.points)} plans were measured"
        if searched.best is None:
            return replace(found, notes=(*found.notes, note))
        gain = 1 - math.exp(searched.outcomes[searched.best].value - ours.value)
        if ours.feasible and gain < max(self.margin, LEAST):
            return replace(found, notes=(*found.notes, f"{note}; none loses clearly less than auto's"))
        chosen = tried.choice(searched.points[searched.best])
        note += f"; the best loses {100 * gain:.0f} % less than auto's"
        return replace(found, specs=joined(units, chosen), predicted=None, notes=(*found.notes, note))

    def _plans(
        self, problem: AllocationProblem, units: Sequence[Unit], found: Allocation, best: Sequence[int]
    ) -> dict[str, Sequence[int]]:
        plans: dict[str, Sequence[int]] = {"auto": best}
        uniform = choice_of(units, Uniform().allocate(problem))
        if uniform is not None:
            plans["uniform"] = uniform
        points = found.front[-FRONT:]
        for number, point in enumerate(reversed(points), 1):
            choice = choice_of(units, point.specs)
            if choice is not None:
                plans[f"front {number}"] = choice
        return plans


@dataclass(frozen=True)
class _Trials:
    """Plans as points."""

    problem: AllocationProblem
    widths: Widths
    table: list[list[float]]

    @cached_property
    def space(self) -> Space:
        return Space(self.widths.dimensions, same_bits(self.widths).__getitem__)

    @cached_property
    def bounds(self) -> list[Limit]:
        return limits(self.problem, self.widths.units)

    def choice(self, point: Point) -> list[int]:
        return self.widths.choice(self.space.configuration(point))

    def allowed(self, point: Point) -> bool:
        choice = self.choice(point)
        return all(total(limit.amounts, choice) <= limit.bound for limit in self.bounds)

    def measure(self, point: Point) -> Outcome:
        figures = self.problem.evaluate(joined(self.widths.units, self.choice(point)), "quantune")
        limit = self.problem.budget.max_bytes(self.problem.float_size)
        fits = (limit is None or figures.size <= limit) and math.isfinite(figures.loss)
        return Outcome(math.log(max(figures.loss, LEAST)) if math.isfinite(figures.loss) else math.inf, fits)

    def features(self, points: Sequence[Point]) -> Array:
        """[points, columns]: plan and steps, average bits, logarithm of the predicted loss."""
        choices = [self.choice(point) for point in points]
        bits = [[unit.bits(pick) for unit, pick in zip(self.widths.units, choice, strict=True)] for choice in choices]
        figures = [
            (float(np.mean(row)), math.log(max(total(self.table, choice), LEAST)))
            for row, choice in zip(bits, choices, strict=True)
        ]
        return np.concatenate([self.space.encode(points), np.array(figures).reshape(len(points), 2)], axis=1)


METHOD: type[Allocator] = Quantune
