"""AWQ's scales, folded into the graph (arXiv 2306.00978): large inputs get finer steps, at no cost at run time.

Per group s = mean|x|^r, normalised so that the geometric middle of its extremes is 1; r is searched. Minimised is the
error that rounding causes in the outputs of all readers, sum of tr(D H D^T), D = Q(W diag(s)) diag(1/s) - W. s = 1 is
among the candidates: on that error the result is never worse than without.

Only matrix products take part: a convolution with one scale per row has nothing to gain. Afterwards any quantizer may
follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from quantkit.errors import InputError
from quantkit.quantizers import _awq
from quantkit.quantizers.mse import MSE
from quantkit.quantizers.rtn import RTN
from quantkit.transforms._problem import Reader, ScaleGroup
from quantkit.types import Array, FloatArray, Transform


@dataclass(frozen=True)
class AWQ:
    """Scale search by group.

    Attributes:
        steps: values of r tried between 0 and 1.
        duo: also try s = mean|x|^r / mean|w|^(1-r), as later implementations do.
        rounding: what the error is measured with.
        gain: a group is scaled when that removes at least this share of its error.
        rows: at most so many rows of each reader decide.
        insert: where nothing can take the division, insert a Mul for all readers of a value together.
    """

    steps: int = 20
    duo: bool = True
    rounding: Literal["rtn", "mse"] = "rtn"
    gain: float = 0.02
    rows: int = 512
    insert: bool = False

    stats: ClassVar[frozenset[str]] = frozenset({"gram", "abs_mean"})
    readers: ClassVar[frozenset[str]] = frozenset({"MatMul", "Gemm"})

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 1000:
            raise InputError(f"awq.steps must be at least 1 and at most 1000, got {self.steps}")
        if not 0 <= self.gain < 1:
            raise InputError(f"awq.gain must be at least 0 and below 1, got {self.gain}")
        if self.rows < 1:
            raise InputError(f"awq.rows must be at least 1, got {self.rows}")

    def scales(self, groups: Sequence[ScaleGroup]) -> Mapping[str, Array]:
        found = {}
        for group in groups:
            scales = self._search(group)
            if scales is not None:
                found[group.name] = scales
        return found

    def _search(self, group: ScaleGroup) -> Array | None:
        """[size], or None where nothing gains enough."""
        parts = [(reader, self._part(reader)) for reader in group.readers]
        known = [(reader, part) for reader, part in parts if reader.stats is not None and reader.stats.gram is not None]
        if not known or len(known) < len(parts):
            return None
        best, least = None, (1 - self.gain) * self.error(known, np.ones(group.size))
        for scales in self._candidates(group, known):
            error = self.error(known, scales)
            if error < least:
                best, least = scales, error
        return best

    def error(self, parts: Sequence[tuple[Reader, FloatArray]], scales: Array) -> float:
        """Sum over the readers of what rounding W diag(s) does to the outputs."""
        total = 0.0
        for reader, weight in parts:
            assert reader.stats is not None and reader.stats.gram is not None
            columns = reader.columns(scales)
            wide = reader.scaled(weight, scales)
            if self.rounding == "mse":
                spread = np.diagonal(reader.stats.gram, axis1=1, axis2=2) / columns**2
                inner = replace(reader.stats, gram=None, square_mean=spread)
                rounded = MSE().quantize(wide, reader.spec, inner).dequantize()
            else:
                rounded = RTN().quantize(wide, reader.spec, None).dequantize()
            delta = reader.scaled(rounded, 1 / scales) - weight
            total += _awq.output_error(delta, reader.stats.gram)
        return total

    def _part(self, reader: Reader) -> FloatArray:
        weight = reader.load()
        return weight[_awq.some_rows(weight.shape[0], reader.channels.shape[0], self.rows)]

    def _candidates(self, group: ScaleGroup, parts: Sequence[tuple[Reader, FloatArray]]) -> list[Array]:
        """Means over readers, and over the inputs that share a channel (query heads that share one v)."""
        activation, size, count = np.zeros(group.size), np.zeros(group.size), np.zeros(group.size)
        for reader, weight in parts:
            assert reader.stats is not None and reader.stats.abs_mean is not None
            width = reader.spec.group_width(weight.shape[1])
            relative = np.tile(_awq.relative_size(weight, width), (reader.channels.shape[0], 1))
            activation += reader.by_channel(reader.stats.abs_mean, group.size, np.add)
            size += reader.by_channel(relative, group.size, np.add)
            count += reader.by_channel(np.ones(reader.channels.shape), group.size, np.add)
        activation, size = activation / np.maximum(count, 1), size / np.maximum(count, 1)
        found = list(_awq.candidate_scales(activation, None, self.steps))
        return found + list(_awq.candidate_scales(activation, size, self.steps)) if self.duo else found


METHOD: type[Transform] = AWQ
