"""Streaming statistics against the same statistics of all values at once, and what each range rule is for."""

from __future__ import annotations

import tracemalloc

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.calibration.accumulators import (
    Distribution,
    Gram,
    Histogram,
    Moments,
    RowSample,
    _expected_error,
    act_params,
    clip_entropy,
    clip_minmax,
    clip_mse,
    clip_percentile,
)
from quantkit.errors import InputError
from quantkit.types import ActParams, Array, FloatArray

RULES = [clip_minmax, clip_percentile, clip_entropy, clip_mse]


def distribution(*parts: Array, bins: int = 2048) -> Distribution:
    histogram = Histogram(bins)
    for part in parts:
        histogram.add(part)
    return histogram.result()


def gaussian(count: int = 100_000, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


def with_outliers() -> FloatArray:
    """A standard Gaussian whose first ten values reach some 30."""
    values = gaussian()
    values[:10] *= np.float32(20)
    values[0] = 30
    return values


def quantize(values: Array, params: ActParams) -> npt.NDArray[np.float64]:
    codes: npt.NDArray[np.float64] = np.rint(values.astype(np.float64) / params.scale) + params.zero_point
    codes = np.clip(codes, 0, 255)
    return params.scale * (codes - params.zero_point)


def squared_error(values: Array, low: float, high: float) -> float:
    return float(((quantize(values, act_params(low, high)) - values) ** 2).sum())


def reference_counts(values: Array, seen: Distribution) -> Array:
    """np.histogram over the same edges; a last bin of width 0 (the maximum on an edge) is counted by itself."""
    places = np.searchsorted(seen.edges[:-1], values.astype(np.float64), side="right") - 1
    return np.bincount(places, minlength=seen.counts.size)


# --- Histogram


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=8), min_size=1, max_size=5))
def test_any_stream_is_counted_exactly(batches: list[list[float]]) -> None:
    parts = [np.array(batch, dtype=np.float32) for batch in batches]
    values = np.concatenate(parts)
    seen = distribution(*parts, bins=16)
    assert seen.low == values.min() and seen.high == values.max()
    assert seen.edges[0] == seen.low and seen.edges[-1] == seen.high
    assert seen.counts.sum() == values.size and seen.counts.size <= 17
    assert (np.diff(seen.edges) >= 0).all()
    assert seen.zeros == (values == 0).sum()
    np.testing.assert_array_equal(seen.counts, reference_counts(values, seen))


def test_growing_gives_the_same_as_knowing_the_range() -> None:
    values = gaussian() * np.float32(1e-3)
    values[50_000:] *= np.float32(5000)
    values[99_999] = -77
    grown, known = Histogram(), Histogram()
    for part in np.array_split(values, 13):
        grown.add(part)
    known.add(values)
    np.testing.assert_array_equal(grown.result().edges, known.result().edges)
    np.testing.assert_array_equal(grown.result().counts, known.result().counts)
    assert grown.result().counts.size > 1000  # at least half of the bins stay in use


def test_merge_is_the_same_as_adding() -> None:
    first, second = gaussian(seed=1) * np.float32(0.01), gaussian(seed=2) * np.float32(3)
    for one, other in ((first, second), (second, first)):
        left, right = Histogram(), Histogram()
        left.add(one)
        right.add(other)
        left.merge(right)
        left.merge(Histogram())
        both = distribution(one, other)
        np.testing.assert_array_equal(left.result().edges, both.edges)
        np.testing.assert_array_equal(left.result().counts, both.counts)
        assert (left.result().low, left.result().high) == (both.low, both.high)
    empty = Histogram()
    empty.merge(left)
    np.testing.assert_array_equal(empty.result().counts, both.counts)


def test_memory_does_not_grow_with_the_samples() -> None:
    histogram, moments, gram, sample = Histogram(), Moments(), Gram(), RowSample(16)
    rows = gaussian(64_000).reshape(1, 8000, 8)

    def feed(times: int) -> int:
        for _ in range(times):
            histogram.add(rows)
            moments.add(rows)
            gram.add(rows)
            sample.add(rows)
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        feed(1)
        assert feed(20) - feed(1) < 20_000  # bytes
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int64, np.uint8])
def test_any_number_type_and_empty_batches(dtype: npt.DTypeLike) -> None:
    values = np.arange(100).astype(dtype)
    seen = distribution(values, np.empty(0, dtype), values)
    assert (seen.low, seen.high, seen.counts.sum(), seen.zeros) == (0, 99, 200, 2)


