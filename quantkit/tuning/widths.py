"""Bits as few choices: a plan to start from, and a step up or down for each of a few groups of layers.

The plans are those of other allocators (one width everywhere, the solver's answers), so that the best of them is a
point of the space; the steps look around it. Groups are the first unit, the last one, and stretches of about equally
many weights between them, in graph order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantkit.allocators._table import Unit
from quantkit.tuning.space import Configuration, Dimension, Point, Space
from quantkit.types import AllocationProblem

BASE = "plan"
SHIFT = "step"
STEPS = (-1, 0, 1)
STRETCHES = 3


@dataclass(frozen=True)
class Widths:
    """What can be chosen of bits.

    Attributes:
        units: layers that are decided together.
        plans: name -> option of each unit.
        groups: indices of units that step together.
    """

    units: tuple[Unit, ...]
    plans: Mapping[str, tuple[int, ...]]
    groups: tuple[tuple[int, ...], ...]

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        base = Dimension(BASE, tuple(self.plans))
        return (base, *(Dimension(f"{SHIFT} {index}", STEPS, ordered=True) for index in range(1, len(self.groups) + 1)))

    def choice(self, configuration: Configuration) -> list[int]:
        """The option of each unit: as far as there are options, steps go to the next."""
        picked = list(self.plans[str(configuration[BASE])])
        for index, group in enumerate(self.groups, 1):
            step = int(configuration.get(f"{SHIFT} {index}", 0))
            for place in group:
                picked[place] = min(max(picked[place] + step, 0), len(self.units[place].options) - 1)
        return picked

    def plain(self, plan: str) -> dict[str, int | str]:
        """The configuration of a plan as it stands."""
        return {BASE: plan, **{f"{SHIFT} {index}": 0 for index in range(1, len(self.groups) + 1)}}


def make_widths(problem: AllocationProblem, units: Sequence[Unit], plans: Mapping[str, Sequence[int]]) -> Widths:
    """Plans of the same choice are kept once, under the first name."""
    kept: dict[tuple[int, ...], str] = {}
    for name, choice in plans.items():
        kept.setdefault(tuple(choice), name)
    weights = [sum(math.prod(problem.targets[name].shape) for name in unit.members) for unit in units]
    return Widths(tuple(units), {name: choice for choice, name in kept.items()}, groups_of(weights))


def same_bits(widths: Widths) -> dict[Point, Point]:
    """Indices of plan and steps -> those that stand for the same bits: no step where that will do."""
    space = Space(widths.dimensions)
    still = STEPS.index(0)
    every = sorted(space, key=lambda point: (sum(abs(index - still) for index in point[1:]), point))
    first: dict[tuple[int, ...], Point] = {}
    return {point: first.setdefault(tuple(widths.choice(space.configuration(point))), point) for point in every}


def groups_of(weights: Sequence[int], stretches: int = STRETCHES) -> tuple[tuple[int, ...], ...]:
    """First, stretches of about equal weight, last; every unit alone where there are no more than that."""
    count = len(weights)
    if count <= stretches + 2:
        return tuple((index,) for index in range(count))
    inner = range(1, count - 1)
    whole = sum(weights[index] for index in inner)
    found: list[list[int]] = [[] for _ in range(stretches)]
    passed = 0.0
    for index in inner:
        # By its middle, and never so late that a stretch stays empty.
        place = min(int((passed + weights[index] / 2) / whole * stretches), stretches - 1)
        found[place].append(index)
        passed += weights[index]
    return ((0,), *(tuple(group) for group in found if group), (count - 1,))
