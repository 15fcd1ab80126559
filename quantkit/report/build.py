"""Put a finished run into a Report: one row per target, totals, and what the user should know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import TYPE_CHECKING

import numpy as np

from quantkit.budget import Budget
from quantkit.costs.bops import bops, shapes_of
from quantkit.costs.size import stored_bits
from quantkit.errors import InputError
from quantkit.feeds import typical_feed
from quantkit.forms import Option
from quantkit.graph.emit import serialized_size
from quantkit.large import float_bytes
from quantkit.options import Options
from quantkit.report.console import short_bytes
from quantkit.report.depth import error_along_depth
from quantkit.report.kernels import layer_nodes, time_shares, with_fused
from quantkit.report.ranges import activation_rows
from quantkit.report.types import (
    Accuracy,
    DepthRow,
    Fidelity,
    FrontRow,
    LayerRow,
    Report,
    SensitivityRow,
    Timing,
)
from quantkit.runtime.ort import PROTOBUF_LIMIT, optimized_nodes
from quantkit.types import Feed, Plan, QuantSpec, Target

if TYPE_CHECKING:
    from quantkit.allocation import Outcome
    from quantkit.allocators._table import Allocation
    from quantkit.candidate import Candidate, Context
    from quantkit.graph.targets import Untouched
    from quantkit.verify import Comparison


@dataclass(frozen=True)
class Measured:
    """What verification found; None where there was no data to run.

    Attributes:
        checked: the layers were compared with their simulation, on held-out or made-up inputs.
        feed: a few held-out samples to look inside the model with.
    """

    fidelity: Comparison | None
    parity: float | None
    timings: tuple[Timing, ...]
    drop: float | None
    latency: float | None
    checked: bool
    feed: Feed | None = None


def build_report(
    context: Context,
    budget: Budget,
    outcome: Outcome,
    measured: Measured,
    untouched: Sequence[Untouched],
    name: str,
    origin: Mapping[str, str],
) -> Report:
    """Everything a run found out, as plain data."""
    candidate, plan = outcome.candidate, outcome.plan
    size = serialized_size(candidate.emitted.model)
    emitted = candidate.emitted
    kernels = layer_nodes(optimized_nodes(emitted.model), with_fused(emitted.model, emitted.names))
    inside = look_inside(context, candidate, measured.feed)
    rows = [
        replace(
            _row(target, candidate.chosen.get(key), plan, kernels[key].op_type if key in kernels else ""),
            time_share=inside.shares.get(key),
        )
        for key, target in context.targets.items()
    ]
    average = _average(context.targets, candidate.chosen)
    predicted = prediction(outcome.allocation, candidate.asked)
    fidelity = None
    if measured.fidelity is not None and measured.parity is not None and context.held_out is not None:
        found = measured.fidelity
        fidelity = Fidelity(found.sqnr, found.cosine, found.top1_agreement, measured.parity, context.held_out.samples)
    return Report(
        model=name,
        target=context.options.target,
        layers=tuple(rows),
        untouched=tuple((row.name, row.op, row.reason) for row in untouched),
        size_before=context.loaded.size,
        size_after=size,
        average_bits=average[0],
        stored_bits=average[1],
        fidelity=fidelity,
        timings=measured.timings,
        contenders=tuple(replace(row, predicted=predicted) if row.chosen else row for row in outcome.contenders),
        unmet=tuple(_unmet(context, budget, candidate, size, average[0], measured)),
        notes=(*context.loaded.notes, *outcome.allocation.notes, *_notes(context, candidate, measured), *inside.notes),
        provenance=dict(origin),
        sensitivities=sensitivities(outcome.allocation, candidate.asked),
        predicted=predicted,
        front=front_rows(outcome.allocation),
        budget=budget.to_dict(),
        accuracy=_accuracy(context, measured),
        depth=inside.depth,
        activations=activation_rows(candidate.emission, context.targets, context.histograms),
        command=python_call(name, context, budget, planned=candidate.name == "plan"),
    )


@dataclass(frozen=True)
class Inside:
    """What running the model once more, opened up, has told."""

    depth: tuple[DepthRow, ...] = ()
    shares: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def look_inside(context: Context, candidate: Candidate, feed: Feed | None) -> Inside:
    """The error along the depth, and each layer's share of the time; a run never fails for them.

    Args:
        feed: a few held-out samples.
    """
    if context.held_out is None or feed is None:
        return Inside()
    if context.large:
        return Inside(
            notes=("more than 1 GiB of weights: error along the depth and shares of the time are not measured",)
        )
    threads, emitted, notes = context.options.threads, candidate.emitted, []
    depth: tuple[DepthRow, ...] = ()
    shares: Mapping[str, float] = {}
    try:
        depth = error_along_depth(context.loaded.model, emitted.model, context.targets, feed, threads=threads)
    except InputError as error:
        notes.append(f"the error along the depth is not known: {error}")
    if float_bytes(context.targets.values()) > PROTOBUF_LIMIT:  # the profiled graph is in memory several times
        return Inside(depth, shares, (*notes, "more than 256 MiB of weights: shares of the time are not measured"))
    try:
        names = with_fused(emitted.model, emitted.names)
        shares = time_shares(emitted.model, names, typical_feed(context.held_out.feeds), threads=threads)
    except InputError as error:
        notes.append(f"the layers' shares of the time are not known: {error}")
    return Inside(depth, shares, tuple(notes))


def _accuracy(context: Context, measured: Measured) -> Accuracy | None:
    evaluation = context.evaluation
    if evaluation is None or measured.drop is None:
        return None
    score = evaluation.float_score
    return Accuracy(evaluation.name, score, score - measured.drop, evaluation.data.samples)


def python_call(name: str, context: Context, budget: Budget, *, planned: bool) -> str:
    """The line of Python that asks for the same: what differs from the defaults; data as a name."""
    known = {item.name: item.default for item in fields(Options) if item.default is not MISSING}
    options = context.options
    given = {key: getattr(options, key) for key, usual in known.items() if getattr(options, key) != usual}
    arguments = [repr(name), *(["plan"] if planned else [])]
    if context.calibration is not None and not options.random_calibration:
        arguments.append("calibration=calibration")
    if context.evaluation is not None:
        arguments.append("evaluation=evaluation")
    if not budget.is_empty:
        limits = {item.name: getattr(budget, item.name) for item in fields(budget)}
        inside = ", ".join(f"{key}={value!r}" for key, value in limits.items() if value is not None)
        arguments.append(f"budget=quantkit.Budget({inside})")
    if options.settings:
        given["settings"] = dict(options.settings)
    arguments += [f"{key}={value!r}" for key, value in given.items()]
    return f"quantkit.{'apply' if planned else 'compress'}({', '.join(arguments)})"


def sensitivities(allocation: Allocation, specs: Mapping[str, QuantSpec]) -> tuple[SensitivityRow, ...]:
    """By the estimator that was believed: the first."""
    if not allocation.scores:
        return ()
    name, scores = next(iter(allocation.scores.items()))
    rows = []
    for unit in allocation.units:
        losses = {unit.bits(option): loss for option, loss in enumerate(scores.raw[unit.name])}
        spec = specs.get(unit.members[0])
        bits = None if spec is None or spec.group_bits is not None else spec.bits
        rows.append(SensitivityRow(unit.members, losses, bits, name, scores.quantity, scores.nats))
    return tuple(rows)


def front_rows(allocation: Allocation) -> tuple[FrontRow, ...]:
    """The front with who predicted it: where its points do not say, the estimator that was believed."""
    first = next(iter(allocation.scores), "")
    return tuple(
        FrontRow(
            point.size,
            point.average_bits,
            point.loss,
            point.estimator or first,
            point.quantity,
            point.nats,
            point.time,
        )
        for point in allocation.front
    )


def prediction(allocation: Allocation, specs: Mapping[str, QuantSpec]) -> float | None:
    """Nats per sample that were expected of a plan; the allocator's own figure where the plan is its own."""
    own = dict(allocation.specs) == dict(specs)
    return allocation.predicted if own and allocation.predicted is not None else allocation.expected(specs)


