"""Units, what each of their options costs and loses, and the exact choice within every budget at once.

A table of losses S[unit, option] comes from an estimator (one file of this folder each). Losses of different units are
taken to add up; how far they do is a property of the network, so `auto` measures it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import numpy as np

from quantkit.allocators._drop import smallest_within_drop
from quantkit.allocators._ilp import Label, Limit, Solution, choose, infeasible, least, solve_choice, total
from quantkit.types import AllocationProblem, FloatArray, QuantSpec

CAP = 2.0
"""What is not finite counts as this many times the largest finite loss: it must not flatten the rest."""
REPAIRS = 12
GROWTH = 2
"""What is kept back at first grows by this factor, from the bytes that the file is too large by."""
CLOSE = 2e-4
"""Share of the size within which a bound is not moved any more."""
DOUBT = 0.02
"""Of the float model's time: predictions that differ by less are not told apart where none is within the budget."""
PROVEN = 2e-9
"""Gap up to which the solver counts an answer as the best."""
NATS = "nats per sample"


@dataclass(frozen=True)
class Unit:
    """Targets that share one decision.

    Attributes:
        name: of the first member.
        members: target names.
        options: narrow to wide; target name -> spec, for all members.
    """

    name: str
    members: tuple[str, ...]
    options: tuple[Mapping[str, QuantSpec], ...]

    def bits(self, option: int) -> int:
        """Width of the first member."""
        return self.options[option][self.members[0]].bits


@dataclass(frozen=True)
class Scores:
    """What an estimator found.

    Attributes:
        raw: unit name -> one figure for each option, in the estimator's own unit.
        quantity: what `raw` is, for the report.
        nats: whether `raw` is in nats per sample already.
        notes: what the reader of the figures should know (a budget of probes that ran out, an interval).
    """

    raw: Mapping[str, tuple[float, ...]]
    quantity: str
    nats: bool = False
    notes: tuple[str, ...] = ()


class Estimator(Protocol):
    """An allocator that fills a table."""

    def scores(self, problem: AllocationProblem, units: Sequence[Unit]) -> Scores:
        """One figure for each option of each unit."""


@dataclass(frozen=True)
class Allocation(Mapping[str, QuantSpec]):
    """Target name -> spec, with the reasons.

    Attributes:
        specs: the choice.
        units: what was decided together.
        scores: estimator's name -> its figures; first the one whose plan this is, or that is believed.
        predicted: nats per sample, None where no estimator speaks in nats.
        front: choices from the smallest to the largest that is within the budget's other limits, none better and
            smaller than another.
        notes: sentences for the report.
        scale: what brings the first estimator's sums to nats per sample; None where that is not known.
    """

    specs: Mapping[str, QuantSpec]
    units: tuple[Unit, ...] = ()
    scores: Mapping[str, Scores] = field(default_factory=dict)
    predicted: float | None = None
    front: tuple[Point, ...] = ()
    notes: tuple[str, ...] = ()
    scale: float | None = None

    def expected(self, specs: Mapping[str, QuantSpec]) -> float | None:
        """Nats per sample that any plan loses by the first estimator; None where it does not speak in nats."""
        picked = choice_of(self.units, specs)
        if self.scale is None or not self.scores or picked is None:
            return None
        return self.scale * total(losses(self.units, next(iter(self.scores.values())).raw), picked)

    def __getitem__(self, name: str) -> QuantSpec:
        return self.specs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


@dataclass(frozen=True)
class Point:
    """One place on the front: what it costs and what it is predicted to lose.

    Attributes:
        size: bytes of the file, estimated: nodes that a mixture of widths brings are not counted.
        average_bits: codes alone.
        loss: predicted.
        specs: target name -> spec.
        estimator: who predicted it.
        quantity: what `loss` is.
        nats: whether it is in nats per sample.
        time: of the float model's, predicted; None where no budget asks for times.
    """

    size: int
    average_bits: float
    loss: float
    specs: Mapping[str, QuantSpec]
    estimator: str = ""
    quantity: str = NATS
    nats: bool = True
    time: float | None = None


