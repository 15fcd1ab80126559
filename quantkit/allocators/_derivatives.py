"""The float model's outputs as a function of its weights: first and second derivatives, one batch in memory at a time.

The operands of targets become inputs of the graph (`quantkit.graph.expose`), so that shared weights, weights behind
Transpose or Reshape, weights of subgraphs and of recurrent layers are all differentiated in the same way: as the
matrix that quantizers see.

J d, how the outputs answer to a change d of some weights, comes from differentiating twice in reverse: J^T u is
linear in u, so its derivative with respect to u, applied to d, is J d. The first of the two passes is shared by all
units and all their options; the second one walks only what lies behind the unit, so that a unit near the outputs
costs nearly nothing. With the divergence from the float model as loss the Hessian is J^T H J (see `_heads`), and d^T
(J^T H J) d takes no more than J d. A loss of the user's own gets the full Hessian, by differentiating its gradient
once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property

import numpy as np
import torch

from quantkit.allocators._heads import Head
from quantkit.allocators._inputs import Loss
from quantkit.errors import InputError
from quantkit.graph.expose import expose, input_name
from quantkit.runtime.ort import first_line
from quantkit.runtime.probe import Probe
from quantkit.runtime.torch_backend import to_torch
from quantkit.types import Array

Tensors = Mapping[str, torch.Tensor]


class Derivatives:
    """The float model on the probe's samples.

    Attributes:
        probe: model, targets and samples.
        names: of the targets whose weights may be changed.
        module: the model; the targets' operands are inputs.
        operands: target name -> the operand, which gradients are with respect to.
        counts: samples of every batch.
    """

    def __init__(
        self,
        probe: Probe,
        names: Sequence[str],
        loss: Loss | None = None,
        loss_name: str = "",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.probe, self.names, self.loss, self.loss_name = probe, tuple(names), loss, loss_name
        exposed = expose(probe.model, {name: probe.targets[name] for name in names})
        self.module = to_torch(exposed.model, dtype=dtype)
        self.dtype = dtype
        self.operands = {name: self.operand(name, probe.targets[name].load()).requires_grad_() for name in self.names}
        self.counts = [
            max((len(value) for value in batch.values() if value.ndim), default=1) for batch in probe.reference
        ]

    @property
    def samples(self) -> int:
        return sum(self.counts)

    @property
    def columns(self) -> int:
        """Most numbers that the outputs have for one sample."""
        kinds = self.probe.divergence.outputs
        return max(
            sum(batch[name].size // max(len(np.atleast_1d(batch[name])), 1) for name in kinds)
            for batch in self.probe.reference
        )

    def operand(self, name: str, matrix: Array) -> torch.Tensor:
        """W[N, K] as the node reads it."""
        return self._tensor(self.probe.targets[name].layout.to_operand(matrix))

    def operands_of(self, matrices: Mapping[str, Array]) -> dict[str, torch.Tensor]:
        return {name: self.operand(name, matrix) for name, matrix in matrices.items()}

    def run(self, batch: int, watched: Sequence[str] = ()) -> Pass:
        """The float model on one batch; `watched` names values of the main graph that are wanted as well."""
        return Pass(self, batch, watched)

    def feed(self, batch: int) -> dict[str, torch.Tensor]:
        """Inputs of the module."""
        own = {input_name(name): operand for name, operand in self.operands.items()}
        return {**{name: self._tensor(value) for name, value in self.probe.feeds[batch].items()}, **own}

    def _tensor(self, values: Array) -> torch.Tensor:
        tensor = torch.from_numpy(values.copy(order="C"))
        return tensor if self.dtype is None or not tensor.is_floating_point() else tensor.to(self.dtype)


class Pass:
    """One batch with everything that derivatives need; forget it before the next.

    Attributes:
        samples: in this batch.
        heads: output name -> second derivative there, of the outputs that the weights reach.
        watched: the values asked for.
    """

    def __init__(self, net: Derivatives, batch: int, watched: Sequence[str]) -> None:
        self._net, self.samples = net, net.counts[batch]
        kinds = net.probe.divergence.outputs
        values = net.module.run(net.feed(batch), list(dict.fromkeys([*kinds, *watched])))
        self.watched = {name: values[name] for name in watched}
        self._all = {name: values[name] for name in kinds}
        self._outputs = {name: value for name, value in self._all.items() if value.requires_grad}
        self.heads = {name: Head.of(kinds[name], value) for name, value in self._outputs.items()}

    def pull(self, cotangents: Tensors, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """J^T s, with respect to each of `inputs` (operands, or values that were watched)."""
        if not self._outputs:
            return [torch.zeros_like(item) for item in inputs]
        return _grad(list(self._outputs.values()), inputs, [cotangents[name] for name in self._outputs])

    def tangent(self, directions: Tensors) -> dict[str, torch.Tensor]:
        """J d, output by output, for changes d of these targets' operands."""
        slopes, duals = self._duals
        used = {name: slopes[name] for name in directions if slopes[name].requires_grad}
        if not used:
            return {name: torch.zeros_like(value) for name, value in self._outputs.items()}
        found = _grad(list(used.values()), duals, [directions[name] for name in used])
        return dict(zip(self._outputs, found, strict=True))

    def curvature(self, directions: Tensors) -> float:
        """d^T H d, added up over the samples of the batch."""
        if self._net.loss is None:
            tangents = self.tangent(directions)
            return sum(head.curvature(tangents[name]) for name, head in self.heads.items())
        products = self.product(directions)
        return sum(float((direction.double() * products[name]).sum()) for name, direction in directions.items())

    def product(self, directions: Tensors) -> dict[str, torch.Tensor]:
        """H d for the same targets, added up over the samples of the batch."""
        inputs = [self._net.operands[name] for name in directions]
        if self._net.loss is None:
            tangents = self.tangent(directions)
            found = self.pull({name: head.product(tangents[name]) for name, head in self.heads.items()}, inputs)
        else:
            used = {name: slope for name, slope in self._slopes.items() if name in directions and slope.requires_grad}
            found = [torch.zeros_like(item) for item in inputs]
            if used:
                found = _grad(list(used.values()), inputs, [directions[name] for name in used])
        return dict(zip(directions, found, strict=True))

    @property
    def columns(self) -> int:
        """Of A, all outputs together."""
        return sum(head.columns for head in self.heads.values())

    def column(self, index: int) -> dict[str, torch.Tensor]:
        """Column of A, for every sample."""
        found = {}
        for name, head in self.heads.items():
            inside = 0 <= index < head.columns
            found[name] = head.column(index) if inside else torch.zeros(head.shape, dtype=head.dtype)
            index -= head.columns
        return found

    def random_root(self, *seed: int) -> dict[str, torch.Tensor]:
        """A e with random signs e, independent for every seed."""
        rng = np.random.default_rng(seed)
        return {name: head.root(signs(rng, head.shape)) for name, head in self.heads.items()}

    def squares(self, directions: Tensors, cotangents: Tensors) -> float:
        """<s, J d>^2, added up over the samples of the batch."""
        tangents = self.tangent(directions)
        rows = torch.zeros(1, dtype=torch.float64)
        for name, head in self.heads.items():
            product = (tangents[name].double() * cotangents[name].double()).reshape(head.rows, -1).sum(1)
            rows = rows + product
        return float(rows.square().sum())

    def loss_gradient(self) -> dict[str, torch.Tensor]:
        """Slope of the user's loss of each sample with respect to its outputs."""
        loss = self._loss()
        found = _grad([loss], list(self._outputs.values()), [torch.ones_like(loss)])
        return dict(zip(self._outputs, found, strict=True))

    @cached_property
    def _duals(self) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """J^T u for all targets, as a function of u; and u."""
        duals = [torch.zeros_like(value, requires_grad=True) for value in self._outputs.values()]
        operands = list(self._net.operands.values())
        if not duals:
            return {name: torch.zeros_like(item) for name, item in self._net.operands.items()}, []
        found = _grad(list(self._outputs.values()), operands, duals, create_graph=True)
        return dict(zip(self._net.operands, found, strict=True)), duals

    @cached_property
    def _slopes(self) -> dict[str, torch.Tensor]:
        """Gradient of the user's loss, as a function of the weights."""
        loss = self._loss()
        found = _grad([loss], list(self._net.operands.values()), [torch.ones_like(loss)], create_graph=True)
        return dict(zip(self._net.operands, found, strict=True))

    def _loss(self) -> torch.Tensor:
        """The user's loss, added up over the samples of the batch."""
        assert self._net.loss is not None
        name = self._net.loss_name
        try:
            loss = self._net.loss(self._all, {name: value.detach() for name, value in self._all.items()})
        except Exception as error:  # a user's function may raise anything
            raise InputError(f"the loss {name!r} failed on the model's outputs: {first_line(error)}") from error
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise InputError(
                f"the loss {name!r} must return one number computed from the outputs, a torch.Tensor, "
                f"got {_described(loss)}"
            )
        if not torch.isfinite(loss):
            figure = float(loss.detach())
            raise InputError(f"the loss {name!r} gave {figure} on the float model's outputs; it must be finite")
        return loss.reshape(()) * self.samples


