"""One multiple-choice program, handed to HiGHS (scipy.optimize.milp) so that its tolerances do no harm.

HiGHS stops at absolute tolerances of 1e-6, so everything it sees is normalised:

    limits      amounts count from each unit's least, and the room that is left then is 1; whole numbers (bytes, bits)
                get half a step of slack, so that rounding neither loses nor admits a choice
    costs       count from each unit's cheapest option; the scale is what the best known answer costs above these, and
                options that alone cost more are out

An answer that exceeds a limit nevertheless (by less than 1e-6 of the room) is cut off and the program solved again.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryFile
from threading import Lock

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp

from quantkit.types import Array

Numbers = npt.NDArray[np.float64]
Joint = Mapping[tuple[int, int], Array]
"""(u, v) with u < v -> [K_u, K_v], at least 0: what two options cost together on top of what each costs alone."""

EXACT_UNITS = 300
"""Up to here answers are proven optimal; beyond, to LARGE_GAP."""
LARGE_GAP = 1e-6
ROUNDING = 1e-12
"""Relative to a limit's largest number: within this, a sum of floats meets it."""
ROOM = 1e3
"""What is left of a limit, in the eyes of the solver: it lets 1e-6 too much pass."""
TOLERANCE = 4e-6
"""More than HiGHS lets a limit be exceeded, relative to the numbers in it."""
OBJECTIVE = 1e3
"""What the best known answer costs in the solver's eyes, up to EXACT_UNITS: its absolute gap of 1e-6 is then 1e-9."""
SHRINKING = 0.1
"""Solve again when the answer costs less than this share of the scale."""
CUTS = 40
NOISE = b"Highs"
GOLDEN = 0.6180339887498949
_PRINTING = Lock()  # file descriptors belong to the process: two threads must not swap them at the same time


@dataclass(frozen=True)
class Row:
    """One limit, ready for comparison.

    Attributes:
        amounts: [U, K], infinite where a unit has no such option.
        bound: a whole number where `whole`.
        whole: all amounts are whole numbers: sums are compared exactly.
    """

    amounts: Numbers
    bound: float
    whole: bool

    @classmethod
    def of(cls, amounts: Numbers, bound: float) -> Row:
        known = amounts[np.isfinite(amounts)]
        whole = bool((known == np.round(known)).all()) and math.isfinite(bound)
        if whole and not float(bound).is_integer():
            bound = math.floor(bound + ROUNDING * abs(bound))
        return cls(amounts, bound, whole)

    @property
    def slack(self) -> float:
        """What the sum may be above the bound."""
        known = np.abs(self.amounts[np.isfinite(self.amounts)])
        return 0.0 if self.whole or not known.size else ROUNDING * float(known.max())

    def used(self, choice: Sequence[int]) -> float:
        """Sum of the chosen amounts, free of rounding for whole numbers."""
        chosen = self.amounts[np.arange(len(choice)), list(choice)].tolist()
        return float(sum(int(amount) for amount in chosen)) if self.whole else math.fsum(chosen)

    def holds(self, choice: Sequence[int]) -> bool:
        return self.used(choice) <= self.bound + self.slack


@dataclass(frozen=True)
class Program:
    """What is left to decide.

    Attributes:
        costs: [U, K] above each unit's cheapest option; infinite where an option is out.
        rows: limits that not every choice meets.
        joint: pair terms.
    """

    costs: Numbers
    rows: tuple[Row, ...]
    joint: Joint

    @property
    def kept(self) -> npt.NDArray[np.bool_]:
        return np.isfinite(self.costs)

    def cost(self, choice: Sequence[int]) -> float:
        """Above the cheapest options, pair terms included."""
        own = self.costs[np.arange(len(choice)), list(choice)].tolist()
        return math.fsum([*own, *(float(block[choice[u], choice[v]]) for (u, v), block in self.joint.items())])

    def holds(self, choice: Sequence[int]) -> bool:
        return all(row.holds(choice) for row in self.rows)

    def room(self, row: Row) -> tuple[Numbers, float]:
        """[U, K] amounts above each unit's least, and what is left for them."""
        amounts = np.where(self.kept, row.amounts, np.inf)
        least = amounts.min(axis=1)
        return amounts - least[:, None], row.bound - math.fsum(least.tolist())