def units_of(problem: AllocationProblem) -> tuple[Unit, ...]:
    """The problem's units, each with one option for every width that a member has."""
    joined = problem.units or {name: (name,) for name in problem.targets}
    units = []
    for members in joined.values():
        known = tuple(name for name in members if problem.candidates.get(name))
        if not known:
            continue
        widths = sorted({spec.bits for name in known for spec in problem.candidates[name]})
        options = []
        for bits in widths:
            option = {name: _nearest(problem.candidates[name], bits) for name in known}
            if option not in options:
                options.append(option)
        units.append(Unit(known[0], known, tuple(options)))
    return tuple(units)


def _nearest(specs: Sequence[QuantSpec], bits: int) -> QuantSpec:
    """The narrowest of at least this width, else the widest."""
    wider = [spec for spec in specs if spec.bits >= bits]
    return min(wider, key=lambda spec: spec.bits) if wider else max(specs, key=lambda spec: spec.bits)


def joined(units: Sequence[Unit], choice: Sequence[int]) -> dict[str, QuantSpec]:
    """The choice as target name -> spec."""
    return {name: spec for unit, pick in zip(units, choice, strict=True) for name, spec in unit.options[pick].items()}


def choice_of(units: Sequence[Unit], specs: Mapping[str, QuantSpec]) -> list[int] | None:
    """The option that each unit has in `specs`; None where a unit has none of its options."""
    choice = []
    for unit in units:
        wanted = {name: specs.get(name) for name in unit.members}
        if wanted not in unit.options:
            return None
        choice.append(unit.options.index(wanted))
    return choice


def weights_of(problem: AllocationProblem, specs: Mapping[str, QuantSpec]) -> dict[str, FloatArray]:
    """Target name -> W[N, K] as it will be after quantization."""
    return {name: problem.quantize(problem.targets[name], spec).dequantize() for name, spec in specs.items()}


def losses(units: Sequence[Unit], raw: Mapping[str, Sequence[float]]) -> list[list[float]]:
    """[units][options] finite losses of at least 0."""
    values = [np.asarray(raw[unit.name], np.float64) for unit in units]
    finite = [row[np.isfinite(row)] for row in values]
    largest = max((float(row.max()) for row in finite if row.size), default=0.0)
    cap = CAP * largest if largest > 0 else 1.0
    return [np.clip(np.nan_to_num(row, nan=cap, posinf=cap, neginf=0.0), 0.0, cap).tolist() for row in values]


def amounts(units: Sequence[Unit], cost: Callable[[str, QuantSpec], float]) -> list[list[float]]:
    """[units][options] of a cost that adds up over members."""
    return [[sum(cost(name, spec) for name, spec in option.items()) for option in unit.options] for unit in units]


def limits(problem: AllocationProblem, units: Sequence[Unit]) -> list[Limit]:
    """Every budget of the problem that is linear in the choice; `max_drop` is not.

    A time that no choice is predicted to keep gives way to the shortest one predicted: measurements decide in the end.
    """
    found = [limit for limit, _ in _labelled(problem, units)]
    if predicted_ms(problem, {}) is None:
        return found
    *others, times = found
    shortest = least(times, others)
    if shortest is None or shortest <= times.bound:
        return found
    assert problem.model_ms is not None
    return [*others, replace(times, bound=shortest + DOUBT * problem.model_ms / problem.correction)]


def predicted_ms(problem: AllocationProblem, specs: Mapping[str, QuantSpec]) -> float | None:
    """Time of the model with these widths, each in its fastest form; None where no budget asks for it."""
    if problem.budget.max_latency is None or problem.milliseconds is None or not problem.model_ms:
        return None
    time, targets = problem.milliseconds, problem.targets
    changes = (time(targets[name], spec) - time(targets[name], None) for name, spec in specs.items())
    return problem.correction * (problem.model_ms + sum(changes))


