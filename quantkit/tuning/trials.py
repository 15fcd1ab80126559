"""Measure configurations: out of the history where they are known, else emitted and run."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from quantkit.allocators._ilp import total
from quantkit.candidate import Candidate, Context
from quantkit.costs.bops import bops, shapes_of
from quantkit.graph.emit import in_memory
from quantkit.measuring import relative_latency
from quantkit.runtime.ort import make_session
from quantkit.tuning.features import STRUCTURE, structure
from quantkit.tuning.history import History, Trial, content_key, figure_of, trial_row
from quantkit.tuning.recipes import columns, features, label
from quantkit.tuning.scoring import Exam, Score, expected_loss, score_all
from quantkit.tuning.search import Outcome
from quantkit.tuning.space import Configuration, Point
from quantkit.tuning.start import Start, relevant
from quantkit.tuning.workshop import identity
from quantkit.types import Array

if TYPE_CHECKING:
    from quantkit.budget import Budget
    from quantkit.pipeline import Run
    from quantkit.rescaling import Rescaled


BITS = ("average bits", "log predicted loss", "log size", "first bits", "last bits", "least bits")
"""Columns beside the recipe's and the model's; loss and size relative to the first trial's."""
LEAST = 1e-12


@dataclass(frozen=True)
class Progressed:
    """After every batch, for whoever watches.

    Attributes:
        trials: all so far; `feasible` of each.
        best: index of the best feasible one.
        known: how many came out of the history.
    """

    trials: tuple[Trial, ...]
    feasible: tuple[bool, ...]
    best: int | None
    known: int


