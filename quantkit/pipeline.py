"""compress(): load, find targets, rescale, calibrate, allocate, choose forms, emit, verify, in the order of its lines.

Transforms change weights so that the float model computes the same; statistics are collected again behind them. What
held-out samples are compared with stays the original model throughout.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from quantkit import forms
from quantkit.allocation import CORRECTION_GAIN_DB, Outcome, allocate
from quantkit.budget import Budget
from quantkit.cache import Store
from quantkit.calibration.collector import Collected, Request, Settings, collect
from quantkit.calibration.data import CalibrationData, random_calibration
from quantkit.calibration.request import EvaluationRequest
from quantkit.candidate import Candidate, Context, HeldOut
from quantkit.costs.latency import open_cache
from quantkit.errors import InputError
from quantkit.evaluation import open_evaluation
from quantkit.graph.emit import save, simulate, without_notes
from quantkit.graph.load import LoadedModel, load_model
from quantkit.graph.regions import find_regions, moved
from quantkit.graph.targets import Untouched, find_targets
from quantkit.kept import kept
from quantkit.large import HASTY, hastened, is_large, make_scratch, open_store, reference_session
from quantkit.measuring import relative_latency
from quantkit.methods import make
from quantkit.options import Options, make_options
from quantkit.parity import check_layers
from quantkit.plan import decisions_to_json, planned_options, with_options
from quantkit.planned import apply_plan
from quantkit.provenance import provenance
from quantkit.report.build import Measured, build_report
from quantkit.report.progress import Progress, SilentProgress
from quantkit.report.types import Contender
from quantkit.rescaling import Rescaled, choices, planned, rescale, search_bits
from quantkit.result import Result
from quantkit.runtime.ort import Session, make_session
from quantkit.types import Allocator, Feed, LayerStats, Plan, Target, WeightQuantizer
from quantkit.verify import (
    check_parity,
    check_repeatable,
    compare,
    measure_timings,
    open_data,
    run_all,
    session_inputs,
)

HOLDOUT_SAMPLES = 128
LARGE_HOLDOUT_SAMPLES = 64
FEW = 2
# Largest integers in made-up inputs: the first one that all tables of the model are long enough for.
MADE_UP_IDS = (99, 9, 1)
NO_TARGETS = "no MatMul, Gemm, Conv, ConvTranspose, Gather, LSTM or GRU has a constant weight and an input that is not"
ERROR_STATS = frozenset({"rows", "mean"})


@dataclass(frozen=True)
class Data:
    """Calibration and held-out samples; both None for weight-only work without data.

    Attributes:
        notes: what the user should know of them.
    """

    calibration: CalibrationData | None
    held_out: HeldOut | None
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        return "none" if self.calibration is None else self.calibration.digest


def compress(
    model: str | Path | onnx.ModelProto | ir.Model,
    *,
    calibration: object = None,
    evaluation: EvaluationRequest | None = None,
    budget: Budget | None = None,
    plan: Plan | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Result:
    """Quantize a model within a budget and prove that the result does what the plan says.

    Args:
        model: file, protobuf or graph; never changed.
        calibration: anything that `open_calibration` takes, or a CalibrationRequest; None = weights only.
        evaluation: the user's metric and data.
        budget: constraints (none = 8 bits).
        plan: decisions to follow instead of allocating.
        progress: where long steps are shown.
        **settings: fields of `quantkit.options.Options`.

    Raises:
        InputError: anything wrong with model, data or settings, in one sentence.
        VerificationError: the emitted model does not compute what the plan says.
    """
    check_arguments(budget, evaluation, plan)
    options = make_options(settings if plan is None else planned_options(plan, settings))
    budget, progress = budget or Budget(), progress or SilentProgress()
    allocator: Allocator = make("allocators", "uniform" if plan is not None else options.allocator, {})
    run = prepare(model, calibration, evaluation, options, allocator.stats, progress)
    if plan is not None:
        names, bits = planned(plan)
        changed = run.rescaled(names, bits)
        context = run.context(changed)
        outcome = apply_plan(context, with_options(plan, options))
    else:
        changed, context, outcome = _best(run, budget)
    outcome = replace(outcome, plan=changed.recorded(outcome.plan))
    with progress.task("verifying"):
        result = finish(context, budget, outcome, run)
    return replace(result, report=replace(result.report, scales=changed.rows))


def prepare(
    model: str | Path | onnx.ModelProto | ir.Model,
    calibration: object,
    evaluation: EvaluationRequest | None,
    options: Options,
    statistics: frozenset[str],
    progress: Progress,
    most_held_out: int = HOLDOUT_SAMPLES,
) -> Run:
    """Open model and data, find the layers.

    Args:
        statistics: fields of LayerStats that are wanted beside the quantizer's.
        most_held_out: samples that measure, at most.

    Raises:
        InputError: anything wrong with model or data.
    """
    loaded = load_model(model)
    targets, untouched = find_targets(loaded.model, options.ignore)
    name = str(loaded.source or loaded.model.graph.name or type(model).__name__)
    if not targets:
        raise InputError(f"{name} has no layer to quantize: {_reasons(untouched)}")
    loaded = replace(loaded, notes=(*loaded.notes, *_ignored(loaded.model, targets, options)))
    large = is_large(targets.values())
    has_data = calibration is not None or options.random_calibration
    if large and has_data and (hasty := hastened(options)) != options:
        options, loaded = hasty, replace(loaded, notes=(*loaded.notes, HASTY))
    reference = reference_session(loaded.model, large, options.threads)
    settings = method_settings(options, options.quantizer)
    store = open_store(options, targets.values())
    quantizer = kept(make("quantizers", options.quantizer, settings), store)
    data = _open_data(
        calibration, reference, options, min(most_held_out, LARGE_HOLDOUT_SAMPLES) if large else most_held_out
    )
    loaded = replace(loaded, notes=(*loaded.notes, *data.notes))
    judge = None if evaluation is None else open_evaluation(evaluation, reference)
    if judge is not None and not large:
        with progress.task("evaluating the float model"):
            _ = judge.float_score  # now, not after the work: labels or a metric may be of no use
    wanted = quantizer.stats | statistics | ERROR_STATS
    original = Rescaled(loaded, targets)
    return Run(name, original, untouched, reference, options, quantizer, wanted, data, judge, progress, store)


@dataclass(frozen=True)
class Run:
    """What all transforms of one run share.

    Attributes:
        name: of the model, for messages.
        reference: the float model.
        wanted: fields of LayerStats to collect.
    """

    name: str
    original: Rescaled
    untouched: list[Untouched]
    reference: Session
    options: Options
    quantizer: WeightQuantizer
    wanted: frozenset[str]
    data: Data
    evaluation: Any
    progress: Progress
    store: Store = field(default_factory=Store)

    def rescaled(self, names: Sequence[str], bits: int) -> Rescaled:
        if not names:
            return self.original
        with self.progress.task("rescaling"):
            statistics = None if self.data.calibration is None else self._statistics
            return rescale(self.original.loaded, self.original.targets, names, bits, self.options, statistics)

    def _statistics(
        self, model: ir.Model, targets: Mapping[str, Target], wanted: frozenset[str]
    ) -> Mapping[str, LayerStats]:
        assert self.data.calibration is not None
        found = collect(model, self.data.calibration, Request(targets, wanted, {}), self._settings, self.progress)
        return found.stats

    @property
    def _settings(self) -> Settings:
        limit, threads, seed = self.options.memory_limit, self.options.threads, self.options.seed
        return Settings(limit, threads, seed, self.store, is_large(self.original.targets.values()))

    def context(self, changed: Rescaled) -> Context:
        """Everything that allocation looks at, collected from the rescaled model."""
        collected = self._collect(changed.loaded, changed.targets)
        return Context(
            loaded=changed.loaded,
            targets=changed.targets,
            options=self.options,
            quantizer=self.quantizer,
            stats=collected.stats,
            histograms=collected.histograms,
            held_out=self.data.held_out,
            evaluation=self.evaluation,
            cache=open_cache(self.options.cache),
            calibration=self.data.calibration,
            store=self.store,
            progress=self.progress,
        )

    def _collect(self, loaded: LoadedModel, targets: Mapping[str, Target]) -> Collected:
        """Statistics for the quantizer, rows for the error figures, histograms for static integer layers."""
        if self.data.calibration is None:
            return Collected({}, {})
        static = forms.static_layers(loaded.model, targets, self.options.target, self.options.activations)
        regions = find_regions(loaded.model, [node for nodes in static.values() for node in nodes])
        # Where a shape operator moves codes, the value before it has told everything.
        histograms = {name: group for name, group in regions.groups.items() if not moved(loaded.model, name, regions)}
        request = Request(targets, self.wanted, histograms)
        found = collect(loaded.model, self.data.calibration, request, self._settings, self.progress)
        # With some layers in float, integers begin elsewhere: every value of a group is found under its own name.
        known = {name: found.histograms[group] for name, group in regions.groups.items() if group in found.histograms}
        return replace(found, histograms={**known, **found.histograms})


def _best(run: Run, budget: Budget) -> tuple[Rescaled, Context, Outcome]:
    """Allocate; with `--transform auto` once for each transform, and keep one that measurably helps."""
    if budget.max_latency is not None and is_large(run.original.targets.values()):
        raise InputError("a model with more than 1 GiB of weights is not timed: leave --max-latency out")
    bits = search_bits(budget, run.options, run.original.loaded.size)
    first, *others = choices(run.options, has_data=run.data.held_out is not None)
    changed = run.rescaled(first, bits)
    context = run.context(changed)
    best = (changed, context, allocate(context, budget, run.progress))
    if not others:
        return best
    rows = list(best[2].contenders)
    least = chosen_sqnr(rows) + CORRECTION_GAIN_DB
    for names in others:
        changed = run.rescaled(names, bits)
        if not changed.changed:
            continue
        context = run.context(changed)
        outcome = allocate(context, budget, run.progress)
        label = f", {' and '.join(names)}"
        tried = [replace(row, name=row.name + label) for row in outcome.contenders]
        keep = chosen_sqnr(tried) > least
        if keep:
            best, least = (changed, context, outcome), chosen_sqnr(tried)
        losers, winners = (rows, tried) if keep else (tried, rows)
        rows = [replace(row, chosen=False) for row in losers] + winners
    return best[0], best[1], replace(best[2], contenders=tuple(rows))


def chosen_sqnr(rows: Sequence[Contender]) -> float:
    return next((row.sqnr for row in rows if row.chosen), -math.inf)


def check_arguments(budget: object, evaluation: object, plan: object) -> None:
    """Raises: InputError where a Python caller passes something else than the type asked for."""
    wanted = (("budget", budget, Budget), ("evaluation", evaluation, EvaluationRequest), ("plan", plan, Plan))
    for name, value, kind in wanted:
        if value is not None and not isinstance(value, kind):
            raise InputError(f"{name} must be a {kind.__name__}, got {value!r}")


def apply(model: str | Path | onnx.ModelProto | ir.Model, plan: Plan, **arguments: Any) -> Result:
    """Follow a plan: `compress` with its decisions made."""
    return compress(model, plan=plan, **arguments)


def method_settings(options: Options, name: str) -> dict[str, Any]:
    """`{"mse.steps": 40}` -> `{"steps": 40}` for the method `mse`; `auto` takes those of the methods it uses too."""
    owners = ("mse", "gptq", "auto") if name == "auto" else (name,)
    pairs = [(owner, key, value) for owner in owners for key, value in options.settings.items()]
    return {key[len(owner) + 1 :]: value for owner, key, value in pairs if key.startswith(f"{owner}.")}


def _reasons(untouched: list[Untouched]) -> str:
    return "; ".join(f"{row.name}: {row.reason}" for row in untouched[:5]) or NO_TARGETS


def _ignored(model: ir.Model, targets: Mapping[str, Target], options: Options) -> list[str]:
    """What the user's own choice keeps out of every count."""
    if not options.ignore:
        return []
    weights = {name: math.prod(target.shape) for name, target in find_targets(model)[0].items()}
    left = [count for name, count in weights.items() if name not in targets]
    share = f"{sum(left) / sum(weights.values()):.0%}"
    counts = "averages of bits and bit operations do not count them"
    return [f"ignored layers stay float ({len(left)}, {share} of the weights): {counts}"] if left else []


