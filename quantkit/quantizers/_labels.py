"""Widths for the groups of one matrix that keep its average width: exact for small problems, local search for others.

A labelling names a level for every group. Its error is the sum of terms[g, a, h, b] over all pairs of groups, a and b
being their levels: with errors D_g = W_g - Q_g and the Gram matrix H of the inputs, tr(D H D^T) is exactly the sum of
the terms tr(D_g H_gh D_h^T), so every labelling can be scored without quantizing again. It is balanced when

    sum_g  width_g * (level of g - bits asked for) = 0

which counts by columns: the average is exact, a shorter last group included.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from quantkit.types import Array

Labels = tuple[int, ...]
ENUMERABLE = 20_000
"""Labellings that are tried one by one; beyond, local search takes over."""
_GAIN = 1e-12  # of the error of the start; smaller improvements are rounding


@dataclass(frozen=True)
class Labelling:
    """What may be chosen and what it costs.

    Attributes:
        terms: [G, L, G, L] float64, symmetric in (group, level) pairs.
        balance: [G, L] int64, columns of the group times (level - bits asked for); 0 = nothing changes.
    """

    terms: npt.NDArray[np.float64]
    balance: npt.NDArray[np.int64]

    @property
    def neutral(self) -> Labels:
        """Every group at the width asked for."""
        return tuple(int(index) for index in np.argmin(np.abs(self.balance), axis=1))

    def error(self, labels: Labels) -> float:
        groups = np.arange(len(labels))
        return float(self.terms[groups[:, None], np.array(labels)[:, None], groups, np.array(labels)].sum())

    def best(self, starts: Iterable[Labels] = ()) -> Labels:
        """The balanced labelling of least error: of all where they can be counted, else the best that is found."""
        if self.balance.shape[1] ** self.balance.shape[0] <= ENUMERABLE:
            return self._enumerated()
        found = [self.improved(start) for start in dict.fromkeys((self.neutral, self._linear(), *starts))]
        return min(found, key=self.error)

    def _enumerated(self) -> Labels:
        num_groups, num_levels = self.balance.shape
        every = np.array(list(product(range(num_levels), repeat=num_groups)))
        groups = np.arange(num_groups)
        every = every[self.balance[groups, every].sum(axis=1) == 0]
        chosen = np.eye(num_levels)[every].reshape(len(every), -1)
        matrix = self.terms.reshape(num_groups * num_levels, -1)
        errors = np.einsum("ij,ij->i", chosen @ matrix, chosen)
        neutral = self.neutral
        best = tuple(int(level) for level in every[np.argmin(errors)])
        return best if self.error(best) < self.error(neutral) else neutral

    def _linear(self) -> Labels:
        """The best labelling of the error's slope at the neutral one."""
        groups = np.arange(len(self.balance))
        neutral = np.array(self.neutral)
        own = np.diagonal(self.terms.reshape(self.balance.size, -1)).reshape(self.balance.shape)
        toward = self.terms[:, :, groups, neutral]  # [G, L, G]
        others = toward.sum(axis=2) - toward[groups, :, groups]
        return separable(own + 2 * others, self.balance)

    def improved(self, labels: Labels) -> Labels:
        """Change the levels of two groups at once, always by the best pair, until no pair helps."""
        current = np.array(labels)
        num_groups, num_levels = self.balance.shape
        groups = np.arange(num_groups)
        flat = self.terms.reshape(num_groups * num_levels, -1)
        least = _GAIN * max(self.error(labels), np.finfo(float).tiny)
        own = np.diagonal(flat)
        group_of = np.repeat(groups, num_levels)
        while True:
            here = groups * num_levels + current
            pull = flat[:, here].sum(axis=1)  # of all groups as they stand, on every (group, level)
            before = flat[here][:, here]
            # Change of one group alone: its own term, and twice those with the others.
            inside = flat[np.arange(len(flat)), np.repeat(here, num_levels)]
            stays = np.repeat(pull[here] * 2 - np.diagonal(before), num_levels)
            alone = own + 2 * (pull - inside) - stays
            across = flat - flat[:, here].repeat(num_levels, axis=1)
            across -= flat[here].repeat(num_levels, axis=0) - before.repeat(num_levels, 0).repeat(num_levels, 1)
            shift = (self.balance - self.balance[groups, current][:, None]).reshape(-1)
            allowed = (shift[:, None] + shift == 0) & (group_of[:, None] != group_of)
            gain = np.where(allowed, alone[:, None] + alone + 2 * across, np.inf)
            place = int(np.argmin(gain))
            if not gain.flat[place] < -least:
                return tuple(int(level) for level in current)
            for move in divmod(place, len(flat)):
                current[move // num_levels] = move % num_levels


def separable(costs: Array, balance: Array) -> Labels:
    """The balanced labelling of least sum of costs[g, level]: dynamic programming over the balance so far.

    Args:
        costs: [G, L].
        balance: [G, L] whole numbers, with a 0 in every row.
    """
    steps = balance // max(int(np.gcd.reduce(np.abs(balance), axis=None)), 1)
    low, high = int(steps.min(axis=1).sum()), int(steps.max(axis=1).sum())
    size = high - low + 1
    best = np.full(size, np.inf)
    best[-low] = 0
    taken = np.zeros((len(steps), size), dtype=np.int8)
    for group, row in enumerate(steps):
        following = np.full(size, np.inf)
        for level in np.argsort(np.abs(row), kind="stable"):  # of equal costs, the level nearest to the one asked for
            step = int(row[level])
            moved = np.full(size, np.inf)
            moved[max(step, 0) : size + min(step, 0)] = best[max(-step, 0) : size - max(step, 0)]
            moved += costs[group, level]
            better = moved < following
            following[better] = moved[better]
            taken[group, better] = level
        best = following
    place, labels = -low, []
    for group in range(len(steps) - 1, -1, -1):
        level = int(taken[group, place])
        labels.append(level)
        place -= int(steps[group, level])
    return tuple(reversed(labels))


def swept(salience: Array, levels: Sequence[int], bits: int, whole: int) -> list[Labels]:
    """The authors' labellings: the least salient groups one level down, as much of the most salient one level up.

    Args:
        salience: [G].
        levels: widths, ascending, `bits` among them.
        bits: the width asked for.
        whole: groups of full length; a shorter last one keeps its width, for nothing could balance it.
    """
    home = levels.index(bits)
    if not 0 < home < len(levels) - 1:
        return []
    down, up = bits - levels[home - 1], levels[home + 1] - bits
    common = int(np.gcd(down, up))
    down, up = down // common, up // common
    order = np.argsort(np.asarray(salience)[:whole], kind="stable")
    found = []
    for count in range(1, whole // (down + up) + 1):
        labels = np.full(len(salience), home)
        labels[order[: count * up]] = home - 1
        labels[order[whole - count * down :]] = home + 1
        found.append(tuple(int(level) for level in labels))
    return found
