"""Layers of few inputs, such as depthwise convolutions: grids by search, codes by the exact closest point.

Here a Gram may belong to a single row, so everything runs over all rows at once, [N, K], each with its own Gram.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.linalg import cholesky

from quantkit.quantizers import _grid
from quantkit.quantizers._closest import Problem, closest
from quantkit.quantizers._gram import Columns, Doubles, Ints, columns_of, damped
from quantkit.types import FloatArray, QuantizedWeight

EXACT_INPUTS = 27
"""Inputs, a 3 x 3 kernel over 3 channels, up to which the exact search pays for any layer."""

STEPS = 1000
"""Steps of the exact search: enough to prove nearly all rows of 9 inputs, and a third of those of 27."""

_MOST_INPUTS, _FEW_ROWS = 64, 8  # a Gram for so few rows is not worth a run of its own
_TRIAL_STEPS = 4  # times the inputs, for a grid that is only tried
_WIDE = (1.0, 0.9, 0.8, 0.7, 0.6, 1.1)
_AROUND = (0.97, 1.03, 0.93, 1.07)
_LESS = 1 - 1e-9


@dataclass(frozen=True)
class Rows:
    """Quantized rows: codes [N, K], scales and zero points [N, G], E [N]."""

    codes: Doubles
    scales: Doubles
    zero_points: Doubles
    errors: Doubles

    def better(self, other: Rows) -> Rows:
        """Each row from the one with the smaller E."""
        take = other.errors < self.errors * _LESS
        pairs = ((getattr(self, name), getattr(other, name)) for name in Rows.__annotations__)
        return Rows(*(np.where(take if mine.ndim == 1 else take[:, None], its, mine) for mine, its in pairs))


class Solver:
    """All rows of a layer with their Grams.

    Args:
        weight: [N, K].
        matrices: [groups, K, K], each of which can be factored; N / groups rows have one in common.
    """

    def __init__(self, weight: FloatArray, matrices: Doubles, columns: Columns) -> None:
        self._weight = weight.astype(np.float64)
        self._matrices, self._columns = matrices, columns
        self._owner: Ints = np.arange(weight.shape[0]) * matrices.shape[0] // weight.shape[0]
        orders = np.argsort(np.diagonal(matrices, axis1=1, axis2=2), axis=1, kind="stable")
        parts = [matrix[np.ix_(order, order)] for matrix, order in zip(matrices, orders, strict=True)]
        self._factors = np.stack([cholesky(part, check_finite=False) for part in parts])
        self._order = orders[self._owner]

    def errors(self, values: Doubles) -> Doubles:
        difference = values - self._weight
        found: Doubles = np.einsum("nk,nk->n", self._slopes(difference), difference)
        return found

    def _slopes(self, difference: Doubles) -> Doubles:
        parts = difference.reshape(self._matrices.shape[0], -1, difference.shape[1])
        return (parts @ self._matrices).reshape(difference.shape)

    def state(self, codes: Doubles, scales: Doubles, zero_points: Doubles) -> Rows:
        group = self._columns.group
        values = (codes - zero_points[:, group]) * scales[:, group]
        return Rows(codes, scales, zero_points, self.errors(values))

    def search(self, start: Rows, rounds: int, covering: tuple[Doubles, Doubles]) -> Rows:
        """Grids around the start's and the covering one, then around the best, each with the codes that suit it."""
        best = start
        for scales, zero_points in ((start.scales, start.zero_points), covering):
            best = self._try(best, scales, zero_points, _WIDE)
        for _ in range(rounds):
            before = best.errors.sum()
            best = self._try(best, best.scales, best.zero_points, _AROUND)
            if best.errors.sum() >= before * _LESS:
                break
        return self.finish(best)

    def finish(self, best: Rows) -> Rows:
        """The closest codes on the grids that were found."""
        found = self._closest(best, best.scales, best.zero_points, STEPS)
        return self.state(self._descended(best.better(found)), best.scales, best.zero_points)

    def _try(self, best: Rows, scales: Doubles, zero_points: Doubles, factors: tuple[float, ...]) -> Rows:
        half, steps = self._columns.half, _TRIAL_STEPS * self._weight.shape[1]
        grids = [(_grid.nearest_scales(scales * factor, half, scales), zero_points) for factor in factors]
        high = 2.0 ** np.array(self._columns.bits) - 1
        if not self._columns.symmetric:
            shifts = [np.where(high > 1, np.clip(zero_points + shift, 0, high), zero_points) for shift in (-1, 1)]
            grids += [(scales, shifted) for shifted in shifts]
        for tried_scales, tried_zeros in grids:
            best = best.better(self._closest(best, tried_scales, tried_zeros, steps))
        refitted = self._least_squares(best)
        return best.better(self.state(best.codes, refitted, best.zero_points))

    def _closest(self, best: Rows, scales: Doubles, zero_points: Doubles, steps: int) -> Rows:
        """Codes for these grids where they beat the best known E; elsewhere E is infinite."""
        group = self._columns.group
        zeros = zero_points[:, group]
        problem = Problem(
            targets=self._sorted(self._weight),
            factors=self._factors,
            owner=self._owner,
            scales=self._sorted(scales[:, group]),
            low=self._sorted(-zeros),
            high=self._sorted(self._columns.high - zeros),
        )
        nothing = np.zeros_like(self._weight)
        found = closest(problem, steps, nothing, best.errors)
        levels = np.empty_like(nothing)
        np.put_along_axis(levels, self._order, found.levels, axis=1)
        state = self.state(np.clip(levels + zeros, 0, self._columns.high), scales, zero_points)
        return replace(state, errors=np.where(found.costs < best.errors, state.errors, np.inf))

    def _sorted(self, values: Doubles) -> Doubles:
        return np.take_along_axis(values, self._order, axis=1)

    def _least_squares(self, state: Rows) -> Doubles:
        """[N, G] the scales that suit the codes best, as they can be stored."""
        group, count = self._columns.group, state.scales.shape[1]
        levels = state.codes - state.zero_points[:, group]
        spread = levels[:, :, None] * (group[:, None] == np.arange(count))  # [N, K, G]
        seen = self._matrices[self._owner] @ spread
        power = spread.transpose(0, 2, 1) @ seen
        match = np.einsum("nkg,nk->ng", seen, self._weight)
        power += (1e-9 * np.trace(power, axis1=1, axis2=2) + np.finfo(np.float64).tiny)[:, None, None] * np.eye(count)
        ideal = np.linalg.solve(power, match[:, :, None])[:, :, 0]
        return _grid.nearest_scales(ideal, self._columns.half, state.scales)

    def _descended(self, state: Rows) -> Doubles:
        """Codes that no single change improves: the best change of each row, as long as there is one."""
        group, codes = self._columns.group, state.codes.copy()
        scales, zeros = state.scales[:, group], state.zero_points[:, group]
        diagonal = np.diagonal(self._matrices, axis1=1, axis2=2)[self._owner]
        every = np.arange(codes.shape[0])
        while True:
            slopes = self._slopes((codes - zeros) * scales - self._weight)
            steps = np.rint(-slopes / (diagonal * scales) * _LESS)
            steps = np.clip(codes + steps, 0, self._columns.high) - codes
            moves = steps * scales
            gains = -(2 * slopes + diagonal * moves) * moves
            best = gains.argmax(axis=1)
            change = np.where(gains[every, best] > 0, steps[every, best], 0)
            if not change.any():
                return codes
            codes[every, best] += change


def many_grams(shape: tuple[int, ...], groups: int) -> bool:
    """True where rows with their own Grams are better handled all at once."""
    return shape[1] <= _MOST_INPUTS and shape[0] < _FEW_ROWS * groups


def refine(weight: FloatArray, quantized: QuantizedWeight, gram: Doubles) -> QuantizedWeight:
    """The same grids with the closest codes under `gram`, exact where the search gets to its end."""
    matrices = np.stack([damped(matrix, 0.0) for matrix in gram])
    solver = Solver(weight, matrices, columns_of(quantized.spec, weight.shape[1], half=False))
    arrays = (quantized.codes, quantized.scales, quantized.zero_points)
    found = solver.finish(solver.state(*(array.astype(np.float64) for array in arrays)))
    return replace(quantized, codes=found.codes.astype(np.uint8))