def _open_data(calibration: object, reference: Session, options: Options, most_held_out: int) -> Data:
    if calibration is None and not options.random_calibration:
        return Data(None, None)
    inputs = session_inputs(reference)
    if not inputs:
        raise InputError("the model has no inputs, so there is nothing to calibrate it with; leave the data out")
    made_up = calibration is None
    data = random_calibration(inputs, seed=options.seed) if made_up else open_data(calibration, inputs)
    note = data.split_note
    kept, held = data.split(options.holdout / 100)
    kept = kept.subset(options.calibration_size) if options.calibration_size else kept
    held = held.subset(most_held_out)
    feeds = list(held)
    check_repeatable(reference, feeds[0])
    return Data(kept, HeldOut(feeds, run_all(reference, feeds), reference), () if note is None else (note,))


def finish(context: Context, budget: Budget, outcome: Outcome, run: Run) -> Result:
    """Stamp, write to a temporary file, reload, compare, time."""
    candidate, plan = outcome.candidate, outcome.plan
    model = candidate.emitted.model
    origin = provenance(context, decisions_to_json(plan), run.data.digest)
    model.metadata_props.update(origin)
    parity, outputs, threads = None, None, context.options.threads
    files = make_scratch(context.options.cache) if context.large else None
    with tempfile.TemporaryDirectory(prefix="quantkit-") as folder:
        written = (Path(folder) if files is None else files.folder) / "model.onnx"
        save(model, written, durable=False)
        session = make_session(written, threads=threads, lean=context.large)
        few = _check_feed(context, run.reference)
        if few is not None:
            graph = simulate(context.loaded.model, candidate.emission, context.store.spill)
            check_layers(written, graph, candidate.emitted.edges, few, threads=threads)
            simulated = make_session(graph, threads=threads, optimize="none", lean=context.large)
    if context.held_out is not None:
        outputs = run_all(session, context.held_out.feeds)
        parity = check_parity(outputs, run_all(simulated, context.held_out.feeds), context.held_out.outputs)
    measured = replace(_measured(context, candidate, session, outputs, parity, few is not None), feed=few)
    if measured.latency is not None:  # taken again where the one that decided is far off
        rows = [replace(row, latency=measured.latency) if row.chosen else row for row in outcome.contenders]
        outcome = replace(outcome, contenders=tuple(rows))
    report = build_report(context, budget, outcome, measured, run.untouched, run.name, origin)
    if files is not None:
        model = without_notes(ir.load(written))
    return Result(model, plan, report, outcome.allocation, files, context.loaded.weight_files)