def impossible(problem: AllocationProblem) -> tuple[str, ...]:
    """A sentence on budgets that no choice meets, and what would have to be; none where all can be met."""
    found = _labelled(problem, units_of(problem))
    sentence = infeasible([limit for limit, _ in found], [label for _, label in found]) if found else None
    return () if sentence is None else (sentence,)


def _labelled(problem: AllocationProblem, units: Sequence[Unit]) -> list[tuple[Limit, Label]]:
    budget, targets = problem.budget, problem.targets
    names = [name for unit in units for name in unit.members]
    found = []
    if budget.avg_bits is not None:
        weights = sum(math.prod(targets[name].shape) for name in names)
        found.append((Limit(code_bits(problem, units), budget.avg_bits * weights), Label("--avg-bits", per=weights)))
    size = budget.max_bytes(problem.float_size)
    if size is not None:
        label = Label("--max-size", " bytes", fixed=problem.fixed_size)
        found.append((Limit(sizes(problem, units), size - problem.fixed_size), label))
    if budget.max_bops is not None and problem.bops is not None:
        count = problem.bops
        whole = sum(count(targets[name], None) for name in names)
        limit = budget.max_bit_operations(whole)
        assert limit is not None
        operations = Limit(amounts(units, lambda name, spec: count(targets[name], spec)), limit)
        found.append((operations, Label("--max-bops")))
    if budget.max_latency is not None and problem.milliseconds is not None and problem.model_ms:
        time, per = problem.milliseconds, problem.model_ms / problem.correction
        rest = problem.model_ms - sum(time(targets[name], None) for name in names)
        times = Limit(amounts(units, lambda name, spec: time(targets[name], spec)), budget.max_latency * per - rest)
        found.append((times, Label("--max-latency", "x", fixed=rest, per=per, adjective="predicted")))
    return found


def code_bits(problem: AllocationProblem, units: Sequence[Unit]) -> list[list[float]]:
    """Bits of codes alone."""
    shapes = {name: target.shape for name, target in problem.targets.items()}
    return amounts(units, lambda name, spec: spec.average_bits(shapes[name][1]) * math.prod(shapes[name]))


def sizes(problem: AllocationProblem, units: Sequence[Unit]) -> list[list[float]]:
    """Bytes in the file."""
    return amounts(units, lambda name, spec: problem.size(problem.targets[name], spec))


@dataclass(frozen=True)
class Answer:
    """A choice within the budgets.

    Attributes:
        choice: option of every unit.
        notes: what the reader should know of how good it is.
    """

    choice: list[int]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, found: Solution) -> Answer:
        return cls(list(found.choice), gap_notes(found))


def gap_notes(found: Solution) -> tuple[str, ...]:
    """What the solver has not proven; none where it has."""
    if found.gap <= PROVEN:
        return ()
    return (f"bits are not proven best: another choice may be predicted to lose up to {100 * found.gap:.2g} % less",)


def solve(problem: AllocationProblem, units: Sequence[Unit], table: Sequence[Sequence[float]]) -> list[int]:
    """The least total loss within all linear budgets; where nothing fits, the narrowest of everything."""
    return answer(problem, units, table).choice


def answer(problem: AllocationProblem, units: Sequence[Unit], table: Sequence[Sequence[float]]) -> Answer:
    """`solve`, with what it has to tell.

    Sizes are estimates: every mixture of widths brings nodes of its own. So the real file is made, and the bound moved
    between what fits and what does not.
    """
    narrow = Answer([0] * len(units))
    found = solve_choice(table, limits(problem, units))
    limit = problem.budget.max_bytes(problem.float_size)
    if found is None or limit is None or problem.file_size is None:
        return narrow if found is None else Answer.of(found)
    best: Solution | None = None
    low, high, extra = 0, None, 0  # bytes kept back: too few, enough
    for _ in range(REPAIRS):
        over = 0 if found is None else problem.file_size(joined(units, found.choice)) - limit
        if over > 0:
            low = extra
            extra = GROWTH * max(extra, over) if high is None else (extra + high) // 2
        else:
            if found is not None and (best is None or found.cost < best.cost):
                best = found
            high = extra
            extra = (low + extra) // 2
        if high is not None and high - low <= CLOSE * limit:
            break
        found = solve_choice(table, limits(replace(problem, fixed_size=problem.fixed_size + extra), units))
    return narrow if best is None else Answer.of(best)


