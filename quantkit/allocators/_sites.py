"""Output gradients times output errors, sample by sample: curvature along errors, for all layers at once.

A node y = op(x, W) that is linear in its weight answers to an error D with dy = op(x, D), and the outputs with J_y
dy. For a column a of A (H = A A^T, see `_heads`) the product a^T J_y dy is <g, dy> with g = J_y^T a, the gradient
that one backward pass leaves at y, for every layer at once. So

    d^T (J^T H J) d = sum over samples and columns of <g, dy>^2
                    = E over signs e of the sum over samples of <J_y^T A e, dy>^2

and each place in the table costs one run of its own layer, not one of everything behind it. Samples must be told
apart at y, as gradients of different samples must not mix: which axis of y counts them is found by sending a gradient
back from one sample alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch

from quantkit.allocators._derivatives import Derivatives, Pass, Tensors
from quantkit.allocators._inputs import LIVE_BYTES, Change
from quantkit.allocators._table import Unit
from quantkit.runtime.torch_backend import TorchModule, to_torch
from quantkit.types import Target, Use

LINEAR = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Gather")
BLOCK = 16
"""Gradients of at most so many cotangents are held at a time, for all layers of a batch."""


@dataclass(frozen=True)
class Site:
    """A node that reads a weight and is linear in it.

    Attributes:
        target: name.
        data, output: names of the values it reads and makes.
        apply: (data, weight) -> the output without bias.
        axis: of the output, along which samples follow each other.
    """

    target: str
    data: str
    output: str
    apply: TorchModule
    axis: int

    def change(self, data: torch.Tensor, error: torch.Tensor, samples: int) -> torch.Tensor:
        """dy, [samples, size]."""
        with torch.no_grad():
            return self.by_sample(self.apply(data=data, weight=error), samples)

    def by_sample(self, values: torch.Tensor, samples: int) -> torch.Tensor:
        """Values shaped like the output as [samples, size]."""
        return values.movedim(self.axis, 0).reshape(samples, -1)


@dataclass(frozen=True)
class Sites:
    """Where the errors of all targets that allow it enter the network.

    Attributes:
        of: target name -> its nodes; targets that are missing are recurrent, stand in subgraphs, or mix samples.
    """

    of: Mapping[str, tuple[Site, ...]]

    @classmethod
    def find(cls, net: Derivatives) -> Sites:
        found = {}
        for name in net.names:
            target = net.probe.targets[name]
            uses = target.uses if target.op in LINEAR else ()
            if uses and all(use.node.graph is net.probe.model.graph and use.data.const_value is None for use in uses):
                found[name] = tuple(_site(net, target, use) for use in uses)
        return cls(_separable(net, found))

    def cover(self, unit: Unit) -> bool:
        return all(name in self.of for name in unit.members)

    @property
    def values(self) -> list[str]:
        """What has to be watched."""
        return [name for sites in self.of.values() for site in sites for name in (site.data, site.output)]

    def squares(self, one: Pass, changes: Sequence[Change], cotangents: Sequence[Tensors]) -> list[float]:
        """For each change, the sum of <g, dy>^2 over the samples of the batch and over `cotangents`.

        Args:
            one: has watched `values`.
            changes: of units that are covered.
            cotangents: what is sent back, for each output.
        """
        if not changes:
            return []
        totals = [0.0] * len(changes)
        block = self._block(one)
        for first in range(0, len(cotangents), block):
            gradients = self._gradients(one, cotangents[first : first + block])
            for index, change in enumerate(changes):
                rows = torch.zeros(one.samples, 1, dtype=torch.float64)
                for name, error in change.operands.items():
                    for site in self.of[name]:
                        dy = site.change(one.watched[site.data], error, one.samples)
                        rows = rows + torch.bmm(gradients[site.output], dy[:, :, None])[:, :, 0]
                totals[index] += float(rows.square().sum())
        return totals

    def _block(self, one: Pass) -> int:
        """Cotangents whose gradients memory holds."""
        size: int = sum(value.nbytes for name, value in one.watched.items() if name in self._outputs)
        return max(1, min(BLOCK, LIVE_BYTES // max(size, 1)))

    @property
    def _outputs(self) -> set[str]:
        return {site.output for sites in self.of.values() for site in sites}

    def _gradients(self, one: Pass, cotangents: Sequence[Tensors]) -> dict[str, torch.Tensor]:
        """Output name -> [samples, cotangents, size]."""
        sites = list({site.output: site for each in self.of.values() for site in each}.values())
        held: dict[str, torch.Tensor] = {}
        for place, cotangent in enumerate(cotangents):
            made = one.pull(cotangent, [one.watched[site.output] for site in sites])
            for site, gradient in zip(sites, made, strict=True):
                rows = site.by_sample(gradient, one.samples)
                if place == 0:
                    held[site.output] = rows.new_empty(len(rows), len(cotangents), rows.shape[1])
                held[site.output][:, place] = rows
        return held


def curvatures(
    net: Derivatives,
    sites: Sites,
    one: Pass,
    units: Sequence[Unit],
    changes: Sequence[Change],
    cotangents: Sequence[Tensors],
    weight: float = 1.0,
) -> list[float]:
    """For each change d^T H d, added up over the samples of the batch; exact where the unit is not covered.

    Args:
        cotangents: columns of A, or of A e; of the user's loss its one gradient, whose square stands for H.
        weight: of the squares; 1 / number for random columns.
    """
    layered = [change for change in changes if sites.cover(units[change.unit])]
    squares = iter(sites.squares(one, layered, cotangents))
    found = []
    for change in changes:
        if sites.cover(units[change.unit]):
            found.append(weight * next(squares))
        elif net.loss is None:
            found.append(one.curvature(change.operands))
        else:
            found.append(one.squares(change.operands, cotangents[0]))
    return found


def _along(values: torch.Tensor, axis: int) -> torch.Tensor:
    """[size of the axis] sums over all others, float64."""
    return values.movedim(axis, 0).reshape(values.shape[axis], -1).sum(1, dtype=torch.float64)


def _site(net: Derivatives, target: Target, use: Use) -> Site:
    """The node alone, its bias left out."""
    node = use.node
    data, weight = ir.Value(name="data"), ir.Value(name="weight")
    weight.dtype, weight.shape = ir.DataType.FLOAT, ir.Shape(target.layout.operand_shape)
    data.shape = use.data.shape
    if use.data.dtype is not None:
        data.dtype = use.data.dtype
    inputs: list[ir.Value | None] = [None, None]
    inputs[use.data_index], inputs[use.weight_index] = data, weight
    alone = ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()), version=node.version)
    alone.outputs[0].name, alone.outputs[0].dtype = "change", ir.DataType.FLOAT
    model = net.probe.model
    graph = ir.Graph([data, weight], [alone.outputs[0]], nodes=[alone], opset_imports=dict(model.opset_imports))
    module = to_torch(ir.Model(graph, ir_version=model.ir_version), dtype=net.dtype)
    return Site(target.name, str(use.data.name), str(node.outputs[0].name), module, 0)


def _separable(net: Derivatives, found: Mapping[str, tuple[Site, ...]]) -> dict[str, tuple[Site, ...]]:
    """Those of whose outputs an axis counts samples, with this axis."""
    if not found or max(net.counts) == 1:
        return dict(found)
    batch = net.counts.index(max(net.counts))
    one = net.run(batch, [site.output for sites in found.values() for site in sites])
    chosen = one.samples // 2
    cotangents = {}
    for name, head in one.heads.items():
        signs = torch.ones(head.shape)
        signs[..., ::2] = -1  # or A e would vanish for even odds
        whole = head.root(signs)
        if head.rows == one.samples:
            rest = torch.arange(one.samples) != chosen
            whole[rest] = 0
        cotangents[name] = whole
    names = list(one.watched)
    gradients = dict(zip(names, one.pull(cotangents, [one.watched[name] for name in names]), strict=True))
    kept = {}
    for name, sites in found.items():
        axes = [_axis(gradients[site.output], one.samples, chosen) for site in sites]
        if None not in axes:
            kept[name] = tuple(
                Site(site.target, site.data, site.output, site.apply, axis)
                for site, axis in zip(sites, axes, strict=True)
                if axis is not None
            )
    return kept


def _axis(gradient: torch.Tensor, samples: int, chosen: int) -> int | None:
    """The first axis along which nothing but the chosen sample's own share is not zero."""
    if not gradient.any():
        return None
    for axis, size in enumerate(gradient.shape):
        if size % samples == 0:
            sums = _along(gradient.abs(), axis).reshape(samples, -1).sum(1)
            if float(sums.sum()) == float(sums[chosen]):
                return axis
    return None
