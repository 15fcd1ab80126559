"""What every weight quantizer promises, checked on every method file found."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from quantkit import quantizers
from quantkit.errors import InputError
from quantkit.quantizers import _grid
from quantkit.types import FloatArray, LayerStats, QuantizedWeight, QuantSpec, WeightQuantizer

METHODS = sorted(info.name for info in pkgutil.iter_modules(quantizers.__path__) if not info.name.startswith("_"))
SHAPES = [(1, 1), (3, 7), (16, 27), (5, 130), (64, 9)]
GROUPS = [-1, 3, 32, 128]


def make(name: str) -> WeightQuantizer:
    method: type[WeightQuantizer] = importlib.import_module(f"quantkit.quantizers.{name}").METHOD
    return method()


def weight_of(shape: tuple[int, int], seed: int = 0) -> FloatArray:
    weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    weight.setflags(write=False)
    return weight


def stats_of(num_inputs: int, groups: int = 1, num_rows: int = 64) -> LayerStats:
    """Statistics of correlated inputs whose channels differ in size."""
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((groups, num_rows, num_inputs)) * np.exp(rng.standard_normal(num_inputs))
    rows += 0.5 * rows.mean(axis=2, keepdims=True)
    arrays: dict[str, Any] = {
        "square_mean": np.square(rows).mean(axis=1),
        "abs_mean": np.abs(rows).mean(axis=1),
        "mean": rows.mean(axis=1),
        "gram": rows.transpose(0, 2, 1) @ rows / num_rows,
        "rows": rows.astype(np.float32),
    }
    for array in arrays.values():
        array.setflags(write=False)
    return LayerStats(num_tokens=num_rows, low=float(rows.min()), high=float(rows.max()), **arrays)


def check(result: QuantizedWeight, weight: FloatArray, spec: QuantSpec) -> None:
    num_rows, num_inputs = weight.shape
    shape = (num_rows, spec.num_groups(num_inputs))
    assert result.spec == replace(spec, group_bits=result.spec.group_bits)
    assert result.group_bits.tolist() == result.spec.widths(num_inputs).tolist()
    assert result.spec.average_bits(num_inputs) == pytest.approx(spec.average_bits(num_inputs), abs=1e-6)
    assert result.codes.shape == weight.shape and result.codes.dtype == np.dtype(np.uint8)
    assert result.scales.shape == shape and result.scales.dtype == np.dtype(np.float32)
    assert result.zero_points.shape == shape and result.zero_points.dtype == np.dtype(np.float32)
    assert result.group_bits.shape == shape[1:] and result.group_bits.dtype == np.dtype(np.uint8)
    bits_of_input = np.repeat(result.group_bits, spec.group_width(num_inputs))[:num_inputs]
    assert (result.codes < 2 ** bits_of_input.astype(int)).all()
    assert np.isfinite(result.scales).all() and (result.scales > 0).all()
    assert (result.zero_points * 2 % 1 == 0).all()
    assert ((result.zero_points >= 0) & (result.zero_points <= 2.0**result.group_bits - 1)).all()
    if spec.symmetric:
        assert (result.zero_points == 2.0 ** (result.group_bits - 1.0) - 0.5 * (result.group_bits == 1)).all()
    assert result.dequantize().shape == weight.shape
    assert np.isfinite(result.dequantize()).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("name", METHODS)
def test_codes_scales_and_zero_points_are_in_range(name: str, bits: int, symmetric: bool) -> None:
    method = make(name)
    for place, shape in enumerate(SHAPES):
        weight = weight_of(shape)
        for turn, group_size in enumerate(GROUPS):
            spec = QuantSpec(bits, group_size, symmetric)
            check(method.quantize(weight, spec, None), weight, spec)
            if (place + turn + bits) % len(GROUPS) == 0:  # every pair of shape and groups has its turn
                check(method.quantize(weight, spec, stats_of(shape[1])), weight, spec)


@pytest.mark.parametrize("name", METHODS)
def test_names_only_statistics_that_exist(name: str) -> None:
    assert make(name).stats <= {"abs_mean", "mean", "square_mean", "gram", "rows"}


@pytest.mark.parametrize("name", METHODS)
def test_same_inputs_give_same_bytes_and_inputs_stay_as_they_are(name: str) -> None:
    weight, stats, spec = weight_of((12, 70)), stats_of(70), QuantSpec(3, 32)
    arrays = (weight, stats.gram, stats.abs_mean, stats.mean, stats.square_mean, stats.rows)
    before = [np.array(array) for array in arrays]
    first, second = (make(name).quantize(weight, spec, stats) for _ in range(2))
    assert first.codes.tobytes() == second.codes.tobytes()
    assert first.scales.tobytes() == second.scales.tobytes()
    assert first.zero_points.tobytes() == second.zero_points.tobytes()
    for array, old in zip(arrays, before, strict=True):
        assert array is not None and array.tobytes() == old.tobytes()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("name", METHODS)
def test_convolution_groups_have_their_own_statistics(name: str, bits: int) -> None:
    weight, spec = weight_of((12, 9)), QuantSpec(bits, -1)
    check(make(name).quantize(weight, spec, stats_of(9, groups=4)), weight, spec)
    check(make(name).quantize(weight, spec, stats_of(9, groups=12)), weight, spec)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", METHODS)
def test_zero_rows_stay_zero(name: str, bits: int, symmetric: bool) -> None:
    weight = np.array(weight_of((4, 40)))
    weight[1] = 0
    weight[2, 32:] = 0
    for stats in (None, stats_of(40)):
        result = make(name).quantize(weight, QuantSpec(bits, 32, symmetric), stats)
        check(result, weight, QuantSpec(bits, 32, symmetric))
        # The two values of a mid-rise grid lie half a scale beside zero.
        allowed = 2.0**-24 if 1 in result.group_bits else 0
        assert np.abs(result.dequantize()[1]).max() <= allowed
        if stats is None or "gram" not in make(name).stats:  # else a zero group may make up for the errors of others
            assert np.abs(result.dequantize()[2, 32:]).max() <= allowed


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_groups_may_have_widths_of_their_own(name: str, symmetric: bool) -> None:
    weight = weight_of((12, 100))
    spec = QuantSpec(3, 32, symmetric, group_bits=(2, 1, 8, 4))
    for stats in (None, stats_of(100), stats_of(100, groups=3)):
        result = make(name).quantize(weight, spec, stats)
        check(result, weight, spec)
        assert result.group_bits.tolist() == [2, 1, 8, 4]
        assert result.codes[:, 64:96].max() > 15  # the 8-bit group uses its codes
        if stats is None:  # else the fine group may make up for the errors of the others
            error = np.abs(result.dequantize() - weight)
            assert error[:, 64:96].max() < 0.2 and error[:, :64].mean() > 0.2


@pytest.mark.parametrize("name", METHODS)
def test_widths_that_do_not_fit_the_groups_are_refused(name: str) -> None:
    spec = QuantSpec(3, 32, group_bits=(2, 1, 8))
    with pytest.raises(InputError, match=r"group_bits must name one width for each of the 4 groups of 100 .*, got 3"):
        make(name).quantize(weight_of((12, 100)), spec, None)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", METHODS)
def test_an_outlier_row_and_constant_rows_survive(name: str, bits: int) -> None:
    weight = np.array(weight_of((5, 64)))
    weight[0, 3] = 1e4
    weight[1], weight[2] = 0.37, -0.37
    result = make(name).quantize(weight, QuantSpec(bits, -1), None)
    check(result, weight, QuantSpec(bits, -1))
    assert np.abs(result.dequantize()[0, 3] / 1e4 - 1) < 2e-3  # relative; only float16's rounding of the scale
    np.testing.assert_allclose(result.dequantize()[1:3], weight[1:3], rtol=2e-3)


@pytest.mark.parametrize("name", METHODS)
def test_scales_are_exact_in_float16_where_float16_is_fine_enough(name: str) -> None:
    spec = QuantSpec(4, 32)
    for stats in (None, stats_of(70)):
        scales = make(name).quantize(weight_of((12, 70)), spec, stats).scales
        assert (scales == scales.astype(np.float16)).all()


@pytest.mark.parametrize("factor", [1e-30, 1e-8, 1e12, 1e37])
@pytest.mark.parametrize("name", METHODS)
def test_tiny_and_huge_weights_are_as_accurate_as_others(name: str, factor: float) -> None:
    weight = (weight_of((6, 40)) * np.float32(factor)).astype(np.float32)
    result = make(name).quantize(weight, QuantSpec(8, 32), None)
    error = (result.dequantize().astype(np.float64) - weight) / factor
    assert np.sqrt(np.mean(error**2)) < 0.01  # 40 dB below the weights of size 1


@pytest.mark.parametrize("name", METHODS)
def test_nan_in_the_weight_is_refused(name: str) -> None:
    weight = np.array(weight_of((6, 40)))
    weight[4, 2] = np.nan
    with pytest.raises(InputError, match=r"weight row 4 holds NaN or infinity.*repair the model's weights"):
        make(name).quantize(weight, QuantSpec(4, 32), None)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_rtn_is_within_half_a_step(bits: int, symmetric: bool) -> None:
    for shape in SHAPES:
        weight, spec = weight_of(shape), QuantSpec(bits, 32, symmetric)
        result = make("rtn").quantize(weight, spec, None)
        width = spec.group_width(shape[1])
        scales = np.repeat(result.scales, width, axis=1)[:, : shape[1]].astype(np.float64)
        zero_points = np.repeat(result.zero_points, width, axis=1)[:, : shape[1]]
        low, high = scales * (0 - zero_points), scales * (2**bits - 1 - zero_points)
        error = np.abs(result.dequantize() - weight.astype(np.float64))
        inside = (weight >= low) & (weight <= high)
        assert (error <= scales * 0.5 * (1 + 1e-5))[inside].all()
        # Beyond: half a step from rounding the zero point, and what rounding the scale down to float16 takes off.
        assert (error <= scales * (0.5 + 2**bits * 2.0**-10)).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_rtn_of_a_quantized_matrix_changes_nothing(bits: int, symmetric: bool) -> None:
    for shape in [*SHAPES, (300, 384)]:
        spec = QuantSpec(bits, 32, symmetric)
        once = make("rtn").quantize(weight_of(shape), spec, None)
        again = make("rtn").quantize(once.dequantize(), spec, None)
        np.testing.assert_array_equal(again.dequantize(), once.dequantize())


def test_both_ends_keep_the_outer_codes_when_the_zero_point_is_a_tie() -> None:
    weight = np.array([[-0.5, 0.25, 1.0, 2.5]], dtype=np.float32)
    result = make("rtn").quantize(weight, QuantSpec(2, -1), None)
    assert result.scales.item() == 1 and result.zero_points.item() == 1
    assert result.codes[0, [0, 3]].tolist() == [0, 3]


def test_rtn_symmetric_codes_mirror() -> None:
    weight, spec = weight_of((8, 64)), QuantSpec(3, 32, symmetric=True)
    plus, minus = (make("rtn").quantize(sign * weight, spec, None) for sign in (np.float32(1), np.float32(-1)))
    np.testing.assert_array_equal(plus.dequantize(), -minus.dequantize())


def test_one_bit_scale_is_twice_the_mean_magnitude() -> None:
    weight = weight_of((8, 70))
    result = make("rtn").quantize(weight, QuantSpec(1, 32), None)
    expected = 2 * np.abs(weight[:, 64:].astype(np.float64)).mean(axis=1)
    np.testing.assert_allclose(result.scales[:, 2], expected, rtol=2.0**-10)
    assert (np.sign(result.dequantize()) == np.sign(weight)).all()


@pytest.mark.parametrize(
    ("scales", "fits"), [([1.0, 3e-3], True), ([2.0**-24], True), ([3e-7], False), ([7e4], False), ([1.0, 1e-9], False)]
)
def test_float16_scales_only_where_all_fit(scales: list[float], fits: bool) -> None:
    assert _grid.fits_half(np.array(scales)) is fits
    stored = _grid.store_scales(np.array(scales), fits)
    np.testing.assert_allclose(stored, scales, rtol=2.0**-10 if fits else 2.0**-24)
    if fits:
        assert (stored.astype(np.float16) == stored).all()


def test_row_chunks_cover_every_row_once() -> None:
    for shape in [(1, 1), (7, 3), (1000, 384), (3, 10_000_000)]:
        chunks = list(_grid.row_chunks(shape))
        assert np.array_equal(
            np.concatenate([np.arange(*chunk.indices(shape[0])) for chunk in chunks]), range(shape[0])
        )
        assert all((chunk.stop - chunk.start) * shape[1] <= max(_grid.CHUNK_ELEMENTS, shape[1]) for chunk in chunks)