# --- Ranges


@pytest.mark.parametrize("rule", RULES)
def test_values_that_are_never_negative_keep_zero_as_low(rule: object) -> None:
    assert callable(rule)
    for values in (np.maximum(with_outliers(), 0), np.abs(gaussian()) + 1, np.clip(3 * gaussian(), 0, 6)):
        low, high = rule(distribution(values))
        assert low == 0 and 0 < high <= values.max()
        assert act_params(low, high).zero_point == 0
        low, high = rule(distribution(-values))
        assert high == 0 and -values.max() <= low < 0
        assert act_params(low, high).zero_point == 255


@pytest.mark.parametrize("rule", RULES)
def test_degenerate_values(rule: object) -> None:
    assert callable(rule)
    assert rule(distribution(np.zeros(9))) == (0, 0)
    low, high = rule(distribution(np.full(9, 3.0)))
    assert low == 0 and 2.9 < high <= 3
    low, high = rule(distribution(np.array([-2.0, 5.0])))
    assert -2 <= low <= 0 and 4.9 < high <= 5


@pytest.mark.parametrize("rule", [clip_percentile, clip_entropy])
@pytest.mark.parametrize("sign", [-1, 1])
def test_rare_outliers_are_clipped(rule: object, sign: int) -> None:
    assert callable(rule)
    values = with_outliers() * np.float32(sign)
    bulk = values[10:]
    low, high = rule(distribution(values))
    assert -6 < low < -2.5 and 2.5 < high < 6
    whole = clip_minmax(distribution(values))
    assert squared_error(bulk, low, high) < 0.1 * squared_error(bulk, *whole)


def test_entropy_clips_each_side_by_itself() -> None:
    values = np.concatenate([-np.abs(gaussian()) * np.float32(0.1), np.abs(with_outliers())])
    low, high = clip_entropy(distribution(values))
    assert -0.5 < low < -0.2
    assert 2.5 < high < 6


def test_entropy_keeps_a_range_that_is_used_evenly() -> None:
    values = np.random.default_rng(0).uniform(-1, 3, 200_000)
    low, high = clip_entropy(distribution(values))
    assert low == pytest.approx(-1, abs=0.05) and high == pytest.approx(3, abs=0.05)
    saturated = np.clip(3 * gaussian(), 0, 6)  # much mass at the upper end
    assert clip_entropy(distribution(saturated)) == (0, 6)


def test_percentile_matches_numpy() -> None:
    values = gaussian() ** 3
    for q in (100.0, 99.99, 99.0, 50.0):
        tail = (100 - q) / 2
        width = np.diff(distribution(values).edges).max()
        low, high = clip_percentile(distribution(values), q)
        assert low == pytest.approx(np.percentile(values, tail), abs=width)
        assert high == pytest.approx(np.percentile(values, 100 - tail), abs=width)


def test_mse_is_better_than_every_other_rule_and_near_the_best_range() -> None:
    relu, skewed = np.maximum(gaussian(), 0), np.exp(gaussian()) - 1
    for values in (gaussian(), relu, skewed, with_outliers(), np.random.default_rng(0).laplace(size=50_000)):
        seen = distribution(values)
        found = squared_error(values, *clip_mse(seen))
        for rule in RULES:
            assert found <= squared_error(values, *rule(seen)) * 1.01
        whole = clip_minmax(seen)
        scans = [(whole[0] * f, whole[1] * g) for f in np.linspace(0.2, 1, 17) for g in np.linspace(0.2, 1, 17)]
        assert found <= 1.02 * min(squared_error(values, *ends) for ends in scans)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (-0.3, 0.7), (0.0, 1.0), (-2.0, 0.0)])
