"""Widths for every group of every layer from one budget: SliM-LLM's groups (arXiv 2405.14917), across layers as well.

A layer's loss is its relative output error, tr(D H D^T) / tr(W H W^T), D being the rounding error and H the Gram
matrix of its inputs. Errors of different groups are taken to add up, so the loss is a sum of one number for each layer,
group and width, and the choice is a multiple-choice knapsack: solved exactly while small, else with one price for all.
Fractional budgets are met to within one group.

The numbers are those of plain rounding (searched ranges up to 4 bits, covering ones above), scaled layer by layer to
what the run's own quantizer makes of the uniform width. A quantizer that makes up for errors spreads them over groups:
so the best choice with one width for each layer is proposed as well, and one width for everything; all are quantized,
and the least real loss wins. It is never worse than uniform's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from quantkit.allocators._drop import SPARE_ERRORS, keeps
from quantkit.allocators._ilp import Limit, choose
from quantkit.allocators._lagrangian import choose_many, fill
from quantkit.allocators._table import predicted_ms
from quantkit.errors import InputError
from quantkit.quantizers import _grid, _salience
from quantkit.quantizers.mse import MSE
from quantkit.quantizers.rtn import RTN
from quantkit.types import AllocationProblem, Allocator, Array, FloatArray, LayerStats, QuantSpec, WeightQuantizer

DEFAULT_BITS = 8
SEARCHED_BITS = 4  # ranges are worth searching up to here
STEP = 0.25  # average bits, when an accuracy is asked for
REPAIRS = 8


@dataclass(frozen=True)
class Slim:
    """One knapsack over all groups.

    Attributes:
        exact_groups: problems of up to so many groups are solved exactly.
    """

    exact_groups: int = 300
    errors: dict[tuple[str, QuantSpec], Array] = field(default_factory=dict, init=False, repr=False, compare=False)
    shipped: dict[tuple[str, QuantSpec], float] = field(default_factory=dict, init=False, repr=False, compare=False)

    stats: ClassVar[frozenset[str]] = frozenset({"gram"})

    def __post_init__(self) -> None:
        if self.exact_groups < 0:
            raise InputError(f"slim.exact_groups must be at least 0, got {self.exact_groups}")

    def allocate(self, problem: AllocationProblem) -> Mapping[str, QuantSpec]:
        if not problem.candidates:
            return {}
        widths = sorted({spec.bits for specs in problem.candidates.values() for spec in specs})
        most = min(float(widths[-1]), float(max(DEFAULT_BITS, widths[0])))
        if problem.budget.avg_bits is not None:
            most = min(most, problem.budget.avg_bits)
        if problem.budget.max_drop is None:
            return self._within(problem, most)
        # Narrow to wide, halving: the smallest average that keeps the accuracy.
        averages = [*np.arange(widths[0], most, STEP).tolist(), most]
        low, high = 0, len(averages) - 1
        while low < high:
            middle = (low + high) // 2
            if keeps(problem, problem.evaluate(self._within(problem, averages[middle])), SPARE_ERRORS):
                high = middle
            else:
                low = middle + 1
        return self._within(problem, averages[high])

    def _within(self, problem: AllocationProblem, average: float) -> dict[str, QuantSpec]:
        """The least predicted loss up to an average width within size, bit operations and predicted time.

        Operations and time depend on what a whole layer is stored as, so they do not add up over groups: the largest
        average at which they hold is found by bisection. A time that the narrowest misses too is left to the forms.
        """
        found = self._at(problem, average)
        if _computes_within(problem, found):
            return found
        narrow = self._at(problem, float(min(spec.bits for specs in problem.candidates.values() for spec in specs)))
        if not _computes_within(problem, narrow):
            problem = replace(problem, milliseconds=None)
            if not _computes_within(problem, narrow):
                return narrow
            if _computes_within(problem, found):
                return found
        low, high = _average(problem, narrow), average
        for _ in range(REPAIRS):
            middle = (low + high) / 2
            tried = self._at(problem, middle)
            if _computes_within(problem, tried):
                narrow, low = tried, middle
            else:
                high = middle
        return narrow

    def _at(self, problem: AllocationProblem, average: float) -> dict[str, QuantSpec]:
        """The least predicted loss at an average width, and within the size that the budget allows."""
        base = _uniform(problem, average)
        if all(spec == problem.candidates[name][0] for name, spec in base.items()):
            return base  # nothing wider is left to choose
        limit = problem.budget.max_bytes(problem.float_size)
        room = None if limit is None else float(limit - problem.fixed_size)
        units = _Units.of(problem, base, {name: self._losses(problem, name, spec) for name, spec in base.items()})
        found = [self._fitting(problem, units, average, room, whole) for whole in (False, True)]
        pool = [specs for specs in found if specs is not None]
        if not pool:
            return base
        if _average(problem, base) <= average + 1e-9 and (room is None or _bytes(problem, base) <= room):
            pool.append(base)
        return min(pool, key=lambda specs: self._shipped(problem, specs))

    def _fitting(
        self, problem: AllocationProblem, units: _Units, average: float, room: float | None, whole: bool
    ) -> dict[str, QuantSpec] | None:
        """The least predicted loss within the budget; with `whole`, layers first take one width each."""
        bound = room
        for _ in range(REPAIRS):
            picked = self._solved(units, average, bound, whole)
            if picked is None:
                return None
            chosen = units.specs(picked)
            over = 0.0 if room is None else _bytes(problem, chosen) - room
            if over <= 0:
                return chosen
            assert bound is not None
            bound -= over  # what the estimate by groups did not see: padding, nodes, other group sizes
        return None

    def _solved(self, units: _Units, average: float, size: float | None, whole: bool) -> Array | None:
        """[U] column of the width of every group; None when nothing fits."""
        amounts, bounds = [units.bits], [average * units.weights]
        if size is not None:
            amounts.append(units.bytes)
            bounds.append(size - units.fixed)
        if not whole:
            return self._chosen(units.losses, amounts, bounds)
        starts = [rows.start for rows, _ in units.layers.values()]
        merged = [np.add.reduceat(table, starts, axis=0) for table in (units.losses, *amounts)]
        layers = self._chosen(merged[0], merged[1:], bounds)
        if layers is None:
            return None
        counts = [rows.stop - rows.start for rows, _ in units.layers.values()]
        return fill(np.repeat(layers, counts), units.losses, amounts, bounds)  # what is left, group by group

    def _chosen(self, losses: Array, amounts: list[Array], bounds: list[float]) -> Array | None:
        if len(losses) > self.exact_groups:
            return choose_many(losses, amounts, bounds)
        options = [np.flatnonzero(np.isfinite(row)) for row in losses]
        limits = [
            Limit([row[kept].tolist() for row, kept in zip(amount, options, strict=True)], bound)
            for amount, bound in zip(amounts, bounds, strict=True)
        ]
        found = choose([row[kept].tolist() for row, kept in zip(losses, options, strict=True)], limits)
        return None if found is None else np.array([kept[index] for kept, index in zip(options, found, strict=True)])

    def _shipped(self, problem: AllocationProblem, specs: Mapping[str, QuantSpec]) -> float:
        """The loss that the run's own quantizer really leaves."""
        return sum(self._error(problem, name, spec) for name, spec in specs.items())

    def _error(self, problem: AllocationProblem, name: str, spec: QuantSpec) -> float:
        key = (name, spec)
        if key not in self.shipped:
            target = problem.targets[name]
            weight = target.load()
            inputs = _salience.inputs_of(problem.stats.get(name), target.shape)
            error = problem.quantize(target, spec).dequantize() - weight
            self.shipped[key] = inputs.error(error) / (inputs.error(weight) or 1.0)
        return self.shipped[key]

    def _losses(self, problem: AllocationProblem, name: str, base: QuantSpec) -> Array:
        """[G, 8] relative output error of every group at 1 to 8 bits; infinite where the layer has no such width."""
        key = (name, base)
        if key not in self.errors:
            target, stats = problem.targets[name], problem.stats.get(name)
            weight = target.load()
            widths = sorted({spec.bits for spec in problem.candidates[name]})
            inputs = _salience.inputs_of(stats, weight.shape)
            energy = inputs.error(weight) or 1.0
            losses = np.full((base.num_groups(weight.shape[1]), 8), np.inf)
            for bits in widths:
                error = _plain(weight, replace(base, bits=bits, act_bits=None), stats)
                losses[:, bits - 1] = inputs.own_terms(error, base.group_width(weight.shape[1])) / energy
            plain = float(losses[:, base.bits - 1].sum())
            self.errors[key] = losses * (self._error(problem, name, base) / plain if plain > 0 else 1.0)
        return self.errors[key]


