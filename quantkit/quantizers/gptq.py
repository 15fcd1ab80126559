"""GPTQ (arXiv 2210.17323) with grids that follow the feedback, then descent until no single code can be improved.

Inputs are decided in order, large ones first, and each error is made up for by the inputs still open: Babai's nearest
plane under the Gram H of the layer's inputs. Other than in the paper, the scale and zero point of a group are searched
when its turn comes, for the weights as the feedback has moved them. Then follow rounds of coordinate descent on the
codes (COMQ, arXiv 2403.07134) and of new grids and codes for each group while all others stay; the error of a row,
E = d H d^T with d = quantized - weight, falls with every step. In the end every row is compared with round-to-nearest
and with the clip search under the exact H, and the best is kept.

Damping stands for what other data than the calibration data will do: it belongs to the error that is minimised, not
only to the factorization. Inputs that calibration never saw are rounded to their nearest code by it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from quantkit.errors import InputError
from quantkit.quantizers import _fit, _gram, _grid, _small
from quantkit.quantizers.mse import MSE
from quantkit.quantizers.rtn import RTN
from quantkit.types import FloatArray, LayerStats, QuantizedWeight, QuantSpec, WeightQuantizer

_SWEEPS = 4  # of descent in each round
_ENOUGH = 1 - 1e-3  # a round that lowers E by less is the last


@dataclass(frozen=True)
class GPTQ:
    """GPTQ and descent.

    Attributes:
        damp: added to H's diagonal, as a share of its mean (huge ones count less); raised until H can be factored.
        act_order: inputs and groups of large mean square first; else in their own order.
        rounds: most rounds of descent and new grids.
        restarts: how often the sequence is run again from the best grids; rows that come out better are kept.
        sweeps: most passes of the descent at the end, which stops by itself where no code can be improved. The three
            together decide the time: with 0, 0 and 0 it is the paper's single pass, ten times faster on wide layers.
    """

    damp: float = 0.05
    act_order: bool = True
    rounds: int = 3
    restarts: int = 1
    sweeps: int = 100

    stats: ClassVar[frozenset[str]] = frozenset({"gram"})

    def __post_init__(self) -> None:
        if not 0 <= self.damp <= 100:
            raise InputError(f"gptq.damp must be at least 0 and at most 100, got {self.damp}")
        if not 0 <= self.rounds <= 1000:
            raise InputError(f"gptq.rounds must be at least 0 and at most 1000, got {self.rounds}")
        if not 0 <= self.restarts <= 100:
            raise InputError(f"gptq.restarts must be at least 0 and at most 100, got {self.restarts}")
        if not 0 <= self.sweeps <= 1000:
            raise InputError(f"gptq.sweeps must be at least 0 and at most 1000, got {self.sweeps}")

    def quantize(self, weight: FloatArray, spec: QuantSpec, stats: LayerStats | None) -> QuantizedWeight:
        gram = _gram.usable_gram(stats, (weight.shape[0], weight.shape[1]))
        searched = MSE().quantize(weight, spec, stats)
        if gram is None:
            return searched
        covering = _grid.minmax_grid(weight, spec)
        plain = RTN().quantize(weight, spec, stats)
        run = self._with_own_grams if _small.many_grams(weight.shape, gram.shape[0]) else self._with_shared_grams
        return _gram.best_rows(weight, gram, [plain, searched, run(weight, searched, covering, gram)])

    def _with_shared_grams(
        self, weight: FloatArray, start: QuantizedWeight, covering: _grid.Grid, gram: _gram.Doubles
    ) -> QuantizedWeight:
        arrays = (start.codes.copy(), start.scales.copy(), start.zero_points.copy())
        found = replace(start, codes=arrays[0], scales=arrays[1], zero_points=arrays[2])
        columns = _gram.columns_of(start.spec, weight.shape[1], covering.half)
        for group in range(gram.shape[0]):
            solver = _Solver.make(gram[group], columns, self)
            for rows in _gram.rows_of_group(weight.shape, gram.shape[0], group):
                solver.improve(weight, found, covering, rows)
        if weight.shape[1] > _small.EXACT_INPUTS:
            return found
        return _small.refine(weight, found, np.stack([_gram.damped(matrix, self.damp) for matrix in gram]))

    def _with_own_grams(
        self, weight: FloatArray, start: QuantizedWeight, covering: _grid.Grid, gram: _gram.Doubles
    ) -> QuantizedWeight:
        columns = _gram.columns_of(start.spec, weight.shape[1], covering.half)
        solver = _small.Solver(weight, np.stack([_gram.damped(matrix, self.damp) for matrix in gram]), columns)
        first = solver.state(*(array.astype(np.float64) for array in (start.codes, start.scales, start.zero_points)))
        wide = (covering.scales.astype(np.float64), covering.zero_points.astype(np.float64))
        found = solver.search(first, self.rounds, wide)
        return replace(
            start,
            codes=found.codes.astype(np.uint8),
            scales=found.scales.astype(np.float32),
            zero_points=found.zero_points.astype(np.float32),
        )


@dataclass(frozen=True)
class _Solver:
    """What the rows of one Gram share."""

    matrix: _gram.Doubles
    columns: _gram.Columns
    groups: list[_fit.Group]
    sequence: _fit.Sequence
    settings: GPTQ

    @classmethod
    def make(cls, gram: _gram.Doubles, columns: _gram.Columns, settings: GPTQ) -> _Solver:
        matrix = _gram.damped(gram, settings.damp)
        groups = _fit.make_groups(matrix, columns, settings.act_order)
        sequence = _fit.make_sequence(matrix, groups, settings.act_order)
        return cls(matrix, columns, groups, sequence, settings)

    def improve(self, weight: FloatArray, found: QuantizedWeight, covering: _grid.Grid, rows: slice) -> None:
        """Quantize these rows from the grids in `found`, and write the result there."""
        best = _gram.open_rows(weight, found, rows, self.columns, self.matrix)
        wide = (covering.scales[rows].T.astype(np.float64), covering.zero_points[rows].T.astype(np.float64))
        self._run(best, wide)
        for _ in range(self.settings.restarts):
            other = best.copy()
            self._run(other, wide)
            best.take(other, other.errors < best.errors)
        _gram.descend(self.matrix, best, self.columns, self.settings.sweeps)
        found.codes[rows] = best.codes.T
        found.scales[rows] = best.scales.T
        found.zero_points[rows] = best.zero_points.T

    def _run(self, state: _gram.Rows, covering: tuple[_gram.Doubles, _gram.Doubles]) -> None:
        _fit.fit_in_sequence(state, self.columns, self.groups, self.sequence, covering)
        state.slope[:] = self.matrix @ (state.values - state.weight)
        error = np.inf
        for _ in range(self.settings.rounds):
            _gram.descend(self.matrix, state, self.columns, _SWEEPS)
            _fit.refit_groups(self.matrix, state, self.columns, self.groups)
            before, error = error, float(state.errors.sum())
            if error > before * _ENOUGH:
                break


METHOD: type[WeightQuantizer] = GPTQ