def _row(target: Target, option: Option | None, plan: Plan, kernel: str) -> LayerRow:
    weights = target.shape[0] * target.shape[1]
    if option is None:
        reason = plan.layers[target.name].reason if target.name in plan.layers else "left in float"
        return LayerRow(
            target.name,
            target.op,
            target.shape,
            None,
            None,
            None,
            None,
            4 * weights,
            4 * weights,
            None,
            kernel,
            None,
            reason,
        )
    return LayerRow(
        name=target.name,
        op=target.op,
        shape=target.shape,
        bits=_bits(option.spec.average_bits(target.shape[1])),
        group_size=option.spec.group_size,
        symmetric=option.spec.symmetric,
        form=option.form,
        bytes_before=4 * weights,
        bytes_after=round(stored_bits(target, option.spec) * weights / 8),
        sqnr=float(-10 * np.log10(max(option.noise, 1e-20))),
        kernel=kernel,
        latency=option.ratio,
        reason=plan.layers[target.name].reason,
    )


def _bits(average: float) -> float:
    """A whole number where it is one."""
    return int(average) if average.is_integer() else round(average, 3)


def _average(targets: Mapping[str, Target], chosen: Mapping[str, Option]) -> tuple[float, float]:
    weights = {name: target.shape[0] * target.shape[1] for name, target in targets.items()}
    codes = sum(
        (chosen[name].spec.average_bits(targets[name].shape[1]) if name in chosen else 32) * count
        for name, count in weights.items()
    )
    stored = sum(
        (stored_bits(targets[name], chosen[name].spec) if name in chosen else 32) * count
        for name, count in weights.items()
    )
    total = sum(weights.values())
    return codes / total, stored / total