def _plain(weight: FloatArray, spec: QuantSpec, stats: LayerStats | None) -> FloatArray:
    """[N, K] errors of plain rounding."""
    rounder: WeightQuantizer = MSE() if spec.bits <= SEARCHED_BITS else RTN()
    error: FloatArray = rounder.quantize(weight, spec, stats).dequantize() - weight
    return error


@dataclass(frozen=True)
class _Units:
    """All groups of all layers, one row each; columns are the widths 1 to 8.

    Attributes:
        layers: name -> (rows, uniform spec) in order.
        losses: [U, 8] relative output error, infinite where there is no such width.
        bits: [U, 8] code bits.
        bytes: [U, 8] bytes of codes and zero points.
        base: [U] column of the uniform width.
        weights: number of weights.
        fixed: bytes that do not depend on widths.
        candidates: name -> bits -> spec of a layer whose groups are all alike.
    """

    layers: Mapping[str, tuple[slice, QuantSpec]]
    losses: Array
    bits: Array
    bytes: Array
    base: Array
    weights: int
    fixed: float
    candidates: Mapping[str, Mapping[int, QuantSpec]]

    @classmethod
    def of(cls, problem: AllocationProblem, base: Mapping[str, QuantSpec], losses: Mapping[str, Array]) -> _Units:
        layers, bits, stored, columns = {}, [], [], []
        start, weights, fixed = 0, 0, 0.0
        levels = np.arange(1, 9)
        for name, spec in base.items():
            num_rows, num_inputs = problem.targets[name].shape
            width = spec.group_width(num_inputs)
            lengths = _grid.group_lengths(num_inputs, width)
            layers[name] = (slice(start, start + len(lengths)), spec)
            start += len(lengths)
            weights += num_rows * num_inputs
            bits.append(num_rows * lengths[:, None] * levels)
            padded = width + (0 if spec.symmetric else 1)  # with its zero points
            stored.append(np.repeat(num_rows * padded * levels[None] / 8, len(lengths), axis=0))
            columns.append(np.full(len(lengths), spec.bits - 1))
            fixed += problem.size(problem.targets[name], spec) - float(stored[-1][:, spec.bits - 1].sum())
        candidates = {name: {spec.bits: spec for spec in problem.candidates[name]} for name in base}
        joined = np.concatenate([losses[name] for name in base])
        return cls(
            layers,
            joined,
            np.concatenate(bits).astype(np.float64),
            np.concatenate(stored),
            np.concatenate(columns),
            weights,
            fixed,
            candidates,
        )

    def loss(self, picked: Array) -> float:
        return float(self.losses[np.arange(len(picked)), picked].sum())

    def specs(self, picked: Array) -> dict[str, QuantSpec]:
        found = {}
        for name, (rows, base) in self.layers.items():
            labels = tuple(int(column) + 1 for column in picked[rows])
            if len(set(labels)) == 1:
                found[name] = self.candidates[name][labels[0]]
            else:
                average = float(self.bits[rows][np.arange(len(labels)), picked[rows]].sum() / self.bits[rows, 0].sum())
                found[name] = replace(base, bits=round(average), group_bits=labels)
        return found


