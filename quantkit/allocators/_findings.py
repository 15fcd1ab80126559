"""What estimators found and how they were judged: their order, figures in nats, fronts, and words for all that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from quantkit.allocators._judge import Verdict
from quantkit.allocators._table import NATS, Point, Scores, Unit, front, losses, told
from quantkit.types import AllocationProblem

UNJUDGED = "too few different assignments to judge the estimators by"


@dataclass(frozen=True)
class Findings:
    """Tables with verdicts.

    Attributes:
        scores: estimator -> its figures; those that are trusted before anything is measured come first.
        verdicts: estimator -> how well it predicted random assignments.
        margin: share by which an estimator has to err less than one that is trusted more.
    """

    scores: Mapping[str, Scores]
    verdicts: Mapping[str, Verdict]
    margin: float

    @cached_property
    def ranking(self) -> tuple[str, ...]:
        """Few assignments tell estimators apart by chance too: where they hardly differ, the usual order holds."""
        doubt = {name: 1 + self.margin * place for place, name in enumerate(self.scores)}
        return tuple(sorted(self.scores, key=lambda name: self.verdicts[name].error * doubt[name]))

    def table(self, units: Sequence[Unit], name: str) -> list[list[float]]:
        """[units][options] of one estimator, in its own unit."""
        return losses(units, self.scores[name].raw)

    def in_nats(self, name: str) -> Scores:
        """Its figures, those of another quantity scaled to nats where the assignments tell by how much."""
        found, scale = self.scores[name], self.verdicts[name].scale
        if found.nats or not math.isfinite(scale):
            return found
        raw = {unit: tuple(scale * loss for loss in row) for unit, row in found.raw.items()}
        return Scores(raw, f"{NATS}, scaled from {found.quantity}", nats=True, notes=found.notes)

    def rest(self, name: str) -> float | None:
        """What brings sums of `in_nats` to what assignments lose; None where they stay in another unit."""
        if self.scores[name].nats:
            scale = self.verdicts[name].scale
            return scale if math.isfinite(scale) else 1.0
        return 1.0 if self.in_nats(name).nats else None

    def front(self, problem: AllocationProblem, units: Sequence[Unit], name: str) -> tuple[Point, ...]:
        """The front by one estimator, in nats where they are known."""
        scale = self.verdicts[name].scale
        points = front(problem, units, self.table(units, name))
        return told(points, name, self.in_nats(name), scale if math.isfinite(scale) else 1.0)

    def sentence(self, plan: str, why: str) -> str:
        """Which plan was kept, and what the estimators are worth.

        Args:
            plan: `bits by` an estimator, or another plan in words.
            why: what it has over the plan by the most trusted estimator, where it is another one.
        """
        trusted = f"bits by {self.ranking[0]}"
        return f"{plan if plan == trusted else f'{plan}, {why} {trusted}'}{self.judgement()}"

    def judgement(self) -> str:
        """How well the most trusted estimator predicts, to stand behind its name."""
        best = self.ranking[0]
        error = self.verdicts[best].error
        if not self.verdicts[best].judged:
            return f"; {UNJUDGED}"
        ordered = sorted(self.verdicts, key=lambda name: self.verdicts[name].error)
        figures = "; ".join(self._figures(name) for name in ordered)
        if len(ordered) == 1:
            return f" (on random assignments, {figures})"
        equals = [name for name in ordered if name != best and self.verdicts[name].error <= error * (1 + self.margin)]
        if equals:
            return f", which predicted random assignments about as well as {' and '.join(equals)} ({figures})"
        return f", which predicted random assignments best ({figures})"

    def _figures(self, name: str) -> str:
        found = self.verdicts[name]
        if not found.judged:
            return f"{name}: the same for all of them"
        return f"{name}: rank correlation {found.rank:.2f}, off by {100 * math.expm1(found.error):.0f} %"