@dataclass
class Trials:
    """Every trial of a run, in order.

    Attributes:
        objective: `loss`, `drop` or `size`.
        history: of this and other runs.
        executor: `local` or `ray`.
    """

    run: Run
    start: Start
    budget: Budget
    objective: str
    history: History
    executor: str
    done: list[Trial] = field(default_factory=list)
    known: int = 0

    @property
    def columns(self) -> tuple[str, ...]:
        return (*columns(), *BITS, *STRUCTURE)

    def allowed(self, point: Point) -> bool:
        """Whether the estimated size, and the bits exactly, are within the budget."""
        configuration = self.start.space.configuration(point)
        size = self.budget.max_bytes(self.run.original.loaded.size)
        if size is not None and self.start.sizes.estimate(configuration, self.start.choice(configuration)) > size:
            return False
        return self.budget.avg_bits is None or self._average(configuration) <= self.budget.avg_bits + 1e-9

    def features(self, points: Sequence[Point]) -> Array:
        """[points, columns]."""
        rows = []
        for point in points:
            configuration = self.start.space.configuration(point)
            rows.append(np.concatenate([features(configuration), self._bits(configuration), self._structure]))
        return np.array(rows, np.float64).reshape(len(points), len(self.columns))

    def measure(self, points: Sequence[Point]) -> list[Outcome]:
        """Trials of these points, remembered one by one."""
        keys = [self._key(point) for point in points]
        found = {key: trial for key in keys if (trial := self.history.trial(key)) is not None}
        self.known += len(found)
        missing = [(key, point) for key, point in zip(keys, points, strict=True) if key not in found]
        for key, point, trial in self._measured(missing):
            row: dict[str, Any] = {"model": self.run.original.loaded.digest, "columns": list(self.columns)}
            row["features"] = [float(f"{value:.6g}") for value in self.features([point])[0]]
            self.history.put(key, {**row, "trial": trial_row(trial)})
            found[key] = self.history.trial(key) or trial  # as it will be read again
        for key in keys:
            self.done.append(found[key])
            configuration = found[key].configuration
            self.start.sizes.learn(configuration, self.start.choice(configuration), found[key].size)
        return [Outcome(figure_of(found[key], self.objective), self._feasible(found[key])) for key in keys]

    @property
    def progressed(self) -> Progressed:
        order = self.ranked()
        feasible = tuple(self._feasible(trial) for trial in self.done)
        return Progressed(tuple(self.done), feasible, order[0] if order else None, self.known)

    def ranked(self) -> list[int]:
        """Feasible trials, the best first; of equals the earlier."""
        usable = [index for index, trial in enumerate(self.done) if self._feasible(trial)]
        return sorted(usable, key=lambda index: figure_of(self.done[index], self.objective))

    def built(self, index: int) -> tuple[Context, Candidate]:
        """The model of a trial, made again."""
        return self._build(self.done[index].configuration)

    def _build(self, configuration: Configuration) -> tuple[Context, Candidate]:
        return self.start.workshop.build(configuration, self.start.choice(configuration), label(configuration))

    def rescaled(self, index: int) -> Rescaled:
        return self.start.workshop.transformed(self.done[index].configuration)[0]

    def run_of(self, index: int) -> Run:
        return self.start.workshop.run_of(self.done[index].configuration)

    def _measured(self, missing: Sequence[tuple[str, Point]]) -> list[tuple[str, Point, Trial]]:
        """New trials; what is too large is not run."""
        began = time.monotonic()
        made = []
        for key, point in missing:
            configuration = self.start.space.configuration(point)
            made.append((key, point, *self._build(configuration)))
        runnable = [item for item in made if self._small(item[2], item[3])]
        best = self._best_losses()
        contents = [ir.to_proto(in_memory(item[3].emitted.model)).SerializeToString() for item in runnable]
        workers = self.run.options.workers
        scores = score_all(contents, self.exam, best, workers=workers, executor=self.executor) if contents else []
        scored = {item[0]: found for item, found in zip(runnable, scores, strict=True)}
        seconds = (time.monotonic() - began) / max(len(made), 1)
        return [
            (key, point, self._trial(point, context, candidate, scored.get(key), best, seconds))
            for key, point, context, candidate in made
        ]

    def _trial(
        self,
        point: Point,
        context: Context,
        candidate: Candidate,
        found: Score | None,
        best: Array | None,
        seconds: float,
    ) -> Trial:
        configuration = self.start.space.configuration(point)
        if found is None:
            return Trial(configuration, candidate.size, math.inf, (), False, None, None, None, seconds)
        began = time.monotonic()
        drop, latency = found.drop, None
        timed, judged = self.budget.max_latency is not None, context.evaluation is not None
        if found.complete and (timed or judged):
            session = make_session(candidate.emitted.model, threads=context.options.threads)
            latency = relative_latency(context, candidate, session) if timed else None
            # The metric is evaluated only where it decides something: it may take far longer than all the rest.
            if judged and (self.objective == "drop" or self.budget.max_drop is not None):
                assert context.evaluation is not None
                drop = context.evaluation.drop(session)
        loss = expected_loss(found, best)
        losses = tuple(float(value) for value in found.losses)
        spent = seconds + time.monotonic() - began
        return Trial(configuration, candidate.size, loss, losses, found.complete, found.sqnr, drop, latency, spent)

    def _feasible(self, trial: Trial) -> bool:
        budget = self.budget
        size = budget.max_bytes(self.run.original.loaded.size)
        return (
            trial.complete
            and math.isfinite(trial.loss)
            and (size is None or trial.size <= size)
            and (budget.max_drop is None or (trial.drop is not None and trial.drop <= budget.max_drop))
            and (budget.max_latency is None or (trial.latency is not None and trial.latency <= budget.max_latency))
        )

    def _small(self, context: Context, candidate: Candidate) -> bool:
        """Within the budgets that need no run."""
        size = self.budget.max_bytes(self.run.original.loaded.size)
        if size is not None and candidate.size > size:
            return False
        if self.budget.max_bops is None:
            return True
        shapes = {name: shapes_of(target, context.stats) for name, target in context.targets.items()}
        whole = sum(bops(target, None, shapes[name]) for name, target in context.targets.items())
        specs = {name: option.spec for name, option in candidate.chosen.items()}
        found = sum(bops(target, specs.get(name), shapes[name]) for name, target in context.targets.items())
        most = self.budget.max_bit_operations(whole)
        return most is None or found <= most

    def _best_losses(self) -> Array | None:
        """[samples] of the best feasible trial so far, to compare others with while they run."""
        order = self.ranked()
        if not order or self.objective != "loss":
            return None
        return np.array(self.done[order[0]].losses)

    def _key(self, point: Point) -> str:
        configuration = self.start.space.configuration(point)
        specs = self.start.workshop.specs(configuration, self.start.choice(configuration))
        return content_key(
            {
                "what": "trial",
                "model": self.run.original.loaded.digest,
                "data": self.run.data.digest,
                "evaluation": self._evaluated,
                "latency": None if self.budget.max_latency is None else str(self.budget.max_latency),
                "options": relevant(self.run),
                **identity(configuration, specs),
            }
        )

    @cached_property
    def _evaluated(self) -> str | None:
        """What the user's metric is measured on; None where no trial measures it."""
        evaluation = self.run.evaluation
        if evaluation is None or (self.objective != "drop" and self.budget.max_drop is None):
            return None
        return f"{evaluation.name} {evaluation.data.digest}"

    @cached_property
    def exam(self) -> Exam:
        """Held-out samples with what the float model makes of them."""
        held_out = self.run.data.held_out
        assert held_out is not None
        feeds = tuple(held_out.feeds)
        outputs = tuple(self.run.reference.run(feed) for feed in feeds)
        context = self.start.workshop.plain
        return Exam(feeds, outputs, context.divergence, self.run.options.threads)

    @cached_property
    def _structure(self) -> Array:
        plain = self.start.workshop.plain
        return structure(plain.loaded.model, plain.targets)

    @cached_property
    def _origin(self) -> tuple[float, float]:
        """(predicted loss, bytes) of the first trial."""
        configuration = self.start.space.configuration(self.start.first[0])
        chosen = self.start.choice(configuration)
        size = sum(self._weights[index] * self._widths(chosen)[index] for index in range(len(chosen)))
        return max(total(self.start.table, chosen), LEAST), max(size, 1.0)

    @cached_property
    def _weights(self) -> list[int]:
        targets = self.start.workshop.plain.targets
        return [sum(math.prod(targets[name].shape) for name in unit.members) for unit in self.start.widths.units]

    def _widths(self, chosen: Sequence[int]) -> list[int]:
        return [unit.bits(option) for unit, option in zip(self.start.widths.units, chosen, strict=True)]

    def _average(self, configuration: Configuration) -> float:
        """Bits per weight, codes alone."""
        widths = self._widths(self.start.choice(configuration))
        return sum(bits * count for bits, count in zip(widths, self._weights, strict=True)) / max(sum(self._weights), 1)

    def _bits(self, configuration: Configuration) -> Array:
        """The columns BITS."""
        chosen = self.start.choice(configuration)
        widths = self._widths(chosen)
        size = float(sum(bits * count for bits, count in zip(widths, self._weights, strict=True)))
        loss, origin = max(total(self.start.table, chosen), LEAST), self._origin
        return np.array(
            [
                self._average(configuration),
                math.log(loss / origin[0]),
                math.log(max(size, 1.0) / origin[1]),
                widths[0],
                widths[-1],
                min(widths),
            ]
        )
