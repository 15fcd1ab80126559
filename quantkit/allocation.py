"""From a budget to one candidate: calibrator, widths, bias correction, forms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantkit.budget import Budget
from quantkit.candidate import CALIBRATION_METHODS, Candidate, Context, Recipe, assemble, bias_shifts, build, measure
from quantkit.costs.size import layer_bytes
from quantkit.errors import InputError
from quantkit.forms import Chooser, Option, static_layers
from quantkit.methods import make
from quantkit.report.progress import Progress
from quantkit.report.types import Contender
from quantkit.types import AllocationProblem, Allocator, LayerPlan, Measurement, Plan, QuantSpec

DEFAULT_WIDTHS = (2, 3, 4, 5, 6, 7, 8)
TRIES = 4
CORRECTION_GAIN_DB = 0.3
FINE = 8  # bits from which on the layers before no longer change what a layer sees
# A measured time between ROOM and 1 times the budget is near enough; corrections aim at AIM times it.
ROOM = 0.9
AIM = 0.96
LARGEST_STEP = 1.6
SLOWER = 1.05

Outcome = tuple[Candidate, Plan, tuple[Contender, ...]]


def allocate(context: Context, budget: Budget, progress: Progress) -> Outcome:
    """Choose a calibrator, widths and forms; the candidate that was kept, its plan, and everything measured."""
    contenders: list[tuple[Candidate, Measurement]] = []
    with progress.task("choosing the calibrator"):
        recipe = Recipe(_calibrator(context, contenders))
    with progress.task("allocating bits"):
        candidate = _allocated(context, budget, recipe, contenders)
        candidate, recipe = _corrected(context, budget, recipe, candidate, contenders)
        candidate = _within_latency(context, budget, recipe, candidate, contenders)
    candidate, recipe = _sequenced(context, recipe, candidate, contenders)
    last = max((index for index, row in enumerate(contenders) if row[0] is candidate), default=-1)
    rows = tuple(
        Contender(other.name, other.size, figures.sqnr, figures.latency, index == last)
        for index, (other, figures) in enumerate(contenders)
    )
    return candidate, _plan(context, candidate, recipe), rows


def _calibrator(context: Context, contenders: list[tuple[Candidate, Measurement]]) -> str:
    """The user's, or the one with which 8-bit integers come closest to the float model on held-out samples."""
    if context.options.calibrator != "auto":
        return context.options.calibrator
    if not context.histograms or context.held_out is None:
        return "minmax"
    widths = dict.fromkeys(context.targets, QuantSpec(8))
    best, best_sqnr = "minmax", -float("inf")
    for method in CALIBRATION_METHODS:
        candidate = build(context, widths, Recipe(method), name=f"8 bits, {method}")
        found = measure(context, candidate)
        contenders.append((candidate, found))
        if found.sqnr > best_sqnr:
            best, best_sqnr = method, found.sqnr
    return best


def _problem(context: Context, budget: Budget, recipe: Recipe, fixed_size: int) -> AllocationProblem:
    targets = context.targets
    chooser = sizing_chooser(context)

    def specs(name: str) -> tuple[QuantSpec, ...]:
        widths = sorted(context.options.bits or DEFAULT_WIDTHS, reverse=True)
        return tuple(chooser.spec(targets[name], bits, _sizing_form(chooser, name, context)) for bits in widths)

    def evaluate(chosen: Mapping[str, QuantSpec]) -> Measurement:
        return measure(context, build(context, chosen, recipe, name="trial", max_latency=budget.max_latency))

    return AllocationProblem(
        targets=targets,
        stats=context.stats,
        candidates={name: specs(name) for name in targets},
        budget=budget,
        size=layer_bytes,
        float_size=context.loaded.size,
        fixed_size=fixed_size,
        quantize=context.quantize,
        evaluate=evaluate,
    )


def sizing_chooser(context: Context) -> Chooser:
    static = static_layers(context.loaded.model, context.targets, context.options.target, context.options.activations)
    return Chooser(
        runtime=context.options.target,
        activations=context.options.activations,
        group_size=context.options.group_size,
        static=frozenset(static if context.histograms else ()),
        activation_of={},
        stats=context.stats,
        quantize=context.quantize,
        cost=context.cost,
    )


def _sizing_form(chooser: Chooser, name: str, context: Context) -> str:
    """The form whose storage a size estimate assumes: static rows, or groups."""
    if name in chooser.static:
        return "qdq"
    return "gather" if context.targets[name].op == "Gather" else "packed"


