"""Streaming statistics of a layer's input, and the activation ranges that follow from its histogram.

Add batches, read the result; memory does not grow with the number of samples, and the order of addition within one run
is the only thing a result depends on. Ranges are for 256 affine levels (uint8): KL divergence as in Quantune
(arXiv 2202.05048) but with both ends free, or the smallest expected squared error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quantkit.errors import InputError
from quantkit.types import ActParams, Array, FloatArray

_CHUNK = 1 << 18  # values binned at once
_GEMM_ROWS = 1024  # rows multiplied in float32 before the sum goes on in float64
_LEVELS = 255  # steps between the 256 levels
_MIDDLE = 128  # the code of 0 in a symmetric scheme
_SMALLEST_EXPONENT = -100

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Distribution:
    """How often an activation took which values.

    Attributes:
        counts: [B] float64; bin i holds values in [edges[i], edges[i + 1]), the last bin its upper edge too.
        edges: [B + 1] float64, ascending; the first is `low`, the last is `high`.
        low, high: exact extremes.
        zeros: how many values were exactly 0 (they are also in their bin's count).
    """

    counts: Doubles
    edges: Doubles
    low: float
    high: float
    zeros: float


class Histogram:
    """Counts in at most `bins` bins whose width is a power of two, edges at multiples of it.

    When a value falls outside, the width doubles until everything fits; two bins become one, so no count is ever split:

        width 1    [0,1) [1,2) [2,3) [3,4)      a 5 arrives
        width 2    [0,  2)     [2,   4)    [4,   6)
    """

    def __init__(self, bins: int = 2048) -> None:
        if bins < 2:
            raise InputError(f"a histogram needs at least 2 bins, got {bins}")
        self._bins = bins
        self._counts = np.zeros(bins)
        self._first = 0  # bin i covers [first + i, first + i + 1) * 2**exponent
        self._exponent = _SMALLEST_EXPONENT
        self._low, self._high = math.inf, -math.inf
        self._zeros = 0.0

    def add(self, values: Array) -> None:
        flat = np.asarray(values).reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            self._add_chunk(flat[start : start + _CHUNK].astype(np.float64))

    def _add_chunk(self, values: Doubles) -> None:
        low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = int(values.size - np.isfinite(values).sum())
            raise InputError(f"{bad} calibration values are NaN or infinite; check the model's weights and input data")
        self._cover(low, high)
        index = np.floor(values * 2.0**-self._exponent) - self._first
        self._counts += np.bincount(index.astype(np.int64), minlength=self._bins)
        self._zeros += values.size - np.count_nonzero(values)

    def merge(self, other: Histogram) -> None:
        """Add everything that `other` has seen."""
        if math.isinf(other._low):
            return
        self._cover(other._low, other._high, other._exponent)
        filled = np.flatnonzero(other._counts)
        bins = (filled + other._first) >> min(self._exponent - other._exponent, 62)
        np.add.at(self._counts, bins - self._first, other._counts[filled])
        self._zeros += other._zeros

    def _cover(self, low: float, high: float, exponent: int = _SMALLEST_EXPONENT) -> None:
        """Widen until [low, high] fits, with bins at least 2**exponent wide."""
        empty = math.isinf(self._low)
        self._low, self._high = min(self._low, low), max(self._high, high)
        exponent = max(exponent, self._exponent)
        span, largest = self._high - self._low, max(abs(self._low), abs(self._high))
        if span > 0:
            exponent = max(exponent, math.frexp(span / self._bins)[1] - 1)
        if largest > 0:  # bin numbers stay below 2**31
            exponent = max(exponent, math.frexp(largest)[1] - 31)
        while self._bin(self._high, exponent) - self._bin(self._low, exponent) >= self._bins:
            exponent += 1
        first = self._bin(self._low, exponent)
        if not empty and (exponent, first) != (self._exponent, self._first):
            filled = np.flatnonzero(self._counts)
            bins = (filled + self._first) >> min(exponent - self._exponent, 62)
            self._counts = np.bincount(bins - first, weights=self._counts[filled], minlength=self._bins).astype(
                np.float64
            )
        self._exponent, self._first = exponent, first

    @staticmethod
    def _bin(value: float, exponent: int) -> int:
        return math.floor(math.ldexp(value, -exponent))

    def result(self) -> Distribution:
        if math.isinf(self._low):
            raise InputError("no calibration value reached this histogram; give the calibration at least one sample")
        last = self._bin(self._high, self._exponent) - self._first
        edges = (self._first + np.arange(last + 2, dtype=np.float64)) * 2.0**self._exponent
        edges[0], edges[-1] = self._low, self._high
        return Distribution(self._counts[: last + 1].copy(), edges, self._low, self._high, self._zeros)


def clip_minmax(seen: Distribution) -> tuple[float, float]:
    """Everything that was seen, and 0."""
    return min(0.0, seen.low), max(0.0, seen.high)


def clip_percentile(seen: Distribution, q: float = 99.99) -> tuple[float, float]:
    """The range of the middle q percent of the values (linear within a bin), and 0."""
    if not 0 < q <= 100:
        raise InputError(f"a percentile must be above 0 and at most 100, got {q}")
    total = np.concatenate([[0.0], np.cumsum(seen.counts)])
    tail = (1 - q / 100) / 2 * total[-1]
    low = float(np.interp(tail, total, seen.edges))
    high = float(np.interp(tail, total[-1] - total[::-1], seen.edges[::-1]))
    return min(0.0, low), max(0.0, high)


def clip_mse(seen: Distribution, steps: int = 32) -> tuple[float, float]:
    """The range with the smallest expected squared error of rounding and clipping (values even within a bin)."""
    return _search(seen, _expected_error, steps)


def clip_entropy(seen: Distribution, steps: int = 32) -> tuple[float, float]:
    """The range whose 256 levels keep the most information: smallest KL(clipped distribution || quantized one)."""
    return _search(seen, _divergence, steps)


def _search(seen: Distribution, loss: Callable[[Distribution, float, float], float], steps: int) -> tuple[float, float]:
    """Both ends together, then each alone, in three rounds of finer steps; never worse than the whole range."""
    widest = clip_minmax(seen)
    if widest[0] == widest[1]:
        return widest
    best, least = widest, loss(seen, *widest)
    for span in (None, 0.2, 0.04):
        factors = np.linspace(1, 0, steps, endpoint=False) if span is None else 1 + span * np.linspace(-1, 1, steps)
        for low_moves, high_moves in ((True, True), (False, True), (True, False)):
            low, high = best
            for factor in factors:
                ends = (
                    max(low * float(factor), widest[0]) if low_moves else low,
                    min(high * float(factor), widest[1]) if high_moves else high,
                )
                found = loss(seen, *ends)
                if found < least:
                    best, least = ends, found
    return best


def _without_zeros(seen: Distribution) -> Doubles:
    """The counts without exact zeros, which every range represents exactly."""
    counts = seen.counts.copy()
    if seen.zeros:
        counts[np.clip(np.searchsorted(seen.edges, 0.0, side="right") - 1, 0, counts.size - 1)] -= seen.zeros
    return counts


def _expected_error(seen: Distribution, low: float, high: float) -> float:
    """Sum over the values of (x - quantized x)^2."""
    params = act_params(low, high)
    inside = np.clip(seen.edges, params.low, params.high)
    steps = inside / params.scale
    nearest = np.rint(steps)
    # Integral of the squared error up to each edge: s^3/12 per whole step, a cubic within a step and beyond the range.
    integral = params.scale**3 * (nearest / 12 + (steps - nearest) ** 3 / 3) + (seen.edges - inside) ** 3 / 3
    widths = np.diff(seen.edges)
    at_edge = (seen.edges - params.scale * nearest) ** 2
    errors = np.where(widths > 0, np.diff(integral) / np.where(widths > 0, widths, 1), at_edge[1:])
    return float(_without_zeros(seen) @ errors)


def _divergence(seen: Distribution, low: float, high: float) -> float:
    """KL between the distribution, its tails moved to the outermost bins kept, and what 256 levels leave of it."""
    params = act_params(low, high)
    counts = _without_zeros(seen)
    centres = (seen.edges[:-1] + seen.edges[1:]) / 2
    levels = np.rint(centres / params.scale).astype(np.int64) + params.zero_point
    kept = np.flatnonzero((counts > 0) & (levels >= 0) & (levels <= _LEVELS))
    if kept.size == 0:
        return math.inf
    inside, levels = counts[kept], levels[kept]
    reference = inside.copy()
    reference[0] += counts[: kept[0]].sum()
    reference[-1] += counts[kept[-1] + 1 :].sum()
    # A level's mass goes evenly to the bins that it stands for.
    mass = np.bincount(levels, weights=inside) / np.maximum(np.bincount(levels), 1)
    quantized = mass[levels] / inside.sum()
    reference /= reference.sum()
    return float(np.sum(reference * np.log(reference / quantized)))


SCHEMES = ("asymmetric", "symmetric", "unsigned", "power")


def act_params(low: float, high: float, scheme: str = "asymmetric") -> ActParams:
    """The uint8 grid of a range widened to hold 0, with a code that is exactly 0.

    Args:
        scheme: `asymmetric` covers the range and no more; `symmetric` reaches equally far to both sides of 0;
            `unsigned` does so too, but starts at 0 where no value lies below; `power` is unsigned with a scale that is
            a power of two. (Close to Quantune's four schemes, arXiv 2202.05048.)
    """
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise InputError(
            f"an activation range needs finite low <= high, got [{low}, {high}]; check the calibration data"
        )
    low, high = min(0.0, low), max(0.0, high)
    if scheme != "asymmetric":
        return _balanced(low, high, scheme)
    scale = float(np.float32(high / _LEVELS - low / _LEVELS))
    if scale == 0:
        return ActParams(1.0, 0)
    return ActParams(scale, min(max(round(-low / scale), 0), _LEVELS))


def _balanced(low: float, high: float, scheme: str) -> ActParams:
    """Zero in the middle of the codes 1 to 255, or at code 0."""
    middle = 0 if scheme != "symmetric" and low == 0 else _MIDDLE
    scale = max(high, -low) / (_LEVELS - middle)
    if scheme == "power" and scale > 0:
        scale = 2.0 ** math.ceil(math.log2(scale))
    scale = float(np.float32(scale))
    return ActParams(scale, middle) if scale > 0 else ActParams(1.0, 0)


class Moments:
    """Per-channel mean, mean magnitude, largest magnitude and mean square of rows [groups, T, K]."""

    def __init__(self) -> None:
        self.count = 0.0
        self._sum: Doubles | None = None
        self._size: Doubles | None = None
        self._square: Doubles | None = None
        self._largest: Doubles | None = None

    def add(self, rows: Array, weights: Array | None = None) -> None:
        """`weights` [T]: how much each row counts, 0 for padding."""
        weighted = rows if weights is None else rows * np.asarray(weights, dtype=np.float32)[:, None]
        total = weighted.sum(axis=1, dtype=np.float64)
        magnitude = np.abs(weighted)
        size = magnitude.sum(axis=1, dtype=np.float64)
        largest = magnitude.max(axis=1, initial=0.0).astype(np.float64)
        square = np.einsum("gtk,gtk->gk", weighted, rows, dtype=np.float64)
        self._sum = total if self._sum is None else self._sum + total
        self._size = size if self._size is None else self._size + size
        self._square = square if self._square is None else self._square + square
        self._largest = largest if self._largest is None else np.maximum(self._largest, largest)
        self.count += rows.shape[1] if weights is None else float(np.sum(weights, dtype=np.float64))

    @property
    def mean(self) -> Doubles:
        """[groups, K] mean x."""
        return _mean(self._sum, self.count)

    @property
    def abs_mean(self) -> Doubles:
        """[groups, K] mean |x|."""
        return _mean(self._size, self.count)

    @property
    def abs_max(self) -> Doubles:
        """[groups, K] largest |x| (times its weight)."""
        return _mean(self._largest, 1.0)

    @property
    def square_mean(self) -> Doubles:
        """[groups, K] mean x^2, the diagonal of the Gram matrix."""
        return _mean(self._square, self.count)


class Gram:
    """X^T X / rows of rows [groups, T, K]: float32 products of a thousand rows at a time, float64 sums."""

    def __init__(self) -> None:
        self.count = 0.0
        self._sum: Doubles | None = None

    def add(self, rows: Array, weights: Array | None = None) -> None:
        """`weights` [T]: how much each row counts, 0 for padding."""
        groups, num_rows, num_inputs = rows.shape
        if self._sum is None:
            self._sum = np.zeros((groups, num_inputs, num_inputs))
        for start in range(0, num_rows, _GEMM_ROWS):
            part = np.asarray(rows[:, start : start + _GEMM_ROWS], dtype=np.float32)
            if weights is not None:
                part = part * np.sqrt(np.asarray(weights[start : start + _GEMM_ROWS], dtype=np.float32))[:, None]
            with np.errstate(over="ignore", invalid="ignore"):  # whoever needs the sums refuses infinite ones
                self._sum += part.transpose(0, 2, 1) @ part
        self.count += num_rows if weights is None else float(np.sum(weights, dtype=np.float64))

    def result(self) -> Doubles:
        """[groups, K, K], symmetric."""
        gram = _mean(self._sum, self.count)
        for start in range(0, gram.shape[1], _GEMM_ROWS):  # by strips: a wide layer's would fill gigabytes three times
            end = start + _GEMM_ROWS
            with np.errstate(invalid="ignore"):  # infinities of either sign
                strip = (gram[:, start:end, start:] + gram[:, start:, start:end].transpose(0, 2, 1)) / 2
            gram[:, start:end, start:] = strip
            gram[:, start:, start:end] = strip.transpose(0, 2, 1)
        return gram


class RowSample:
    """At most `limit` rows, each row seen being kept with the same probability (reservoir sampling).

    The choice depends on the seed and on how many rows came before, not on how they were split into batches.
    """

    def __init__(self, limit: int = 256, seed: int = 0) -> None:
        if limit < 1:
            raise InputError(f"a row sample needs a limit of at least 1, got {limit}")
        self._limit = limit
        self._generator = np.random.Generator(np.random.PCG64(seed))
        self._rows: FloatArray | None = None
        self._seen = 0

    def add(self, rows: Array, weights: Array | None = None) -> None:
        """Rows [groups, T, K]; those of weight 0 are left out."""
        if weights is not None:
            rows = rows[:, np.asarray(weights) > 0]
        groups, num_rows, num_inputs = rows.shape
        if self._rows is None:
            self._rows = np.zeros((groups, self._limit, num_inputs), dtype=np.float32)
        fresh = min(max(self._limit - self._seen, 0), num_rows)
        self._rows[:, self._seen : self._seen + fresh] = rows[:, :fresh]
        # Row number n (from 1) takes the place of a random one with probability limit / n.
        numbers = self._seen + np.arange(fresh, num_rows) + 1
        places = (self._generator.random(numbers.size) * numbers).astype(np.int64)
        for source in np.flatnonzero(places < self._limit):
            self._rows[:, places[source]] = rows[:, fresh + source]
        self._seen += num_rows

    def result(self) -> FloatArray:
        """[groups, T, K] float32, T = min(limit, rows seen)."""
        if self._rows is None or self._seen == 0:
            raise InputError("no calibration row reached this layer; give the calibration at least one sample")
        return self._rows[:, : min(self._seen, self._limit)].copy()


def _mean(total: Doubles | None, count: float) -> Doubles:
    if total is None or count <= 0:
        raise InputError("no calibration row reached this layer; give the calibration at least one sample")
    return total / count
