"""Grid and codes of one group at once: several scales and zero points are tried, the best is kept row by row.

The group's part of the layer error is |R (values - targets)|^2, where the targets already make up for the errors of the
other groups. Each candidate grid is filled by `nearest_plane` and its scale then set by least squares for those levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import cholesky, solve_triangular

from quantkit.quantizers import _grid
from quantkit.quantizers._gram import Columns, Doubles, Ints, Rows, add_effect, nearest_plane

_CHUNK = 1 << 17  # levels tried at once: 1 MiB for each of a few float64 arrays, so that they stay in the cache
_MIN_COLUMNS = 512  # but enough of them side by side for matrix products to be fast
_WIDE = (1.0, 0.8, 0.9, 0.95, 1.05, 1.1)  # scales tried first, as multiples of the one at hand
_NARROW = (1.0, 0.93, 0.97, 1.03, 1.07)  # then around the best of these
_AROUND = (1.0, 0.9, 0.95, 1.07)  # and whenever the other groups have changed
_GAIN = 1 - 1e-9  # an error must fall by more than rounding noise to count


@dataclass(frozen=True)
class Group:
    """The inputs of one group.

    Attributes:
        inputs: where they are.
        order: [k] their order in `factor`, counted from the first; the last one is decided first.
        factor: R of the group, [k, k] upper triangular.
    """

    inputs: slice
    order: Ints
    factor: Doubles


@dataclass(frozen=True)
class Fitted:
    """The best grid of each row, with its levels (code - zero_point) [k, n] and what it costs; the rest is [n]."""

    levels: Doubles
    scales: Doubles
    zero_points: Doubles
    costs: Doubles


def fit(targets: Doubles, factor: Doubles, scales: Doubles, zero_points: Doubles, bits: int, half: bool) -> Fitted:
    """The best of C candidate grids for each of n rows: targets [k, n], scales and zero points [C, n]."""
    size, num_rows = targets.shape
    found = Fitted(np.empty_like(targets), np.empty(num_rows), np.empty(num_rows), np.empty(num_rows))
    step = -(-max(_CHUNK // size, _MIN_COLUMNS) // scales.shape[0])
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        part = _fit(targets[:, rows], factor, scales[:, rows], zero_points[:, rows], bits, half)
        found.levels[:, rows] = part.levels
        found.scales[rows], found.zero_points[rows], found.costs[rows] = part.scales, part.zero_points, part.costs
    return found


def _fit(targets: Doubles, factor: Doubles, scales: Doubles, zero_points: Doubles, bits: int, half: bool) -> Fitted:
    """Candidates are filled and compared in float32, in units of each row's first scale; the cost returned is exact."""
    count, num_rows = scales.shape
    base, every = scales[0], np.arange(num_rows)
    zeros = zero_points.reshape(-1).astype(np.float32)
    limits = (-zeros, np.float32(2.0**bits - 1) - zeros)
    units = (targets / base).astype(np.float32)
    steps = (scales / base).astype(np.float32).reshape(-1)
    single = (factor / np.abs(factor).max()).astype(np.float32)
    levels = nearest_plane(np.tile(units, count), single, steps, limits, midrise=bits == 1)
    seen = (single @ levels).reshape(-1, count, num_rows)
    aimed = single @ units
    power = np.einsum("kcn,kcn->cn", seen, seen)
    match = np.einsum("kcn,kn->cn", seen, aimed)
    ideal = np.where(match > 0, match / np.where(power > 0, power, 1), scales / base)
    stored = _grid.nearest_scales(ideal * base, half, scales)
    seen *= (stored / base).astype(np.float32)
    seen -= aimed[:, None]
    best = np.einsum("kcn,kcn->cn", seen, seen).argmin(axis=0)
    chosen = levels.reshape(-1, count, num_rows)[:, best, every].astype(np.float64)
    missed = factor @ (chosen * stored[best, every] - targets)
    costs = np.einsum("kn,kn->n", missed, missed)
    return Fitted(chosen, stored[best, every], zero_points[best, every], costs)


def candidates(
    scales: Doubles, zero_points: Doubles, factors: tuple[float, ...], bits: int, columns: Columns
) -> tuple[Doubles, Doubles]:
    """[C, n] grids around those of each row: finer and coarser ones, and one code up and down where that is free."""
    grids = [(_grid.nearest_scales(scales * factor, columns.half, scales), zero_points) for factor in factors]
    if not columns.symmetric and bits > 1:
        grids += [(scales, np.clip(zero_points + shift, 0, 2.0**bits - 1)) for shift in (-1, 1)]
    return np.stack([grid[0] for grid in grids]), np.stack([grid[1] for grid in grids])


