"""Points, configurations, columns."""

from __future__ import annotations

import re

import numpy as np
import pytest

from quantkit.errors import InputError
from quantkit.tuning.space import Dimension, Point, Space

SPACE = Space(
    (
        Dimension("bits", (2, 3, 4), ordered=True),
        Dimension("calibrator", ("minmax", "entropy", "mse")),
        Dimension("bias", (False, True)),
        Dimension("alone", ("x",)),
    )
)


def folded(point: Point) -> Point:
    """At the first width the calibrator is not read."""
    return (point[0], 0, *point[2:]) if point[0] == 0 else point


FOLDED = Space(SPACE.dimensions, folded)


def test_every_point_once_in_dictionary_order() -> None:
    points = list(SPACE)
    assert len(points) == len(SPACE) == 18 == len(set(points))
    assert points == sorted(points)
    assert [SPACE.point(SPACE.configuration(point)) for point in points] == points


def test_points_of_the_same_model_are_one() -> None:
    points = list(FOLDED)
    assert len(points) == 18 - 4
    assert all(folded(point) == point for point in points)
    assert FOLDED.point({"bits": 2, "calibrator": "mse", "bias": True, "alone": "x"}) == (0, 0, 1, 0)


def test_neighbours_differ_in_one_dimension() -> None:
    found = SPACE.neighbours((1, 1, 0, 0))
    assert len(found) == 2 + 2 + 1 and (1, 1, 0, 0) not in found
    assert all(sum(a != b for a, b in zip(point, (1, 1, 0, 0), strict=True)) == 1 for point in found)
    assert all(folded(point) == point for point in FOLDED.neighbours((1, 1, 0, 0)))


def test_drawn_points_are_different_and_of_the_space() -> None:
    found = FOLDED.draw(np.random.default_rng(0), 200)
    assert set(found) == set(FOLDED) and len(found) == len(set(found))


def test_columns() -> None:
    encoded = SPACE.encode([(2, 1, 1, 0), (0, 0, 0, 0)])
    assert encoded.dtype == np.float32
    # bits is ordered, calibrator has a column for each value, bias has two values, one value tells nothing
    assert encoded.tolist() == [[2, 0, 1, 0, 1], [0, 1, 0, 0, 0]]
    assert Space((Dimension("alone", (1,)),)).encode([(0,)]).shape == (1, 0)


def test_large_spaces_are_not_enumerated() -> None:
    assert SPACE.small
    assert not Space(tuple(Dimension(f"d{index}", (0, 1, 2, 3, 4, 5, 6, 7)) for index in range(5))).small


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        ({"bits": 2}, "a configuration names bits, calibrator, bias, alone, got bits"),
        ({}, "a configuration names bits, calibrator, bias, alone, got nothing"),
        ({"bits": 5, "calibrator": "mse", "bias": True, "alone": "x"}, "bits must be one of 2, 3, 4, got 5"),
    ],
)
def test_wrong_configurations(configuration: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        SPACE.point(configuration)


def test_wrong_dimensions() -> None:
    with pytest.raises(InputError, match="the dimension d has no values; leave it out or name at least one"):
        Dimension("d", ())
    with pytest.raises(InputError, match=r"the dimension d names a value twice, got \[1, 1\]"):
        Dimension("d", (1, 1))
