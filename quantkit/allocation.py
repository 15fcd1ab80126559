"""From a budget to one candidate: calibrator, widths, bias correction, forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from quantkit.allocators._drop import SPARE_ERRORS
from quantkit.allocators._table import Allocation, again, impossible
from quantkit.budget import Budget
from quantkit.candidate import CALIBRATION_METHODS, Candidate, Context, Recipe, assemble, bias_shifts, build
from quantkit.costs.size import layer_bytes
from quantkit.errors import InputError
from quantkit.forms import Option
from quantkit.methods import make
from quantkit.problem import Ledger, bits_label, make_problem
from quantkit.report.build import sensitivities
from quantkit.report.progress import Progress
from quantkit.report.types import Contender, SensitivityRow
from quantkit.types import AllocationProblem, Allocator, LayerPlan, Measurement, Plan, QuantSpec

TRIES = 4
CORRECTION_GAIN_DB = 0.3
FINE = 8  # bits from which on the layers before no longer change what a layer sees
# A measured time between ROOM and 1 times the budget is near enough; corrections aim at AIM times it.
ROOM = 0.9
AIM = 0.96
LARGEST_STEP = 1.6
SLOWER = 1.05
SPARE = 500  # part of the size that is left where the biases of other bits may take more
LEFT_FLOAT = "chosen to stay float"
NEAR = 1  # widths on either side whose losses a layer's reason tells


@dataclass(frozen=True)
class Outcome:
    """What was kept, and why.

    Attributes:
        contenders: everything that was emitted and measured.
        allocation: the allocator's reasons.
    """

    candidate: Candidate
    plan: Plan
    contenders: tuple[Contender, ...]
    allocation: Allocation = field(default_factory=lambda: Allocation({}))


def allocate(context: Context, budget: Budget, progress: Progress) -> Outcome:
    """Choose a calibrator, widths and forms."""
    ledger = Ledger(context, budget.max_bops)
    with progress.task("choosing the calibrator"):
        recipe = Recipe(_calibrator(context, ledger))
    with progress.task("allocating bits"):
        if budget.max_latency is not None and context.held_out is not None:
            # One measured model shows what no layer alone does, before anything is predicted.
            ledger.measure(ledger.build(dict.fromkeys(context.targets, QuantSpec(8)), recipe, "8 bits"))
        candidate, allocation = _allocated(budget, recipe, ledger)
        problem = make_problem(ledger, budget, recipe, _fixed_size(context, candidate))
        allocation = replace(allocation, notes=(*allocation.notes, *impossible(problem)))
        candidate, recipe = _corrected(budget, recipe, candidate, ledger)
        candidate = _within_latency(problem, allocation, recipe, candidate, ledger)
    candidate, recipe = _sequenced(budget, recipe, candidate, ledger)
    allocation = replace(allocation, notes=(*allocation.notes, *_doubts(budget, candidate, ledger)))
    plan = plan_of(context, candidate, recipe, sensitivities(allocation, candidate.asked))
    return Outcome(candidate, plan, ledger.contenders(candidate, allocation.expected), allocation)


def _doubts(budget: Budget, candidate: Candidate, ledger: Ledger) -> list[str]:
    """Where the accuracy is kept by so little that other samples may find otherwise."""
    context = ledger.context
    if budget.max_drop is None or (context.held_out is None and context.evaluation is None):
        return []
    found = ledger.measure(candidate)
    if not budget.keeps(found.drop) or budget.keeps(found.drop + SPARE_ERRORS * found.drop_error):
        return []
    return [
        f"the accuracy budget is kept by less than a standard error: the drop is {found.drop:.4f} +- "
        f"{found.drop_error:.4f}; more evaluation data would tell more"
    ]


def _calibrator(context: Context, ledger: Ledger) -> str:
    """The user's, or the one with which 8-bit integers come closest to the float model on held-out samples."""
    if context.options.calibrator != "auto":
        return context.options.calibrator
    if not context.histograms or context.held_out is None:
        return "minmax"
    widths = dict.fromkeys(context.targets, QuantSpec(8))
    best, best_sqnr = "minmax", -float("inf")
    for method in CALIBRATION_METHODS:
        found = ledger.measure(ledger.build(widths, Recipe(method), f"8 bits, {method}"))
        if found.sqnr > best_sqnr:
            best, best_sqnr = method, found.sqnr
    return best


