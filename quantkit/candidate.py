"""Build one candidate model from widths, and measure it: the work behind `problem.evaluate` and the final choice."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import onnx_ir as ir

from quantkit.cache import Store
from quantkit.calibration import accumulators
from quantkit.calibration.accumulators import Distribution
from quantkit.calibration.augment import Augmented, token_inputs
from quantkit.calibration.data import CalibrationData
from quantkit.costs.bops import macs, shapes_of
from quantkit.costs.latency import LatencyCache
from quantkit.costs.layers import LayerTimes
from quantkit.divergence import Divergence
from quantkit.evaluation import Evaluation
from quantkit.feeds import samples_of, shapes_in, typical_feed
from quantkit.forms import Chooser, Option, choose_forms, operations_limits, static_layers
from quantkit.graph._checks import measure as graph_digest
from quantkit.graph.bias import bias_shift, correctable
from quantkit.graph.emit import Assignment, Emission, Emitted, emit, emitter, in_memory
from quantkit.graph.load import LoadedModel
from quantkit.graph.regions import Regions, find_regions
from quantkit.large import is_large
from quantkit.network import Network
from quantkit.options import Options
from quantkit.parallel import Task, quantize_all, quantize_one
from quantkit.provenance import provenance_bytes
from quantkit.report.progress import Progress, SilentProgress
from quantkit.runtime.ort import PROTOBUF_LIMIT, Session, inline_bytes, time_sessions, undisturbed_clock
from quantkit.runtime.probe import Probe
from quantkit.sequential import Settings, quantize_sequentially
from quantkit.types import (
    ActParams,
    Array,
    Feed,
    FloatArray,
    LayerStats,
    QuantizedWeight,
    QuantSpec,
    Target,
    WeightQuantizer,
)

CALIBRATION_METHODS = ("minmax", "percentile", "entropy", "mse")
TIMING_SECONDS = 1.0
PROBE_SAMPLES = 64  # of calibration data, on which allocators try changed weights
LATENCY_DOUBT = 0.15  # in logarithms: figures that differ by more are not the same


@dataclass(frozen=True)
class HeldOut:
    """Samples that calibration did not see, and what the float model makes of them.

    Attributes:
        feeds: a few batches, kept in memory.
        outputs: of the float model.
        session: the float model.
    """

    feeds: Sequence[Feed]
    outputs: Mapping[str, Array]
    session: Session

    @property
    def samples(self) -> int:
        return sum(map(samples_of, self.feeds))


@dataclass(frozen=True)
class Context:
    """What all candidates of one run share.

    Attributes:
        stats: target name -> calibration statistics.
        histograms: value group -> distribution.
        held_out: None when there is no data at all.
        evaluation: the user's metric, or None.
        calibration: the samples themselves; None without data.
    """

    loaded: LoadedModel
    targets: Mapping[str, Target]
    options: Options
    quantizer: WeightQuantizer
    stats: Mapping[str, LayerStats]
    histograms: Mapping[str, Distribution]
    held_out: HeldOut | None
    evaluation: Evaluation | None
    cache: LatencyCache
    calibration: CalibrationData | None = None
    store: Store = field(default_factory=Store)
    progress: Progress = field(default_factory=SilentProgress)
    weights: dict[tuple[str, QuantSpec], QuantizedWeight] = field(default_factory=dict)

    def quantize(self, target: Target, spec: QuantSpec) -> QuantizedWeight:
        """The quantized weight; each (target, spec without activations) is made once."""
        stored = replace(spec, act_bits=None)
        key = (target.name, stored)
        if key not in self.weights:
            self._keep(key, quantize_one(self.quantizer, self._task(target, (stored,)))[0])
        return self.weights[key]

    def quantize_many(self, wanted: Sequence[tuple[str, QuantSpec]]) -> None:
        """Make what is missing of these (target, spec), several at a time; `quantize` then finds it."""
        specs: dict[str, dict[QuantSpec, None]] = {}
        for name, spec in wanted:
            stored = replace(spec, act_bits=None)
            if (name, stored) not in self.weights:
                specs.setdefault(name, {})[stored] = None
        tasks = [self._task(self.targets[name], tuple(missing)) for name, missing in specs.items()]
        with self.progress.task("quantizing layers", total=len(tasks)) as advance:
            for name, made in quantize_all(self.quantizer, tasks, self.options.workers):
                for spec, weight in zip(specs[name], made, strict=True):
                    self._keep((name, spec), weight)
                advance(1)

    def _task(self, target: Target, specs: tuple[QuantSpec, ...]) -> Task:
        return Task(target.name, target.shape, target.load, seen_by(self.quantizer, self.stats.get(target.name)), specs)

    def _keep(self, key: tuple[str, QuantSpec], made: QuantizedWeight) -> None:
        self.weights[key] = made
        self.weights.setdefault((key[0], made.spec), made)  # asked for again with the widths that it chose

    def cost(self, target: Target, spec: QuantSpec, form: str, rows: int) -> tuple[float, float]:
        """(float ms, form ms) of a layer on the typical held-out feed."""
        return self.times.cost(target, spec, form, rows)

    def chooser(
        self, activations: str, static: Iterable[str], activation_of: Mapping[str, ActParams], *, timed: bool = False
    ) -> Chooser:
        """Forms by this run's data; the arguments are those of Chooser."""
        names, runtime, group_size = frozenset(static), self.options.target, self.options.group_size
        functions = (self.stats, self.quantize, self.cost)
        return Chooser(runtime, activations, group_size, names, activation_of, *functions, timed, self.large)

    @cached_property
    def large(self) -> bool:
        """Whether weights stay in files."""
        return is_large(self.targets.values())

    @cached_property
    def times(self) -> LayerTimes:
        known = self.held_out is not None and self.calibration is not None
        calibrated = self.calibration.samples if self.calibration is not None and known else None
        samples = 1 if self.held_out is None else samples_of(typical_feed(self.held_out.feeds))
        options = self.options
        return LayerTimes(self.targets, self.stats, calibrated, samples, self.cache, options.target, options.threads)

    @cached_property
    def model_ms(self) -> float | None:
        """Time of the float model on the typical held-out feed; remembered like the layers' times."""
        if self.held_out is None or self.large:
            return None
        feed = typical_feed(self.held_out.feeds)
        parts = {"model": self.loaded.digest, "shapes": shapes_in(feed), "threads": self.options.threads}
        known = self.cache.get(parts)
        if known is None:
            clock = undisturbed_clock(self.options.threads)
            known = time_sessions([self.held_out.session], feed, seconds=TIMING_SECONDS, clock=clock)
            known = self.cache.put(parts, known)
        return known[0]

    @cached_property
    def divergence(self) -> Divergence:
        """How outputs of held-out samples are compared with the float model's."""
        assert self.held_out is not None
        return Divergence.of([self.held_out.outputs])

    @cached_property
    def network(self) -> Network | None:
        """The float model with samples to try changed weights on; None without data, or where it is too large to be
        run again and again."""
        if self.held_out is None or self.calibration is None or self.large:
            return None
        feeds = list(self.calibration.subset(PROBE_SAMPLES))
        model, threads = self.loaded.model, self.options.threads
        return Network(
            Probe(model, self.targets, feeds, threads, self.store),
            Probe(model, self.targets, list(self.held_out.feeds), threads, self.store),
            sum(macs(target, shapes_of(target, self.stats)) for target in self.targets.values()),
        )


