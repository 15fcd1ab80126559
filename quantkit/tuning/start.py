"""Where a search starts: the plans of other allocators, found once and kept in the history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from quantkit.allocation import allocate
from quantkit.allocators._ilp import Limit, choose
from quantkit.allocators._table import Unit, choice_of, losses, scored, units_of
from quantkit.allocators.salience import Salience
from quantkit.allocators.uniform import Uniform
from quantkit.budget import Budget
from quantkit.candidate import Context, Recipe
from quantkit.forms import static_layers
from quantkit.graph.bias import correctable
from quantkit.methods import find
from quantkit.pipeline import Run
from quantkit.problem import Ledger, make_problem
from quantkit.provenance import versions
from quantkit.report.progress import Progress
from quantkit.rescaling import search_bits
from quantkit.tuning.history import History, content_key
from quantkit.tuning.recipes import (
    ACTIVATIONS,
    ALL,
    BIAS,
    CALIBRATOR,
    CHANNEL,
    DEFAULT,
    ENDS,
    FLOAT,
    GRANULARITY,
    GROUP,
    INPUTS,
    PLANNED,
    QUANTIZED,
    QUANTIZER,
    SAMPLES,
    SCHEME,
    SCHEMES,
    TRANSFORM,
    Possible,
    make_space,
    recipe_dimensions,
)
from quantkit.tuning.sizes import Sizes
from quantkit.tuning.space import Configuration, Dimension, Point, Space, Value
from quantkit.tuning.widths import Widths, make_widths
from quantkit.tuning.workshop import Workshop
from quantkit.types import QuantSpec

FRONT = 4
"""Plans of the solver's front that a search starts from, beside the best one."""
PLAIN = Recipe("minmax")
FILLINGS = 4
"""Files that are made to find the plan that fills the budget."""
LARGE = 0.6
"""Smaller ones than this share of the best one's bytes are left out."""


@dataclass(frozen=True)
class Start:
    """Everything that is settled before the first trial.

    Attributes:
        space: all configurations.
        first: the uniform plan, the allocator's, and the solver's for each group size, as points.
        table: [units][options] predicted losses.
        widths: what configurations say of bits.
        workshop: makes models.
        sizes: what they take.
    """

    space: Space
    first: tuple[Point, ...]
    table: tuple[tuple[float, ...], ...]
    widths: Widths
    workshop: Workshop
    sizes: Sizes

    def choice(self, configuration: Configuration) -> list[int]:
        """The option of each unit."""
        return self.widths.choice(configuration)


def make_start(run: Run, budget: Budget, history: History, progress: Progress) -> Start:
    """Collect statistics, and let the allocator choose, unless the history knows what it chose."""
    bits = search_bits(budget, run.options, run.original.loaded.size)
    context = run.context(run.original)
    problem = make_problem(Ledger(context), budget, PLAIN, 0)
    units = units_of(problem)
    key = content_key({"what": "start", **_asked(run, budget)})
    known = history.get(key)
    if known is None or not _fits(known, units):
        known = _found(run, context, budget, units, bits, progress)
        history.put(key, known)
    dimensions = recipe_dimensions(run.options, _possible(run, context, known["transforms"]))
    recipe = _plain(dimensions, known["recipe"])
    workshop, sizes = Workshop(run, context, bits, units, budget), Sizes(context, units, {"": int(known["rest"])})
    groups = next(item.values for item in dimensions if item.name == GROUP)
    with progress.task("filling the budget with each group size", total=len(groups)) as advance:
        fits = {}
        for group in groups:
            fits[group] = _filling(workshop, sizes, known["table"], {**recipe, GROUP: group}, (key, history))
            advance(1)
    order = ("uniform", "auto", *sorted(set(known["plans"]) - {"uniform", "auto"}))  # however it was stored
    plans = {name: tuple(known["plans"][name]) for name in order}
    filled = {f"fit {group}": choice for group, choice in fits.items() if choice}
    widths = make_widths(problem, units, {**plans, **filled})
    first = [{**recipe, **widths.plain(_name(widths, plans[name]))} for name in ("uniform", "auto")]
    first += [
        {**recipe, GROUP: group, **widths.plain(_name(widths, choice))} for group, choice in fits.items() if choice
    ]
    space = make_space(dimensions, widths)
    points = tuple(dict.fromkeys(space.point(configuration) for configuration in first))
    return Start(space, points, tuple(tuple(row) for row in known["table"]), widths, workshop, sizes)


def _filling(
    workshop: Workshop,
    sizes: Sizes,
    table: Sequence[Sequence[float]],
    recipe: Mapping[str, Value],
    kept: tuple[str, History],
) -> tuple[int, ...]:
    """The solver's plan for the bytes of the budget with this recipe's groups; empty without a budget of bytes.

    What a file holds beside its layers is an estimate, so real ones are made until one fits.

    Args:
        kept: key of the run and the history, which knows what was found before.
    """
    limit = workshop.budget.max_bytes(workshop.plain.loaded.size)
    if limit is None:
        return ()
    start, history = kept
    key = content_key({"what": "fit", "start": start, "group": recipe[GROUP]})
    known = history.get(key)
    if known is None:
        found: list[int] | None = None
        spare = 0
        for _ in range(FILLINGS):
            bound = limit - sizes.beside(recipe) - spare
            found = choose(table, [Limit(sizes.table(recipe), bound)])
            if found is None:
                break
            size = workshop.build(recipe, found, "fit")[1].size
            sizes.learn(recipe, found, size)
            if size <= limit:
                break
            spare = max(size - limit, spare) + limit // 1000
        known = {"choice": found, "rest": sizes.beside(recipe)}
        history.put(key, known)
    elif known["choice"] is not None:
        whole = sizes.estimate(recipe, known["choice"]) - sizes.beside(recipe) + int(known["rest"])
        sizes.learn(recipe, known["choice"], whole)
    return () if known["choice"] is None else tuple(known["choice"])


