"""Round to nearest: each group's grid covers its range, each weight goes to the nearest code."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from quantkit.quantizers import _grid
from quantkit.types import FloatArray, LayerStats, QuantizedWeight, QuantSpec, WeightQuantizer


@dataclass(frozen=True)
class RTN:
    """Needs no data; the baseline that every other quantizer is compared with.

    Attributes:
        per_tensor: one grid for the whole layer, whatever the group size.
        power_of_two: scales are powers of two, the next above.
    """

    per_tensor: bool = False
    power_of_two: bool = False

    stats: ClassVar[frozenset[str]] = frozenset()

    def quantize(self, weight: FloatArray, spec: QuantSpec, stats: LayerStats | None) -> QuantizedWeight:
        grid = self._whole(weight, spec) if self.per_tensor else _grid.minmax_grid(weight, spec)
        if self.power_of_two:
            grid = _powers(weight, spec, grid)
        return _grid.quantized(weight, spec, grid, _grid.rtn_codes(spec, weight.shape[1]))

    def _whole(self, weight: FloatArray, spec: QuantSpec) -> _grid.Grid:
        """Every group with the grid of all weights together; groups of other widths with theirs."""
        num_rows, num_inputs = weight.shape
        widths = spec.widths(num_inputs)
        flat = np.ascontiguousarray(weight).reshape(1, -1)
        grids = {
            bits: _grid.minmax_grid(flat, QuantSpec(bits, -1, symmetric=spec.symmetric))
            for bits in map(int, np.unique(widths))
        }
        scales = np.array([grids[int(bits)].scales[0, 0] for bits in widths], np.float32)
        zero_points = np.array([grids[int(bits)].zero_points[0, 0] for bits in widths], np.float32)
        shape = (num_rows, len(widths))
        half = all(grid.half for grid in grids.values())
        return _grid.Grid(np.tile(scales, (num_rows, 1)), np.broadcast_to(zero_points, shape).copy(), half)


def _powers(weight: FloatArray, spec: QuantSpec, grid: _grid.Grid) -> _grid.Grid:
    """The grid with its scales rounded up to powers of two; zero points move so that the lowest value stays in."""
    scales = np.exp2(np.ceil(np.log2(grid.scales.astype(np.float64)))).astype(np.float32)
    if spec.symmetric:
        return replace(grid, scales=scales, half=_grid.fits_half(scales))
    highest = 2.0 ** spec.widths(weight.shape[1]) - 1
    lowest = -grid.zero_points.astype(np.float64) * grid.scales
    moved = np.clip(np.floor(-lowest / scales + 0.5), 0, highest)
    halves = spec.widths(weight.shape[1]) == 1
    zero_points = np.where(halves, grid.zero_points, moved).astype(np.float32)
    return _grid.Grid(scales, zero_points, _grid.fits_half(scales))


METHOD: type[WeightQuantizer] = RTN