def test_expected_error_is_the_integral_over_each_bin(low: float, high: float) -> None:
    # The last bin has no width, the second is narrower than a step of the widest range.
    edges = np.array([-1.0, -0.2, -0.198, 0.4, 3.0, 3.0])
    counts = np.array([5.0, 2.0, 11.0, 7.0, 4.0])
    expected = 4 * squared_error(np.array([3.0]), low, high)
    for index in range(4):
        middles = (np.arange(200_000) + 0.5) / 200_000
        spread = edges[index] + (edges[index + 1] - edges[index]) * middles
        expected += counts[index] * squared_error(spread, low, high) / spread.size
    seen = Distribution(counts, edges, low=-1.0, high=3.0, zeros=0.0)
    assert _expected_error(seen, low, high) == pytest.approx(expected, rel=1e-4)
    with_zeros = Distribution(counts + 30.0 * (edges[:-1] == -0.198), edges, low=-1.0, high=3.0, zeros=30.0)
    assert _expected_error(with_zeros, low, high) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("threshold", [0, 2])
def test_mse_finds_the_best_upper_end_among_many_zeros(threshold: float) -> None:
    values = np.maximum(gaussian(400_000) - np.float32(threshold), 0)
    best = min(squared_error(values, 0, float(high)) for high in np.linspace(1, 5, 401))
    assert squared_error(values, *clip_mse(distribution(values))) <= 1.01 * best


# --- Activation grid


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(-1e20, 1e20), st.floats(-1e20, 1e20))
def test_act_params_hold_zero_exactly_and_cover_the_range(one: float, other: float) -> None:
    low, high = min(one, other), max(one, other)
    params = act_params(low, high)
    assert params.scale == float(np.float32(params.scale)) > 0
    assert 0 <= params.zero_point <= 255
    assert quantize(np.zeros(1), params)[0] == 0
    slack = 0.5 * params.scale * (1 + 1e-4)
    if max(high, 0) - min(low, 0) > 1e-30:
        assert params.low <= min(low, 0) + slack and params.high >= max(high, 0) - slack
        assert params.high - params.low <= (max(high, 0) - min(low, 0)) * (1 + 1e-6)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 255.0, ActParams(1.0, 0)),
        (2.0, 255.0, ActParams(1.0, 0)),
        (-255.0, -1.0, ActParams(1.0, 255)),
        (-128.0, 127.0, ActParams(1.0, 128)),
        (0.0, 0.0, ActParams(1.0, 0)),
        (-5e-46, 5e-46, ActParams(1.0, 0)),
    ],
)
def test_act_params_of_known_ranges(low: float, high: float, expected: ActParams) -> None:
    assert act_params(low, high) == expected


# --- Rows


def batches() -> list[FloatArray]:
    """Rows [2, T, 5] of changing T, whose mean is far from 0."""
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((2, count, 5)) + 3).astype(np.float32) for count in (1, 700, 2049, 3)]


def test_moments_and_gram_match_float64() -> None:
    moments, gram = Moments(), Gram()
    for rows in batches():
        moments.add(rows)
        gram.add(rows)
    everything = np.concatenate(batches(), axis=1).astype(np.float64)
    assert moments.count == gram.count == everything.shape[1]
    np.testing.assert_allclose(moments.mean, everything.mean(axis=1), rtol=1e-7)
    np.testing.assert_allclose(moments.abs_mean, np.abs(everything).mean(axis=1), rtol=1e-7)
    np.testing.assert_allclose(moments.square_mean, np.square(everything).mean(axis=1), rtol=1e-7)
    expected = everything.transpose(0, 2, 1) @ everything / everything.shape[1]
    np.testing.assert_allclose(gram.result(), expected, rtol=1e-6)
    np.testing.assert_array_equal(gram.result(), gram.result().transpose(0, 2, 1))
    assert gram.result().dtype == np.float64


def test_row_weights_leave_padding_out() -> None:
    masked = (Moments(), Gram(), RowSample(limit=5000))
    plain = (Moments(), Gram(), RowSample(limit=5000))
    for rows in batches():
        weights = np.arange(rows.shape[1]) % 3 != 0
        noisy = rows.copy()
        noisy[:, ~weights] = 1e6
        kept = rows[:, weights]
        for index in range(3):
            masked[index].add(noisy, weights)
            plain[index].add(kept)
    assert masked[0].count == plain[0].count and masked[1].count == plain[1].count
    np.testing.assert_allclose(masked[0].mean, plain[0].mean, rtol=1e-12)
    np.testing.assert_allclose(masked[0].abs_mean, plain[0].abs_mean, rtol=1e-12)
    np.testing.assert_allclose(masked[1].result(), plain[1].result(), rtol=1e-6)
    np.testing.assert_array_equal(masked[2].result(), plain[2].result())


