"""Sensitivity to second order, with the error that really is there: S = 1/2 d^T H d, d = Q(W) - W, in nats per sample.

HAWQ (arXiv 1911.03852) takes the error for isotropic noise and needs the trace of H alone; the error is known, so
nothing has to be assumed about it, and the product is exact. The loss is the divergence from the float model's own
outputs, whose Hessian at the float weights is the Gauss-Newton matrix J^T H J: one product J d with the network's
Jacobian for each place in the table is all that it takes (`_derivatives`). Where the outputs are few, even that is
too much: as many backward passes as there are outputs give the same figure for all layers at once (`_sites`). The
cheaper of the two is taken.

Without gradients, differences: (L(+e d) + L(-e d)) / (2 e^2), two runs in onnxruntime of what lies behind the unit. L
and its slope are 0 at the float weights, and the cubic term cancels. Figures agree to a percent; on convolutional
networks with many outputs this takes less time.

Good from 3 bits upwards: below, errors are too large for a second-order expansion, and `measured` costs no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from quantkit.allocators import _inputs
from quantkit.allocators._table import Allocation, Scores, Unit, allocate_by
from quantkit.errors import InputError
from quantkit.types import AllocationProblem, Allocator, FloatArray

if TYPE_CHECKING:
    from quantkit.allocators._derivatives import Derivatives


@dataclass(frozen=True)
class Quadratic:
    """Half the second derivative of the loss along the rounding error.

    Attributes:
        gradient: differentiate in torch; false, or without torch: differences in onnxruntime.
        step: of the differences, as a share of the weights' norm.
        loss: module:function in the place of the divergence; negative curvature counts as 0.
    """

    gradient: bool = True
    step: float = 0.004
    loss: str | None = None

    stats: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if not 0 < self.step <= 1:
            raise InputError(f"quadratic.step must be above 0 and at most 1, got {self.step}")
        _inputs.check_loss(self.loss, "quadratic")
        if self.loss is not None and not self.gradient:
            raise InputError("quadratic.loss needs gradients: leave quadratic.gradient out")

    def scores(self, problem: AllocationProblem, units: Sequence[Unit]) -> Scores:
        if not self.gradient:
            return self._differences(problem, units)
        if self.loss is None and not _inputs.has_torch():
            return self._differences(problem, units, ("torch is not installed: differences instead of derivatives",))
        with _inputs.derivatives(problem, units, "quadratic", self.loss) as net:
            raw = _inputs.second_order(problem, units, net, _curvatures(net, units))
        if self.loss is None:
            return Scores(raw, "nats per sample", nats=True)
        return Scores(raw, f"{self.loss} per sample")

    def allocate(self, problem: AllocationProblem) -> Allocation:
        return allocate_by(problem, "quadratic", self)

    def _differences(self, problem: AllocationProblem, units: Sequence[Unit], notes: tuple[str, ...] = ()) -> Scores:
        probe = _inputs.samples(problem, "quadratic")
        scales: list[list[float]] = [[] for _ in units]
        trials = {
            unit.members: partial(self._steps, problem, unit, own) for unit, own in zip(units, scales, strict=True)
        }
        found = probe.losses(trials, problem.progress)
        raw = {}
        for unit, figures, own in zip(units, found, scales, strict=True):
            both = np.reshape(figures, (-1, 2)).sum(axis=1)
            raw[unit.name] = tuple((both / (2 * np.square(own))).tolist())
        return Scores(raw, "nats per sample", nats=True, notes=notes)

    def _steps(self, problem: AllocationProblem, unit: Unit, scales: list[float]) -> Iterator[Mapping[str, FloatArray]]:
        """W + e d and W - e d for each option; the e are left in `scales`."""
        floats = {name: problem.targets[name].load() for name in unit.members}
        norm = _norm(floats)
        for entry in _inputs.entries(problem, [unit]):
            size = _norm(entry.errors)
            scale = self.step * norm / size if size > 0 else 1.0
            scales.append(scale)
            for sign in (scale, -scale):
                yield {name: floats[name] + np.float32(sign) * error for name, error in entry.errors.items()}


def _norm(matrices: Mapping[str, FloatArray]) -> float:
    return float(np.sqrt(sum(np.square(matrix, dtype=np.float64).sum() for matrix in matrices.values())))


def _curvatures(net: Derivatives, units: Sequence[Unit]) -> Callable[[Sequence[_inputs.Change], int], list[float]]:
    """d^T H d of changes on a batch, added up over its samples."""
    if net.loss is None and 2 * net.columns <= sum(len(unit.options) for unit in units):
        from quantkit.allocators import _sites

        sites = _sites.Sites.find(net)

        def by_columns(changes: Sequence[_inputs.Change], batch: int) -> list[float]:
            one = net.run(batch, sites.values)
            columns = [one.column(index) for index in range(one.columns)]
            return _sites.curvatures(net, sites, one, units, changes, columns)

        return by_columns

    def by_directions(changes: Sequence[_inputs.Change], batch: int) -> list[float]:
        one = net.run(batch)
        return [one.curvature(change.operands) for change in changes]

    return by_directions


METHOD: type[Allocator] = Quadratic