def _found(
    run: Run, context: Context, budget: Budget, units: Sequence[Unit], bits: int, progress: Progress
) -> dict[str, Any]:
    """What `compress` would choose, as plain JSON values."""
    outcome = allocate(context, budget, progress)
    candidate, settings = outcome.candidate, outcome.plan.settings
    problem = make_problem(Ledger(context), budget, PLAIN, 0)
    asked = {name: QuantSpec(spec.bits) for name, spec in candidate.asked.items()}
    best = _nearest(units, asked)
    layers = sum(problem.size(context.targets[name], spec) for name, spec in candidate.asked.items())
    sized = make_problem(Ledger(context), budget, PLAIN, max(candidate.size - layers, 0))
    plans: dict[str, Sequence[int]] = {"uniform": _nearest(units, dict(Uniform().allocate(sized))), "auto": best}
    points = [point for point in outcome.allocation.front if point.size >= LARGE * candidate.size]
    spread = np.unique(np.linspace(0, len(points) - 1, FRONT).round().astype(int)) if points else ()
    for number, index in enumerate(spread, 1):
        plans[f"front {number}"] = _nearest(units, dict(points[int(index)].specs))
    names, scores = list(outcome.allocation.scores), outcome.allocation.scores
    raw = scores[names[0]].raw if names else scored(problem, units, "salience", Salience()).raw
    return {
        "plans": {name: list(map(int, choice)) for name, choice in plans.items()},
        "table": losses(units, raw),
        "rest": max(candidate.size - layers, 0),
        "recipe": {key: settings[key] for key in ("calibrator", "bias_correction", "inputs", "scheme")},
        "transforms": _transforms(run, bits),
    }


def _transforms(run: Run, bits: int) -> list[str]:
    """`none`, and the transforms that really scale something."""
    if run.options.transform not in (None, "auto"):
        return [str(run.options.transform)]
    names = [name for name in find("transforms") if name != "smoothquant" or run.options.activations != "none"]
    return ["none", *(name for name in names if run.rescaled((name,), bits).changed)]


def _possible(run: Run, context: Context, transforms: Sequence[str]) -> Possible:
    options = run.options
    static = bool(context.histograms) and bool(
        static_layers(context.loaded.model, context.targets, options.target, options.activations)
    )
    biases = any(
        correctable(target) and context.stats.get(name) is not None for name, target in context.targets.items()
    )
    samples = 0 if run.data.calibration is None else run.data.calibration.samples
    return Possible(tuple(transforms), static, biases, samples)


def _plain(dimensions: Sequence[Dimension], recipe: Mapping[str, Any]) -> dict[str, Value]:
    """The recipe that `compress` settled on, with every setting that the space knows."""
    wanted: dict[str, Value] = {
        TRANSFORM: "none",
        QUANTIZER: "auto",
        INPUTS: QUANTIZED if recipe["inputs"] == QUANTIZED else FLOAT,
        BIAS: bool(recipe["bias_correction"]) and recipe["inputs"] != QUANTIZED,
        ACTIVATIONS: "auto",
        CALIBRATOR: recipe["calibrator"],
        SCHEME: recipe.get("scheme", SCHEMES[0]),
        GROUP: DEFAULT,
        SAMPLES: ALL,
        GRANULARITY: CHANNEL,
        ENDS: PLANNED,
    }
    values = {dimension.name: dimension.values for dimension in dimensions}
    return {name: value if value in values[name] else values[name][0] for name, value in wanted.items()}


def _name(widths: Widths, choice: tuple[int, ...]) -> str:
    """The plan's name, or that of an equal one."""
    return next(name for name, known in widths.plans.items() if tuple(known) == choice)


def _nearest(units: Sequence[Unit], specs: Mapping[str, QuantSpec]) -> list[int]:
    """The option of each unit that has the first member's width, or the next wider one."""
    exact = choice_of(units, specs)
    if exact is not None:
        return exact
    picked = []
    for unit in units:
        wanted = specs[unit.members[0]].bits if unit.members[0] in specs else 8
        wide = [option for option in range(len(unit.options)) if unit.bits(option) >= wanted]
        picked.append(wide[0] if wide else len(unit.options) - 1)
    return picked


def _fits(known: Mapping[str, Any], units: Sequence[Unit]) -> bool:
    """Whether a row of the history is one for these units."""
    try:
        sizes = [len(unit.options) for unit in units]
        good = [len(row) for row in known["table"]] == sizes and {"uniform", "auto"} <= set(known["plans"])
        return (
            good
            and all(
                len(choice) == len(sizes) and all(0 <= pick < size for pick, size in zip(choice, sizes, strict=True))
                for choice in known["plans"].values()
            )
            and bool(known["recipe"])
            and "rest" in known
            and "transforms" in known
        )
    except (KeyError, TypeError, AttributeError):
        return False


def _asked(run: Run, budget: Budget) -> dict[str, Any]:
    """What the allocator's choice depends on."""
    return {
        "model": run.original.loaded.digest,
        "data": run.data.digest,
        "budget": {name: None if value is None else str(value) for name, value in asdict(budget).items()},
        "options": relevant(run),
    }


def relevant(run: Run) -> dict[str, Any]:
    """Options and versions that change what a configuration makes or what it measures."""
    options = asdict(run.options)
    for name in ("cache", "memory_limit", "workers"):
        del options[name]
    options["settings"] = {key: str(value) for key, value in sorted(run.options.settings.items())}
    return {**options, "ignore": list(options["ignore"]), "versions": versions()}