def prepared(costs: Numbers, rows: Sequence[Row], joint: Joint) -> Program | None:
    """Without options that fit no limit or are as bad as another in every respect; None when nothing fits."""
    figures = np.stack([costs, *(row.amounts for row in rows)])
    kept = np.asarray(np.isfinite(figures).all(axis=0), np.bool_)
    over = np.ones_like(kept)
    while over.any():
        if not kept.any(axis=1).all():
            return None
        program = Program(np.where(kept, costs, np.inf), tuple(rows), joint)
        over = np.zeros_like(kept)
        for row in rows:
            above, room = program.room(row)
            if room < -row.slack:
                return None
            over |= kept & (above > room + row.slack)
        kept &= ~over
    if not joint:
        kept &= ~_dominated(program.costs, rows)
    left = np.where(kept, costs, np.inf)
    left -= left.min(axis=1)[:, None]
    program = Program(left, tuple(rows), joint)
    binding = []
    for row in rows:
        above, room = program.room(row)
        most = math.fsum(np.where(kept, above, 0).max(axis=1).tolist())
        if room > row.slack and most > room:
            binding.append(row)
    return Program(left, tuple(binding), joint)


def _dominated(costs: Numbers, rows: Sequence[Row]) -> npt.NDArray[np.bool_]:
    """[U, K] whether another option of the unit is as good in every figure; of equal ones the first stays."""
    figures = np.stack([costs, *(row.amounts for row in rows)])
    mine, other = figures[:, :, :, None], figures[:, :, None, :]  # [figure, u, option, another]
    no_worse, better = (other <= mine).all(axis=0), (other < mine).any(axis=0)
    earlier = np.tri(costs.shape[1], k=-1, dtype=np.bool_)[None]
    return np.asarray((no_worse & (better | earlier)).any(axis=2), np.bool_)


def solve(program: Program, start: list[int] | None) -> tuple[list[int] | None, float, bool]:
    """The cheapest choice, a bound on the cost of all, and whether HiGHS proved it.

    Args:
        start: a choice that holds; None = none is known.
    """
    best, bound, proven = start, 0.0, True
    scale = program.cost(start) if start is not None else _largest(program)
    while scale > 0:
        gap = 0.0 if len(program.costs) <= EXACT_UNITS else LARGE_GAP
        found, reached, proven = _Search(program, scale).run(gap)
        bound = max(bound, min(reached, math.inf if best is None else program.cost(best)))
        if found is not None and (best is None or program.cost(found) < program.cost(best)):
            best = found
        spent = 0.0 if best is None else program.cost(best)
        if not 0 < spent < SHRINKING * scale:
            break
        scale = spent
    if best is not None and proven and len(best) <= EXACT_UNITS and not program.joint:
        best = _settled(program, best)
    return best, bound, proven


def relaxed(program: Program, start: list[int]) -> float:
    """A bound on what every choice costs, options and combinations taken in fractions.

    Args:
        start: a choice that holds.
    """
    scale = program.cost(start)
    return min(_Search(program, scale).relax(), scale) if scale > 0 else 0.0


def _largest(program: Program) -> float:
    most = max((float(block.max()) for block in program.joint.values()), default=0.0)
    return max(most, float(program.costs[program.kept].max())) or 1.0


