"""HAWQ: average curvature of a layer times its squared rounding error.

    V2, V3 (arXiv 1911.03852, 2011.10680)    S = tr(H) / n * |Q(W) - W|^2
    V1 (arXiv 1905.03696)                    S = largest eigenvalue of H * |Q(W) - W|^2

H is the layer's own block of the Hessian of the loss per sample, n its number of weights. V2 is twice the loss to be
expected if rounding errors were isotropic noise, which with a scale for each row or group they are not: `quadratic`
needs no such assumption. V1 ranks layers by eigenvalue over n; the knapsack, which divides by size, does the same
with S.

The loss is the divergence from the float model's outputs, whose Hessian is J^T A A^T J (see `_heads`), so that tr(H)
= E |J^T A e|^2 over random signs e at the outputs: one backward pass is a draw for every layer, and no layer's draw
holds noise of another's, as it would with one vector of signs for all weights. Its variance is what v^T H v has with
signs v at the weights, but for the diagonals: 2 |A^T J J^T A|_F^2 = 2 |H|_F^2. A loss of the user's own is no such
product: v^T H v, a vector and a Hessian product for each layer; traces below 0 count as 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from quantkit.allocators import _inputs
from quantkit.allocators._hutchinson import FIRST, Draw, Estimate, estimate
from quantkit.allocators._table import Allocation, Scores, Unit, allocate_by
from quantkit.errors import InputError
from quantkit.report.progress import Progress
from quantkit.types import AllocationProblem, Allocator, Array

if TYPE_CHECKING:
    import torch

    from quantkit.allocators._derivatives import Derivatives, Pass

CONVERGED = 0.01
"""|H v - a v| at which power iteration ends, as a share of a: an eigenvalue lies within that of a."""


@dataclass(frozen=True)
class Hawq:
    """Curvature times squared error.

    Attributes:
        tolerance: share of a trace that its 95 % interval may reach to either side before drawing ends.
        probes: most random vectors for each layer and batch.
        order: `v2` by traces, `v1` by largest eigenvalues.
        iterations: most steps of power iteration (v1).
        loss: module:function in the place of the divergence.
    """

    tolerance: float = 0.1
    probes: int = 64
    order: Literal["v2", "v1"] = "v2"
    iterations: int = 100
    loss: str | None = None

    stats: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if not self.tolerance > 0:
            raise InputError(f"hawq.tolerance must be above 0, got {self.tolerance}")
        if self.probes < FIRST:
            raise InputError(f"hawq.probes must be at least {FIRST}, got {self.probes}")
        if self.order not in ("v2", "v1"):
            raise InputError(f"hawq.order must be v2 or v1, got {self.order!r}")
        if self.iterations < 1:
            raise InputError(f"hawq.iterations must be at least 1, got {self.iterations}")
        _inputs.check_loss(self.loss, "hawq")

    def scores(self, problem: AllocationProblem, units: Sequence[Unit]) -> Scores:
        notes: tuple[str, ...] = ()
        with _inputs.derivatives(problem, units, "hawq", self.loss) as net:
            if self.order == "v1":
                quantity = "largest eigenvalue x squared error"
                curvature, unsettled = eigenvalues(net, self.iterations, problem.seed, problem.progress)
                if unsettled:
                    notes = (
                        f"{unsettled} of {len(curvature)} largest eigenvalues had not settled to {100 * CONVERGED:g} % "
                        f"after {self.iterations} iterations",
                    )
            else:
                quantity = "mean Hessian trace x squared error"
                found = traces(net, self.tolerance, self.probes, problem.seed, problem.progress)
                curvature = {name: found[name].mean / math.prod(problem.targets[name].shape) for name in found}
                notes = self._notes(found)
        rows: list[list[float]] = [[] for _ in units]
        for entry in _inputs.entries(problem, units):
            squares = {name: float(np.square(error, dtype=np.float64).sum()) for name, error in entry.errors.items()}
            rows[entry.unit].append(sum(max(curvature[name], 0.0) * square for name, square in squares.items()))
        return Scores({unit.name: tuple(row) for unit, row in zip(units, rows, strict=True)}, quantity, notes=notes)

    def allocate(self, problem: AllocationProblem) -> Allocation:
        return allocate_by(problem, "hawq", self)

    def _notes(self, found: Mapping[str, Estimate]) -> tuple[str, ...]:
        """What did not get as narrow as was asked for."""
        wide = [one for one in found.values() if not one.within(self.tolerance)]
        if not wide:
            return ()
        worst = max(one.half_width / abs(one.mean) if one.mean else math.inf for one in wide)
        return (
            f"{len(wide)} of {len(found)} Hessian traces are not known to {100 * self.tolerance:g} % after "
            f"{self.probes} probes, but to {100 * worst:.3g} % or better",
        )


def traces(net: Derivatives, tolerance: float, most: int, seed: int, progress: Progress) -> dict[str, Estimate]:
    """Target name -> trace of its block of the Hessian of the loss per sample."""

    def draw(names: Sequence[str], which: range) -> Mapping[str, Array]:
        made = {name: np.zeros((len(net.counts), len(which))) for name in names}
        for batch in range(len(net.counts)):
            one = net.run(batch)
            for place, probe in enumerate(which):
                figures = (_from_outputs if net.loss is None else _from_weights)(net, one, names, (seed, batch, probe))
                for name, figure in zip(names, figures, strict=True):
                    made[name][batch, place] = figure / net.samples
        return made

    typed: Draw = draw
    with progress.task("Hessian traces", total=len(net.names)) as advance:
        return estimate(typed, net.names, tolerance, most, advance)


def _from_outputs(net: Derivatives, one: Pass, names: Sequence[str], seed: tuple[int, ...]) -> list[float]:
    """|J^T A e|^2 for each target, from one backward pass."""
    gradients = one.pull(one.random_root(*seed), [net.operands[name] for name in names])
    return [float(gradient.double().square().sum()) for gradient in gradients]


def _from_weights(net: Derivatives, one: Pass, names: Sequence[str], seed: tuple[int, ...]) -> list[float]:
    """v^T H v for each target, with signs of its own."""
    from quantkit.allocators._derivatives import signs

    figures = []
    for name in names:
        rng = np.random.default_rng((*seed, net.names.index(name)))
        figures.append(one.curvature({name: signs(rng, net.operands[name].shape).to(net.operands[name].dtype)}))
    return figures


def eigenvalues(net: Derivatives, iterations: int, seed: int, progress: Progress) -> tuple[dict[str, float], int]:
    """Target name -> largest eigenvalue of its block of the Hessian of the loss per sample, by power iteration.

    Returns:
        The eigenvalues, and how many of them had not settled.
    """
    from quantkit.allocators._derivatives import normals

    vectors = {
        name: _unit(normals(np.random.default_rng((seed, index)), net.operands[name]))
        for index, name in enumerate(net.names)
    }
    found = dict.fromkeys(net.names, 0.0)
    with progress.task("Hessian eigenvalues", total=len(net.names)) as advance:
        for _ in range(iterations):
            products = {name: vector * 0 for name, vector in vectors.items()}
            for batch in range(len(net.counts)):
                one = net.run(batch)
                for name, vector in vectors.items():
                    products[name] += one.product({name: vector})[name] / net.samples
            for name, product in products.items():
                found[name] = float((vectors[name].double() * product.double()).sum())
                rest = float((product - found[name] * vectors[name]).norm())
                if rest <= CONVERGED * abs(found[name]):
                    del vectors[name]
                    advance(1)
                else:
                    vectors[name] = _unit(product)
            if not vectors:
                break
        advance(len(vectors))
    return found, len(vectors)


def _unit(vector: torch.Tensor) -> torch.Tensor:
    scaled: torch.Tensor = vector / vector.norm()
    return scaled


METHOD: type[Allocator] = Hawq