def _allocated(
    context: Context, budget: Budget, recipe: Recipe, contenders: list[tuple[Candidate, Measurement]]
) -> Candidate:
    """The allocator's plan, or the uniform one of the same budget where held-out samples find that better."""
    name = "uniform" if context.options.allocator == "auto" else context.options.allocator
    candidate = _within_size(context, budget, recipe, name)
    if name == "uniform" or context.held_out is None:
        return candidate
    uniform = _within_size(context, budget, recipe, "uniform")
    limit = budget.max_bytes(context.loaded.size)
    ours, theirs = (_measured(context, item, contenders) for item in (candidate, uniform))
    fits = limit is None or uniform.size <= max(limit, candidate.size)
    return uniform if fits and theirs.sqnr > ours.sqnr else candidate


def _measured(context: Context, candidate: Candidate, contenders: list[tuple[Candidate, Measurement]]) -> Measurement:
    """Its figures, taken once and kept among the contenders."""
    known = next((figures for other, figures in contenders if other is candidate), None)
    if known is None:
        known = measure(context, candidate)
        contenders.append((candidate, known))
    return known


def _within_size(context: Context, budget: Budget, recipe: Recipe, name: str) -> Candidate:
    """Allocate on estimated sizes; what the real file shows of the rest of the model corrects the estimate."""
    settings = {
        key.partition(".")[2]: value for key, value in context.options.settings.items() if key.startswith(f"{name}.")
    }
    allocator: Allocator = make("allocators", name, settings)
    limit = budget.max_bytes(context.loaded.size)
    floats = sum(4 * target.shape[0] * target.shape[1] for target in context.targets.values())
    fixed_size = max(context.loaded.size - floats, 0)
    tried: list[Candidate] = []
    seen: list[Mapping[str, QuantSpec]] = []
    for _ in range(TRIES):
        problem = _problem(context, budget, recipe, fixed_size)
        specs = allocator.allocate(problem)
        if specs in seen:
            break
        seen.append(specs)
        label = f"{name} {_bits_label(context, specs)}"
        tried.append(build(context, specs, recipe, name=label, max_latency=budget.max_latency))
        if limit is None:
            break
        layers = sum(problem.size(context.targets[key], spec) for key, spec in specs.items())
        over = max(tried[-1].size - limit, 0)
        fixed_size = max(tried[-1].size - layers, fixed_size + over if over else 0)
    fitting = [candidate for candidate in tried if limit is None or candidate.size <= limit]
    # The largest that fits holds the most bits; when nothing fits, the smallest comes nearest.
    return max(fitting, key=lambda item: item.size) if fitting else min(tried, key=lambda item: item.size)


def _bits_label(context: Context, specs: Mapping[str, QuantSpec]) -> str:
    """The widths, or their average where groups have widths of their own."""
    if all(spec.group_bits is None for spec in specs.values()):
        return "/".join(str(bits) for bits in sorted({spec.bits for spec in specs.values()}))
    shapes = {name: context.targets[name].shape for name in specs}
    bits = sum(spec.average_bits(shapes[name][1]) * math.prod(shapes[name]) for name, spec in specs.items())
    return f"{bits / sum(math.prod(shape) for shape in shapes.values()):.3g}"


def _corrected(
    context: Context,
    budget: Budget,
    recipe: Recipe,
    candidate: Candidate,
    contenders: list[tuple[Candidate, Measurement]],
) -> tuple[Candidate, Recipe]:
    """With bias correction where that measurably helps on held-out samples."""
    if context.held_out is None or not bias_shifts(context, candidate.emission.layers):
        return candidate, recipe
    specs = candidate.asked
    corrected = replace(recipe, bias_correction=True)
    label = f"{candidate.name}, bias corrected"
    other = build(context, specs, corrected, name=label, max_latency=budget.max_latency)
    before, after = _measured(context, candidate, contenders), _measured(context, other, contenders)
    return (other, corrected) if after.sqnr > before.sqnr + CORRECTION_GAIN_DB else (candidate, recipe)


def _within_latency(
    context: Context,
    budget: Budget,
    recipe: Recipe,
    candidate: Candidate,
    contenders: list[tuple[Candidate, Measurement]],
) -> Candidate:
    """Measure; without a latency budget, never end slower than float; with one, approach it from either side."""
    if context.held_out is None:
        return candidate
    specs = candidate.asked
    figures = _measured(context, candidate, contenders)
    if budget.max_latency is None:
        if figures.latency <= SLOWER:
            return candidate
        return _not_slower(context, recipe, specs, candidate, figures, contenders)
    return _approach(context, budget.max_latency, recipe, (candidate, figures), contenders)