def make_groups(matrix: Doubles, columns: Columns, act_order: bool) -> list[Group]:
    """Each group with its own factor; inputs of large mean square are decided first, or all in their order."""
    groups = []
    for inputs in columns.slices:
        part = matrix[inputs, inputs]
        order = _first_last(np.diagonal(part), act_order)
        groups.append(Group(inputs, order, cholesky(part[np.ix_(order, order)], check_finite=False)))
    return groups


def _first_last(sizes: Doubles, act_order: bool) -> Ints:
    """Numbers so that what is decided first comes last."""
    return np.argsort(sizes, kind="stable") if act_order else np.arange(sizes.size)[::-1]


@dataclass(frozen=True)
class Sequence:
    """All groups one after the other: `groups` as they follow in `factor` [K, K]; the last one is decided first."""

    groups: Ints
    factor: Doubles


def make_sequence(matrix: Doubles, groups: list[Group], act_order: bool) -> Sequence:
    if len(groups) == 1:
        return Sequence(np.zeros(1, dtype=np.int64), groups[0].factor)
    sizes = np.array([np.diagonal(matrix)[group.inputs].mean() for group in groups])
    order = _first_last(sizes, act_order)
    inputs = np.concatenate([groups[number].order + groups[number].inputs.start for number in order])
    return Sequence(order, cholesky(matrix[np.ix_(inputs, inputs)], overwrite_a=True, check_finite=False))


def fit_in_sequence(
    state: Rows, columns: Columns, groups: list[Group], sequence: Sequence, covering: tuple[Doubles, Doubles]
) -> None:
    """GPTQ by groups: each gets the grid that suits it best after the inputs decided before have moved it.

    Grids tried are those around the state's, and covering ones, [G, n] scales and zero points. `state.slope` is left
    for the caller to compute.
    """
    stop = state.weight.shape[0]
    missing = np.empty_like(state.weight)  # weight - values, in the order of the sequence
    for number in sequence.groups[::-1]:
        group, bits = groups[number], columns.bits[number]
        start = stop - group.order.size
        factor = sequence.factor[start:stop, start:stop]
        targets = state.weight[group.inputs][group.order]
        if stop < missing.shape[0]:
            moved = sequence.factor[start:stop, stop:] @ missing[stop:]
            targets = targets + solve_triangular(factor, moved, overwrite_b=True, check_finite=False)
        scales, zero_points = candidates(state.scales[number], state.zero_points[number], _WIDE, bits, columns)
        scales = np.concatenate([scales, covering[0][number][None]])
        zero_points = np.concatenate([zero_points, covering[1][number][None]])
        found = fit(targets, factor, scales, zero_points, bits, columns.half)
        finer = candidates(found.scales, found.zero_points, _NARROW, bits, columns)
        found = _better(found, fit(targets, factor, *finer, bits, columns.half))
        every = np.ones(found.scales.shape, dtype=bool)
        place(state, number, group, found, every)
        values = found.levels * found.scales
        missing[start:stop] = state.weight[group.inputs][group.order] - values
        state.values[group.inputs] = values[np.argsort(group.order)]
        stop = start


def _better(first: Fitted, second: Fitted) -> Fitted:
    """The cheaper one of each row."""
    take = second.costs < first.costs
    names = ("levels", "scales", "zero_points", "costs")
    return Fitted(*(np.where(take, getattr(second, name), getattr(first, name)) for name in names))


def refit_groups(matrix: Doubles, state: Rows, columns: Columns, groups: list[Group]) -> None:
    """Fit each group in turn, the others as they are; a row's group changes only where E falls."""
    for number, group in enumerate(groups):
        order, factor, bits = group.order, group.factor, columns.bits[number]
        values = state.values[group.inputs][order]
        # R (values - targets) = R^-T slope: where the slope would be zero if nothing needed rounding.
        missed = solve_triangular(factor, state.slope[group.inputs][order], trans=1, check_finite=False)
        targets = values - solve_triangular(factor, missed, check_finite=False)
        tried = candidates(state.scales[number], state.zero_points[number], _AROUND, bits, columns)
        found = fit(targets, factor, *tried, bits, columns.half)
        better = found.costs < np.einsum("kn,kn->n", missed, missed) * _GAIN
        place(state, number, group, found, better)
        moves = np.where(better, found.levels * found.scales - values, 0)[np.argsort(order)]
        state.values[group.inputs] += moves
        add_effect(state.slope, matrix[group.inputs], moves, better)


def place(state: Rows, number: int, group: Group, found: Fitted, better: npt.NDArray[np.bool_]) -> None:
    """Write a group's new grid and codes into the rows `better` [n]; values and slope are the caller's."""
    back = np.argsort(group.order)
    codes = (found.levels + found.zero_points)[back]
    state.codes[group.inputs] = np.where(better, codes, state.codes[group.inputs])
    state.scales[number] = np.where(better, found.scales, state.scales[number])
    state.zero_points[number] = np.where(better, found.zero_points, state.zero_points[number])
