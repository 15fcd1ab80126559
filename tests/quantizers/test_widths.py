"""Groups of different widths: each is quantized as a layer of that width would be."""

from __future__ import annotations

import numpy as np
import pytest

from quantkit.quantizers import _grid
from quantkit.quantizers.mse import MSE
from quantkit.quantizers.rtn import RTN
from quantkit.types import LayerStats, QuantSpec

WIDTHS = (3, 1, 8, 2, 5)
SHAPE = (20, 140)  # the last of five groups has 12 inputs


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", [RTN(), MSE()])
@pytest.mark.parametrize("with_stats", [False, True])
def test_each_group_is_what_its_width_makes_of_it(method: RTN | MSE, symmetric: bool, with_stats: bool) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(SHAPE).astype(np.float32)
    stats = LayerStats(1, 0.0, 1.0, square_mean=rng.exponential(size=(4, 140))) if with_stats else None
    mixed = method.quantize(weight, QuantSpec(4, 32, symmetric, group_bits=WIDTHS), stats)
    assert mixed.group_bits.tolist() == list(WIDTHS) and mixed.group_bits.dtype == np.uint8
    for group, bits in enumerate(WIDTHS):
        uniform = method.quantize(weight, QuantSpec(bits, 32, symmetric), stats)
        inputs = slice(32 * group, 32 * group + 32)
        np.testing.assert_array_equal(mixed.codes[:, inputs], uniform.codes[:, inputs])
        np.testing.assert_array_equal(mixed.scales[:, group], uniform.scales[:, group])
        np.testing.assert_array_equal(mixed.zero_points[:, group], uniform.zero_points[:, group])
        np.testing.assert_array_equal(mixed.dequantize()[:, inputs], uniform.dequantize()[:, inputs])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", [RTN(), MSE()])
def test_the_same_width_everywhere_is_the_uniform_layer(method: RTN | MSE, symmetric: bool) -> None:
    weight = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
    for bits in range(1, 9):
        one = method.quantize(weight, QuantSpec(bits, 32, symmetric), None)
        other = method.quantize(weight, QuantSpec(4, 32, symmetric, group_bits=(bits,) * 5), None)
        np.testing.assert_array_equal(one.dequantize(), other.dequantize())


def test_limits_of_codes() -> None:
    for symmetric, low in ((False, [0, 0, 0, 0, 0]), (True, [1, 0, 1, 1, 1])):
        spec = QuantSpec(4, 32, symmetric, group_bits=WIDTHS)
        limits = _grid.rtn_codes(spec, 140)
        assert limits.low.tolist() == low and limits.high.tolist() == [7, 1, 255, 3, 31]
        assert _grid.all_codes(spec, 140).low.tolist() == [0] * 5
        assert _grid.all_codes(spec, 140).high.tolist() == [7, 1, 255, 3, 31]
    assert _grid.middles(spec.widths(140)).tolist() == [4, 0.5, 128, 2, 16]


def test_nearest_scales_keep_what_cannot_be_stored() -> None:
    scales = np.array([0.1, 1e-9, 1e6, -2.0, np.inf])
    otherwise = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    found = _grid.nearest_scales(scales, True, otherwise)
    assert found.tolist() == [float(np.float16(0.1)), 2, 3, 4, 5]
    assert _grid.nearest_scales(scales, False, otherwise).tolist() == [
        float(np.float32(0.1)), float(np.float32(1e-9)), 1e6, 4, 5,
    ]  # fmt: skip