def _uniform(problem: AllocationProblem, average: float) -> dict[str, QuantSpec]:
    """One width everywhere: the widest within the average and the size, else the narrowest."""
    limit = problem.budget.max_bytes(problem.float_size)
    widths = sorted({spec.bits for specs in problem.candidates.values() for spec in specs}, reverse=True)
    chosen: dict[str, QuantSpec] = {}
    for bits in widths:
        chosen = {}
        for name, specs in problem.candidates.items():
            wider = [spec for spec in specs if spec.bits >= bits] or list(specs)
            chosen[name] = min(wider, key=lambda spec: spec.bits)
        size = problem.fixed_size + _bytes(problem, chosen)
        if _average(problem, chosen) <= average + 1e-9 and (limit is None or size <= limit):
            break
    return chosen


def _average(problem: AllocationProblem, specs: Mapping[str, QuantSpec]) -> float:
    shapes = {name: problem.targets[name].shape for name in specs}
    bits = sum(spec.average_bits(shapes[name][1]) * shapes[name][0] * shapes[name][1] for name, spec in specs.items())
    return bits / sum(rows * columns for rows, columns in shapes.values())


def _computes_within(problem: AllocationProblem, specs: Mapping[str, QuantSpec]) -> bool:
    """Whether bit operations and predicted time keep their budgets."""
    budget, targets = problem.budget, problem.targets
    if budget.max_bops is not None and problem.bops is not None:
        most = budget.max_bit_operations(sum(problem.bops(targets[name], None) for name in specs))
        if most is not None and sum(problem.bops(targets[name], spec) for name, spec in specs.items()) > most:
            return False
    time = predicted_ms(problem, specs)
    return time is None or time <= (budget.max_latency or 0.0) * (problem.model_ms or 0.0)


def _bytes(problem: AllocationProblem, specs: Mapping[str, QuantSpec]) -> int:
    return sum(problem.size(problem.targets[name], spec) for name, spec in specs.items())


METHOD: type[Allocator] = Slim
