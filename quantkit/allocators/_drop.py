"""Whether a measured drop keeps the accuracy budget, and the smallest choice of a front that does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from quantkit.types import AllocationProblem, Measurement, QuantSpec

if TYPE_CHECKING:
    from quantkit.allocators._table import Point

SPARE_ERRORS = 1.0
"""Standard errors of the measured drop by which the budget has to be kept, where anything keeps it by that much."""


def smallest_within_drop(
    problem: AllocationProblem, points: Sequence[Point], fallback: Mapping[str, QuantSpec]
) -> Mapping[str, QuantSpec]:
    """The smallest point whose measured drop is within the budget; `fallback` where none is.

    Bisection over the front, small to large; the drop is nearly but not quite monotone, so that the two neighbours
    below the place found are tried too. Of several points that are measured, the one that is taken was lucky more
    often than not: so a standard error has to be left, unless nothing leaves that much.
    """
    known: dict[int, Measurement] = {}

    def measured(index: int) -> Measurement:
        if index not in known:
            known[index] = problem.evaluate(points[index].specs)
        return known[index]

    for errors in (SPARE_ERRORS, 0.0):
        low, high = 0, len(points)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if keeps(problem, measured(middle), errors) else (middle + 1, high)
        if low < len(points):
            near = range(max(low - 2, 0), low)
            smallest = next((index for index in near if keeps(problem, measured(index), errors)), low)
            return points[smallest].specs
    return fallback


def keeps(problem: AllocationProblem, found: Measurement, errors: float = 0.0) -> bool:
    """Whether a drop is within the budget with so many standard errors to spare."""
    return problem.budget.keeps(found.drop + errors * found.drop_error)
