"""Rounding against the Gram matrix of a layer's inputs: what every quantizer that reads `gram` shares.

The error of a row is E = d H d^T with d = quantized - weight and H = X^T X / rows: the mean square of the error of the
layer's output. Inside, matrices are transposed, [K, n]: one input of all rows is then one contiguous vector. H is
factored as R^T R, R upper triangular, so that E = |R d|^2 and inputs can be decided one by one, the last one first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.linalg import LinAlgError, cholesky
from scipy.linalg.blas import dgemm

from quantkit.errors import InputError
from quantkit.quantizers import _grid
from quantkit.types import Array, FloatArray, LayerStats, QuantizedWeight, QuantSpec

Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

BLOCK = 64
"""Inputs decided one by one before a matrix product carries their effect to all others."""

ROW_ELEMENTS = 1 << 21  # weights of the rows handled at once: 16 MiB for each of a handful of float64 arrays
_TRIES = 40
_STAY = 1 - 1e-9  # a code moves only if it is nearer by more than rounding noise, so that ties cannot alternate
_FEW = 0.7  # rows still moving, as a share, below which the others are set aside
_SPARSE = 0.2  # below this share of rows it pays to pick them out of the matrix


@dataclass(frozen=True)
class Columns:
    """How the K inputs fall into groups.

    Attributes:
        group: [K] group of each input.
        high: [K] largest code of each input.
        slices: [G] inputs of each group.
        bits: [G] width of each group.
        symmetric: zero points stay in the middle.
        half: scales must be exact in float16.
    """

    group: Ints
    high: Doubles
    slices: tuple[slice, ...]
    bits: tuple[int, ...]
    symmetric: bool
    half: bool


@dataclass
class Rows:
    """Some rows of a weight and how they are quantized at the moment; transposed, and changed in place.

    Attributes:
        weight, values, slope: [K, n]; values = scale * (code - zero_point), slope = H @ (values - weight).
        codes: [K, n], whole numbers.
        scales, zero_points: [G, n].
    """

    weight: Doubles
    codes: Doubles
    scales: Doubles
    zero_points: Doubles
    values: Doubles
    slope: Doubles

    @property
    def errors(self) -> Doubles:
        """[n] E of every row."""
        found: Doubles = np.einsum("kn,kn->n", self.values - self.weight, self.slope)
        return found

    def copy(self) -> Rows:
        return Rows(*(getattr(self, name).copy() for name in Rows.__annotations__))

    def take(self, other: Rows, rows: npt.NDArray[np.bool_]) -> None:
        """Copy the rows [n] that are True from the other."""
        for name in Rows.__annotations__:
            np.copyto(getattr(self, name), getattr(other, name), where=rows)


def columns_of(spec: QuantSpec, num_inputs: int, half: bool) -> Columns:
    width, widths = spec.group_width(num_inputs), spec.widths(num_inputs)
    group = np.arange(num_inputs) // width
    slices = tuple(slice(start, min(start + width, num_inputs)) for start in range(0, num_inputs, width))
    bits = tuple(int(bits) for bits in widths)
    high = (2.0 ** widths[group] - 1).astype(np.float64)
    return Columns(group, high, slices, bits, spec.symmetric, half)


def usable_gram(stats: LayerStats | None, shape: tuple[int, int]) -> Doubles | None:
    """[groups, K, K] of the statistics, or None when there is none.

    Raises:
        InputError: the gram has another shape, a value that is not finite, or does not divide the rows.
    """
    if stats is None or stats.gram is None:
        return None
    gram = np.asarray(stats.gram, dtype=np.float64)
    if gram.ndim != 3 or gram.shape[1:] != (shape[1], shape[1]) or gram.shape[0] == 0 or shape[0] % gram.shape[0]:
        raise InputError(
            f"a gram for a weight {list(shape)} must be [groups, {shape[1]}, {shape[1]}] with groups dividing "
            f"{shape[0]}, got {list(gram.shape)}; collect the statistics of this layer again"
        )
    if not np.isfinite(gram).all():
        raise InputError("the gram holds NaN or infinity; check the calibration data's preprocessing")
    return gram


def damped(gram: Doubles, share: float) -> Doubles:
    """The Gram [K, K] with share * (mean root of its diagonal)^2 added to the diagonal.

    That is the mean of the diagonal where all inputs are alike; a few huge ones raise it less. The share is raised
    until the matrix can be factored. A Gram of zeros becomes the identity: all inputs alike.
    """
    size = float(np.mean(np.sqrt(np.maximum(np.diagonal(gram), 0)))) ** 2
    if size == 0:
        return np.eye(gram.shape[0])
    for _ in range(_TRIES):
        matrix = gram.copy()
        matrix[np.diag_indices_from(matrix)] += share * size
        with suppress(LinAlgError):
            cholesky(matrix, check_finite=False)
            return matrix
        share = max(10 * share, 1e-8)
    raise InputError("the gram cannot be factored: it is not the product of any data with itself; collect it again")


def row_errors(weight: FloatArray, values: FloatArray, gram: Doubles) -> Doubles:
    """[N] E of every row; gram [groups, K, K], rows in as many equal parts."""
    errors = np.empty(weight.shape[0])
    for group in range(gram.shape[0]):
        for rows in rows_of_group(weight.shape, gram.shape[0], group):
            difference = values[rows].astype(np.float64) - weight[rows]
            errors[rows] = np.einsum("nk,nk->n", difference @ gram[group], difference)
    return errors


def rows_of_group(shape: tuple[int, ...], groups: int, group: int) -> Iterator[slice]:
    """The rows that read one Gram of several, in parts of about ROW_ELEMENTS weights."""
    size = shape[0] // groups
    for part in _grid.row_chunks((size, shape[1]), ROW_ELEMENTS):
        yield slice(group * size + part.start, group * size + part.stop)


def best_rows(weight: FloatArray, gram: Doubles, candidates: list[QuantizedWeight]) -> QuantizedWeight:
    """Each row from the candidate with the smallest E, the first one where they are equal; grids of one kind."""
    best = candidates[0]
    least = row_errors(weight, best.dequantize(), gram)
    for other in candidates[1:]:
        errors = row_errors(weight, other.dequantize(), gram)
        better = (errors < least)[:, None]
        least = np.minimum(errors, least)
        best = replace(
            best,
            codes=np.where(better, other.codes, best.codes),
            scales=np.where(better, other.scales, best.scales),
            zero_points=np.where(better, other.zero_points, best.zero_points),
        )
    return best


def open_rows(weight: FloatArray, quantized: QuantizedWeight, rows: slice, columns: Columns, matrix: Doubles) -> Rows:
    """These rows of a quantized weight, ready to be improved."""
    codes = np.array(quantized.codes[rows].T, dtype=np.float64, order="C")
    scales = np.array(quantized.scales[rows].T, dtype=np.float64, order="C")
    zero_points = np.array(quantized.zero_points[rows].T, dtype=np.float64, order="C")
    exact = np.array(weight[rows].T, dtype=np.float64, order="C")
    values = (codes - zero_points[columns.group]) * scales[columns.group]
    return Rows(exact, codes, scales, zero_points, values, matrix @ (values - exact))


def descend(matrix: Doubles, state: Rows, columns: Columns, sweeps: int) -> None:
    """Coordinate descent on codes (COMQ, arXiv 2403.07134): each code in turn goes where E is smallest.

    E never rises. Unless `sweeps` ends it, no change of a single code lowers E any more: rows that a sweep left as
    they were are done.
    """
    index = np.arange(state.codes.shape[1])
    work = state
    for _ in range(sweeps):
        moving = _sweep(matrix, work, columns)
        if moving.size < _FEW * index.size:
            if work is not state:
                _put_back(state, work, index)
            index = index[moving]
            if not index.size:
                return
            work = Rows(*(np.ascontiguousarray(getattr(state, name)[:, index]) for name in Rows.__annotations__))
    if work is not state:
        _put_back(state, work, index)


def _put_back(state: Rows, work: Rows, index: Ints) -> None:
    for name in ("codes", "values", "slope"):
        getattr(state, name)[:, index] = getattr(work, name)


def _sweep(matrix: Doubles, state: Rows, columns: Columns) -> Ints:
    """One pass over the inputs; the rows in which a code changed."""
    diagonal = np.diagonal(matrix)
    inverse = np.where(diagonal > 0, -_STAY / np.where(diagonal > 0, diagonal, 1), 0)
    num_inputs, num_rows = state.codes.shape
    changed = np.zeros(num_rows, dtype=bool)
    moves = np.empty((min(BLOCK, num_inputs), num_rows))
    for start in range(0, num_inputs, BLOCK):
        stop = min(start + BLOCK, num_inputs)
        for i in range(start, stop):
            scale, codes = state.scales[columns.group[i]], state.codes[i]
            step = matrix[i, start:i] @ moves[: i - start]
            step += state.slope[i]
            step *= inverse[i]
            step /= scale
            step += codes
            np.rint(step, out=step)
            np.maximum(step, 0, out=step)
            np.minimum(step, columns.high[i], out=step)
            step -= codes
            codes += step
            np.multiply(step, scale, out=moves[i - start])
        block = moves[: stop - start]
        moving = np.any(block != 0, axis=0)
        changed |= moving
        state.values[start:stop] += block
        add_effect(state.slope, matrix[start:stop], block, moving)
    return np.flatnonzero(changed)


def add_effect(slope: Doubles, matrix: Doubles, moves: Doubles, moving: npt.NDArray[np.bool_]) -> None:
    """slope [K, n] += matrix [k, K].T @ moves [k, n], in place; moves are 0 but in the rows `moving` [n]."""
    rows = np.flatnonzero(moving)
    if not rows.size:
        return
    if rows.size < _SPARSE * moving.size:
        slope[:, rows] += matrix.T @ moves[:, rows]
    else:  # transposed views are what BLAS takes without a copy, and adds to
        dgemm(1.0, moves.T, matrix.T, beta=1.0, c=slope.T, trans_b=True, overwrite_c=True)


def nearest_plane(
    targets: Array, factor: Array, scales: Array, limits: tuple[Array, Array], midrise: bool = False
) -> Array:
    """Levels (code - zero_point) [k, m] decided one input after the other, the last one first (GPTQ, Babai).

    After each decision the inputs still open move to where they make up for its error best: the minimum of
    |R (levels * scales - targets)|^2 over them, as if they need not be rounded. All arrays are of one float type.

    Args:
        targets: [k, m].
        factor: R, [k, k] upper triangular.
        scales: [m] of every column of targets.
        limits: smallest and largest level, [m] each.
        midrise: levels are -0.5 and 0.5 (1 bit) instead of whole numbers.
    """
    size = targets.shape[0]
    unit = factor / np.diagonal(factor)[:, None]
    errors = np.empty_like(targets)  # what is missing to the target, of the inputs decided
    levels = np.empty_like(targets)
    inverse = 1 / scales
    for stop in range(size, 0, -BLOCK):
        start = max(stop - BLOCK, 0)
        aims = targets[start:stop] + unit[start:stop, stop:] @ errors[stop:]
        for i in range(stop - 1, start - 1, -1):
            level = levels[i]
            np.matmul(unit[i, i + 1 : stop], errors[i + 1 : stop], out=level)
            level += aims[i - start]
            level *= inverse
            if midrise:
                np.floor(level, out=level)
                level += 0.5
            else:
                np.rint(level, out=level)
            np.maximum(level, limits[0], out=level)
            np.minimum(level, limits[1], out=level)
            np.multiply(level, scales, out=errors[i])
            np.subtract(targets[i], errors[i], out=errors[i])
    return levels
