"""Widths by groups within one matrix, and ranges that spare the weights that matter (SliM-LLM, arXiv 2405.14917).

Asked for N bits, some groups of inputs get fewer and others more, so that the average is N exactly. Which ones is
decided on the layer's output error tr(D H D^T), H the Gram matrix of its inputs: from one table of the errors of all
pairs of groups and widths, every labelling is scored exactly (for errors of plain rounding), so the search need not be
one-dimensional as the authors' is (`search="sweep"`). Rounding that makes up for errors changes how those of different
inputs go together, so a second labelling is proposed: the best if inputs were unrelated. Both, and N bits everywhere,
are then rounded as they will ship, and the best is kept: never worse than N bits everywhere.

Ranges are searched like those of `mse`, with errors of salient weights counted `salient_weight` times; 1 is the plain
search (which is also what the authors' default amounts to).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from quantkit.errors import InputError
from quantkit.quantizers import _gram, _grid, _salience
from quantkit.quantizers._labels import Labelling, Labels, separable, swept
from quantkit.quantizers.gptq import GPTQ
from quantkit.quantizers.mse import MSE, input_importance
from quantkit.types import FloatArray, LayerStats, QuantizedWeight, QuantSpec, WeightQuantizer


@dataclass(frozen=True)
class Slim:
    """Salience-driven widths.

    Attributes:
        levels: widths that groups may have, beside the one asked for; none = one bit less and one more.
        search: `exact` = over all balanced labellings, `sweep` = the authors', ordered by salience.
        salient_weight: how much an error of a salient weight counts when ranges are searched, 1 or more.
        norm: exponent of the error when ranges are searched.
        rounder: `gptq` where a Gram matrix is known, or `nearest`: every weight to its nearest code.
    """

    levels: tuple[int, ...] = ()
    search: Literal["exact", "sweep"] = "exact"
    salient_weight: float = 1.5
    norm: float = 2.0
    rounder: Literal["gptq", "nearest"] = "gptq"

    stats: ClassVar[frozenset[str]] = frozenset({"gram"})

    def __post_init__(self) -> None:
        if not all(1 <= bits <= 8 for bits in self.levels):
            raise InputError(f"slim.levels must be widths from 1 to 8, got {list(self.levels)}")
        if not 1 <= self.salient_weight < float("inf"):
            raise InputError(f"slim.salient_weight must be at least 1, got {self.salient_weight}")
        if not 0 < self.norm < float("inf"):
            raise InputError(f"slim.norm must be above 0, got {self.norm}")

    def quantize(self, weight: FloatArray, spec: QuantSpec, stats: LayerStats | None) -> QuantizedWeight:
        plain = self._rounded(weight, spec, stats)
        if spec.group_bits is not None or spec.num_groups(weight.shape[1]) < 2:
            return plain
        inputs = _salience.inputs_of(stats, weight.shape)
        best, least = plain, inputs.error(plain.dequantize() - weight)
        levels = self._levels(spec.bits)
        for labels in self._proposals(weight, spec, stats, inputs, levels):
            widths = tuple(levels[label] for label in labels)
            found = self._rounded(weight, replace(spec, group_bits=widths), stats)
            error = inputs.error(found.dequantize() - weight)
            if error < least:
                best, least = found, error
        return best

    def _levels(self, bits: int) -> list[int]:
        around = self.levels or (max(bits - 1, 1), min(bits + 1, 8))
        return sorted({bits, *around})

    def _rounded(self, weight: FloatArray, spec: QuantSpec, stats: LayerStats | None) -> QuantizedWeight:
        """As it ships: searched ranges, and rows for which GPTQ is better from there."""
        nearest = self._nearest(weight, spec, stats)
        gram = _salience.inputs_of(stats, weight.shape).gram
        if gram is None or self.rounder == "nearest":
            return nearest
        return _gram.best_rows(weight, gram, [nearest, GPTQ().quantize(weight, spec, stats)])

    def _nearest(self, weight: FloatArray, spec: QuantSpec, stats: LayerStats | None) -> QuantizedWeight:
        limits = _grid.all_codes(spec, weight.shape[1])
        return _grid.quantized(weight, spec, self._grid(weight, spec, stats), limits)

    def _grid(self, weight: FloatArray, spec: QuantSpec, stats: LayerStats | None) -> _grid.Grid:
        """Salience-weighted ranges; never worse than covering ones under the same weights."""
        importance = input_importance(stats)
        if self.salient_weight != 1:
            inputs = _salience.inputs_of(stats, weight.shape)
            marks = _salience.salient(inputs.salience(weight), spec.group_width(weight.shape[1]))
            factors = np.where(marks, self.salient_weight, 1.0)
            importance = _salience.importance_of_rows(inputs.energy, len(weight)) * factors
        return MSE(norm=self.norm).search(weight, spec, _grid.minmax_grid(weight, spec), importance)

    def _proposals(
        self, weight: FloatArray, spec: QuantSpec, stats: LayerStats | None, inputs: _salience.Inputs, levels: list[int]
    ) -> list[Labels]:
        """Balanced labellings worth rounding, N bits everywhere left out."""
        num_inputs = weight.shape[1]
        width = spec.group_width(num_inputs)
        size = np.abs(weight).max() or np.float32(1)  # products of errors of tiny weights would be lost in float32
        errors = []
        for bits in levels:
            uniform = replace(spec, bits=bits)
            errors.append((self._nearest(weight, uniform, stats).dequantize() - weight) / size)
        balance = np.outer(_grid.group_lengths(num_inputs, width), np.array(levels) - spec.bits)
        labelling = Labelling(inputs.terms(errors, width), balance)
        if self.search == "sweep":
            salience = _salience.group_sums(inputs.salience(weight), width)
            tried = swept(salience, levels, spec.bits, num_inputs // width)
            found = [min(tried, key=labelling.error)] if tried else []
        else:
            unrelated = separable(_salience.diagonal_terms(errors, inputs.energy, width), balance)
            found = [labelling.best([unrelated]), unrelated]
        return [labels for labels in dict.fromkeys(found) if labels != labelling.neutral]


METHOD: type[WeightQuantizer] = Slim
