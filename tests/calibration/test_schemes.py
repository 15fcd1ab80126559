"""Symmetric, unsigned and power-of-two ranges of activations."""

from __future__ import annotations

import numpy as np
import pytest

from quantkit.calibration.accumulators import SCHEMES, act_params
from quantkit.candidate import scheme_within

RANGES = [(-1.0, 3.0), (0.0, 2.5), (-4.0, 0.0), (-0.001, 0.001), (0.0, 0.0)]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("low", "high"), RANGES)
def test_the_range_is_covered_and_zero_is_exact(scheme: str, low: float, high: float) -> None:
    found = act_params(low, high, scheme)
    assert 0 <= found.zero_point <= 255 and found.scale > 0
    assert found.low <= low + found.scale / 2 and found.high >= high - found.scale / 2


def test_symmetric_reaches_equally_far() -> None:
    found = act_params(-1.0, 3.0, "symmetric")
    assert found.zero_point == 128 and found.high == pytest.approx(3.0, rel=1e-6)
    assert act_params(0.0, 2.55, "symmetric").zero_point == 128


def test_unsigned_starts_at_zero_where_nothing_lies_below() -> None:
    assert act_params(0.0, 2.55, "unsigned").zero_point == 0
    assert act_params(0.0, 2.55, "unsigned").scale == pytest.approx(0.01)
    assert act_params(-1.0, 2.55, "unsigned") == act_params(-1.0, 2.55, "symmetric")


@pytest.mark.parametrize(("low", "high"), RANGES[:4])
def test_powers_of_two(low: float, high: float) -> None:
    plain, found = act_params(low, high, "unsigned"), act_params(low, high, "power")
    assert float(np.log2(found.scale)).is_integer() and plain.scale <= found.scale < 2 * plain.scale
    assert found.zero_point == plain.zero_point


@pytest.mark.parametrize(
    ("scheme", "least", "most", "kept"),
    [
        ("symmetric", -np.inf, np.inf, "symmetric"),
        ("symmetric", 0.0, np.inf, "unsigned"),
        ("power", 0.0, np.inf, "power"),
        ("power", 0.0, 6.0, "asymmetric"),
        ("asymmetric", 0.0, 6.0, "asymmetric"),
    ],
)
def test_where_a_relu_or_clip_was_absorbed_the_range_ends_there(
    scheme: str, least: float, most: float, kept: str
) -> None:
    """Codes are all that still cuts the values: below a Relu's zero or above a Clip's bound there may be none."""
    assert scheme_within(scheme, least, most) == kept
