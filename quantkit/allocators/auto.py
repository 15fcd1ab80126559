"""The default: let measurements choose the estimator, then let measurements choose the plan.

1. Estimators fill their tables: single-unit divergences where affordable, measured one by one and as a line through
   several sizes of error; else output gradients where torch is installed; and figures that cost next to nothing.
2. Random assignments near the budget are tried; the estimator that predicts them best, each left out in turn, is
   believed. How far losses add up is a property of the network, and this shows it.
3. A few plans are emitted and measured in their runtime: one width everywhere, one width with first and last layer at 8
   bits, the solver's answer by each of the two best estimators. The best within the budget is kept, so the result is
   never worse than uniform.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar

from quantkit.allocators._drop import smallest_within_drop
from quantkit.allocators._findings import Findings
from quantkit.allocators._ilp import total
from quantkit.allocators._inputs import has_torch
from quantkit.allocators._judge import Verdict, assignments, clearly_better, judge, true_losses
from quantkit.allocators._table import (
    Allocation,
    Answer,
    Estimator,
    Scores,
    Unit,
    answer,
    front,
    joined,
    limits,
    losses,
    scored,
    told,
    units_of,
)
from quantkit.allocators.fisher import Fisher
from quantkit.allocators.linearity import Linearity
from quantkit.allocators.measured import Measured
from quantkit.allocators.salience import Salience
from quantkit.allocators.uniform import DEFAULT_BITS, Uniform
from quantkit.errors import InputError
from quantkit.types import AllocationProblem, Allocator, Measurement, QuantSpec

EDGE_BITS = 8
UNIFORM = "uniform"
ENDS = "8 bits at both ends"
WIDEST = "widest"
PLANS = MappingProxyType(
    {
        UNIFORM: "one width everywhere",
        ENDS: "first and last layer at 8 bits, one width between them",
        WIDEST: "every layer at its widest",
    }
)
LESS = "measured to lose less than"
LARGE = "a large model: one width everywhere; --allocator salience gives layers widths by their Gram matrices"


@dataclass(frozen=True)
class Kept:
    """A plan that was measured.

    Attributes:
        name: in the pool.
        why: what it has over the plan by the most trusted estimator.
    """

    name: str
    specs: Mapping[str, QuantSpec]
    why: str


@dataclass(frozen=True)
class Auto:
    """Choose by measurement.

    Attributes:
        assignments: random assignments that are tried to judge estimators.
        affordable: multiplications that a table of single-unit divergences may take; beyond, it is not made.
        contenders: estimators whose answers are emitted and measured.
        margin: a plan has to lose this share less than the one by the most trusted estimator to take its place, and an
            estimator to err this share less than a more trusted one: few held-out samples tell small differences by
            chance. A plan has to lose less by the standard error of the difference as well. Uniform only has to lose
            less.
    """

    assignments: int = 24
    affordable: float = 2e13
    contenders: int = 2
    margin: float = 0.1

    stats: ClassVar[frozenset[str]] = Salience.stats

    def __post_init__(self) -> None:
        if self.assignments < 3:
            raise InputError(f"auto.assignments must be at least 3, got {self.assignments}")
        if not 0 <= self.margin < 1:
            raise InputError(f"auto.margin must be at least 0 and below 1, got {self.margin}")
        if self.contenders < 1:
            raise InputError(f"auto.contenders must be at least 1, got {self.contenders}")

    def allocate(self, problem: AllocationProblem) -> Allocation:
        units = units_of(problem)
        if problem.network is None or not units or _nothing_to_choose(problem, units):
            large = problem.network is None and problem.stats
            plain = Allocation(Uniform().allocate(problem), units, notes=(LARGE,) if large else ())
            return self._with_front(problem, plain) if problem.front and units else plain
        found = self._findings(problem, units)
        contending = found.ranking[: self.contenders] if limits(problem, units) else ()
        answers = {name: answer(problem, units, found.table(units, name)) for name in contending}
        kept = self._kept(problem, _pool(problem, units, answers), found.ranking[0])
        owner = next((name for name in answers if joined(units, answers[name].choice) == kept.specs), None)
        name = owner or found.ranking[0]
        points = found.front(problem, units, name)
        specs, why = kept.specs, kept.why
        if problem.budget.max_drop is not None:
            specs = smallest_within_drop(problem, points, kept.specs)
            why = why if specs is not kept.specs else "as nothing that was measured keeps the accuracy, instead of"
        plan = PLANS[kept.name] if owner is None and specs is kept.specs else f"bits by {name}"
        notes = (found.sentence(plan, why), *found.scores[name].notes)
        notes += answers[owner].notes if owner is not None else ()
        order = (name, *(other for other in found.ranking if other != name))
        scores = {other: found.in_nats(other) for other in order}
        made = Allocation(specs, units, scores, front=points, notes=notes, scale=found.rest(name))
        return replace(made, predicted=made.expected(specs))

    def _with_front(self, problem: AllocationProblem, plain: Allocation) -> Allocation:
        """A plan that nothing was compared for, with the front that was asked for beside it."""
        units = plain.units
        if problem.network is None:
            scores = scored(problem, units, "salience", Salience())
            points = front(problem, units, losses(units, scores.raw))
            return replace(plain, front=told(points, "salience", scores))
        found = self._findings(problem, units)
        best = found.ranking[0]
        points = found.front(problem, units, best)
        return replace(plain, front=points, notes=(f"the front is by {best}{found.judgement()}", *plain.notes))

    def _findings(self, problem: AllocationProblem, units: Sequence[Unit]) -> Findings:
        asked = self._estimators(problem, units)
        scores = {name: scored(problem, units, name, estimator) for name, estimator in asked.items()}
        return Findings(scores, self._verdicts(problem, units, scores), self.margin)

    def _estimators(self, problem: AllocationProblem, units: Sequence[Unit]) -> dict[str, Estimator]:
        """The most trusted first: a line through several sizes of error is less noisy than one measurement each."""
        assert problem.network is not None
        entries = sum(len(unit.options) for unit in units)
        samples = sum(len(next(iter(feed.values()))) for feed in problem.network.calibration.feeds)
        if problem.network.macs * samples * entries / 2 <= self.affordable:
            return {"linearity": Linearity(), "measured": Measured(), "salience": Salience()}
        if has_torch():
            return {"fisher": Fisher(), "salience": Salience()}
        return {"salience": Salience()}

    def _verdicts(
        self, problem: AllocationProblem, units: Sequence[Unit], scores: Mapping[str, Scores]
    ) -> dict[str, Verdict]:
        choices = assignments(problem, units, self.assignments)
        truth = true_losses(problem, units, choices)
        return {name: judge(units, found.raw, choices, truth) for name, found in scores.items()}

    def _kept(self, problem: AllocationProblem, pool: Mapping[str, Mapping[str, QuantSpec]], trusted: str) -> Kept:
        """The first of the pool, unless another is measured to lose clearly less, or uniform to lose less at all.

        Args:
            trusted: the estimator whose plan the others have to beat.
        """
        limit = problem.budget.max_bytes(problem.float_size)
        found: dict[str, Measurement] = {}
        for name, specs in pool.items():
            if not any(specs == pool[other] for other in found):
                found[name] = problem.evaluate(specs, name)
        fitting = {name: figures for name, figures in found.items() if limit is None or figures.size <= limit}
        if not fitting:
            least = min(found, key=lambda name: found[name].size)
            return Kept(least, pool[least], "measured to take fewer bytes than")
        most = problem.budget.max_latency
        quick = {name: figures for name, figures in fitting.items() if most is None or figures.latency <= most}
        fitting = quick or fitting  # where none is, forms are still to be corrected by what was measured
        best = next(iter(fitting))
        for name, figures in fitting.items():
            if name == UNIFORM:
                better = figures.loss < fitting[best].loss
            else:
                much = figures.loss < fitting[best].loss * (1 - self.margin)
                better = much and clearly_better(figures, fitting[best])
            if better:
                best = name
        missed = f"bits by {trusted}" in found.keys() - fitting.keys()
        return Kept(best, pool[best], "measured to be within the budget, unlike" if missed else LESS)


def _pool(
    problem: AllocationProblem, units: Sequence[Unit], answers: Mapping[str, Answer]
) -> dict[str, Mapping[str, QuantSpec]]:
    """Name -> plan to emit and measure; `answers` by estimators, the most trusted first."""
    if not answers:  # an accuracy alone: the front decides
        return {WIDEST: joined(units, [len(unit.options) - 1 for unit in units])}
    same = replace(problem, budget=replace(problem.budget, max_drop=None))
    pool = {f"bits by {name}": joined(units, found.choice) for name, found in answers.items()}
    recipe = both_ends_wide(problem, units)
    ends = {} if recipe is None else {ENDS: recipe}
    uniform = Uniform().allocate(same)
    others = {name: specs for name, specs in {**pool, **ends}.items() if specs != uniform}
    return {**others, UNIFORM: uniform}  # last: it need not win clearly


def _nothing_to_choose(problem: AllocationProblem, units: Sequence[Unit]) -> bool:
    """Whether the widest that is of use fits: more bits than 8 gain nothing, and fewer were not asked for."""
    if problem.budget.max_drop is not None:
        return False
    wide = [max(option for option in range(len(unit.options)) if _ordinary(unit, option)) for unit in units]
    return all(total(limit.amounts, wide) <= limit.bound for limit in limits(problem, units))


def _ordinary(unit: Unit, option: int) -> bool:
    return option == 0 or unit.bits(option) <= DEFAULT_BITS


def both_ends_wide(problem: AllocationProblem, units: Sequence[Unit]) -> dict[str, QuantSpec] | None:
    """First and last layer at 8 bits, all others one width: the widest that still fits; None where none does."""
    if len(units) < 3:
        return None
    bounds = limits(problem, units)
    widths = sorted({unit.bits(option) for unit in units for option in range(len(unit.options))}, reverse=True)
    for bits in widths:
        choice = []
        for index, unit in enumerate(units):
            wanted = EDGE_BITS if index in (0, len(units) - 1) else bits
            wide = [option for option in range(len(unit.options)) if unit.bits(option) >= wanted]
            choice.append(wide[0] if wide else len(unit.options) - 1)
        if all(total(limit.amounts, choice) <= limit.bound for limit in bounds):
            return joined(units, choice)
    return None


METHOD: type[Allocator] = Auto