def seen_by(quantizer: WeightQuantizer, stats: LayerStats | None) -> LayerStats | None:
    """The statistics that a quantizer asks for: what was collected for others must not change its answer."""
    if stats is None:
        return None
    names = ("abs_mean", "mean", "square_mean", "gram", "rows", "abs_max")
    hidden: dict[str, Any] = {name: None for name in names if name not in quantizer.stats}
    return replace(stats, **hidden)


@dataclass(frozen=True)
class Candidate:
    """One emitted model and the decisions behind it.

    Attributes:
        chosen: target name -> form, spec and figures.
        emission: everything that decides the bytes.
        emitted: the graph.
        content: its serialisation's sha256, without provenance.
        size: bytes of the file.
        asked: target name -> the width, or the groups' widths, that the forms were chosen for.
    """

    name: str
    chosen: Mapping[str, Option]
    emission: Emission
    emitted: Emitted
    content: str
    size: int
    asked: Mapping[str, QuantSpec] = field(default_factory=dict)


def activation_params(
    regions: Regions, histograms: Mapping[str, Distribution], calibrator: str, scheme: str = "asymmetric"
) -> dict[str, ActParams]:
    """group -> scale and zero point, from its histogram and within what its absorbed Relu/Clip allow."""
    clip = {name: getattr(accumulators, f"clip_{name}") for name in CALIBRATION_METHODS}[calibrator]
    params = {}
    for group in dict.fromkeys(regions.groups.values()):
        low, high = clip(next(histograms[name] for name in (group, *regions.members(group)) if name in histograms))
        least, most = regions.bounds(group)
        params[group] = accumulators.act_params(max(low, least), min(high, most), scheme_within(scheme, least, most))
    return params


def scheme_within(scheme: str, least: float, most: float) -> str:
    """The scheme, as far as it still ends where an absorbed Relu or Clip does: nothing else cuts the values there."""
    if most < math.inf:
        return "asymmetric"
    return "unsigned" if scheme == "symmetric" and least == 0 else scheme