def test_real_weights_scale_the_rows_share() -> None:
    rows = batches()[1]
    weights = np.random.default_rng(1).uniform(0, 2, rows.shape[1:2])
    gram, moments = Gram(), Moments()
    gram.add(rows, weights)
    moments.add(rows, weights)
    exact = rows.astype(np.float64)
    expected = (exact * weights[:, None]).transpose(0, 2, 1) @ exact / weights.sum()
    np.testing.assert_allclose(gram.result(), expected, rtol=1e-6)
    np.testing.assert_allclose(moments.mean, np.average(exact, axis=1, weights=weights), rtol=1e-6)
    np.testing.assert_allclose(moments.square_mean, np.average(exact**2, axis=1, weights=weights), rtol=1e-6)


def numbered(count: int) -> FloatArray:
    """Rows [2, count, 3] that name themselves."""
    return np.broadcast_to(np.arange(count, dtype=np.float32)[None, :, None], (2, count, 3))


def test_row_sample_does_not_depend_on_the_batches() -> None:
    rows = numbered(1000)
    whole, parts = RowSample(32, seed=7), RowSample(32, seed=7)
    whole.add(rows)
    for part in np.array_split(rows, 37, axis=1):
        parts.add(part)
    np.testing.assert_array_equal(whole.result(), parts.result())
    kept = whole.result()
    assert kept.shape == (2, 32, 3) and kept.dtype == np.float32
    assert len(set(kept[0, :, 0].tolist())) == 32
    assert (kept == kept[:1, :, :1]).all()  # the same rows of every group, whole
    other = RowSample(32, seed=8)
    other.add(rows)
    assert not np.array_equal(other.result(), kept)


def test_row_sample_keeps_every_row_while_there_is_room() -> None:
    sample = RowSample(16)
    sample.add(numbered(9))
    np.testing.assert_array_equal(sample.result(), numbered(9))


def test_row_sample_is_uniform_over_the_stream() -> None:
    hits = np.zeros(200)
    for seed in range(1500):
        sample = RowSample(20, seed)
        for part in np.array_split(numbered(200)[:1], 3, axis=1):
            sample.add(part)
        hits[sample.result()[0, :, 0].astype(int)] += 1
    expected = 1500 * 20 / 200
    # Binomial with standard deviation 11.6; 200 rows stay within 5 of them.
    assert np.abs(hits - expected).max() < 5 * 11.6
    assert abs(hits[:100].sum() - hits[100:].sum()) < 5 * 165


def test_inputs_are_not_written() -> None:
    rows = batches()[1]
    rows.setflags(write=False)
    weights = np.ones(rows.shape[1])
    weights.setflags(write=False)
    Histogram().add(rows)
    accumulators: tuple[Moments | Gram | RowSample, ...] = (Moments(), Gram(), RowSample(8))
    for accumulator in accumulators:
        accumulator.add(rows, weights)
        accumulator.add(rows)


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(InputError, match=r"a histogram needs at least 2 bins, got 1"):
        Histogram(1)
    with pytest.raises(InputError, match=r"2 calibration values are NaN or infinite; check the model's weights"):
        Histogram().add(np.array([1, np.nan, np.inf], dtype=np.float32))
    with pytest.raises(InputError, match=r"no calibration value reached this histogram"):
        Histogram().result()
    with pytest.raises(InputError, match=r"a percentile must be above 0 and at most 100, got 0"):
        clip_percentile(distribution(gaussian(10)), 0)
    with pytest.raises(InputError, match=r"an activation range needs finite low <= high, got \[1, -1\]"):
        act_params(1, -1)
    with pytest.raises(InputError, match=r"a row sample needs a limit of at least 1, got 0"):
        RowSample(0)
    with pytest.raises(InputError, match=r"no calibration row reached this layer"):
        RowSample().result()
    with pytest.raises(InputError, match=r"no calibration row reached this layer"):
        Gram().result()
    masked = Moments()
    masked.add(numbered(3), np.zeros(3))
    with pytest.raises(InputError, match=r"no calibration row reached this layer"):
        _ = masked.mean
