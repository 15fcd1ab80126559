"""One run's allocation problem: what allocators may look at, and everything that was emitted and measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from quantkit.budget import Budget
from quantkit.candidate import Candidate, Context, Recipe, build, measure
from quantkit.costs.bops import bops, shapes_of
from quantkit.costs.size import layer_bytes
from quantkit.forms import Chooser, static_layers
from quantkit.graph.units import find_units
from quantkit.report.types import Contender
from quantkit.types import AllocationProblem, Measurement, QuantSpec

TRIAL = "trial "
DEFAULT_WIDTHS = (2, 3, 4, 5, 6, 7, 8)


@dataclass
class Ledger:
    """Candidates of one run, each built and measured once. The first name given to one stays, but for trials.

    Attributes:
        rows: what was measured, in order.
        known: what allocators found out that no budget changes.
    """

    context: Context
    rows: list[tuple[Candidate, Measurement]] = field(default_factory=list)
    known: dict[str, object] = field(default_factory=dict)
    _built: dict[object, Candidate] = field(default_factory=dict)

    def build(
        self, specs: Mapping[str, QuantSpec], recipe: Recipe, name: str, max_latency: float | None = None
    ) -> Candidate:
        """The candidate with these widths; the same ones again keep their first name."""
        key = (tuple(sorted(specs.items(), key=lambda item: item[0])), recipe, max_latency)
        if key not in self._built:
            self._built[key] = build(self.context, specs, recipe, name=name, max_latency=max_latency)
        elif self._built[key].name.startswith(TRIAL):
            self._built[key] = replace(self._built[key], name=name)
        return self._built[key]

    def measure(self, candidate: Candidate) -> Measurement:
        known = next((figures for other, figures in self.rows if other is candidate), None)
        if known is None:
            known = measure(self.context, candidate)
            self.rows.append((candidate, known))
        return known

    def contenders(self, kept: Candidate) -> tuple[Contender, ...]:
        """Rows for the report."""
        last = max((index for index, row in enumerate(self.rows) if row[0] is kept), default=-1)
        return tuple(
            Contender(other.name, other.size, figures.sqnr, figures.latency, index == last, figures.loss)
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
        return tuple(chooser.spec(targets[name], bits, _sizing_form(chooser, name, context)) for bits in widths)

    def evaluate(chosen: Mapping[str, QuantSpec], name: str = "trial") -> Measurement:
        return ledger.measure(ledger.build(chosen, recipe, f"{name} {bits_label(context, chosen)}", budget.max_latency))

    def file_size(chosen: Mapping[str, QuantSpec]) -> int:
        return ledger.build(chosen, recipe, f"{TRIAL}{bits_label(context, chosen)}", budget.max_latency).size

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
        quantize_many=context.quantize_many,
        file_size=file_size,
        units=find_units(targets),
        bops=lambda target, spec: bops(target, spec, shapes_of(target, context.stats)),
        network=context.network,
        seed=context.options.seed,
        progress=context.progress,
        known=ledger.known,
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


def bits_label(context: Context, specs: Mapping[str, QuantSpec]) -> str:
    """`4 bits` where all are alike, else the average over weights: `3.97 bits`."""
    widths = {spec.bits for spec in specs.values()}
    if len(widths) == 1 and all(spec.group_bits is None for spec in specs.values()):
        return f"{min(widths)} bits"
    shapes = {name: context.targets[name].shape for name in specs}
    bits = sum(spec.average_bits(shapes[name][1]) * math.prod(shapes[name]) for name, spec in specs.items())
    return f"{bits / sum(math.prod(shape) for shape in shapes.values()):.3g} bits"
