"""Round to nearest with one grid for a layer, and with scales that are powers of two."""

from __future__ import annotations

import numpy as np
import pytest

from quantkit.quantizers.rtn import RTN
from quantkit.types import QuantSpec
from tests.helpers.models import random

WEIGHT = random(12, 50) * np.exp(random(12, 1) * 4).astype(np.float32)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_per_tensor_is_one_grid(bits: int, group_size: int, symmetric: bool) -> None:
    spec = QuantSpec(bits, group_size, symmetric=symmetric)
    found = RTN(per_tensor=True).quantize(WEIGHT, spec, None)
    flat = RTN().quantize(WEIGHT.reshape(1, -1), QuantSpec(bits, -1, symmetric=symmetric), None)
    assert np.ptp(found.scales) == 0 and np.ptp(found.zero_points) == 0
    assert found.scales.shape == (12, spec.num_groups(50))
    assert np.array_equal(found.dequantize(), flat.dequantize().reshape(WEIGHT.shape))


def test_per_tensor_with_widths_of_groups() -> None:
    spec = QuantSpec(4, 25, group_bits=(2, 8))
    found = RTN(per_tensor=True).quantize(WEIGHT, spec, None)
    assert np.ptp(found.scales[:, 0]) == 0 and np.ptp(found.scales[:, 1]) == 0
    assert found.scales[0, 0] > found.scales[0, 1]
    assert found.codes[:, :25].max() <= 3 and found.codes[:, 25:].max() > 3


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_powers_of_two(bits: int, symmetric: bool) -> None:
    """The next power above; a zero point is a whole code, so that an end may lie up to half a step outside."""
    spec = QuantSpec(bits, 16, symmetric=symmetric)
    plain, found = (RTN(power_of_two=power).quantize(WEIGHT, spec, None) for power in (False, True))
    exponents = np.log2(found.scales.astype(np.float64))
    assert np.array_equal(exponents, np.rint(exponents))
    assert (found.scales >= plain.scales).all() and (found.scales < 2 * plain.scales).all()
    steps = np.repeat(found.scales, 16, axis=1)[:, :50]
    assert (np.abs(found.dequantize() - WEIGHT) <= (0.5001 if symmetric else 1.0001) * steps).all()


def test_powers_of_two_of_one_bit_keep_the_middle() -> None:
    found = RTN(power_of_two=True).quantize(WEIGHT, QuantSpec(1, 16), None)
    assert (found.zero_points == 0.5).all() and set(np.unique(found.codes)) <= {0, 1}


def test_both_together() -> None:
    found = RTN(per_tensor=True, power_of_two=True).quantize(WEIGHT, QuantSpec(8, -1, symmetric=True), None)
    assert np.ptp(found.scales) == 0 and float(np.log2(found.scales[0, 0])).is_integer()
