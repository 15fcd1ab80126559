"""From the best trial to the model that is kept: not slower than float, then made again with more samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from quantkit.allocation import SLOWER, Outcome, plan_of
from quantkit.allocators._table import Allocation
from quantkit.candidate import Candidate, Context
from quantkit.measuring import measure, relative_latency
from quantkit.pipeline import Run, finish
from quantkit.report.types import Contender
from quantkit.rescaling import Rescaled
from quantkit.result import Result
from quantkit.runtime.ort import make_session
from quantkit.tuning.history import Trial
from quantkit.tuning.recipes import label, recipe_of
from quantkit.tuning.trials import Trials
from quantkit.tuning.workshop import Workshop
from quantkit.types import Measurement

SLOW_TRIES = 4
"""Models whose speed is measured, the best first, to find one that is not slower than float."""
REFIT_HOLDOUT = 10
"""Percent of the samples that still measure when the best configuration is made again."""
LEAST_SAMPLES = 8
SURPRISE = 1.5
"""Times the loss: two small sets of samples differ by less."""
REFITTED = "refitted"


@dataclass(frozen=True)
class Best:
    """The trial to keep.

    Attributes:
        index: of the trial.
        notes: which better ones were passed over, and why.
    """

    index: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kept:
    """A configuration's model, with the run whose samples made it."""

    run: Run
    changed: Rescaled
    context: Context
    candidate: Candidate

    def measured(self, context: Context) -> Measurement:
        """On the held-out samples of a context."""
        return measure(context, self.candidate)


def best_trial(trials: Trials) -> Best:
    """The best feasible trial; without a latency budget, the best of those that are not slower than float.

    Where none is feasible the one that comes nearest to the budgets: complete and small.
    """
    done = trials.progressed.trials
    order = trials.ranked()
    if not order:
        return Best(min(range(len(done)), key=lambda index: (not done[index].complete, done[index].size)))
    if trials.budget.max_latency is not None or trials.run.options.activations == "8":
        return Best(order[0])
    notes: list[str] = []
    for index in order[:SLOW_TRIES]:
        kept = as_tried(trials, index)
        session = make_session(kept.candidate.emitted.model, threads=kept.context.options.threads)
        latency = relative_latency(kept.context, kept.candidate, session)
        if latency <= SLOWER:
            return Best(index, tuple(notes))
        rank = _figure(done[index], trials.objective)
        notes.append(
            f"number {index + 1} ranked higher ({rank}), but took {latency:.2f}x the float model's time: passed over"
        )
    return Best(order[0])


def _figure(trial: Trial, objective: str) -> str:
    """What a trial is ranked by."""
    if objective == "size":
        return f"{trial.size:,} bytes"
    if objective == "drop" and trial.drop is not None:
        return f"a drop of {100 * trial.drop:.3g} %"
    return f"a loss of {trial.loss:.3g} nats"


def as_tried(trials: Trials, index: int) -> Kept:
    """The model of a trial."""
    context, candidate = trials.built(index)
    return Kept(trials.run_of(index), trials.rescaled(index), context, candidate)


def refitted(trials: Trials, index: int, kept: Kept, wider: Callable[[int], Run]) -> Kept:
    """The configuration made again with nearly all samples, unless that is too large, too slow or goes wrong.

    More samples make weights fit better (7 percent less loss on 800 other images, SqueezeNet); none are left to show
    so small a difference: each is measured on the samples that it has not seen, and only a bad surprise counts.

    Args:
        wider: percentage that measures -> the run with so many samples held out.
    """
    if kept.run.options.holdout <= REFIT_HOLDOUT or kept.run.options.calibration_size:
        return kept
    run = wider(REFIT_HOLDOUT)
    if run.data.held_out is None or run.data.held_out.samples < LEAST_SAMPLES:
        return kept
    start, configuration = trials.start, trials.done[index].configuration
    workshop = Workshop(run, run.context(run.original), start.workshop.bits, start.workshop.units, trials.budget)
    name = f"{kept.candidate.name}, {REFITTED}"
    context, candidate = workshop.build(configuration, start.choice(configuration), name)
    made = Kept(run, workshop.transformed(configuration)[0], context, candidate)
    before, after = kept.measured(kept.context), made.measured(context)
    size, latency = trials.budget.max_bytes(run.original.loaded.size), trials.budget.max_latency
    drop = trials.budget.max_drop
    fits = (size is None or after.size <= size) and (latency is None or after.latency <= latency)
    fits = fits and (drop is None or after.drop <= max(drop, before.drop))
    return made if fits and after.loss <= SURPRISE * before.loss else kept


def result_of(trials: Trials, best: Best, kept: Kept) -> Result:
    """Verify, and report every complete trial."""
    index = best.index
    figures = kept.measured(kept.context)
    done, feasible = trials.progressed.trials, trials.progressed.feasible
    again = kept.candidate.name.endswith(REFITTED)
    rows = [
        Contender(
            f"{number}: {label(trial.configuration)}",
            trial.size,
            -math.inf if trial.sqnr is None else trial.sqnr,
            math.nan if trial.latency is None else trial.latency,
            number - 1 == index and not again,
            trial.loss,
        )
        for number, trial in enumerate(done, 1)
        if trial.complete
    ]
    if again:
        rows.append(
            Contender(kept.candidate.name, kept.candidate.size, figures.sqnr, figures.latency, True, figures.loss)
        )
    else:
        rows = [replace(row, latency=figures.latency) if row.chosen else row for row in rows]
    notes = [f"{len(done)} trials, {sum(feasible)} within the budget; number {index + 1} was kept", *best.notes]
    if again:
        assert kept.run.data.calibration is not None
        notes.append(
            f"made again with {kept.run.data.calibration.samples} samples in place of the fewer that trials had"
        )
    plan = plan_of(kept.context, kept.candidate, recipe_of(done[index].configuration), ())
    outcome = Outcome(kept.candidate, kept.changed.recorded(plan), tuple(rows), Allocation({}, notes=tuple(notes)))
    result = finish(kept.context, trials.budget, outcome, kept.run)
    return replace(result, report=replace(result.report, scales=kept.changed.rows))