@dataclass(frozen=True)
class Recipe:
    """What a run decides before widths and forms.

    Attributes:
        calibrator: how ranges are taken from histograms.
        bias_correction: shift biases by what rounding does to the outputs' means.
        sequential: quantize every layer on what the quantized layers before it produce; biases then always follow.
        scheme: how a range becomes scale and zero point, see `act_params`.
    """

    calibrator: str
    bias_correction: bool = False
    sequential: bool = False
    scheme: str = "asymmetric"


def build(
    context: Context,
    specs: Mapping[str, QuantSpec],
    recipe: Recipe,
    *,
    name: str,
    max_latency: float | None = None,
    max_bops: int | Fraction | None = None,
    integer: str | None = None,
) -> Candidate:
    """Choose forms for the widths, quantize, emit.

    Args:
        specs: target name -> width, or widths of its groups; absent targets stay float.
        recipe: calibrator and bias correction.
        max_latency, max_bops: budgets that the forms keep.
        integer: overrides the run's `activations` option.
    """
    options = context.options
    mode = integer or options.activations
    targets = {key: context.targets[key] for key in specs}
    model = context.loaded.model
    static = static_layers(model, targets, options.target, mode) if context.histograms else {}
    regions = find_regions(model, [node for nodes in static.values() for node in nodes])
    params = activation_params(regions, context.histograms, recipe.calibrator, recipe.scheme)
    inputs = {key: params[regions.groups[str(targets[key].uses[0].data.name)]] for key in static}
    chooser = context.chooser(mode, static, inputs, timed=max_latency is not None)
    context.quantize_many([(key, spec) for key in specs for _, spec in chooser.specs(targets[key], specs[key])])
    choices = {key: chooser.options(target, specs[key]) for key, target in targets.items()}
    model_ms = context.model_ms
    correction = 1.0 if max_latency is None or model_ms is None else context.times.correction(model_ms, static)
    limits = operations_limits(context.targets, choices, context.stats, max_bops)
    chosen = choose_forms(choices, model_ms=model_ms, max_latency=max_latency, correction=correction, limits=limits)
    return replace(assemble(context, chosen, regions, params, name, recipe), asked=dict(specs))


def assemble(
    context: Context,
    chosen: Mapping[str, Option],
    regions: Regions,
    params: Mapping[str, ActParams],
    name: str,
    recipe: Recipe,
) -> Candidate:
    """Quantize and emit what was chosen."""
    if recipe.sequential:
        layers, shifts = _sequential(context, chosen)
    else:
        layers = {
            key: Assignment(option.form, context.quantize(context.targets[key], option.spec))
            for key, option in chosen.items()
        }
        shifts = bias_shifts(context, layers) if recipe.bias_correction else {}
    emission = Emission(layers, regions, dict(params), context.options.target, shifts)
    emitted = emit(context.loaded.model, emission, context.store.spill)
    content, size = _digest(emitted.model)
    return Candidate(name, chosen, emission, emitted, content, size + provenance_bytes(context))


def _sequential(context: Context, chosen: Mapping[str, Option]) -> tuple[dict[str, Assignment], dict[str, FloatArray]]:
    """The layers one after the other, each on what those before it really produce, and what their biases gain."""
    assert context.calibration is not None
    options = context.options
    data = Augmented(context.calibration, token_inputs(context.loaded.model), options.augment, options.seed)
    found = quantize_sequentially(
        context.loaded.model,
        context.targets,
        {key: option.spec for key, option in chosen.items()},
        data,
        context.quantizer,
        Settings(
            threads=options.threads,
            seed=options.seed,
            bias=True,
            lean=context.large,
            folder=context.store.scratch_folder,
        ),
        context.progress,
        effective=lambda target, weight: emitter(chosen[target.name].form).effective_weight(weight),
    )
    return {key: Assignment(chosen[key].form, weight) for key, weight in found.weights.items()}, dict(found.shifts)


def bias_shifts(context: Context, layers: Mapping[str, Assignment]) -> dict[str, FloatArray]:
    """Target name -> what bias correction adds, for every layer that has room for it."""
    shifts = {}
    for name, assignment in layers.items():
        target, stats = context.targets[name], context.stats.get(name)
        if stats is not None and stats.mean is not None and correctable(target):
            effective = emitter(assignment.form).effective_weight(assignment.weight)
            shifts[name] = bias_shift(target.load(), effective, stats.mean)
    return shifts


def _digest(model: ir.Model) -> tuple[str, int]:
    """(sha256, bytes) of the serialised graph; weights that lie beside the file are hashed one by one."""
    if inline_bytes(model) > PROTOBUF_LIMIT:
        return graph_digest(model)[1], inline_bytes(model)
    content = ir.to_proto(in_memory(model)).SerializeToString(deterministic=True)
    return hashlib.sha256(content).hexdigest(), len(content)
