"""Choose one option per unit: the multiple-choice knapsack with any number of limits, solved exactly by HiGHS."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from quantkit.allocators._highs import Numbers, Program, Row, prepared, solve
from quantkit.allocators._lagrangian import choose_many

DIGITS = 6
"""Significant digits of a figure that is no whole number, in sentences."""


@dataclass(frozen=True)
class Limit:
    """Sum of the chosen options' amounts must not exceed `bound`; amounts[u][k] belongs to option k of unit u.

    An infinite amount (or cost) means that the unit has no such option.
    """

    amounts: Sequence[Sequence[float]]
    bound: float


@dataclass(frozen=True)
class Label:
    """How a limit is called where it cannot be met.

    Attributes:
        name: as the user knows it, `--max-size`.
        unit: written behind figures, with its space: ` bytes`, `x`.
        fixed: what counts against the limit beside the options, in the limit's own unit.
        per: the user's figure is (amount + fixed) / per.
        adjective: of the smallest figure there is.
    """

    name: str
    unit: str = ""
    fixed: float = 0.0
    per: float = 1.0
    adjective: str = "possible"

    def figure(self, amount: float) -> str:
        """Rounded up, so that a limit of this figure can be met."""
        value = (amount + self.fixed) / self.per
        if not float(value).is_integer() and value != 0:
            step = 10.0 ** (math.floor(math.log10(abs(value))) - DIGITS + 1)
            value = math.ceil(value / step) * step
        whole = float(value).is_integer()
        return f"{int(value) if whole else format(value, f'.{DIGITS}g')}{self.unit}"


@dataclass(frozen=True)
class Solution:
    """A choice and how good it is.

    Attributes:
        choice: option of every unit.
        cost: of the choice.
        bound: no choice within the limits costs less.
        gap: (cost - bound) / what the choice costs above every unit's cheapest option.
        status: `optimal`: proven, to 1e-9 of that (to 1e-6 beyond 300 units); `feasible`: a limit came so close that
            the solver could not tell which side of it cheaper choices are on.
    """

    choice: tuple[int, ...]
    cost: float
    bound: float
    gap: float
    status: Literal["optimal", "feasible"]


def choose(costs: Sequence[Sequence[float]], limits: Sequence[Limit] = ()) -> list[int] | None:
    """The option of every unit that minimises the total cost within the limits; None when nothing fits."""
    found = solve_choice(costs, limits)
    return None if found is None else list(found.choice)


def solve_choice(costs: Sequence[Sequence[float]], limits: Sequence[Limit] = ()) -> Solution | None:
    """The option of every unit that minimises the total cost within the limits; None when nothing fits.

    Limits in whole numbers are met exactly, others to 1e-12 of their largest number. Of equally cheap choices the one
    that uses less of the limits is taken, then a fixed one.
    """
    if not costs:
        return Solution((), 0.0, 0.0, 0.0, "optimal")
    table = padded(costs)
    program = prepared(table, [Row.of(padded(limit.amounts), limit.bound) for limit in limits], {})
    return None if program is None else solution(table, program, priced(program))


def solution(costs: Numbers, program: Program, start: list[int] | None) -> Solution | None:
    """Solve what was prepared from these costs [U, K].

    Args:
        start: a choice within the limits, or None.
    """
    choice, bound, proven = solve(program, start)
    if choice is None:
        return None
    base = math.fsum(np.where(program.kept, costs, np.inf).min(axis=1).tolist())
    spent = program.cost(choice)
    pairs = (float(block[choice[u], choice[v]]) for (u, v), block in program.joint.items())
    cost = math.fsum([*costs[np.arange(len(choice)), choice].tolist(), *pairs])
    gap = max(spent - bound, 0.0) / spent if spent > 0 else 0.0
    return Solution(tuple(choice), cost, min(base + bound, cost), gap, "optimal" if proven else "feasible")


def priced(program: Program) -> list[int] | None:
    """One price for all limits, then what still fits: a first answer, which tells the scale of costs."""
    amounts, bounds = [], []
    for row in program.rows:
        above, room = program.room(row)
        amounts.append(np.where(program.kept, above / room, 0.0))
        bounds.append(1.0)
    found = choose_many(program.costs, amounts, bounds)
    return found.tolist() if found is not None and program.holds(found.tolist()) else None


def padded(rows: Sequence[Sequence[float]]) -> Numbers:
    """[units, options], infinite where a unit has fewer."""
    table = np.full((len(rows), max((len(row) for row in rows), default=0)), np.inf)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return table


def total(amounts: Sequence[Sequence[float]], choice: Sequence[int]) -> float:
    """Sum of the chosen options' amounts."""
    return float(sum(options[index] for options, index in zip(amounts, choice, strict=True)))


def least(limit: Limit, others: Sequence[Limit] = ()) -> float | None:
    """The smallest bound with which something fits, all other limits kept; None when they cannot be kept."""
    found = solve_choice(limit.amounts, others)
    return None if found is None else found.cost


def infeasible(limits: Sequence[Limit], labels: Sequence[Label]) -> str | None:
    """Why nothing fits, and what would: one sentence, or None where something does."""
    alone = [(least(limit), limit, label) for limit, label in zip(limits, labels, strict=True)]
    failing = [item for item in alone if item[0] is None or not _met(item[1], item[0])]
    if failing:
        return "; ".join(
            f"{label.name} {_asked(label, limit.bound)} cannot be met: the smallest {label.adjective} is "
            f"{label.figure(math.inf if smallest is None else smallest)}"
            for smallest, limit, label in failing
        )
    if _fits(limits):
        return None
    clashing = list(range(len(limits)))
    for index in range(len(limits)):  # what is infeasible without a limit does not need it
        rest = [other for other in clashing if other != index]
        if not _fits([limits[other] for other in rest]):
            clashing = rest
    changes = []
    for index in clashing:
        smallest = least(limits[index], [limits[other] for other in clashing if other != index])
        assert smallest is not None  # else the others would clash without this one
        changes.append(f"{labels[index].name} would have to be {labels[index].figure(smallest)}")
    names = [f"{labels[index].name} {_asked(labels[index], limits[index].bound)}" for index in clashing]
    return f"{' and '.join(names)} cannot be met together: with the rest as it is, {', or '.join(changes)}"


def _fits(limits: Sequence[Limit]) -> bool:
    return not limits or choose([[0.0] * len(row) for row in limits[0].amounts], limits) is not None


def _met(limit: Limit, amount: float) -> bool:
    row = Row.of(padded(limit.amounts), limit.bound)
    return amount <= row.bound + row.slack


def _asked(label: Label, bound: float) -> str:
    """As the user gave it."""
    return f"{format((bound + label.fixed) / label.per, f'.{DIGITS + 6}g')}{label.unit}"