def again(problem: AllocationProblem, allocation: Allocation) -> Mapping[str, QuantSpec]:
    """The choice by the table that was believed, within another budget; the same one where there is no table."""
    scores = next(iter(allocation.scores.values()), None)
    if scores is None or problem.budget.max_drop is not None:
        return allocation.specs
    return joined(allocation.units, solve(problem, allocation.units, losses(allocation.units, scores.raw)))


def front(
    problem: AllocationProblem, units: Sequence[Unit], table: Sequence[Sequence[float]], steps: int = 24
) -> tuple[Point, ...]:
    """Choices along the size, from everything narrow to the least loss that the budget's limits allow."""
    size, bits = sizes(problem, units), code_bits(problem, units)
    weights = sum(math.prod(problem.targets[name].shape) for unit in units for name in unit.members)
    best = solve(problem, units, table)
    low = [int(np.argmin(row)) for row in size]
    found: dict[tuple[int, ...], Point] = {}
    others = limits(problem, units)
    for bound in np.linspace(total(size, low), total(size, best), steps):
        picked = choose(table, [*others, Limit(size, float(bound))])
        if picked is not None:
            time = predicted_ms(problem, joined(units, picked))
            found[tuple(picked)] = Point(
                int(total(size, picked)) + problem.fixed_size,
                total(bits, picked) / weights,
                total(table, picked),
                joined(units, picked),
                time=None if time is None else time / (problem.model_ms or 1.0),
            )
    kept: list[Point] = []
    for point in sorted(found.values(), key=lambda point: (point.size, point.loss)):
        if not kept or point.loss < kept[-1].loss:
            kept.append(point)
    return tuple(kept)


def told(points: Sequence[Point], name: str, found: Scores, scale: float = 1.0) -> tuple[Point, ...]:
    """The front with who predicted it and in what; `scale` brings its losses to the unit of `found`."""
    by = partial(replace, estimator=name, quantity=found.quantity, nats=found.nats)
    return tuple(by(point, loss=scale * point.loss) for point in points)


def allocate_by(problem: AllocationProblem, name: str, estimator: Estimator) -> Allocation:
    """The choice by one estimator's table; with `max_drop`, the smallest on its front that really keeps it."""
    units = units_of(problem)
    if not units:
        return Allocation({})
    widest = joined(units, [len(unit.options) - 1 for unit in units])
    if problem.budget.is_empty and not problem.front:
        return Allocation(widest, units)
    scores = scored(problem, units, name, estimator)
    table = losses(units, scores.raw)
    points = told(front(problem, units, table), name, scores)
    if problem.budget.is_empty:
        return Allocation(widest, units, front=points, notes=scores.notes)
    found = answer(problem, units, table)
    specs: Mapping[str, QuantSpec] = joined(units, found.choice)
    if problem.budget.max_drop is not None:
        specs = smallest_within_drop(problem, points, specs)
    scale, notes = 1.0 if scores.nats else None, (*scores.notes, *found.notes)
    made = Allocation(specs, units, {name: scores}, front=points, notes=notes, scale=scale)
    return replace(made, predicted=made.expected(specs))


def scored(problem: AllocationProblem, units: Sequence[Unit], name: str, estimator: Estimator) -> Scores:
    """The estimator's figures, found once in a run: no budget changes them."""
    if name not in problem.known:
        problem.quantize_many([item for unit in units for option in unit.options for item in option.items()])
        problem.known[name] = estimator.scores(problem, units)
    found: Scores = problem.known[name]
    return found
