"""One run's allocation problem: what allocators may look at, and everything that was emitted and measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from typing import TypeVar

from quantkit.allocators._table import impossible
from quantkit.budget import Budget
from quantkit.candidate import Candidate, Context, Recipe, build
from quantkit.costs.size import layer_bytes
from quantkit.forms import Chooser, static_layers
from quantkit.graph.units import find_units
from quantkit.measuring import measure
from quantkit.report.types import Contender
from quantkit.types import AllocationProblem, Measurement, QuantSpec, Target

TRIAL = "trial "
DEFAULT_WIDTHS = (2, 3, 4, 5, 6, 7, 8)
Figure = TypeVar("Figure", int, float)


@dataclass
class Ledger:
    """Candidates of one run, each built and measured once. The first name given to one stays, but for trials.

    Attributes:
        max_bops: budget that every candidate's forms keep.
        rows: what was measured, in order.
        known: what allocators found out that no budget changes.
    """

    context: Context
    max_bops: int | Fraction | None = None
    rows: list[tuple[Candidate, Measurement]] = field(default_factory=list)
    known: dict[str, object] = field(default_factory=dict)
    _built: dict[object, Candidate] = field(default_factory=dict)

    def build(
        self, specs: Mapping[str, QuantSpec], recipe: Recipe, name: str, max_latency: float | None = None
    ) -> Candidate:
        """The candidate with these widths; the same ones again keep their first name."""
        key = (tuple(sorted(specs.items(), key=lambda item: item[0])), recipe, max_latency)
        if key not in self._built:
            self._built[key] = build(
                self.context, specs, recipe, name=name, max_latency=max_latency, max_bops=self.max_bops
            )
        elif self._built[key].name.startswith(TRIAL) and not name.startswith(TRIAL):
            known, named = self._built[key], replace(self._built[key], name=name)
            self._built[key] = named
            self.rows = [(named if made is known else made, figures) for made, figures in self.rows]
        return self._built[key]

    def measure(self, candidate: Candidate) -> Measurement:
        known = next((figures for other, figures in self.rows if other is candidate), None)
        if known is None:
            known = measure(self.context, candidate)
            self.rows.append((candidate, known))
        return known

    def contenders(
        self, kept: Candidate, expected: Callable[[Mapping[str, QuantSpec]], float | None] = lambda specs: None
    ) -> tuple[Contender, ...]:
        """Rows for the report.

        Args:
            expected: target name -> spec -> nats that an estimator predicts; None = it does not tell.
        """
        last = max((index for index, row in enumerate(self.rows) if row[0] is kept), default=-1)
        return tuple(
            Contender(
                other.name,
                other.size,
                figures.sqnr,
                figures.latency,
                index == last,
                figures.loss,
                expected(other.asked),
            )
            for index, (other, figures) in enumerate(self.rows)
        )


def make_problem(ledger: Ledger, budget: Budget, recipe: Recipe, fixed_size: int) -> AllocationProblem:
    """What an allocator decides on.

    Args:
        fixed_size: bytes of the file beside the layers.
    """
    context = ledger.context
    targets = context.targets
    chooser = sizing_chooser(context)

    def specs(name: str) -> tuple[QuantSpec, ...]:
        widths = sorted(context.options.bits or DEFAULT_WIDTHS, reverse=True)
        return tuple(chooser.spec(targets[name], bits, sizing_form(chooser, name, context)) for bits in widths)

    def evaluate(chosen: Mapping[str, QuantSpec], name: str = "trial") -> Measurement:
        return ledger.measure(ledger.build(chosen, recipe, f"{name} {bits_label(context, chosen)}", budget.max_latency))

    def file_size(chosen: Mapping[str, QuantSpec]) -> int:
        return ledger.build(chosen, recipe, f"{TRIAL}{bits_label(context, chosen)}", budget.max_latency).size

    timed = budget.max_latency is not None
    model_ms = context.model_ms if timed else None
    problem = AllocationProblem(
        targets=targets,
        stats=context.stats,
        candidates={name: specs(name) for name in targets},
        budget=budget,
        size=layer_bytes,
        float_size=context.loaded.size,
        fixed_size=fixed_size,
        quantize=context.quantize,
        evaluate=evaluate,
        quantize_many=context.quantize_many,
        file_size=file_size,
        units=find_units(targets),
        bops=_remembered(chooser.operations),
        milliseconds=_remembered(chooser.milliseconds) if timed else None,
        model_ms=model_ms,
        correction=1.0 if model_ms is None else context.times.correction(model_ms, chooser.static),
        network=context.network,
        seed=context.options.seed,
        progress=context.progress,
        known=ledger.known,
        front=context.options.front,
    )
    if timed and budget.max_bops is not None:  # one form has to serve both
        both = replace(problem, bops=_remembered(partial(chooser.operations, fastest=True)))
        return problem if impossible(both) else both
    return problem


def _remembered(figure: Callable[[Target, QuantSpec | None], Figure]) -> Callable[[Target, QuantSpec | None], Figure]:
    """The same figures, each found once: a solver's limits are made of them again and again."""
    known: dict[tuple[str, QuantSpec | None], Figure] = {}

    def look_up(target: Target, spec: QuantSpec | None) -> Figure:
        key = (target.name, spec)
        if key not in known:
            known[key] = figure(target, spec)
        return known[key]

    return look_up


def sizing_chooser(context: Context) -> Chooser:
    static = static_layers(context.loaded.model, context.targets, context.options.target, context.options.activations)
    return context.chooser(context.options.activations, static if context.histograms else (), {})


def sizing_form(chooser: Chooser, name: str, context: Context) -> str:
    """The form whose storage a size estimate assumes: static rows, or groups."""
    if name in chooser.static:
        return "qdq"
    return "gather" if context.targets[name].op == "Gather" else "packed"


def bits_label(context: Context, specs: Mapping[str, QuantSpec]) -> str:
    """`4 bits` where all are alike, else the average over weights: `3.97 bits`."""
    widths = {spec.bits for spec in specs.values()}
    if len(widths) == 1 and all(spec.group_bits is None for spec in specs.values()):
        return f"{min(widths)} bits"
    shapes = {name: context.targets[name].shape for name in specs}
    bits = sum(spec.average_bits(shapes[name][1]) * math.prod(shapes[name]) for name, spec in specs.items())
    return f"{bits / sum(math.prod(shape) for shape in shapes.values()):.3g} bits"
