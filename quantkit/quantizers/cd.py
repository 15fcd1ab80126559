"""Coordinate descent on codes against the Gram matrix (COMQ, arXiv 2403.07134), from the clip search's grid and codes.

One code at a time goes where E = d H d^T is smallest, d = quantized - weight, until no change of a single code lowers
it. Grids stay as they are. `polish` does the same to the codes of any quantizer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from quantkit.errors import InputError
from quantkit.quantizers import _gram, _small
from quantkit.quantizers.mse import MSE
from quantkit.quantizers.rtn import RTN
from quantkit.types import FloatArray, LayerStats, QuantizedWeight, QuantSpec, WeightQuantizer

SWEEPS = 100


@dataclass(frozen=True)
class CD:
    """Clip search, then descent.

    Attributes:
        damp: added to H's diagonal, as a share of its mean (huge ones count less).
        sweeps: most passes over all inputs; 0 leaves the clip search as it is.
    """

    damp: float = 0.05
    sweeps: int = SWEEPS

    stats: ClassVar[frozenset[str]] = frozenset({"gram"})

    def __post_init__(self) -> None:
        if not 0 <= self.damp <= 100:
            raise InputError(f"cd.damp must be at least 0 and at most 100, got {self.damp}")
        if not 0 <= self.sweeps <= 10_000:
            raise InputError(f"cd.sweeps must be at least 0 and at most 10000, got {self.sweeps}")

    def quantize(self, weight: FloatArray, spec: QuantSpec, stats: LayerStats | None) -> QuantizedWeight:
        gram = _gram.usable_gram(stats, (weight.shape[0], weight.shape[1]))
        start = MSE().quantize(weight, spec, stats)
        if gram is None:
            return start
        matrices = np.stack([_gram.damped(matrix, self.damp) for matrix in gram])
        found = polish(weight, start, matrices, self.sweeps)
        return _gram.best_rows(weight, gram, [RTN().quantize(weight, spec, stats), start, found])


def polish(
    weight: FloatArray, quantized: QuantizedWeight, gram: _gram.Doubles, sweeps: int = SWEEPS
) -> QuantizedWeight:
    """The same grids with codes that no single change improves; no row's E under `gram` [groups, K, K] rises.

    With few inputs the codes are the best there are, where the exact search gets to its end. Inputs that the Gram never
    saw keep their codes.
    """
    scaled = weight
    if quantized.pre_scale is not None:  # the codes stand for weight * pre_scale, which multiplies input / pre_scale
        scaled = weight * quantized.pre_scale
        gram = gram / np.outer(quantized.pre_scale, quantized.pre_scale).astype(np.float64)
    if weight.shape[1] <= _small.EXACT_INPUTS or _small.many_grams(weight.shape, gram.shape[0]):
        plain = replace(quantized, pre_scale=None)
        found = _gram.best_rows(scaled, gram, [plain, _small.refine(scaled, plain, gram)])
        return replace(quantized, codes=found.codes)
    columns = _gram.columns_of(quantized.spec, weight.shape[1], half=False)
    codes = quantized.codes.copy()
    for group in range(gram.shape[0]):
        for rows in _gram.rows_of_group(weight.shape, gram.shape[0], group):
            state = _gram.open_rows(scaled, quantized, rows, columns, gram[group])
            _gram.descend(gram[group], state, columns, sweeps)
            codes[rows] = state.codes.T
    return replace(quantized, codes=codes)


METHOD: type[WeightQuantizer] = CD