def _allocated(budget: Budget, recipe: Recipe, ledger: Ledger) -> tuple[Candidate, Allocation]:
    """The allocator's plan, or the uniform one of the same budget where held-out samples find that better."""
    context = ledger.context
    name = context.options.allocator
    if name == "auto" and context.held_out is None:
        name = "uniform"
    uniform, allocation = _within_size(budget, recipe, "uniform", ledger)
    if name == "uniform":
        return uniform, allocation
    candidate, allocation = _within_size(budget, recipe, name, ledger, fixed_size=_fixed_size(context, uniform))
    if context.held_out is None or candidate is uniform:
        return candidate, allocation
    limit = budget.max_bytes(context.loaded.size)
    ours, theirs = ledger.measure(candidate), ledger.measure(uniform)
    if budget.max_drop is not None:
        return _smaller(budget, [(candidate, ours), (uniform, theirs)]), allocation
    fits = limit is None or uniform.size <= max(limit, candidate.size)
    quick = budget.max_latency is None or theirs.latency <= max(budget.max_latency, ours.latency)
    if not (fits and quick and theirs.loss < ours.loss):
        return candidate, allocation
    told = f"one width everywhere after all: measured with everything in place, it loses less than the plan of {name}"
    return uniform, replace(allocation, notes=(*allocation.notes, told))


def _smaller(budget: Budget, pairs: Sequence[tuple[Candidate, Measurement]]) -> Candidate:
    """The smallest that keeps the accuracy, by a standard error where any does; the first where none does."""
    for errors in (SPARE_ERRORS, 0.0):
        kept = [item for item, found in pairs if budget.keeps(found.drop + errors * found.drop_error)]
        if kept:
            return min(kept, key=lambda item: item.size)
    return pairs[0][0]


def _fixed_size(context: Context, candidate: Candidate) -> int:
    """Bytes of the file beside its layers."""
    return max(
        candidate.size - sum(layer_bytes(context.targets[key], spec) for key, spec in candidate.asked.items()), 0
    )


def _within_size(
    budget: Budget, recipe: Recipe, name: str, ledger: Ledger, fixed_size: int | None = None
) -> tuple[Candidate, Allocation]:
    """Allocate on estimated sizes; what the real file shows of the rest of the model corrects the estimate."""
    context = ledger.context
    settings = {
        key.partition(".")[2]: value for key, value in context.options.settings.items() if key.startswith(f"{name}.")
    }
    allocator: Allocator = make("allocators", name, settings)
    limit = budget.max_bytes(context.loaded.size)
    if fixed_size is None:
        floats = sum(4 * target.shape[0] * target.shape[1] for target in context.targets.values())
        fixed_size = max(context.loaded.size - floats, 0)
    tried: list[tuple[Candidate, Allocation]] = []
    seen: list[Mapping[str, QuantSpec]] = []
    for _ in range(TRIES):
        problem = make_problem(ledger, budget, recipe, fixed_size)
        found = allocator.allocate(problem)
        specs = dict(found)
        if specs in seen:
            break
        seen.append(specs)
        label = f"{name} {bits_label(context, specs)}"
        made = ledger.build(specs, recipe, label, budget.max_latency)
        tried.append((made, found if isinstance(found, Allocation) else Allocation(specs)))
        if limit is None:
            break
        layers = sum(problem.size(context.targets[key], spec) for key, spec in specs.items())
        over = max(made.size - limit, 0)
        fixed_size = max(made.size - layers, fixed_size + over if over else 0)
    fitting = [pair for pair in tried if limit is None or pair[0].size <= limit]
    # The largest that fits holds the most bits; when nothing fits, the smallest comes nearest.
    if fitting:
        return max(fitting, key=lambda pair: pair[0].size)
    return min(tried, key=lambda pair: pair[0].size)