def _unmet(
    context: Context, budget: Budget, candidate: Candidate, size: int, average: float, measured: Measured
) -> list[str]:
    found = []
    limit = budget.max_bytes(context.loaded.size)
    if limit is not None and size > limit:
        found.append(f"size {size} bytes exceeds the budget of {limit} bytes")
    if budget.avg_bits is not None and average > budget.avg_bits + 1e-9:
        found.append(f"average bits {average:.3f} exceed the budget of {budget.avg_bits:g}")
    if budget.max_latency is not None:
        if measured.latency is None:
            found.append("the latency budget cannot be checked without calibration data; give --calib")
        elif measured.latency > budget.max_latency:
            found.append(f"time {measured.latency:.2f}x of float exceeds the budget of {budget.max_latency:g}x")
    if budget.max_drop is not None:
        drop = _drop(measured)
        if drop is None:
            found.append("the accuracy budget cannot be checked without data; give --calib, or --eval and --metric")
        elif drop > budget.max_drop:
            found.append(f"the drop of {drop:.4f} exceeds the budget of {budget.max_drop:g}")
    return found + _unmet_bops(context, budget, candidate)


def _unmet_bops(context: Context, budget: Budget, candidate: Candidate) -> list[str]:
    def spent(chosen: Mapping[str, Option]) -> int:
        return sum(
            bops(target, chosen[name].spec if name in chosen else None, shapes_of(target, context.stats))
            for name, target in context.targets.items()
        )

    limit, count = budget.max_bit_operations(spent({})), spent(candidate.chosen)
    return [f"{count} bit operations exceed the budget of {limit}"] if limit is not None and count > limit else []


def _drop(measured: Measured) -> float | None:
    if measured.drop is not None or measured.fidelity is None:
        return measured.drop
    agreement = measured.fidelity.top1_agreement
    return 1 - (measured.fidelity.cosine if agreement is None else agreement)


def _notes(context: Context, candidate: Candidate, measured: Measured) -> list[str]:
    notes = []
    if candidate.size > context.loaded.size:
        notes.append("the file is larger than the float one: its layers are too small for what unpacking them costs")
    if not measured.checked:
        why = "more than 1 GiB of weights" if context.large else "made-up inputs do not suit it"
        notes.append(f"the file loads, but was not run and compared: {why}; give --calib")
    if context.held_out is None:
        what = "nothing" if context.evaluation is None else "the metric alone"
        notes.append(f"no calibration data: weights only, {what} was measured; give --calib for integer activations")
    notes += _scaled_inputs(candidate)
    slow = [timing for timing in measured.timings if timing.speedup < 1 / 1.05]
    for timing in slow:
        shapes = ", ".join("x".join(map(str, shape)) for shape in timing.shapes.values())
        notes.append(
            f"slower than float at {shapes}: {timing.speedup:.2f}x; --max-latency 1x asks for forms that are not"
        )
    loaded = sum(_loaded_bytes(context.targets[name], option) for name, option in candidate.chosen.items())
    if loaded > candidate.size:
        notes.append(f"weights take {short_bytes(loaded)} once loaded (the file is smaller: they are unpacked at load)")
    return notes


def _scaled_inputs(candidate: Candidate) -> list[str]:
    """The kernel behind matmulnbits has no place for input scales: what the graph has instead."""
    names = [
        name
        for name, layer in candidate.emission.layers.items()
        if layer.form == "matmulnbits" and layer.weight.pre_scale is not None
    ]
    if not names:
        return []
    count = "1 layer" if len(names) == 1 else f"{len(names)} layers"
    return [f"a Div is inserted in front of {count} whose inputs are scaled: {', '.join(names)}"]


def _loaded_bytes(target: Target, option: Option) -> int:
    """Bytes of the constant that the kernel reads."""
    from quantkit.emitters.matmulnbits import kernel_bits

    weights = target.shape[0] * target.shape[1]
    widths = option.spec.widths(target.shape[1]).tolist()
    bits = {"packed": 32, "qdq": 8, "dynamic": 8, "matmulnbits": kernel_bits(*widths)}
    return weights * bits.get(option.form, 4 if set(widths) == {4} else 8) // 8