@contextmanager
def opened(probe: Probe, names: Sequence[str], loss: Loss | None, loss_name: str) -> Iterator[Derivatives]:
    """The float model on the probe's samples and with the probe's threads, so that figures repeat."""
    before = torch.get_num_threads()
    torch.set_num_threads(probe.threads)
    try:
        yield Derivatives(probe, names, loss, loss_name)
    finally:
        torch.set_num_threads(before)


def signs(rng: np.random.Generator, shape: Sequence[int]) -> torch.Tensor:
    """Random +1 and -1, float32."""
    return torch.from_numpy(2.0 * rng.integers(0, 2, tuple(shape)) - 1.0).float()


def normals(rng: np.random.Generator, like: torch.Tensor) -> torch.Tensor:
    """Standard normal numbers, shaped and typed like another tensor."""
    return torch.from_numpy(rng.standard_normal(tuple(like.shape))).to(like.dtype)


def _grad(
    outputs: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    cotangents: Sequence[torch.Tensor],
    create_graph: bool = False,
) -> list[torch.Tensor]:
    """Zeros where an output does not depend on an input; the graph stays usable."""
    return list(
        torch.autograd.grad(
            outputs,
            inputs,
            cotangents,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    )


def _described(value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"one of shape {list(value.shape)}" if value.numel() != 1 else "one that does not depend on them"