def _settled(program: Program, best: list[int]) -> list[int]:
    """Of equally cheap choices, the one that uses least of the limits, then a fixed one.

    Equal sums come from equal steps: where no two options cost the same, there is nothing to settle.
    """
    cost = program.cost(best)
    steps = np.sort(program.costs[(program.costs > 0) & (program.costs <= cost * (1 + ROUNDING))])
    if not (np.diff(steps) <= ROUNDING * cost).any():
        return best
    search = _Search(program, cost)
    order = np.arange(search.size) * GOLDEN % 1.0
    used = sum((above[program.kept] / room for above, room in map(program.room, program.rows)), np.zeros(search.size))
    flat = program.costs[program.kept] / cost * OBJECTIVE
    search.add(LinearConstraint(flat[None], -np.inf, OBJECTIVE * (1 + ROUNDING)))
    found, _, proven = search.run(0.0, used / max(len(program.rows), 1) + order / search.size)
    settled = found is not None and proven and program.cost(found) <= cost * (1 + ROUNDING)
    return found if settled and found is not None else best


class _Search:
    """Columns: the kept options of all units, then the kept combinations of each pair of units."""

    def __init__(self, program: Program, scale: float) -> None:
        self._program, self._scale = program, scale / OBJECTIVE
        kept = program.kept
        self._units, self._options = np.nonzero(kept)
        self._column = np.full(kept.shape, -1)
        self._column[kept] = np.arange(len(self._units))
        together, blocks = self._combinations()
        self.size, self._width = len(self._units), len(self._units) + len(together)
        costs = np.concatenate([program.costs[kept], together])
        # An option that alone costs more than a whole answer known is out.
        self._allowed = costs <= scale * (1 + TOLERANCE)
        self._costs = np.where(self._allowed, costs / self._scale, 0.0)
        self._constraints = [LinearConstraint(self._wide(self._units, np.arange(self.size)), 1, 1)]
        if blocks is not None:
            self._constraints.append(LinearConstraint(blocks, 0, 0))
        self._limits = [_normal(program, row) for row in program.rows]

    def _wide(self, rows: Array, columns: Array) -> sparse.csr_array:
        ones = np.ones(len(rows))
        return sparse.csr_array((ones, (rows, columns)), shape=(int(rows.max()) + 1, self._width))

    def _combinations(self) -> tuple[Numbers, sparse.csr_array | None]:
        """Costs of the columns z[(u,k),(v,j)], and the rows sum_j z = x[u,k] and sum_k z = x[v,j].

        For whole x these say z = x[u,k] x[v,j], whatever the sign of its cost; they are far tighter for fractions than
        z >= x + y - 1, z <= x, z <= y.
        """
        costs, rows, columns, values = [], [], [], []
        width, height = len(self._units), 0
        for (u, v), block in self._program.joint.items():
            first, second = (np.flatnonzero(self._program.kept[unit]) for unit in (u, v))
            index = width + np.arange(len(first) * len(second)).reshape(len(first), len(second))
            width += index.size
            costs.append(np.asarray(block, np.float64)[np.ix_(first, second)].reshape(-1))
            for unit, options, members in ((u, first, index), (v, second, index.T)):
                for option, own in zip(options, members, strict=True):
                    rows.append(np.full(len(own) + 1, height))
                    columns.append(np.append(own, self._column[unit, option]))
                    values.append(np.append(np.ones(len(own)), -1.0))
                    height += 1
        if not costs:
            return np.zeros(0), None
        where = (np.concatenate(rows), np.concatenate(columns))
        return np.concatenate(costs), sparse.csr_array((np.concatenate(values), where), shape=(height, width))

    def add(self, constraint: LinearConstraint) -> None:
        self._constraints.append(constraint)

    def run(self, gap: float, objective: Numbers | None = None) -> tuple[list[int] | None, float, bool]:
        """The cheapest choice that holds (None: there is none), a bound on all, and whether it is proven.

        Args:
            gap: relative, at which to stop.
            objective: of the options instead of their costs.
        """
        bound = 0.0
        for _ in range(CUTS):
            found, reached = self._milp(gap, self._limits, objective)
            bound = max(bound, reached)
            if found is None or self._program.holds(found):
                return found, bound if found is not None else math.inf, True
            self._constraints += [self._cut(row, found) for row in self._program.rows if not row.holds(found)]
        tight = [(amounts, most - TOLERANCE) for amounts, most in self._limits]
        found, _ = self._milp(gap, tight, objective)
        return found if found is not None and self._program.holds(found) else None, bound, False

    def relax(self) -> float:
        found = self._call(np.zeros(self._width), {}, self._limits, None)
        return 0.0 if found.x is None else max(float(found.fun), 0.0) * self._scale

    def _cut(self, row: Row, found: Sequence[int]) -> LinearConstraint:
        """Not all of the units that exceed the limit together may have as much as they have now, or more."""
        above, room = self._program.room(row)
        mine = above[np.arange(len(found)), list(found)]
        order = np.argsort(-mine, kind="stable")
        needed = order[: int(np.argmax(np.cumsum(mine[order]) > room + row.slack)) + 1]
        if mine[needed].sum() <= room + row.slack:
            needed = order
        chosen = np.isin(self._units, needed) & (above[self._units, self._options] >= mine[self._units])
        line = np.zeros(self._width)
        line[: self.size] = chosen
        return LinearConstraint(line[None], -np.inf, len(needed) - 1)

    def _milp(
        self, gap: float, limits: Sequence[tuple[Numbers, float]], objective: Numbers | None
    ) -> tuple[list[int] | None, float]:
        whole = np.concatenate([np.ones(self.size), np.zeros(self._width - self.size)])
        found = self._call(whole, {"mip_rel_gap": gap}, limits, objective)
        if found.x is None:
            return None, math.inf
        choice = np.zeros(len(self._program.costs), np.int64)
        value = np.full(len(choice), -1.0)
        for unit, option, share in zip(self._units, self._options, found.x[: self.size], strict=True):
            if share > value[unit]:
                choice[unit], value[unit] = option, share
        return choice.tolist(), max(float(found.mip_dual_bound or 0.0), 0.0) * self._scale

    def _call(
        self,
        whole: Numbers,
        options: Mapping[str, float],
        limits: Sequence[tuple[Numbers, float]],
        objective: Numbers | None,
    ) -> OptimizeResult:
        rest = np.zeros(self._width - self.size)
        held = [LinearConstraint(np.concatenate([amounts, rest])[None], -np.inf, most) for amounts, most in limits]
        with quiet():
            return milp(
                self._costs if objective is None else np.concatenate([objective, rest]),
                integrality=whole,
                bounds=Bounds(0, self._allowed.astype(np.float64)),
                constraints=[*self._constraints, *held],
                options=dict(options),
            )


def _normal(program: Program, row: Row) -> tuple[Numbers, float]:
    """[kept options] amounts in units of the room, and what they may add up to."""
    above, room = program.room(row)
    flat = above[program.kept]
    if not row.whole:
        return flat / room * ROOM, ROOM
    step = int(np.gcd.reduce(flat.astype(np.int64)))
    return flat / room * ROOM, (room // step + 0.5) * step / room * ROOM


@contextmanager
def quiet() -> Iterator[None]:
    """HiGHS prints to standard output even when told not to, and that output may be JSON: its lines are left out.

    Whatever else the process prints meanwhile is written when it is done. Buffers of the C library are emptied on both
    sides, since what is left in them would come out later.
    """
    library = ctypes.CDLL("ucrtbase" if os.name == "nt" else None)
    with _PRINTING, TemporaryFile() as file:
        library.fflush(None)
        try:
            kept = os.dup(1)
        except OSError:  # there is no standard output
            yield
            return
        os.dup2(file.fileno(), 1)
        try:
            yield
        finally:
            library.fflush(None)
            os.dup2(kept, 1)
            os.close(kept)
            file.seek(0)
            other = b"".join(line for line in file if not line.startswith(NOISE))
            while other:
                other = other[os.write(1, other) :]