def _sequenced(
    context: Context, recipe: Recipe, candidate: Candidate, contenders: list[tuple[Candidate, Measurement]]
) -> tuple[Candidate, Recipe]:
    """Every layer quantized again, on what the layers before it really produce: kept when asked for, or when better."""
    wanted = context.options.inputs
    if wanted == "quantized" and context.calibration is None:
        raise InputError("inputs quantized needs calibration data: give --calib, or leave it at auto")
    if wanted == "float" or context.calibration is None:
        return candidate, recipe
    inputs = {name: target.shape[1] for name, target in context.targets.items()}
    narrow = any(option.spec.average_bits(inputs[name]) < FINE for name, option in candidate.chosen.items())
    if wanted == "auto" and not narrow:
        return candidate, recipe
    sequential = replace(recipe, sequential=True)
    regions, params = candidate.emission.regions, candidate.emission.activations
    label = f"{candidate.name}, on quantized inputs"
    other = assemble(context, candidate.chosen, regions, params, label, sequential)
    other = replace(other, asked=candidate.asked)
    before, after = _measured(context, candidate, contenders), _measured(context, other, contenders)
    return (other, sequential) if wanted == "quantized" or after.sqnr > before.sqnr else (candidate, recipe)


def _approach(
    context: Context,
    wanted: float,
    recipe: Recipe,
    start: tuple[Candidate, Measurement],
    contenders: list[tuple[Candidate, Measurement]],
) -> Candidate:
    """The most faithful of a few candidates that are fast enough, else the fastest.

    Layers are measured alone, so their sum only predicts the model's time: what is asked of the prediction is
    corrected by what was measured, until the forms no longer change.
    """
    candidate, figures = start
    specs = candidate.asked
    tried = [(candidate, figures)]
    asked = wanted
    label = candidate.name
    for attempt in range(TRIES):
        if ROOM * wanted <= figures.latency <= wanted:
            break
        asked *= min(max(AIM * wanted / figures.latency, 1 / LARGEST_STEP), LARGEST_STEP)
        candidate = build(context, specs, recipe, name=f"{label} ({attempt + 2})", max_latency=asked)
        if candidate.content in {other.content for other, _ in tried}:
            break
        figures = measure(context, candidate)
        tried.append((candidate, figures))
        contenders.append((candidate, figures))
    fitting = [pair for pair in tried if pair[1].latency <= wanted]
    if not fitting and context.options.activations != "8":  # where integers do not pay, floats may
        plain = build(context, specs, recipe, name=f"{label}, weights only", integer="none")
        tried.append((plain, measure(context, plain)))
        contenders.append(tried[-1])
        fitting = [pair for pair in tried[-1:] if pair[1].latency <= wanted]
    if fitting:
        return max(fitting, key=lambda pair: pair[1].sqnr)[0]
    return min(tried, key=lambda pair: pair[1].latency)[0]


def _not_slower(
    context: Context,
    recipe: Recipe,
    specs: Mapping[str, QuantSpec],
    candidate: Candidate,
    figures: Measurement,
    contenders: list[tuple[Candidate, Measurement]],
) -> Candidate:
    if context.options.activations == "8":
        return candidate
    other = build(context, specs, recipe, name=f"{candidate.name}, weights only", integer="none")
    measured = measure(context, other)
    contenders.append((other, measured))
    return other if measured.latency < figures.latency else candidate


def _plan(context: Context, candidate: Candidate, recipe: Recipe) -> Plan:
    layers = {name: LayerPlan(option.spec, option.form, _reason(option)) for name, option in candidate.chosen.items()}
    options = context.options
    settings: dict[str, Any] = {
        "allocator": "uniform" if options.allocator == "auto" else options.allocator,
        "quantizer": options.quantizer,
        "calibrator": recipe.calibrator,
        "bias_correction": recipe.bias_correction,
        "inputs": "quantized" if recipe.sequential else "float",
        "augment": options.augment,
        "calibrated": context.held_out is not None,
        "target": options.target,
        "seed": options.seed,
        **dict(sorted(options.settings.items())),
    }
    return Plan(layers, candidate.emission.activations, settings)


def _reason(option: Option) -> str:
    if option.form == "qdq":
        return "integer convolution path"
    if option.form == "gather":
        return "rows are dequantized as they are looked up"
    if option.ratio is None:
        return "float at run time: no integer kernel for this operator"
    times = f"measured {1 / option.ratio:.2f}x of float alone" if option.ratio else ""
    kinds = {
        "dynamic": "int8 product, ranges at run time",
        "matmulnbits": "stays packed at run time",
        "packed": "float at run time, most accurate",
    }
    return f"{kinds.get(option.form, option.form)}; {times}"
