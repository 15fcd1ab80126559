"""Round to nearest: each group's grid covers its range, each weight goes to the nearest code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from quantkit.quantizers import _grid
from quantkit.types import FloatArray, LayerStats, QuantizedWeight, QuantSpec, WeightQuantizer


@dataclass(frozen=True)
class RTN:
    """Needs no data; the baseline that every other quantizer is compared with."""

    stats: ClassVar[frozenset[str]] = frozenset()

    def quantize(self, weight: FloatArray, spec: QuantSpec, stats: LayerStats | None) -> QuantizedWeight:
        return _grid.quantized(weight, spec, _grid.minmax_grid(weight, spec), _grid.rtn_codes(spec, weight.shape[1]))


METHOD: type[WeightQuantizer] = RTN
