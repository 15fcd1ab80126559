"""Sensitivity from output gradients times output errors: the curvature of the loss, sampled by a few backward passes.

    S = 1/2 E over e of the mean over samples of <g, dy>^2,   g = J_y^T A e,   dy = op(x, Q(W) - W)

y is the layer's own output, A A^T the Hessian of the divergence at the float model's outputs, e random signs. For
class scores A e has the mean and covariance of the score of labels drawn from the model's own softmax, with lighter
tails: the expectation is the Fisher information, which here is the Gauss-Newton matrix, so that S estimates 1/2 d^T H
d, the very figure of `quadratic`, in nats and without bias. Summing <g, dy> over a whole sample before squaring is
what makes it so; squaring element by element would take errors of neighbouring outputs to be independent, which they
are not. The idea of scoring a layer by gradient times error goes back to Optimal Brain Damage and to WoodFisher
(arXiv 2004.14340).

One forward and `probes` backward passes serve all layers; each place in the table costs one run of its own layer.
Where the outputs are no more than `probes`, all columns of A are taken, and nothing is left to chance. Layers without
a linear operator of their own (recurrent ones, those in subgraphs) are computed exactly, as `quadratic` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from quantkit.allocators import _inputs
from quantkit.allocators._table import Allocation, Scores, Unit, allocate_by
from quantkit.errors import InputError
from quantkit.types import AllocationProblem, Allocator

if TYPE_CHECKING:
    import torch

    from quantkit.allocators._derivatives import Pass


@dataclass(frozen=True)
class Fisher:
    """Squared products of output gradients and output errors.

    Attributes:
        probes: backward passes for each batch.
        loss: module:function whose own gradients are used instead (the empirical Fisher); they must not vanish at the
            float model, so this is for likelihoods of labels and the like, not for distances from the float outputs.
    """

    probes: int = 16
    loss: str | None = None

    stats: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if self.probes < 1:
            raise InputError(f"fisher.probes must be at least 1, got {self.probes}")
        _inputs.check_loss(self.loss, "fisher")

    def scores(self, problem: AllocationProblem, units: Sequence[Unit]) -> Scores:
        with _inputs.derivatives(problem, units, "fisher", self.loss) as net:
            from quantkit.allocators._sites import Sites, curvatures

            sites = Sites.find(net)

            def batch_curvatures(changes: Sequence[_inputs.Change], batch: int) -> list[float]:
                one = net.run(batch, sites.values)
                cotangents, weight = self._cotangents(one, batch, problem.seed)
                return curvatures(net, sites, one, units, changes, cotangents, weight)

            raw = _inputs.second_order(problem, units, net, batch_curvatures)
        if self.loss is None:
            return Scores(raw, "nats per sample", nats=True)
        if not any(any(row) for row in raw.values()):
            raise InputError(
                f"the gradient of the loss {self.loss!r} is zero at the float model, so it tells nothing: "
                "let fisher.loss be a likelihood of labels, or leave it out"
            )
        return Scores(raw, f"half the squared slope of {self.loss} per sample")

    def allocate(self, problem: AllocationProblem) -> Allocation:
        return allocate_by(problem, "fisher", self)

    def _cotangents(self, one: Pass, batch: int, seed: int) -> tuple[list[dict[str, torch.Tensor]], float]:
        """What is sent back through the network, and what the squares are multiplied by."""
        if self.loss is not None:
            return [one.loss_gradient()], 1.0
        if one.columns <= self.probes:
            return [one.column(index) for index in range(one.columns)], 1.0
        return [one.random_root(seed, batch, probe) for probe in range(self.probes)], 1 / self.probes


METHOD: type[Allocator] = Fisher
