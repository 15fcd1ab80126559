"""Clip search: never worse than round-to-nearest, and much better at few bits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from quantkit.errors import InputError
from quantkit.quantizers.mse import MSE
from quantkit.quantizers.rtn import RTN
from quantkit.types import Array, FloatArray, LayerStats, QuantSpec

SHAPE = (64, 256)


def sample(name: str) -> FloatArray:
    rng = np.random.default_rng(0)
    if name == "gaussian":
        return rng.standard_normal(SHAPE).astype(np.float32)
    return (rng.laplace(size=SHAPE) if name == "laplace" else rng.standard_t(4, size=SHAPE)).astype(np.float32)


def sqnr(weight: FloatArray, quantized: FloatArray) -> float:
    exact = weight.astype(np.float64)
    return float(10 * np.log10((exact**2).sum() / ((quantized - exact) ** 2).sum()))


def row_errors(weight: FloatArray, quantized: FloatArray, importance: Array, norm: float = 2.0) -> Array:
    """[N] weighted error in float64; importance [N, K]."""
    errors: Array = (importance * np.abs(quantized - weight.astype(np.float64)) ** norm).sum(axis=1)
    return errors


def stats_with(
    gram: Array | None = None, square_mean: Array | None = None, abs_mean: Array | None = None
) -> LayerStats:
    return LayerStats(num_tokens=1, low=0.0, high=1.0, gram=gram, square_mean=square_mean, abs_mean=abs_mean)


# Gain over round-to-nearest in dB, groups of 128, each about half a dB below what the search reaches.
GAINS = {
    ("gaussian", 2, False): 2.3, ("gaussian", 2, True): 5.5, ("gaussian", 3, False): 0.8, ("gaussian", 3, True): 2.4,
    ("gaussian", 4, False): 0.3, ("gaussian", 4, True): 0.8, ("laplace", 2, False): 2.1, ("laplace", 2, True): 4.3,
    ("laplace", 3, False): 0.8, ("laplace", 3, True): 2.4, ("laplace", 4, False): 0.3, ("laplace", 4, True): 0.8,
    ("student", 2, False): 2.0, ("student", 2, True): 3.8, ("student", 3, False): 0.8, ("student", 3, True): 2.3,
    ("student", 4, False): 0.3, ("student", 4, True): 0.7,
}  # fmt: skip


@pytest.mark.parametrize(("name", "bits", "symmetric"), GAINS)
def test_gain_over_rtn(name: str, bits: int, symmetric: bool) -> None:
    weight, spec = sample(name), QuantSpec(bits, 128, symmetric)
    gain = sqnr(weight, MSE().quantize(weight, spec, None).dequantize())
    gain -= sqnr(weight, RTN().quantize(weight, spec, None).dequantize())
    assert gain > GAINS[name, bits, symmetric]


def test_two_bit_gaussian_is_near_the_best_uniform_quantizer() -> None:
    # Four equal steps on a Gaussian reach 9.25 dB (Max, 1960) with levels at half steps; on a grid that holds 0 a
    # little less.
    weight = sample("gaussian")
    assert sqnr(weight, MSE().quantize(weight, QuantSpec(2, 256), None).dequantize()) > 8.4


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_no_row_is_worse_than_rtn(bits: int, symmetric: bool) -> None:
    rng = np.random.default_rng(2)
    half = rng.exponential(size=(4, 256)) ** 2
    grams = np.zeros((4, 256, 256))
    grams[:, np.arange(256), np.arange(256)] = half
    cases = [
        (None, np.ones((4, 256))),
        (stats_with(gram=grams), half),
        (stats_with(abs_mean=np.sqrt(half)), half),
    ]
    for name, group_size in itertools.product(("gaussian", "student"), (-1, 32, 100)):
        weight, spec = sample(name), QuantSpec(bits, group_size, symmetric)
        baseline = RTN().quantize(weight, spec, None).dequantize()
        for stats, importance in cases:
            rows = np.repeat(importance, weight.shape[0] // 4, axis=0)
            found = row_errors(weight, MSE().quantize(weight, spec, stats).dequantize(), rows)
            assert (found <= row_errors(weight, baseline, rows) * (1 + 1e-9)).all()  # the order of addition


def test_importance_moves_the_grid_to_where_errors_cost() -> None:
    weight, spec = sample("gaussian"), QuantSpec(2, -1)
    importance = np.where(np.arange(256) < 16, 100.0, 1.0)
    with_stats = MSE().quantize(weight, spec, stats_with(gram=np.diag(importance)[None])).dequantize()
    without = MSE().quantize(weight, spec, None).dequantize()
    rows = np.broadcast_to(importance, weight.shape)
    assert row_errors(weight, with_stats, rows).sum() < 0.97 * row_errors(weight, without, rows).sum()
    for stats in (stats_with(square_mean=importance[None]), stats_with(abs_mean=np.sqrt(importance)[None])):
        np.testing.assert_array_equal(MSE().quantize(weight, spec, stats).dequantize(), with_stats)


def test_each_convolution_group_uses_its_own_gram() -> None:
    weight, spec = sample("student")[:8], QuantSpec(3, -1)
    importance = np.random.default_rng(3).exponential(size=(4, 256)) ** 3
    grams = np.zeros((4, 256, 256))
    grams[:, np.arange(256), np.arange(256)] = importance
    whole = MSE().quantize(weight, spec, stats_with(gram=grams))
    for group in range(4):
        rows = slice(2 * group, 2 * group + 2)
        part = MSE().quantize(weight[rows], spec, stats_with(gram=grams[group : group + 1]))
        np.testing.assert_array_equal(whole.codes[rows], part.codes)
    # A gram given to the wrong rows must show.
    wrong = MSE().quantize(weight, spec, stats_with(gram=grams[::-1]))
    assert not np.array_equal(whole.codes, wrong.codes)


def test_matches_an_exhaustive_search() -> None:
    weight, spec = sample("gaussian")[:12, :32], QuantSpec(2, -1)
    found = row_errors(weight, MSE().quantize(weight, spec, None).dequantize(), np.ones(weight.shape))
    exact = weight.astype(np.float64)
    best = np.full(12, np.inf)
    for scale, zero_point in itertools.product(np.linspace(0.05, 4, 2000), range(4)):
        codes = np.clip(np.rint(exact / scale + zero_point), 0, 3)
        best = np.minimum(best, ((scale * (codes - zero_point) - exact) ** 2).sum(axis=1))
    assert (found >= best * (1 - 1e-3)).all()  # 2000 scales are a little coarser than least squares
    assert found.sum() <= best.sum() * 1.02
    assert (found <= best * 1.15).all()


def test_finer_search_finds_better_grids() -> None:
    weight, spec = sample("student"), QuantSpec(3, 64)
    searches = [MSE(steps, refinements=0) for steps in (1, 4, 32)] + [MSE(32, refinements=4)]
    ones = np.ones(weight.shape)
    errors = [row_errors(weight, search.quantize(weight, spec, None).dequantize(), ones).sum() for search in searches]
    assert errors[0] > errors[1] > errors[2] > errors[3]


def test_a_search_of_one_step_is_rtn() -> None:
    weight, spec = sample("student"), QuantSpec(3, 64, symmetric=True)
    found, baseline = MSE(steps=1, refinements=0).quantize(weight, spec, None), RTN().quantize(weight, spec, None)
    np.testing.assert_array_equal(found.codes, baseline.codes)
    np.testing.assert_array_equal(found.scales, baseline.scales)


def test_norm_is_what_is_minimised() -> None:
    weight, spec = sample("student"), QuantSpec(3, 64)
    ones = np.ones(weight.shape)
    for norm, other in ((2.0, 4.0), (4.0, 2.0)):
        mine = MSE(norm=norm).quantize(weight, spec, None).dequantize()
        theirs = MSE(norm=other).quantize(weight, spec, None).dequantize()
        assert row_errors(weight, mine, ones, norm).sum() < row_errors(weight, theirs, ones, norm).sum()


def test_dead_inputs_do_not_disturb() -> None:
    weight, spec = sample("gaussian"), QuantSpec(4, 32)
    importance = np.ones(256)
    importance[:40] = 0  # the whole first group and a part of the second
    result = MSE().quantize(weight, spec, stats_with(gram=np.diag(importance)[None]))
    assert sqnr(weight, result.dequantize()) > 20  # dB
    baseline = RTN().quantize(weight, spec, None)
    np.testing.assert_array_equal(result.codes[:, :32], baseline.codes[:, :32])


def test_settings_are_checked() -> None:
    with pytest.raises(InputError, match=r"mse.steps must be at least 1 and at most 10000, got 0"):
        MSE(steps=0)
    with pytest.raises(InputError, match=r"mse.max_shrink must be at least 0 and below 1, got 1"):
        MSE(max_shrink=1)
    with pytest.raises(InputError, match=r"mse.norm must be above 0, got -1"):
        MSE(norm=-1)
    with pytest.raises(InputError, match=r"mse.refinements must be at least 0, got -2"):
        MSE(refinements=-2)
