"""Choose one option per unit where some pairs of units cost more, or less, together than alone.

    minimise  sum_u cost[u, x_u] + sum_{u<v} term[u,v][x_u, x_v]   within linear limits

Half of the least that each option's terms can come to is moved to the option itself: what is left of the terms is at
least 0, and without it the problem is an ordinary knapsack, whose bound holds. Small problems are solved exactly, with
a column for every combination of a pair; larger ones by local search, one or two units at a time, from several starts,
with the bound that the same program gives when fractions are allowed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from quantkit.allocators._highs import Joint, Numbers, Program, Row, prepared, relaxed
from quantkit.allocators._ilp import Limit, Solution, padded, priced, solution, solve_choice
from quantkit.types import Array

EXACT_UNITS = 40
EXACT_COLUMNS = 2500
"""Combinations of all pairs together."""
STARTS = 8
SPREAD = 0.5
"""Of the logarithm of costs, at random starts."""
MOVES = 1000
LEAST = 1e-12
"""Relative gain below which a move is rounding."""


def cost_of(costs: Sequence[Sequence[float]], terms: Joint, choice: Sequence[int]) -> float:
    """What the choice costs, pair terms included."""
    own = (row[option] for row, option in zip(costs, choice, strict=True))
    return math.fsum([*own, *(float(block[choice[u], choice[v]]) for (u, v), block in terms.items())])


def choose_pairs(
    costs: Sequence[Sequence[float]], terms: Joint, limits: Sequence[Limit] = (), seed: int = 0
) -> Solution | None:
    """The option of every unit that costs least, pair terms included; None when nothing fits.

    Never worse than the best choice without pair terms is under this objective.

    Args:
        costs: [U][K_u].
        terms: (u, v) with u < v -> [K_u, K_v], of any sign.
        limits: as for `choose`.
        seed: of the starts of the local search.
    """
    alone = solve_choice(costs, limits)
    if alone is None or not terms:
        return alone
    table, rest = _shifted(padded(costs), terms)
    rows = [Row.of(padded(limit.amounts), limit.bound) for limit in limits]
    program = prepared(table, rows, rest)
    assert program is not None  # something fits
    found = _searched(program, [*alone.choice], seed)
    small = len(costs) <= EXACT_UNITS and sum(block.size for block in terms.values()) <= EXACT_COLUMNS
    answer = solution(table, program, found) if small else None
    base = math.fsum(np.where(program.kept, table, np.inf).min(axis=1).tolist())
    if answer is None:
        answer = Solution(tuple(found), 0.0, base + relaxed(program, found), 0.0, "feasible")
    cost = cost_of(costs, terms, answer.choice)
    bound = min(answer.bound, cost)
    return replace(answer, cost=cost, bound=bound, gap=(cost - bound) / (cost - base) if cost > bound else 0.0)


def _shifted(costs: Numbers, terms: Joint) -> tuple[Numbers, dict[tuple[int, int], Array]]:
    """Costs with their half of the least terms, and what is left of the terms: at least 0."""
    table, rest = costs.copy(), {}
    for (u, v), block in terms.items():
        first, second = block.min(axis=1) / 2, block.min(axis=0) / 2
        table[u, : len(first)] += first
        table[v, : len(second)] += second
        rest[u, v] = np.maximum(block - first[:, None] - second[None], 0.0)
    return table, rest


def _searched(program: Program, start: list[int], seed: int) -> list[int]:
    """The best of the local optima reached from several starts."""
    moves = _Moves.of(program)
    best = moves.descend(start)
    for costs in _perturbed(moves, best, seed):
        begin = priced(replace(program, costs=costs))
        if begin is None:
            continue
        found = moves.descend(begin)
        if program.cost(found) < program.cost(best) * (1 - LEAST):
            best = found
    return best


def _perturbed(moves: _Moves, choice: Sequence[int], seed: int) -> Iterator[Numbers]:
    """[U, K] costs as seen from a choice, then the same disturbed at random; infinite where an option is out."""
    rng = np.random.Generator(np.random.PCG64(seed))
    program = moves.program
    seen = np.full(program.costs.shape, np.inf)
    seen[program.kept] = moves.costs + moves.together[:, moves.columns(choice)].sum(axis=1)
    seen -= seen.min(axis=1)[:, None]
    yield seen
    for _ in range(STARTS - 1):
        yield seen * np.exp(SPREAD * rng.standard_normal(seen.shape))


@dataclass(frozen=True)
class _Moves:
    """Everything about the kept options, in one row.

    Attributes:
        costs: [n].
        together: [n, n] pair terms, symmetric.
        unit: [n] unit of each option.
        column: [U, K] place of each option, -1 where there is none.
        amounts: [limits, n].
        room: [limits] what the amounts may add up to.
    """

    program: Program
    costs: Numbers
    together: Numbers
    unit: Array
    column: Array
    amounts: Numbers
    room: Numbers

    @classmethod
    def of(cls, program: Program) -> _Moves:
        kept = program.kept
        unit, option = np.nonzero(kept)
        column = np.full(kept.shape, -1)
        column[kept] = np.arange(len(unit))
        together = np.zeros((len(unit), len(unit)))
        for (u, v), block in program.joint.items():
            first, second = column[u][kept[u]], column[v][kept[v]]
            part = np.asarray(block)[np.ix_(option[first], option[second])]
            together[np.ix_(first, second)] = part
            together[np.ix_(second, first)] = part.T
        rows = [program.room(row) for row in program.rows]
        amounts = np.array([above[kept] for above, _ in rows]).reshape(len(rows), len(unit))
        slack = [row.slack for row in program.rows]
        room = np.array([left + more for (_, left), more in zip(rows, slack, strict=True)])
        return cls(program, program.costs[kept], together, unit, column, amounts, room)

    def columns(self, choice: Sequence[int]) -> Array:
        return self.column[np.arange(len(choice)), list(choice)]

    def descend(self, choice: Sequence[int]) -> list[int]:
        """Change the one or two units that gain most, until nothing gains."""
        options = np.nonzero(self.program.kept)[1]
        here, now = self.columns(choice), list(choice)
        for _ in range(MOVES):
            move = self._best(here)
            if move is None:
                break
            for column in move:
                now[self.unit[column]] = int(options[column])
                here[self.unit[column]] = column
        return now

    def _best(self, here: Array) -> list[int] | None:
        """The options to change to; None where no change gains."""
        mine = here[self.unit]  # [n] what the unit has now
        seen = self.costs + self.together[:, here].sum(axis=1)
        gain = seen - seen[mine]
        step = self.amounts - self.amounts[:, mine]
        left = self.room - self.amounts[:, here].sum(axis=1)
        fits = (step <= left[:, None]).all(axis=0)
        one = np.where(fits, gain, np.inf)
        both = gain[:, None] + gain[None]
        both += self.together - self.together[:, mine] - self.together[mine] + self.together[np.ix_(mine, mine)]
        both[self.unit[:, None] == self.unit[None]] = np.inf
        for used, most in zip(step, left, strict=True):
            both[used[:, None] + used[None] > most] = np.inf
        least = -LEAST * max(float(seen[here].sum()), 1e-300)
        first, second = divmod(int(both.argmin()), len(mine))
        if both[first, second] < min(float(one.min()), least):
            return [first, second]
        return [int(one.argmin())] if one.min() < least else None
