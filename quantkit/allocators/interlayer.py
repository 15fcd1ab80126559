"""Single-unit divergences with what neighbouring units lose together: pair terms, where held-out samples confirm them.

    P[(u,k),(v,j)] = L(u at k, v at j) - L(u at k) - L(v at j)

is measured for units that are close in graph order, at every pair of widths where that is affordable, else at one width
and carried over to the others by the size of the rounding errors (P ~ |d_u| |d_v|). Such terms are small differences of
noisy figures: they are used only where random assignments, tried on samples that nothing was fitted to, are predicted
better with them. The choice with them is measured against the choice without them, and the better one is kept.

An accuracy is kept by bisection (arXiv 2306.04879): for one width after the other, units take it in the order of their
divergence with half of its pair terms, as many as the accuracy allows, each count tried by a real measurement.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
from scipy import stats

from quantkit.allocators._bisection import Bisection
from quantkit.allocators._drop import SPARE_ERRORS
from quantkit.allocators._judge import assignments, predicted, true_losses
from quantkit.allocators._pairs import choose_pairs, cost_of
from quantkit.allocators._table import (
    Allocation,
    Answer,
    Scores,
    Unit,
    answer,
    front,
    joined,
    limits,
    losses,
    scored,
    units_of,
    weights_of,
)
from quantkit.allocators.measured import Measured
from quantkit.errors import InputError
from quantkit.network import network_of
from quantkit.types import AllocationProblem, Allocator, Array, FloatArray, QuantSpec

Terms = Mapping[tuple[int, int], Array]
"""(u, v) with u < v -> [options of u, options of v], nats per sample."""

REPAIRS = 8
ENOUGH = 5
"""Assignments below which nothing is confirmed."""
LEAST = 1e-12


@dataclass(frozen=True)
class Evidence:
    """How random assignments were predicted without and with pair terms.

    Attributes:
        tried: assignments.
        ranks: Spearman's correlation of predicted and true losses.
        errors: root mean square of log(true / predicted), predicted without the assignment in question.
    """

    tried: int
    ranks: tuple[float, float]
    errors: tuple[float, float]

    @property
    def accepted(self) -> bool:
        return self.tried >= ENOUGH and self.errors[1] < self.errors[0] and self.ranks[1] >= self.ranks[0]

    def sentence(self, pairs: int) -> str:
        if self.tried < ENOUGH:
            return f"pair terms of {pairs} pairs of neighbours left out: too few assignments to judge them by"
        verb = "used" if self.accepted else "left out"
        return (
            f"pair terms of {pairs} pairs of neighbours {verb}: with them, the rank correlation on {self.tried} random "
            f"assignments is {self.ranks[1]:.2f} instead of {self.ranks[0]:.2f}, and predictions are off by "
            f"{100 * math.expm1(self.errors[1]):.0f} % instead of {100 * math.expm1(self.errors[0]):.0f} %"
        )


@dataclass(frozen=True)
class Interlayer:
    """Divergences with pair terms.

    Attributes:
        window: units this far apart in graph order count as neighbours.
        reference_bits: where not every pair of widths is affordable, the one that is measured.
        affordable: multiplications that measuring pairs at every width may take.
        assignments: random ones that pair terms are judged by.
        verified: counts beyond the first that violates the accuracy, which are tried as well.
    """

    window: int = 2
    reference_bits: int = 3
    affordable: float = 2e13
    assignments: int = 24
    verified: int = 1

    stats: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("reference_bits", 1), ("assignments", ENOUGH), ("verified", 0)):
            if getattr(self, name) < least:
                raise InputError(f"interlayer.{name} must be at least {least}, got {getattr(self, name)}")

    def scores(self, problem: AllocationProblem, units: Sequence[Unit]) -> Scores:
        table, terms, note = self._figures(problem, units)
        raw = {unit.name: tuple(row) for unit, row in zip(units, augmented(units, table, terms), strict=True)}
        return Scores(raw, "nats per sample, half of the pair terms included", nats=True, notes=(note,))

    def allocate(self, problem: AllocationProblem) -> Allocation:
        units = units_of(problem)
        widest = [len(unit.options) - 1 for unit in units]
        if not units or (problem.budget.is_empty and not problem.front):
            return Allocation(joined(units, widest), units)
        table, terms, note = self._figures(problem, units)
        seen = augmented(units, table, terms)
        best = self._within(problem, units, table, terms)
        choice, notes = widest if problem.budget.is_empty else best.choice, [note, *best.notes]
        if problem.budget.max_drop is not None:
            start = best.choice if limits(problem, units) else widest
            for errors in (SPARE_ERRORS, 0.0):
                bisection = Bisection(problem, units, seen, self.verified, errors)
                choice = bisection.run(start)
                if bisection.found:
                    break
            notes.append(bisection.sentence())
        scores = {"interlayer": self.scores(problem, units), "measured": self._alone(problem, units)}
        points = front(problem, units, losses(units, scores["interlayer"].raw))
        return Allocation(joined(units, choice), units, scores, cost_of(table, terms, choice), points, tuple(notes))

    def _alone(self, problem: AllocationProblem, units: Sequence[Unit]) -> Scores:
        network_of(problem.network, problem.stats, "the allocator interlayer")
        return scored(problem, units, "measured", Measured())

    def _figures(self, problem: AllocationProblem, units: Sequence[Unit]) -> tuple[list[list[float]], Terms, str]:
        """Losses of single units, the pair terms to use, and why."""
        table = losses(units, self._alone(problem, units).raw)
        found: Terms = problem.known.setdefault(repr(self), None) or self.terms(problem, units, table)
        problem.known[repr(self)] = found
        key = f"{self!r} {replace(problem.budget, max_drop=None)}"  # what assignments are drawn for
        if key not in problem.known:
            problem.known[key] = self.evidence(problem, units, table, found)
        evidence: Evidence = problem.known[key]
        return table, found if evidence.accepted else {}, evidence.sentence(len(found))

    def terms(self, problem: AllocationProblem, units: Sequence[Unit], table: Sequence[Sequence[float]]) -> Terms:
        """What neighbours lose together on top of what each loses alone.

        Args:
            table: [units][options] losses of single units.
        """
        assert problem.network is not None
        near = [(u, v) for u in range(len(units)) for v in range(u + 1, min(u + 1 + self.window, len(units)))]
        entries = sum(len(units[u].options) * len(units[v].options) for u, v in near)
        probe = problem.network.calibration
        samples = sum(len(next(iter(feed.values()))) for feed in probe.feeds)
        whole = problem.network.macs * samples * entries / 2 <= self.affordable
        places = {}
        for u, v in near:
            if whole:
                places[u, v] = [(k, j) for k in range(len(units[u].options)) for j in range(len(units[v].options))]
            else:
                places[u, v] = [(_level(units[u], self.reference_bits), _level(units[v], self.reference_bits))]
        trials = {
            units[u].members + units[v].members: partial(_together, problem, units[u], units[v], places[u, v])
            for u, v in near
        }
        found = {}
        errors = [] if whole else [_errors(problem, unit) for unit in units]
        for (u, v), row in zip(near, probe.losses(trials, problem.progress), strict=True):
            both = np.array(row)
            alone = np.array([table[u][k] + table[v][j] for k, j in places[u, v]])
            term = np.where(np.isfinite(both), both - alone, 0.0)
            if whole:
                found[u, v] = term.reshape(len(units[u].options), len(units[v].options))
            else:
                ((k, j),) = places[u, v]
                size = errors[u][k] * errors[v][j]
                found[u, v] = (
                    term[0] * np.outer(errors[u], errors[v]) / size
                    if size > 0
                    else np.zeros((len(errors[u]), len(errors[v])))
                )
        return found

    def evidence(
        self, problem: AllocationProblem, units: Sequence[Unit], table: Sequence[Sequence[float]], terms: Terms
    ) -> Evidence:
        """Random assignments tried on held-out samples, against both predictions."""
        choices = assignments(problem, units, self.assignments) if terms else []
        truth = true_losses(problem, units, choices)
        alone, paired = predicted(table, choices), np.array([cost_of(table, terms, choice) for choice in choices])
        usable = np.isfinite(truth) & (truth > 0)
        if usable.sum() < ENOUGH:
            return Evidence(int(usable.sum()), (0.0, 0.0), (0.0, 0.0))
        logs = [np.log(np.maximum(values[usable], LEAST)) for values in (truth, alone, paired)]
        ranks = [_rank(item, logs[0]) for item in logs[1:]]
        errors = [_left_out(item, logs[0]) for item in logs[1:]]
        return Evidence(int(usable.sum()), (ranks[0], ranks[1]), (errors[0], errors[1]))

    def _within(
        self, problem: AllocationProblem, units: Sequence[Unit], table: Sequence[Sequence[float]], terms: Terms
    ) -> Answer:
        """The choice with pair terms, unless the one without them loses less on held-out samples."""
        alone = answer(problem, units, table)
        if not terms:
            return alone
        paired = _fitting(problem, units, table, terms)
        if paired is None or paired.choice == alone.choice:
            return alone
        first, second = true_losses(problem, units, [alone.choice, paired.choice])
        return paired if second < first else alone


def augmented(units: Sequence[Unit], table: Sequence[Sequence[float]], terms: Terms) -> list[list[float]]:
    """[units][options] losses with half of the terms with every neighbour at the same width."""
    seen = [list(row) for row in table]
    for (u, v), block in terms.items():
        for option in range(len(units[u].options)):
            seen[u][option] += block[option, _level(units[v], units[u].bits(option))] / 2
        for option in range(len(units[v].options)):
            seen[v][option] += block[_level(units[u], units[v].bits(option)), option] / 2
    return seen


def _level(unit: Unit, bits: int) -> int:
    """The option of this width, else the next wider one, else the widest."""
    wider = [option for option in range(len(unit.options)) if unit.bits(option) >= bits]
    return wider[0] if wider else len(unit.options) - 1


def _together(
    problem: AllocationProblem, first: Unit, second: Unit, places: Sequence[tuple[int, int]]
) -> Iterator[Mapping[str, FloatArray]]:
    for k, j in places:
        specs: dict[str, QuantSpec] = {**first.options[k], **second.options[j]}
        yield weights_of(problem, specs)


def _errors(problem: AllocationProblem, unit: Unit) -> Array:
    """[options] Frobenius norm of the rounding error of all members."""
    weights = {name: problem.targets[name].load() for name in unit.members}
    found = []
    for option in unit.options:
        made = weights_of(problem, option)
        found.append(math.sqrt(sum(float(np.square(made[name] - weights[name]).sum()) for name in made)))
    return np.array(found)


def _fitting(
    problem: AllocationProblem, units: Sequence[Unit], table: Sequence[Sequence[float]], terms: Terms
) -> Answer | None:
    """The best choice with pair terms whose real file fits; None where none was found."""
    most = problem.budget.max_bytes(problem.float_size)
    for _ in range(REPAIRS):
        found = choose_pairs(table, terms, limits(problem, units), problem.seed)
        if found is None:
            return None
        if most is None or problem.file_size is None:
            return Answer.of(found)
        over = problem.file_size(joined(units, found.choice)) - most
        if over <= 0:
            return Answer.of(found)
        problem = replace(problem, fixed_size=problem.fixed_size + over)  # what the estimate did not see
    return None


def _rank(first: Array, second: Array) -> float:
    return float(stats.spearmanr(first, second).statistic) if np.ptp(first) > 0 and np.ptp(second) > 0 else 0.0


def _left_out(x: Array, y: Array) -> float:
    """RMS error of the line through all points but one, at that one."""
    spread = float(np.square(x - x.mean()).sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread if spread > 0 else 0.0
    weight = 1 / len(x) + (np.square(x - x.mean()) / spread if spread > 0 else 0.0)
    error = (y - y.mean() - slope * (x - x.mean())) / np.maximum(1 - weight, LEAST)
    return float(np.sqrt(np.mean(np.square(error))))


METHOD: type[Allocator] = Interlayer