def _corrected(budget: Budget, recipe: Recipe, candidate: Candidate, ledger: Ledger) -> tuple[Candidate, Recipe]:
    """With bias correction where that measurably helps on held-out samples."""
    context = ledger.context
    if context.held_out is None or not bias_shifts(context, candidate.emission.layers):
        return candidate, recipe
    specs = candidate.asked
    corrected = replace(recipe, bias_correction=True)
    label = f"{candidate.name}, bias corrected"
    other = ledger.build(specs, corrected, label, budget.max_latency)
    before, after = ledger.measure(candidate), ledger.measure(other)
    better = after.sqnr > before.sqnr + CORRECTION_GAIN_DB and _keeps_as_much(budget, before, after, ledger)
    return (other, corrected) if better else (candidate, recipe)


def _keeps_as_much(budget: Budget, before: Measurement, after: Measurement, ledger: Ledger) -> bool:
    """Whether a model may take another one's place: it keeps what is measured of the budget, or comes no further off.

    Corrected biases are new bytes, other forms other times, and other weights lose other samples.
    """
    size = budget.max_bytes(ledger.context.loaded.size)
    return (
        (size is None or after.size <= max(size, before.size))
        and (budget.max_latency is None or after.latency <= max(budget.max_latency, before.latency))
        and (budget.keeps(after.drop) or after.drop <= before.drop)
    )


def _within_latency(
    problem: AllocationProblem, allocation: Allocation, recipe: Recipe, candidate: Candidate, ledger: Ledger
) -> Candidate:
    """Measure; without a latency budget, never end slower than float; with one, approach it from either side."""
    if ledger.context.held_out is None:
        return candidate
    figures = ledger.measure(candidate)
    if problem.budget.max_latency is None:
        return candidate if figures.latency <= SLOWER else _not_slower(problem.budget, recipe, candidate, ledger)
    return _approach(problem, allocation, recipe, (candidate, figures), ledger)


