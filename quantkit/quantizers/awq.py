"""Activation-aware weight quantization of one matrix (AWQ, arXiv 2306.00978): large inputs get finer steps.

Inputs are divided by s and columns multiplied by it before rounding, s = mean|x|^r with r searched; then the clip
search of `mse` on the scaled matrix. Minimised is the error of the output, tr(D H D^T), D what rounding does and
H the Gram matrix of the inputs. Plain rounding and the plain clip search are among the candidates, so the result is
never worse than either on that error.

Scales are part of the stored weight (`pre_scale`): most forms undo them when the weight is unpacked, for nothing; the
form that stays packed at run time (matmulnbits) divides its input, which costs a node, so scales have to earn it. The
transform `awq` finds scales that cost nothing at run time; `--quantizer awq` runs it first, unless --transform says
otherwise, and what is left to gain here is then small.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from quantkit.errors import InputError
from quantkit.quantizers import _awq
from quantkit.quantizers.mse import MSE
from quantkit.quantizers.rtn import RTN
from quantkit.types import Array, FloatArray, LayerStats, QuantizedWeight, QuantSpec, WeightQuantizer


@dataclass(frozen=True)
class AWQ:
    """Scale search, then clip search.

    Attributes:
        steps: values of r tried between 0 and 1.
        duo: also try s = mean|x|^r / mean|w|^(1-r), as later implementations do.
        clip: search the clip range of the scaled matrix too.
        min_gain: scales are kept when they remove at least this share of the error.
        rows: at most so many rows decide about r.
    """

    steps: int = 20
    duo: bool = True
    clip: bool = True
    min_gain: float = 0.1
    rows: int = 512

    stats: ClassVar[frozenset[str]] = frozenset({"gram", "abs_mean", "square_mean"})

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 1000:
            raise InputError(f"awq.steps must be at least 1 and at most 1000, got {self.steps}")
        if not 0 <= self.min_gain < 1:
            raise InputError(f"awq.min_gain must be at least 0 and below 1, got {self.min_gain}")
        if self.rows < 1:
            raise InputError(f"awq.rows must be at least 1, got {self.rows}")

    def quantize(self, weight: FloatArray, spec: QuantSpec, stats: LayerStats | None) -> QuantizedWeight:
        plain = [RTN().quantize(weight, spec, stats)]
        if self.clip:
            plain.append(MSE().quantize(weight, spec, stats))
        if stats is None or stats.gram is None:
            return plain[-1]
        gram = stats.gram
        errors = [_awq.output_error(item.dequantize() - weight, gram) for item in plain]
        best = int(np.argmin(errors))
        # Rows with one scale feed integer kernels, which would round the unscaled matrix a second time. A sign has no
        # steps to make finer.
        by_row = spec.group_width(weight.shape[1]) == weight.shape[1]
        if stats.abs_mean is None or by_row or spec.bits == 1 or not errors[best]:
            return plain[best]
        scaled = self._scaled(weight, spec, stats, self._search(weight, spec, stats))
        error = _awq.output_error(scaled.dequantize() - weight, gram)
        return scaled if error < (1 - self.min_gain) * errors[best] else plain[best]

    def _search(self, weight: FloatArray, spec: QuantSpec, stats: LayerStats) -> Array:
        """[K] the scales with which plain rounding errs least on some of the rows."""
        assert stats.gram is not None and stats.abs_mean is not None
        groups = stats.gram.shape[0]
        part = weight[_awq.some_rows(weight.shape[0], groups, self.rows)]
        activation = stats.abs_mean.mean(axis=0)
        candidates = [np.ones(weight.shape[1]), *_awq.candidate_scales(activation, None, self.steps)]
        if self.duo:
            size = _awq.relative_size(part, spec.group_width(weight.shape[1]))
            candidates += _awq.candidate_scales(activation, size, self.steps)
        errors = []
        for scales in candidates:
            rounded = RTN().quantize((part * scales).astype(np.float32), spec, None).dequantize()
            errors.append(_awq.output_error((rounded / scales - part).astype(np.float32), stats.gram))
        return candidates[int(np.argmin(errors))]

    def _scaled(self, weight: FloatArray, spec: QuantSpec, stats: LayerStats, scales: Array) -> QuantizedWeight:
        """The better of rounding and clip search, on the scaled matrix."""
        factors = scales.astype(np.float32)
        wide = weight * factors
        assert stats.gram is not None
        found = [RTN().quantize(wide, spec, None)]
        if self.clip:
            inner = replace(stats, gram=stats.gram / factors / factors[:, None], square_mean=None)
            found.append(MSE().quantize(wide, spec, inner))
        results = [replace(item, pre_scale=factors) for item in found]
        errors = [_awq.output_error(item.dequantize() - weight, stats.gram) for item in results]
        return results[int(np.argmin(errors))]


METHOD: type[WeightQuantizer] = AWQ
