"""The closest grid point under a small Gram matrix, exactly: enumeration of Schnorr and Euchner with branch and bound.

|R (values - targets)|^2 is a sum with one term for each input, and the term of input i needs only inputs i and later.
The last input is decided first, each tries its levels from the nearest outwards, and a branch ends as soon as its terms
exceed the best point known. All rows take their steps side by side; a limit on steps bounds the time, and the best
point seen by then counts (the first one is Babai's, where GPTQ ends).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quantkit.quantizers._gram import Doubles, Ints

_COMPACT = 64  # steps between looks at which rows are done
_LESS = 1 - 1e-12


@dataclass(frozen=True)
class Problem:
    """M rows of k inputs, the last one decided first.

    Attributes:
        targets: [M, k].
        factors: [groups, k, k] upper triangular R.
        owner: [M] which R each row has.
        scales: [M, k] of each weight.
        low, high: [M, k] smallest and largest level (code - zero_point), at whole steps from each other.
    """

    targets: Doubles
    factors: Doubles
    owner: Ints
    scales: Doubles
    low: Doubles
    high: Doubles


@dataclass(frozen=True)
class Closest:
    """Levels [M, k], |R (values - targets)|^2 [M], and whether no point is closer [M]."""

    levels: Doubles
    costs: Doubles
    proven: npt.NDArray[np.bool_]


def closest(problem: Problem, steps: int, levels: Doubles, costs: Doubles) -> Closest:
    """The closest points that `steps` steps find, starting from known levels [M, k] of these costs [M] (may be inf)."""
    found = Closest(levels.copy(), costs.copy(), np.zeros(costs.size, dtype=bool))
    rows = np.arange(costs.size)
    search = _Search(problem, levels, costs)
    for step in range(1, steps + 1):
        search.step()
        if step % _COMPACT == 0 or step == steps:
            found.levels[rows], found.costs[rows] = search.best, search.costs
            found.proven[rows] = search.done
            rows, search = rows[~search.done], search.part(~search.done)
            if not rows.size:
                break
    return found


class _Search:
    """Where each row stands: the inputs above `depth` are decided, the one at `depth` tries its next level."""

    def __init__(self, problem: Problem, levels: Doubles, costs: Doubles) -> None:
        size = problem.targets.shape[1]
        diagonal = np.diagonal(problem.factors, axis1=1, axis2=2)
        unit = problem.factors / diagonal[:, :, None]
        unit[:, np.arange(size), np.arange(size)] = 0
        self.shared = (unit, diagonal**2)
        self.owner = problem.owner
        self.targets, self.scales, self.low, self.high = problem.targets, problem.scales, problem.low, problem.high
        self.best, self.costs = levels.copy(), costs.copy()
        self.depth = np.full(costs.size, size - 1)
        self.done = np.zeros(costs.size, dtype=bool)
        self.levels, self.centers, self.missing = (np.zeros_like(problem.targets) for _ in range(3))
        self.below, self.above = (np.zeros_like(problem.targets) for _ in range(2))
        self.partial = np.zeros((costs.size, size + 1))
        self._enter(np.arange(costs.size))

    def part(self, rows: npt.NDArray[np.bool_]) -> _Search:
        """The same search for some of its rows."""
        other = object.__new__(_Search)
        for name, value in vars(self).items():
            setattr(other, name, value if name == "shared" else value[rows])
        return other

    def step(self) -> None:
        """Each row that is not done goes one input deeper, or back to the next level of the input above."""
        rows = np.flatnonzero(~self.done)
        depth = self.depth[rows]
        level, scale = self.levels[rows, depth], self.scales[rows, depth]
        distance = level * scale - self.centers[rows, depth]
        cost = self.partial[rows, depth + 1] + self.shared[1][self.owner[rows], depth] * distance**2
        open_ = cost < self.costs[rows] * _LESS
        leaf, deeper = open_ & (depth == 0), open_ & (depth > 0)
        ends = rows[leaf]
        self.best[ends], self.costs[ends] = self.levels[ends], cost[leaf]
        down = rows[deeper]
        self.partial[down, depth[deeper]] = cost[deeper]
        self.missing[down, depth[deeper]] = self.targets[down, depth[deeper]] - (level * scale)[deeper]
        self.depth[down] -= 1
        self._enter(down)
        self._leave(rows[~deeper])

    def _enter(self, rows: Ints) -> None:
        """The nearest level first."""
        depth = self.depth[rows]
        moved = np.einsum("mk,mk->m", self.shared[0][self.owner[rows], depth], self.missing[rows])
        center = self.targets[rows, depth] + moved
        low, high = self.low[rows, depth], self.high[rows, depth]
        level = np.clip(np.rint(center / self.scales[rows, depth] - low) + low, low, high)
        self.centers[rows, depth], self.levels[rows, depth] = center, level
        self.below[rows, depth], self.above[rows, depth] = level - 1, level + 1

    def _leave(self, rows: Ints) -> None:
        """Back to the input decided before, and on to its next level."""
        self.depth[rows] += 1
        over = self.depth[rows] == self.targets.shape[1]
        self.done[rows[over]] = True
        rows = rows[~over]
        depth = self.depth[rows]
        center = self.centers[rows, depth] / self.scales[rows, depth]
        below, above = self.below[rows, depth], self.above[rows, depth]
        down = np.where(below >= self.low[rows, depth], center - below, np.inf)
        up = np.where(above <= self.high[rows, depth], above - center, np.inf)
        lower = down < up
        # No level left: an infinite one costs too much, which leads further back.
        self.levels[rows, depth] = np.where(lower, below, np.where(np.isfinite(up), above, np.inf))
        self.below[rows, depth] = below - lower
        self.above[rows, depth] = above + ~lower