def _check_feed(context: Context, reference: Session) -> Feed | None:
    """What the layers are compared on: a few held-out samples, else made-up ones; None where that cannot be.

    Without data a model of many gigabytes is not run at all, and made-up inputs may be none that it accepts.
    """
    if context.held_out is not None:
        inputs = session_inputs(reference)
        feed = context.held_out.feeds[0]
        batches = {array.shape[0] if array.ndim else 0 for array in feed.values()}
        fixed = any(spec.shape and isinstance(spec.shape[0], int) for spec in inputs)
        return feed if fixed or len(batches) != 1 else {name: array[:FEW] for name, array in feed.items()}
    if context.large:
        return None
    for max_id in MADE_UP_IDS:
        with suppress(InputError):
            inputs = session_inputs(reference)
            made_up = random_calibration(inputs, samples=FEW, seed=context.options.seed, max_id=max_id)
            feed = next(iter(made_up))
            check_repeatable(reference, feed)
            return feed
    return None


def _measured(
    context: Context, candidate: Candidate, session: Session, outputs: Any, parity: float | None, checked: bool
) -> Measured:
    drop = None if context.evaluation is None else context.evaluation.drop(session)
    if context.held_out is None or outputs is None or parity is None:
        return Measured(None, parity, (), drop, None, checked)
    if context.large:  # run on mapped weights, neither is as fast as it will be
        return Measured(compare(context.held_out.outputs, outputs), parity, (), drop, None, checked)
    timings = measure_timings(context.held_out.session, session, context.held_out.feeds)
    latency = relative_latency(context, candidate, session, check=True)
    return Measured(compare(context.held_out.outputs, outputs), parity, timings, drop, latency, checked)
