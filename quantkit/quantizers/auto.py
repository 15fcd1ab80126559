"""Row by row the best of rtn, mse and gptq, by the error of the layer's output; without a Gram matrix, mse.

Its settings are those of `gptq` and `mse`, and `gptq.damp` or `mse.steps` set them as well as `auto.damp`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from quantkit.quantizers import _gram
from quantkit.quantizers.gptq import GPTQ
from quantkit.quantizers.mse import MSE
from quantkit.types import FloatArray, LayerStats, QuantizedWeight, QuantSpec, WeightQuantizer


@dataclass(frozen=True)
class Auto:
    """The default quantizer.

    Attributes:
        damp, act_order, rounds, restarts, sweeps: of gptq.
        steps, max_shrink, norm, refinements: of mse.
    """

    damp: float = GPTQ.damp
    act_order: bool = GPTQ.act_order
    rounds: int = GPTQ.rounds
    restarts: int = GPTQ.restarts
    sweeps: int = GPTQ.sweeps
    steps: int = MSE.steps
    max_shrink: float = MSE.max_shrink
    norm: float = MSE.norm
    refinements: int = MSE.refinements

    stats: ClassVar[frozenset[str]] = GPTQ.stats | MSE.stats

    def __post_init__(self) -> None:
        self._gptq()
        self._mse()

    def quantize(self, weight: FloatArray, spec: QuantSpec, stats: LayerStats | None) -> QuantizedWeight:
        gram = _gram.usable_gram(stats, (weight.shape[0], weight.shape[1]))
        if gram is None:
            return self._mse().quantize(weight, spec, stats)
        found = self._gptq().quantize(weight, spec, stats)  # already compared with rtn and with the default mse
        if self._mse() == MSE():
            return found
        return _gram.best_rows(weight, gram, [self._mse().quantize(weight, spec, stats), found])

    def _gptq(self) -> GPTQ:
        return GPTQ(self.damp, self.act_order, self.rounds, self.restarts, self.sweeps)

    def _mse(self) -> MSE:
        return MSE(self.steps, self.max_shrink, self.norm, self.refinements)


METHOD: type[WeightQuantizer] = Auto
