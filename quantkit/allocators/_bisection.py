"""The smallest configuration that keeps an accuracy, by bisection over an order of units (arXiv 2306.04879)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from quantkit.allocators._drop import keeps
from quantkit.allocators._ilp import total
from quantkit.allocators._table import Unit, joined, limits
from quantkit.types import AllocationProblem


@dataclass
class Bisection:
    """Lower widths while the accuracy is kept; every configuration is measured once.

    Attributes:
        seen: [units][options] what units are sorted by.
        verified: counts beyond the first that violates, which are tried as well.
        errors: standard errors of the drop by which the accuracy has to be kept.
        known: choice -> bytes of its file where it keeps all budgets, None where it violates one.
        measured: for every configuration that was emitted and run, whether it kept the accuracy.
    """

    problem: AllocationProblem
    units: Sequence[Unit]
    seen: Sequence[Sequence[float]]
    verified: int
    errors: float = 0.0
    known: dict[tuple[int, ...], int | None] = field(default_factory=dict)
    measured: list[bool] = field(default_factory=list)

    def run(self, start: Sequence[int]) -> list[int]:
        """The smallest configuration that was measured to keep all budgets; `start` where none was.

        At most ceil(log2 U) + 1 measurements for each width, and `verified` more.
        """
        if not self._keeps(start):
            return list(start)
        current, active = list(start), list(range(len(self.units)))
        widths = {unit.bits(option) for unit in self.units for option in range(len(unit.options))}
        for bits in sorted(widths, reverse=True):
            lower = {unit: _at_most(self.units[unit], current[unit], bits) for unit in active}
            movable = [unit for unit in active if lower[unit] != current[unit]]
            movable.sort(key=lambda unit: self.seen[unit][lower[unit]])
            count = self._count(current, movable, lower)
            current = _moved(current, movable[:count], lower)
            active = [unit for unit in active if unit not in movable[count:]]
        fitting = [(size, total(self.seen, choice), choice) for choice, size in self.known.items() if size is not None]
        return list(min(fitting)[2])

    @property
    def found(self) -> bool:
        """Whether anything that was measured keeps all budgets."""
        return any(size is not None for size in self.known.values())

    def sentence(self) -> str:
        if not self.found:
            return "no configuration keeps the accuracy: even the most accurate one within the other budgets loses more"
        count = len(self.measured)
        were = "configuration was" if count == 1 else "configurations were"
        return f"{count} {were} measured, {sum(self.measured)} of which kept the accuracy"

    def _count(self, current: Sequence[int], movable: Sequence[int], lower: Mapping[int, int]) -> int:
        """How many of the units can be lowered, the first ones first."""
        low, high = 0, len(movable) + 1
        while high - low > 1:
            middle = (low + high) // 2
            if self._keeps(_moved(current, movable[:middle], lower)):
                low = middle
            else:
                high = middle
        # Accuracy is nearly but not quite monotone.
        beyond = range(high + 1, min(high + self.verified, len(movable)) + 1)
        return max([low, *(count for count in beyond if self._keeps(_moved(current, movable[:count], lower)))])

    def _keeps(self, choice: Sequence[int]) -> bool:
        key = tuple(choice)
        if key not in self.known:
            self.known[key] = self._size_within(choice)
        return self.known[key] is not None

    def _size_within(self, choice: Sequence[int]) -> int | None:
        """Bytes of the file where it keeps all budgets; what exceeds a linear one is not even measured."""
        budget = self.problem.budget
        assert budget.max_drop is not None
        if any(total(limit.amounts, choice) > limit.bound for limit in limits(self.problem, self.units)):
            return None
        found = self.problem.evaluate(joined(self.units, choice))
        size = budget.max_bytes(self.problem.float_size)
        self.measured.append(keeps(self.problem, found, self.errors))
        return found.size if self.measured[-1] and (size is None or found.size <= size) else None


def _moved(current: Sequence[int], chosen: Sequence[int], lower: Mapping[int, int]) -> list[int]:
    return [lower[unit] if unit in chosen else option for unit, option in enumerate(current)]


def _at_most(unit: Unit, current: int, bits: int) -> int:
    """The widest option of at most `bits` that is narrower than the current one; else the current one."""
    narrower = [option for option in range(current) if unit.bits(option) <= bits]
    return max(narrower, default=current) if unit.bits(current) > bits else current
