"""What every estimator promises: a figure for each option of each unit, finite, not negative, less for more bits.

Terms between layers may bring a figure that is next to nothing below 0.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import numpy as np
import pytest

from quantkit.allocators._table import Estimator, units_of
from quantkit.methods import make
from quantkit.ranking import estimator_names
from tests.allocators import small

BITS = (2, 3, 4, 6, 8)


@pytest.mark.parametrize("network", ["dense", "tied", "recurrent"])
@pytest.mark.parametrize("name", estimator_names())
def test_tables(name: str, network: str) -> None:
    made = small.problem(network, BITS)
    units = units_of(made)
    found = cast(Estimator, make("allocators", name, {})).scores(made, units)
    assert set(found.raw) == {unit.name for unit in units} and found.quantity
    for unit in units:
        row = found.raw[unit.name]
        assert len(row) == len(unit.options) == len(BITS)
        assert all(isinstance(figure, float) for figure in row)
        assert np.isfinite(row).all() and min(row) >= -0.05 * row[0]
        assert all(wide <= 1.05 * narrow + 0.05 * row[0] for narrow, wide in pairwise(row))
        assert abs(row[-1]) < 0.1 * row[0]
