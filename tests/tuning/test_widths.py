"""Plans, steps and groups of layers."""

from __future__ import annotations

import pytest

from quantkit.allocators._table import Unit
from quantkit.tuning.widths import Widths, groups_of
from quantkit.types import QuantSpec

UNITS = tuple(Unit(name, (name,), tuple({name: QuantSpec(bits)} for bits in (2, 4, 8))) for name in ("u0", "u1", "u2"))
WIDTHS = Widths(UNITS, {"uniform": (1, 1, 1), "best": (0, 1, 2)}, ((0,), (1,), (2,)))


@pytest.mark.parametrize(
    ("weights", "groups"),
    [
        ([], ()),
        ([5], ((0,),)),
        ([1] * 5, ((0,), (1,), (2,), (3,), (4,))),
        ([1] * 8, ((0,), (1, 2), (3, 4), (5, 6), (7,))),
        ([9, 1, 1, 1, 1, 8, 9], ((0,), (1, 2, 3, 4), (5,), (6,))),
    ],
)
def test_groups_are_the_ends_and_stretches_of_equal_weight(weights: list[int], groups: object) -> None:
    found = groups_of(weights)
    assert found == groups
    assert [index for group in found for index in group] == list(range(len(weights)))


def test_steps_go_to_the_next_option_and_no_further() -> None:
    assert [dimension.name for dimension in WIDTHS.dimensions] == ["plan", "step 1", "step 2", "step 3"]
    assert WIDTHS.choice(WIDTHS.plain("best")) == [0, 1, 2]
    assert WIDTHS.choice({"plan": "best", "step 1": -1, "step 2": 1, "step 3": 1}) == [0, 2, 2]
    assert WIDTHS.choice({"plan": "uniform", "step 1": 1, "step 2": 0, "step 3": -1}) == [2, 1, 0]
