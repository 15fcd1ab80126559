"""A search space of configurations: a few named dimensions with a few values each.

A point is one index per dimension. Several points may describe the same model (a calibrator without integer layers to
calibrate); `canonical` says which of them stands for all, and only that one is ever tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from quantkit.errors import InputError
from quantkit.types import FloatArray

Value = str | int | float | bool
Point = tuple[int, ...]
Configuration = Mapping[str, Value]
SMALL = 4096
"""Spaces of at most this many points are enumerated; from larger ones points are drawn."""


@dataclass(frozen=True)
class Dimension:
    """One thing to choose.

    Attributes:
        name: unique in its space.
        values: in an order that grid search follows.
        ordered: neighbours in `values` are alike (bits, shifts), so that a split may lie between any two.
    """

    name: str
    values: tuple[Value, ...]
    ordered: bool = False

    def __post_init__(self) -> None:
        if not self.values:
            raise InputError(f"the dimension {self.name} has no values; leave it out or name at least one")
        if len(set(self.values)) != len(self.values):
            raise InputError(f"the dimension {self.name} names a value twice, got {list(self.values)}")


def itself(point: Point) -> Point:
    """Every point is a model of its own."""
    return point


@dataclass(frozen=True)
class Space:
    """All combinations of the dimensions' values.

    Attributes:
        canonical: point -> the one that stands for the same model.
    """

    dimensions: tuple[Dimension, ...]
    canonical: Callable[[Point], Point] = itself

    def __len__(self) -> int:
        """Points, before the same models are taken together."""
        return math.prod(len(dimension.values) for dimension in self.dimensions)

    def __iter__(self) -> Iterator[Point]:
        """Every canonical point in dictionary order, the last dimension changing fastest."""
        for point in product(*(range(len(dimension.values)) for dimension in self.dimensions)):
            if self.canonical(point) == point:
                yield point

    @property
    def small(self) -> bool:
        return len(self) <= SMALL

    def configuration(self, point: Point) -> dict[str, Value]:
        return {
            dimension.name: dimension.values[index] for dimension, index in zip(self.dimensions, point, strict=True)
        }

    def point(self, configuration: Configuration) -> Point:
        """The canonical point of a configuration.

        Raises:
            InputError: a dimension is missing, unknown, or has no such value.
        """
        names = [dimension.name for dimension in self.dimensions]
        if set(configuration) != set(names):
            raise InputError(f"a configuration names {', '.join(names)}, got {', '.join(configuration) or 'nothing'}")
        indices = []
        for dimension in self.dimensions:
            if configuration[dimension.name] not in dimension.values:
                raise InputError(
                    f"{dimension.name} must be one of {', '.join(map(str, dimension.values))}, "
                    f"got {configuration[dimension.name]!r}"
                )
            indices.append(dimension.values.index(configuration[dimension.name]))
        return self.canonical(tuple(indices))

    def draw(self, rng: np.random.Generator, count: int) -> list[Point]:
        """Up to `count` different canonical points at random."""
        found: dict[Point, None] = {}
        highs = [len(dimension.values) for dimension in self.dimensions]
        for row in rng.integers(0, highs, size=(count, len(highs))):
            found[self.canonical(tuple(int(index) for index in row))] = None
        return list(found)

    def neighbours(self, point: Point) -> list[Point]:
        """Canonical points that differ in one dimension."""
        found: dict[Point, None] = {}
        for place, dimension in enumerate(self.dimensions):
            for index in range(len(dimension.values)):
                found[self.canonical((*point[:place], index, *point[place + 1 :]))] = None
        found.pop(self.canonical(point), None)
        return list(found)

    def encode(self, points: Sequence[Point]) -> FloatArray:
        """[points, columns]: one column for an ordered or two-valued dimension, else one for each value."""
        columns = []
        table = np.array(points, np.int64).reshape(len(points), len(self.dimensions))
        for place, dimension in enumerate(self.dimensions):
            indices = table[:, place]
            if dimension.ordered or len(dimension.values) == 2:
                columns.append(indices[:, None].astype(np.float32))
            elif len(dimension.values) > 2:
                columns.append((indices[:, None] == np.arange(len(dimension.values))).astype(np.float32))
        return np.concatenate(columns, axis=1) if columns else np.zeros((len(points), 0), np.float32)
