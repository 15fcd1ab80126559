"""tune(): learn from real evaluations which configuration of everything is best within a budget.

The first trials are the uniform plan and the plan of the allocator `auto` as `compress` would make it, so that the best
trial is never worse than either on the samples that measure. Every trial is a real model run in its runtime; hopeless
ones end early. Trials are kept by content in a history, from which an interrupted search goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from quantkit.budget import Budget
from quantkit.calibration.request import EvaluationRequest
from quantkit.errors import InputError
from quantkit.methods import make
from quantkit.options import make_options
from quantkit.pipeline import Run, check_arguments, prepare
from quantkit.report.progress import Progress, SilentProgress
from quantkit.result import Result
from quantkit.tuning.final import as_tried, best_trial, refitted, result_of
from quantkit.tuning.history import FILE, Trial, open_history
from quantkit.tuning.scoring import EXECUTORS
from quantkit.tuning.search import Limits, State, Tuner, search
from quantkit.tuning.search import Outcome as Shown
from quantkit.tuning.space import Point
from quantkit.tuning.start import make_start
from quantkit.tuning.trials import Progressed, Trials
from quantkit.types import Allocator

HELD_OUT = 256
DEFAULT_HOLDOUT = 40
NOISE = 0.005
"""Expected gains below half a percent of the loss are not worth a trial."""
OBJECTIVES = ("loss", "drop", "size")
Watcher = Callable[[Progressed], None]


@dataclass(frozen=True)
class TuneSettings:
    """How to search.

    Attributes:
        trials: configurations to measure, those given first included.
        tuner: file name of a tuner.
        batch: configurations proposed and measured at once.
        objective: what to make small: `loss` in nats, `drop` of the user's metric, `size` within --max-drop.
        history: file or folder of measured trials; a folder's are learnt from, whatever model they are of.
        executor: where candidates run: `local` processes or a `ray` cluster.
        refit: make the best configuration again with nearly all samples.
    """

    trials: int = 40
    tuner: str = "quantune"
    batch: int = 1
    objective: str | None = None
    history: Path | None = None
    executor: str = "local"
    refit: bool = True

    def __post_init__(self) -> None:
        Limits(self.trials, self.batch)
        if self.objective is not None and self.objective not in OBJECTIVES:
            raise InputError(f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        if self.executor not in EXECUTORS:
            raise InputError(f"executor must be one of {', '.join(EXECUTORS)}, got {self.executor!r}")

    def wanted(self, budget: Budget, *, evaluation: bool) -> str:
        """The objective that the budget implies where none is named.

        Raises:
            InputError: nothing limits the search, or the objective needs what is not there.
        """
        sized = budget.max_size is not None or budget.avg_bits is not None or budget.max_bops is not None
        if not sized and budget.max_drop is None and budget.max_latency is None:
            raise InputError(
                "tuning needs a budget: give --max-size, --avg-bits, --max-bops, --max-latency or --max-drop"
            )
        found = self.objective or ("size" if budget.max_drop is not None and not sized else "loss")
        if found == "drop" and not evaluation:
            raise InputError("the objective drop needs the user's metric: give --eval and --metric")
        if found == "size" and budget.max_drop is None:
            raise InputError("the objective size needs an accuracy to keep: give --max-drop")
        return found


@dataclass(frozen=True)
class Tuned:
    """The best model and how it was found.

    Attributes:
        result: as `compress` returns it.
        trials: in order.
        feasible: of each trial: within every budget, and measured completely.
        best: index of the trial that was kept.
        objective: what was made small.
        known: trials that came out of the history.
        ended: why there are no more trials.
    """

    result: Result
    trials: tuple[Trial, ...]
    feasible: tuple[bool, ...]
    best: int
    objective: str
    known: int
    ended: str

    @property
    def front(self) -> tuple[int, ...]:
        """Complete trials that no other beats in both size and loss, by size."""
        order = sorted(
            (index for index, trial in enumerate(self.trials) if trial.complete),
            key=lambda index: (self.trials[index].size, self.trials[index].loss),
        )
        kept: list[int] = []
        for index in order:
            if not kept or self.trials[index].loss < self.trials[kept[-1]].loss:
                kept.append(index)
        return tuple(kept)


def tune(
    model: str | Path | onnx.ModelProto | ir.Model,
    *,
    calibration: object,
    budget: Budget,
    evaluation: EvaluationRequest | None = None,
    search_settings: TuneSettings | None = None,
    watch: Watcher | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Tuned:
    """Search for the best configuration within a budget, by measuring.

    Args:
        model: file, protobuf or graph; never changed.
        calibration: anything that `compress` takes; a part of it measures (`holdout`, here 40 percent unless given).
        budget: what has to hold.
        evaluation: the user's metric and data; needed by the objective `drop`, and by --max-drop to mean that metric.
        search_settings: how to search.
        watch: called after every batch.
        progress: where long steps are shown.
        **settings: fields of `quantkit.options.Options`.

    Raises:
        InputError: anything wrong with model, data or settings, in one sentence.
        VerificationError: the emitted model does not compute what the plan says.
    """
    chosen = search_settings or TuneSettings()
    check_arguments(budget, evaluation, None)
    objective = chosen.wanted(budget, evaluation=evaluation is not None)
    tuner: Tuner = make("tuners", chosen.tuner, _own(settings.get("settings", {}), chosen.tuner))
    options = make_options({"holdout": DEFAULT_HOLDOUT, **settings})
    shown = progress or SilentProgress()
    allocator: Allocator = make("allocators", options.allocator, {})

    def opened(holdout: int) -> Run:
        wanted = replace(options, holdout=holdout)
        return prepare(model, calibration, evaluation, wanted, allocator.stats, shown, most_held_out=HELD_OUT)

    run = opened(options.holdout)
    if run.data.held_out is None:
        raise InputError("tuning needs calibration data to measure on: give --calib")
    history = open_history(_file(chosen.history))
    start = make_start(run, budget, history, shown)
    trials = Trials(run, start, budget, objective, history, chosen.executor)
    state = _state(trials, options.seed)
    limits = Limits(chosen.trials, chosen.batch, 0.0 if objective == "drop" else NOISE)

    with shown.task("tuning"):
        searched = search(state, tuner, _watched(trials, watch), limits, start.first)
    best = best_trial(trials)
    kept = as_tried(trials, best.index)
    if chosen.refit:
        with shown.task("making the best one again with more samples"):
            kept = refitted(trials, best.index, kept, opened)
    with shown.task("verifying"):
        result = result_of(trials, best, kept)
    done = trials.progressed
    return Tuned(result, done.trials, done.feasible, best.index, objective, done.known, searched.ended)


def _watched(trials: Trials, watch: Watcher | None) -> Callable[[Sequence[Point]], list[Shown]]:
    """Measures, and tells whoever watches."""

    def measured(points: Sequence[Point]) -> list[Shown]:
        found = trials.measure(points)
        if watch is not None:
            watch(trials.progressed)
        return found

    return measured


def _state(trials: Trials, seed: int) -> State:
    """Nothing tried yet, and what trials of other models tell."""
    others = trials.history.others(trials.run.original.loaded.digest, trials.columns, trials.objective)
    return State(trials.start.space, (), (), trials.features, trials.allowed, others, seed)


def _own(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """`{"quantune.depth": 3}` -> `{"depth": 3}` for the tuner `quantune`."""
    return {key.partition(".")[2]: value for key, value in settings.items() if key.startswith(f"{name}.")}


def _file(path: Path | None) -> Path | None:
    return path / FILE if path is not None and path.is_dir() else path