def _sequenced(budget: Budget, recipe: Recipe, candidate: Candidate, ledger: Ledger) -> tuple[Candidate, Recipe]:
    """Every layer quantized again, on what the layers before it really produce: kept when asked for, or when better."""
    context = ledger.context
    wanted = context.options.inputs
    if wanted == "quantized" and context.calibration is None:
        raise InputError("inputs quantized needs calibration data: give --calib, or leave it at auto")
    if wanted == "float" or context.calibration is None:
        return candidate, recipe
    inputs = {name: target.shape[1] for name, target in context.targets.items()}
    narrow = any(option.spec.average_bits(inputs[name]) < FINE for name, option in candidate.chosen.items())
    if wanted == "auto" and (not narrow or context.large):  # as long again, for a large model
        return candidate, recipe
    other = _in_sequence(candidate, recipe, ledger)
    limit = budget.max_bytes(context.loaded.size)
    if limit is not None and other.size > max(limit, candidate.size) and budget.max_latency is None:
        # The biases that it corrects are new bytes: bits make room for them.
        tighter = replace(budget, max_size=max(2 * limit - other.size - limit // SPARE, 1))
        retried = _in_sequence(_allocated(tighter, recipe, ledger)[0], recipe, ledger)
        other = retried if retried.size <= limit else other
    before, after = ledger.measure(candidate), ledger.measure(other)
    better = after.loss < before.loss and _keeps_as_much(budget, before, after, ledger)
    kept = wanted == "quantized" or better
    return (other, replace(recipe, sequential=True)) if kept else (candidate, recipe)


def _in_sequence(candidate: Candidate, recipe: Recipe, ledger: Ledger) -> Candidate:
    """The same widths and forms, each layer quantized on what the quantized ones before it produce."""
    regions, params = candidate.emission.regions, candidate.emission.activations
    label = f"{candidate.name}, on quantized inputs"
    sequential = replace(recipe, sequential=True)
    other = assemble(ledger.context, candidate.chosen, regions, params, label, sequential)
    return replace(other, asked=candidate.asked)


def _approach(
    problem: AllocationProblem,
    allocation: Allocation,
    recipe: Recipe,
    start: tuple[Candidate, Measurement],
    ledger: Ledger,
) -> Candidate:
    """The most faithful of a few candidates that are fast enough, else the fastest.

    Layers are measured alone, so their sum only predicts the model's time: what is asked of the prediction is
    corrected by what was measured, for widths and forms, until they no longer change.
    """
    context, wanted = ledger.context, problem.budget.max_latency
    assert wanted is not None
    candidate, figures = start
    tried = [(candidate, figures)]
    asked = wanted
    label = candidate.name
    for attempt in range(TRIES):
        if ROOM * wanted <= figures.latency <= wanted:
            break
        asked *= min(max(AIM * wanted / figures.latency, 1 / LARGEST_STEP), LARGEST_STEP)
        specs = candidate.asked
        if candidate.asked == allocation.specs:
            specs = again(replace(problem, budget=replace(problem.budget, max_latency=asked)), allocation)
            allocation = replace(allocation, specs=specs)
        name = f"{label} ({attempt + 2})"
        candidate = build(context, specs, recipe, name=name, max_latency=asked, max_bops=ledger.max_bops)
        if candidate.content in {other.content for other, _ in tried}:
            break
        figures = ledger.measure(candidate)
        tried.append((candidate, figures))
    rest, first = replace(problem.budget, max_latency=None), start[1]

    def able(pairs: Sequence[tuple[Candidate, Measurement]]) -> list[tuple[Candidate, Measurement]]:
        return [pair for pair in pairs if _keeps_as_much(rest, first, pair[1], ledger)]

    fitting = [pair for pair in able(tried) if pair[1].latency <= wanted]
    if not fitting and context.options.activations != "8" and ledger.max_bops is None:
        # Where integers do not pay, floats may.
        plain = build(context, start[0].asked, recipe, name=f"{label}, weights only", integer="none")
        tried.append((plain, ledger.measure(plain)))
        fitting = [pair for pair in able(tried[-1:]) if pair[1].latency <= wanted]
    if fitting:
        return max(fitting, key=lambda pair: pair[1].sqnr)[0]
    return min(able(tried), key=lambda pair: pair[1].latency)[0]  # the first one is among them


def _not_slower(budget: Budget, recipe: Recipe, candidate: Candidate, ledger: Ledger) -> Candidate:
    context = ledger.context
    if context.options.activations == "8" or ledger.max_bops is not None:
        return candidate
    other = build(context, candidate.asked, recipe, name=f"{candidate.name}, weights only", integer="none")
    before, after = ledger.measure(candidate), ledger.measure(other)
    return other if after.latency < before.latency and _keeps_as_much(budget, before, after, ledger) else candidate


def plan_of(context: Context, candidate: Candidate, recipe: Recipe, rows: Sequence[SensitivityRow]) -> Plan:
    """The candidate's decisions, and the settings that repeat them."""
    losses = {name: _losses(row) for row in rows for name in row.layers}
    layers = {name: LayerPlan(None, None, LEFT_FLOAT) for name in context.targets}
    for name, option in candidate.chosen.items():
        layers[name] = LayerPlan(option.spec, option.form, _reason(option) + losses.get(name, ""))
    options = context.options
    settings: dict[str, Any] = {
        "allocator": options.allocator,
        "quantizer": options.quantizer,
        "calibrator": recipe.calibrator,
        "scheme": recipe.scheme,
        "bias_correction": recipe.bias_correction,
        "inputs": "quantized" if recipe.sequential else "float",
        "augment": options.augment,
        "holdout": options.holdout,
        "calibration_size": options.calibration_size,
        "calibrated": context.held_out is not None,
        "target": options.target,
        "seed": options.seed,
        **dict(sorted(options.settings.items())),
    }
    return Plan(layers, candidate.emission.activations, settings)


def _losses(row: SensitivityRow) -> str:
    """What the widths around the one chosen would lose."""
    widths = sorted(row.losses)
    near = widths
    if row.bits is not None and row.bits in widths:
        place = widths.index(row.bits)
        near = widths[max(place - NEAR, 0) : place + NEAR + 1]
    kept = {row.bits: " (chosen)"} if row.bits is not None else {}
    figures = ", ".join(f"{row.losses[bits]:.2g} at {bits}{kept.get(bits, '')}" for bits in sorted(near))
    return f"; would lose {figures} bits, by {row.estimator}" if figures else ""


def _reason(option: Option) -> str:
    if option.form == "qdq":
        return "integer kernel, activation ranges from calibration"
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
