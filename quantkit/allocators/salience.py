"""Sensitivity from activations alone: the output error that rounding makes, relative to the output, on the Gram matrix.

    S = tr(D H D^T) / tr(W H W^T),  D = Q(W) - W,  H = X^T X / T

AWQ (arXiv 2306.00978) and SliM-LLM (arXiv 2405.14917) call weights salient whose inputs are large; D being known,
nothing is left to approximate. It is blind to what the rest of the network makes of the error. Without calibration data
H is the identity. Costs one product for each entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from quantkit.allocators._table import Allocation, Scores, Unit, allocate_by
from quantkit.quantizers import _salience
from quantkit.types import AllocationProblem, Allocator, QuantSpec


@dataclass(frozen=True)
class Salience:
    """Relative squared output errors, added up over the layers of a unit.

    A layer's share of all weights does not enter: weighted by it, the ranking was worse on ResNet-20 and SqueezeNet.
    """

    stats: ClassVar[frozenset[str]] = frozenset({"gram"})

    def scores(self, problem: AllocationProblem, units: Sequence[Unit]) -> Scores:
        raw = {}
        with problem.progress.task("output errors of layers", total=len(units)) as advance:
            for unit in units:
                raw[unit.name] = tuple(
                    sum(relative_error(problem, name, spec) for name, spec in option.items()) for option in unit.options
                )
                advance(1)
        return Scores(raw, "relative squared output error")

    def allocate(self, problem: AllocationProblem) -> Allocation:
        return allocate_by(problem, "salience", self)


def relative_error(problem: AllocationProblem, name: str, spec: QuantSpec) -> float:
    """tr(D H D^T) / tr(W H W^T) of one layer; tr(D H D^T) itself where the layer's output is zero."""
    target = problem.targets[name]
    weight = target.load()
    inputs = _salience.inputs_of(problem.stats.get(name), target.shape)
    error = problem.quantize(target, spec).dequantize() - weight
    return float(inputs.error(error)) / (float(inputs.error(weight)) or 1.0)


METHOD: type[Allocator] = Salience
