"""Clip search: each group keeps the grid with the smallest weighted error instead of the one that covers its range.

A few large weights stretch a covering grid; clipping them makes all other steps finer. Per group, the scale is searched
over a geometric sequence of shrink factors (and, where zero points are free, one code up and down), then improved by
least squares for fixed codes, s* = sum h w l / sum h l^2 with l = code - zero_point. h is how much an error at an input
costs: its mean square, the diagonal of GPTQ's Hessian (arXiv 2210.17323); mean |x| squared without it, else 1.
The covering grid is always a candidate, so no group's weighted error exceeds round-to-nearest's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from quantkit.errors import InputError
from quantkit.quantizers import _grid
from quantkit.types import Array, FloatArray, LayerStats, QuantizedWeight, QuantSpec, WeightQuantizer

_MIN_COLUMNS = 256  # groups handled at once, so that row operations over them are long enough to be fast
_MAX_ELEMENTS = 1 << 20
_GAIN = 1e-4  # an error must fall by this share to count: more than float32 noise, so that "never worse" holds exactly


@dataclass(frozen=True)
class MSE:
    """Clip search.

    Attributes:
        steps: shrink factors tried, from 1 down to 1 - max_shrink.
        max_shrink: largest share of the range that may be clipped off.
        norm: exponent of the error, sum h |w - q|^norm.
        refinements: least-squares improvements of the best scale.
    """

    steps: int = 32
    max_shrink: float = 0.85
    norm: float = 2.0
    refinements: int = 4

    stats: ClassVar[frozenset[str]] = frozenset({"square_mean"})

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 10_000:
            raise InputError(f"mse.steps must be at least 1 and at most 10000, got {self.steps}")
        if not 0 <= self.max_shrink < 1:
            raise InputError(f"mse.max_shrink must be at least 0 and below 1, got {self.max_shrink}")
        if self.norm <= 0:
            raise InputError(f"mse.norm must be above 0, got {self.norm}")
        if self.refinements < 0:
            raise InputError(f"mse.refinements must be at least 0, got {self.refinements}")

    def quantize(self, weight: FloatArray, spec: QuantSpec, stats: LayerStats | None) -> QuantizedWeight:
        covering = _grid.minmax_grid(weight, spec)
        grid = self.search(weight, spec, covering, input_importance(stats))
        return _grid.quantized(weight, spec, grid, _grid.all_codes(spec, weight.shape[1]))

    def search(self, weight: FloatArray, spec: QuantSpec, start: _grid.Grid, importance: Array | None) -> _grid.Grid:
        """The best grid per group, never worse than `start` under importance [groups, K] (None: all inputs alike)."""
        scales, zero_points = start.scales.copy(), start.zero_points.copy()
        widths = spec.widths(weight.shape[1])
        for bits in np.unique(widths):  # groups of one width are searched together
            self._search_width(weight, spec, start, importance, int(bits), (scales, zero_points))
        return _grid.Grid(scales, zero_points, start.half)

    def _search_width(
        self,
        weight: FloatArray,
        spec: QuantSpec,
        start: _grid.Grid,
        importance: Array | None,
        bits: int,
        found: tuple[FloatArray, FloatArray],
    ) -> None:
        """Search the groups of `bits` bits and write what is found into scales and zero points [N, G]."""
        num_rows, num_inputs = weight.shape
        width = spec.group_width(num_inputs)
        groups = np.flatnonzero(spec.widths(num_inputs) == bits)
        whole = groups.size == start.scales.shape[1]
        if importance is None and bits == 1:  # no code is 0: what fills a shorter last group must not count
            importance = np.ones((1, num_inputs))
        elements = min(max(_grid.CHUNK_ELEMENTS, _MIN_COLUMNS * width), _MAX_ELEMENTS)
        for rows in _grid.row_chunks(weight.shape, elements):
            part = (rows, slice(None)) if whole else (rows, groups)
            base = start.scales[part].reshape(-1)
            # Groups side by side, [width, n * G], in units of their first scale: errors neither over- nor underflow.
            values = _grid.grouped(weight[rows], width)[:, part[1]]
            units = np.ascontiguousarray(values.reshape(-1, width).T) / base
            costs = None if importance is None else _costs(importance, rows, num_rows, width, part[1])
            search = _Search(units, costs, base, bits, self.norm, start.half)
            search.consider(base, start.zero_points[part].reshape(-1))
            self._explore(search, spec.symmetric)
            found[0][part] = search.scales.reshape(-1, groups.size)
            found[1][part] = search.zero_points.reshape(-1, groups.size)

    def _explore(self, search: _Search, symmetric: bool) -> None:
        first = search.zero_points.copy()
        shifts = (0,) if symmetric else (0, -1, 1)
        factors = (1 - self.max_shrink) ** np.linspace(0, 1, self.steps) if search.bits > 1 else np.ones(0)
        for shift in shifts:
            zero_points = np.clip(first + shift, 0, 2**search.bits - 1)
            for factor in factors[0 if shift else 1 :]:
                search.consider(search.base * factor, zero_points)
        # 1-bit codes are the signs, whatever the scale: least squares is then the exact answer at once.
        for _ in range(self.refinements if search.bits > 1 else 1):
            search.consider(search.least_squares(), search.zero_points)


class _Search:
    """The best scale and zero point so far for each of M groups."""

    def __init__(
        self, units: FloatArray, costs: FloatArray | None, base: FloatArray, bits: int, norm: float, half: bool
    ) -> None:
        self.units, self.costs, self.base = units, costs, base
        self.bits, self.norm, self.half = bits, norm, half
        self.errors = np.full(base.shape, np.inf, dtype=np.float32)
        self.scales = base
        self.zero_points = np.zeros_like(base)
        self._buffer = np.empty_like(units)

    def consider(self, scales: Array, zero_points: FloatArray) -> None:
        """Take these grids, their scales rounded as they will be stored, where they are better than the best so far."""
        stored = _grid.store_scales(scales, self.half)
        stored = np.where(stored > 0, stored, self.scales)
        errors = self._error(stored / self.base, zero_points)
        better = errors < self.errors * (1 - _GAIN)
        self.errors = np.where(better, errors, self.errors)
        self.scales = np.where(better, stored, self.scales)
        self.zero_points = np.where(better, zero_points, self.zero_points)

    def least_squares(self) -> Array:
        """[M] the best scales for the codes that the best grids give."""
        levels = self._levels(self.scales / self.base, self.zero_points)
        weighted = levels if self.costs is None else levels * self.costs
        power = np.einsum("wm,wm->m", weighted, levels)
        match = np.einsum("wm,wm->m", weighted, self.units)
        ratios = match / np.where(power > 0, power, 1)
        return np.where(ratios > 0, ratios.astype(np.float64) * self.base, self.scales)

    def _levels(self, ratios: FloatArray, zero_points: FloatArray) -> FloatArray:
        """[width, M] code - zero_point of every weight, in the shared buffer."""
        levels = self._buffer
        if self.bits == 1:
            np.copysign(np.float32(0.5), self.units, out=levels)
            return levels
        np.multiply(self.units, 1 / ratios, out=levels)
        np.rint(levels, out=levels)
        np.maximum(levels, -zero_points, out=levels)
        np.minimum(levels, 2**self.bits - 1 - zero_points, out=levels)
        return levels

    def _error(self, ratios: FloatArray, zero_points: FloatArray) -> FloatArray:
        """[M] weighted error of every group, in units of its base."""
        error = self._levels(ratios, zero_points)
        error *= ratios
        error -= self.units
        if self.norm == 2:
            error *= error
        else:
            np.abs(error, out=error)
            np.power(error, self.norm, out=error)
        if self.costs is not None:
            error *= self.costs
        total: FloatArray = error.sum(axis=0)
        return total


def input_importance(stats: LayerStats | None) -> Array | None:
    """[groups, K] cost of an error at each input, or None when calibration saw nothing."""
    if stats is not None and stats.gram is not None:
        return np.diagonal(stats.gram, axis1=1, axis2=2)
    if stats is not None and stats.square_mean is not None:
        return stats.square_mean
    if stats is not None and stats.abs_mean is not None:
        return np.square(stats.abs_mean)
    return None


def _costs(
    importance: Array, rows: slice, num_rows: int, width: int, chosen: slice | npt.NDArray[np.int64]
) -> FloatArray:
    """[width, n * G] importance of the chunk's weights in the chosen groups, largest 1 within each group."""
    group_of_row = np.arange(rows.start, rows.stop) * importance.shape[0] // num_rows
    groups = _grid.grouped(importance, width)[:, chosen]
    largest = groups.max(axis=-1, keepdims=True)
    groups = (groups / np.where(largest > 0, largest, 1)).astype(np.float32)
    return np.ascontiguousarray(groups[group_of_row].reshape(-1, width).T)


METHOD: type[WeightQuantizer] = MSE
