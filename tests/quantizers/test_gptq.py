"""GPTQ against its definition, and never worse than what it starts from."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from scipy.linalg import cholesky

from quantkit.errors import InputError
from quantkit.quantizers import _fit, _gram, _grid
from quantkit.quantizers.auto import Auto
from quantkit.quantizers.cd import CD
from quantkit.quantizers.gptq import GPTQ
from quantkit.quantizers.mse import MSE
from quantkit.quantizers.rtn import RTN
from quantkit.types import Array, FloatArray, LayerStats, QuantizedWeight, QuantSpec


def stats_of(gram: Array, tokens: int = 100) -> LayerStats:
    gram = gram if gram.ndim == 3 else gram[None]
    gram.setflags(write=False)
    return LayerStats(num_tokens=tokens, low=-1.0, high=1.0, gram=gram)


def inputs(num_rows: int, num_inputs: int, seed: int = 0) -> Array:
    """[rows, K] correlated inputs of different sizes, with two outlier channels where there is room."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((num_rows, num_inputs)) * np.exp(0.5 * rng.standard_normal(num_inputs))
    rows += rng.standard_normal((num_rows, 1)) + 0.3 * rows[:, rng.permutation(num_inputs)]
    rows[:, :2] *= 20 if num_inputs > 8 else 1
    return rows


def gram_of(num_inputs: int, num_rows: int = 500, seed: int = 0) -> Array:
    rows = inputs(num_rows, num_inputs, seed)
    gram: Array = rows.T @ rows / num_rows
    return gram


def weight_of(shape: tuple[int, int], seed: int = 1) -> FloatArray:
    weight = np.random.default_rng(seed).standard_t(5, size=shape).astype(np.float32)
    weight.setflags(write=False)
    return weight


def row_errors(weight: FloatArray, quantized: QuantizedWeight, gram: Array) -> Array:
    """[N] d H d^T of one Gram, from the definition."""
    difference = quantized.dequantize().astype(np.float64) - weight
    errors: Array = ((difference @ gram) * difference).sum(axis=1)
    return errors


def sequential(weight: Array, gram: Array, scale: Array, zero: Array, high: int) -> Array:
    """GPTQ from its definition, rows [n, K]: quantize an input, then move those still open to their optimum."""
    moved = weight.astype(np.float64).copy()
    num_inputs = weight.shape[1]
    codes = np.zeros(weight.shape)
    for i in range(num_inputs):
        codes[:, i] = np.clip(np.rint(moved[:, i] / scale + zero), 0, high)
        if i + 1 == num_inputs:
            break
        fixed = (codes[:, : i + 1] - zero[:, None]) * scale[:, None] - weight[:, : i + 1]
        # min over the open part o of (f, o) H (f, o)^T is o = -f H_fo H_oo^-1.
        moved[:, i + 1 :] = weight[:, i + 1 :] - fixed @ gram[: i + 1, i + 1 :] @ np.linalg.inv(gram[i + 1 :, i + 1 :])
    return codes


@pytest.mark.parametrize("num_inputs", [1, 2, 7, 63, 64, 65, 150])
@pytest.mark.parametrize("bits", [2, 4])
def test_nearest_plane_is_sequential_least_squares(num_inputs: int, bits: int) -> None:
    weight, gram = weight_of((5, num_inputs)).astype(np.float64), gram_of(num_inputs)
    scale, zero, high = np.full(5, 3 / 2**bits), np.array([0, 1, 2, 3, 2.0]), 2**bits - 1
    expected = sequential(weight, gram, scale, zero, high)
    factor = cholesky(gram[::-1, ::-1])  # the last one is decided first
    levels = _gram.nearest_plane(weight.T[::-1].copy(), factor, scale, (-zero, high - zero))
    np.testing.assert_array_equal(levels[::-1].T + zero[:, None], expected)


def test_nearest_plane_on_the_one_bit_grid() -> None:
    weight, gram = weight_of((5, 40)).astype(np.float64), gram_of(40)
    expected = sequential(weight, gram, np.ones(5), np.full(5, 0.5), 1)
    half = np.full(5, 0.5)
    levels = _gram.nearest_plane(
        weight.T[::-1].copy(), cholesky(gram[::-1, ::-1]), np.ones(5), (-half, half), midrise=True
    )
    np.testing.assert_array_equal(levels[::-1].T + 0.5, expected)


def test_a_sequence_is_gptq_where_only_one_grid_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram, spec = weight_of((6, 150)), gram_of(150), QuantSpec(4, -1)
    grid, start = _grid.minmax_grid(weight, spec), RTN().quantize(weight, spec, None)
    columns = _gram.columns_of(spec, 150, grid.half)
    monkeypatch.setattr(_fit, "candidates", lambda scales, zeros, factors, bits, columns: (scales[None], zeros[None]))
    monkeypatch.setattr(_fit, "_better", lambda first, second: first)
    groups = _fit.make_groups(gram, columns, act_order=False)
    state = _gram.open_rows(weight, start, slice(0, 6), columns, gram)
    covering = (grid.scales.T.astype(np.float64), grid.zero_points.T.astype(np.float64))
    _fit.fit_in_sequence(state, columns, groups, _fit.make_sequence(gram, groups, act_order=False), covering)
    scales, zeros = grid.scales[:, 0].astype(np.float64), grid.zero_points[:, 0]
    np.testing.assert_array_equal(state.codes.T, sequential(weight, gram, scales, zeros, 15))
    np.testing.assert_array_equal(state.values, (state.codes - state.zero_points) * state.scales)


def test_groups_in_sequence_see_what_the_groups_before_have_moved() -> None:
    """Each group of 16: the best of many grids for the least-squares targets that the decided groups leave."""
    weight, gram, spec = weight_of((6, 40)), gram_of(40), QuantSpec(3, 16)
    grid, start = _grid.minmax_grid(weight, spec), RTN().quantize(weight, spec, None)
    columns = _gram.columns_of(spec, 40, grid.half)
    groups = _fit.make_groups(gram, columns, act_order=False)
    state = _gram.open_rows(weight, start, slice(0, 6), columns, gram)
    covering = (grid.scales.T.astype(np.float64), grid.zero_points.T.astype(np.float64))
    _fit.fit_in_sequence(state, columns, groups, _fit.make_sequence(gram, groups, act_order=False), covering)
    exact = weight.astype(np.float64)
    for stop in (16, 32, 40):
        begin = stop - 16 if stop < 40 else 32
        fixed = state.values.T[:, :begin] - exact[:, :begin]
        targets, rest = exact[:, begin:stop].copy(), np.arange(begin, 40)
        if begin:
            moved = exact[:, begin:] - fixed @ gram[:begin, begin:] @ np.linalg.inv(gram[np.ix_(rest, rest)])
            targets = moved[:, : stop - begin]
        # Sequential rounding on the very same grid decides the same codes for these targets, or the grid's scale was
        # set for the codes afterwards; its error must not be smaller than what was found.
        inner = np.linalg.inv(np.linalg.inv(gram[begin:, begin:])[: stop - begin, : stop - begin])
        group = begin // 16
        found = state.values.T[:, begin:stop] - targets
        plain = sequential(targets, inner, grid.scales[:, group].astype(np.float64), grid.zero_points[:, group], 7)
        other = (plain - grid.zero_points[:, group, None]) * grid.scales[:, group, None] - targets
        errors, others = (np.einsum("nk,nk->n", part @ inner, part) for part in (found, other))
        assert (errors <= others * (1 + 1e-9)).all() and errors.sum() < 0.95 * others.sum()


GAINS = {2: 0.45, 3: 0.45, 4: 0.45, 8: 0.45}  # of round-to-nearest's error, at most; about 0.1 to 0.3 is reached


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_row_is_worse_than_rtn_or_mse_and_all_together_are_much_better(
    bits: int, group_size: int, symmetric: bool
) -> None:
    weight, gram = weight_of((24, 144)), gram_of(144)
    spec, stats = QuantSpec(bits, group_size, symmetric), stats_of(gram)
    found = row_errors(weight, GPTQ().quantize(weight, spec, stats), gram)
    rtn = row_errors(weight, RTN().quantize(weight, spec, None), gram)
    mse = row_errors(weight, MSE().quantize(weight, spec, stats), gram)
    assert (found <= rtn * (1 + 1e-12)).all() and (found <= mse * (1 + 1e-12)).all()
    assert found.sum() < GAINS[bits] * rtn.sum()


@pytest.mark.parametrize("bits", [2, 4])
def test_better_than_plain_gptq_and_than_descent_alone(bits: int) -> None:
    """Plain GPTQ: covering grids, large inputs first, no descent."""
    weight, gram = weight_of((40, 160)), gram_of(160)
    spec, stats = QuantSpec(bits, 32), stats_of(gram)
    grid = _grid.minmax_grid(weight, spec)
    matrix = _gram.damped(gram, 0.01)
    order = np.argsort(np.diagonal(matrix))
    plain = np.zeros(weight.shape)
    factor = cholesky(matrix[np.ix_(order, order)])
    scales = np.repeat(grid.scales, 32, axis=1).astype(np.float64)
    zeros = np.repeat(grid.zero_points, 32, axis=1)
    missing = np.zeros(weight.shape)
    for i in range(159, -1, -1):
        k = order[i]
        aim = weight[:, k] + missing[:, order[i + 1 :]] @ factor[i, i + 1 :] / factor[i, i]
        code = np.clip(np.rint(aim / scales[:, k] + zeros[:, k]), 0, 2**bits - 1)
        plain[:, k] = (code - zeros[:, k]) * scales[:, k]
        missing[:, k] = weight[:, k] - plain[:, k]
    plain_error = np.einsum("nk,nk->", missing @ gram, missing)
    found = row_errors(weight, GPTQ().quantize(weight, spec, stats), gram).sum()
    descent = row_errors(weight, CD().quantize(weight, spec, stats), gram).sum()
    assert found < 0.85 * plain_error and found < 0.9 * descent


def test_more_rounds_and_restarts_are_better() -> None:
    weight, matrix = weight_of((40, 160)), gram_of(160)
    spec, stats = QuantSpec(3, 32), stats_of(matrix)
    settings = [GPTQ(0, rounds=0, restarts=0), GPTQ(0, rounds=1, restarts=0), GPTQ(0, rounds=6, restarts=0)]
    settings += [GPTQ(0, rounds=6, restarts=2)]
    errors = [row_errors(weight, one.quantize(weight, spec, stats), matrix).sum() for one in settings]
    assert errors[0] > 1.01 * errors[1] and errors[1] > errors[2] > errors[3]


def test_the_single_pass_of_the_paper_is_a_choice() -> None:
    weight, gram, spec = weight_of((40, 160)), gram_of(160), QuantSpec(3, 32)
    single, ended = (
        row_errors(weight, GPTQ(rounds=0, restarts=0, sweeps=sweeps).quantize(weight, spec, stats_of(gram)), gram)
        for sweeps in (0, 100)
    )
    assert ended.sum() < 0.99 * single.sum()
    plain = row_errors(weight, RTN().quantize(weight, spec, None), gram)
    assert (single <= plain).all() and single.sum() < 0.7 * plain.sum()


def test_orthogonal_inputs_leave_each_group_a_clip_search() -> None:
    """H = identity: nothing can be made up for, every code is the nearest one of its grid."""
    weight = weight_of((20, 96))
    result = GPTQ().quantize(weight, QuantSpec(3, 32), stats_of(np.eye(96)))
    scales, zeros = (np.repeat(array, 32, axis=1) for array in (result.scales, result.zero_points))
    np.testing.assert_array_equal(result.codes, np.clip(np.rint(weight / scales + zeros), 0, 7))
    searched = MSE().quantize(weight, QuantSpec(3, 32), stats_of(np.eye(96)))
    assert row_errors(weight, result, np.eye(96)).sum() <= row_errors(weight, searched, np.eye(96)).sum()


@pytest.mark.parametrize("method", [GPTQ(), CD(), Auto()])
def test_a_token_seen_twice_is_a_token_of_weight_two(method: Any) -> None:
    rows = inputs(100, 40)
    twice = np.concatenate([rows, rows[:50]])
    weights = np.r_[np.full(50, 2.0), np.ones(50)]
    weight, spec = weight_of((8, 40)), QuantSpec(3, 32)
    one = method.quantize(weight, spec, stats_of(twice.T @ twice / 150))
    other = method.quantize(weight, spec, stats_of((rows * weights[:, None]).T @ rows / 150))
    np.testing.assert_array_equal(one.dequantize(), other.dequantize())


@pytest.mark.parametrize("method", [GPTQ(), GPTQ(damp=0), CD(), CD(damp=0), Auto()])
def test_a_gram_of_few_tokens_works(method: Any) -> None:
    """7 tokens, 70 inputs: rank 7."""
    weight, gram = weight_of((10, 70)), gram_of(70, num_rows=7)
    for spec in (QuantSpec(3, 32), QuantSpec(1, 32), QuantSpec(4, -1, True)):
        result = method.quantize(weight, spec, stats_of(gram))
        rtn = row_errors(weight, RTN().quantize(weight, spec, None), gram)
        assert (row_errors(weight, result, gram) <= rtn * (1 + 1e-9)).all()
        assert np.isfinite(result.dequantize()).all()


@pytest.mark.parametrize("method", [GPTQ(), CD()])
@pytest.mark.parametrize("num_inputs", [96, 20])
def test_inputs_never_seen_go_to_their_nearest_code(method: Any, num_inputs: int) -> None:
    gram = gram_of(num_inputs)
    dead = np.array([3, 11, 12, num_inputs - 1])
    gram[dead], gram[:, dead] = 0, 0
    weight = np.clip(weight_of((12, num_inputs)), -2, 2)
    result = method.quantize(weight, QuantSpec(4, 32), stats_of(gram))
    width = min(32, num_inputs)
    scales, zeros = (np.repeat(array, width, axis=1)[:, dead] for array in (result.scales, result.zero_points))
    nearest = np.clip(np.rint(weight[:, dead].astype(np.float64) / scales + zeros), 0, 15)
    np.testing.assert_array_equal(result.codes[:, dead], nearest)


def test_nothing_seen_at_all_is_a_plain_search() -> None:
    weight, spec = weight_of((12, 96)), QuantSpec(3, 32)
    result = GPTQ().quantize(weight, spec, stats_of(np.zeros((96, 96))))
    plain = RTN().quantize(weight, spec, None)
    np.testing.assert_array_equal(result.dequantize(), plain.dequantize())  # E is 0 for every row: the first one


@pytest.mark.parametrize("method", [GPTQ(), CD()])
@pytest.mark.parametrize(("shape", "groups"), [((8, 40), 2), ((8, 40), 8), ((12, 9), 12), ((12, 9), 3), ((6, 100), 3)])
def test_each_convolution_group_uses_its_own_gram(method: Any, shape: tuple[int, int], groups: int) -> None:
    weight, spec = weight_of(shape), QuantSpec(3, -1)
    grams = np.stack([gram_of(shape[1], seed=seed) for seed in range(groups)])
    whole = method.quantize(weight, spec, stats_of(grams))
    size = shape[0] // groups
    for group in range(groups):
        rows = slice(group * size, (group + 1) * size)
        part = method.quantize(weight[rows], spec, stats_of(grams[group]))
        mine, alone = whole.dequantize()[rows], part.dequantize()
        errors = [
            (((values - weight[rows]) @ grams[group]) * (values - weight[rows])).sum() for values in (mine, alone)
        ]
        assert errors[0] == pytest.approx(errors[1], rel=0.15)  # small layers take another way than rows alone
        rtn = row_errors(weight[rows], RTN().quantize(weight[rows], spec, None), grams[group])
        assert errors[0] < rtn.sum()
    wrong = method.quantize(weight, spec, stats_of(grams[::-1].copy()))
    mistaken = sum(
        row_errors(weight[g * size : (g + 1) * size], _rows(wrong, g, size), grams[g]).sum() for g in range(groups)
    )
    right = sum(
        row_errors(weight[g * size : (g + 1) * size], _rows(whole, g, size), grams[g]).sum() for g in range(groups)
    )
    assert mistaken > 1.01 * right


def _rows(result: QuantizedWeight, group: int, size: int) -> QuantizedWeight:
    rows = slice(group * size, (group + 1) * size)
    return QuantizedWeight(
        result.spec, result.codes[rows], result.scales[rows], result.zero_points[rows], result.group_bits
    )


@pytest.mark.parametrize("shape", [(1, 1), (1, 100), (9, 1), (3, 65), (2, 129), (1, 27)])
@pytest.mark.parametrize(("bits", "symmetric"), list(itertools.product([1, 2, 8], [False, True])))
def test_odd_shapes(shape: tuple[int, int], bits: int, symmetric: bool) -> None:
    weight, gram = weight_of(shape), gram_of(shape[1])
    for group_size in (-1, 32):
        spec = QuantSpec(bits, group_size, symmetric)
        found = GPTQ().quantize(weight, spec, stats_of(gram))
        rtn = RTN().quantize(weight, spec, None)
        assert (row_errors(weight, found, gram) <= row_errors(weight, rtn, gram) * (1 + 1e-12)).all()


def test_an_outlier_channel_costs_little() -> None:
    """An input 100 times as large as all others: its weight's error is what costs."""
    rows = inputs(300, 64)
    rows[:, 10] = 100 * rows[:, 5] + np.random.default_rng(3).standard_normal(300)
    gram = rows.T @ rows / 300
    weight, spec = weight_of((16, 64)), QuantSpec(3, 64)
    found, rtn = GPTQ().quantize(weight, spec, stats_of(gram)), RTN().quantize(weight, spec, None)
    assert row_errors(weight, found, gram).sum() < 0.08 * row_errors(weight, rtn, gram).sum()


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e6, 1e30])
def test_units_of_weights_and_inputs_do_not_matter(factor: float) -> None:
    weight, gram = weight_of((8, 70)), gram_of(70)
    spec = QuantSpec(3, 32)
    plain = row_errors(weight, GPTQ().quantize(weight, spec, stats_of(gram)), gram).sum()
    scaled = (weight * np.float32(factor)).astype(np.float32)
    large = row_errors(scaled, GPTQ().quantize(scaled, spec, stats_of(gram)), gram).sum() / factor**2
    assert large == pytest.approx(plain, rel=0.02)
    other = GPTQ().quantize(weight, spec, stats_of(gram * factor))
    assert row_errors(weight, other, gram).sum() == pytest.approx(plain, rel=0.02)


def test_mixed_widths_beat_uniform_where_the_inputs_differ() -> None:
    rows = inputs(400, 128)
    rows[:, 32:] *= 0.05
    gram = rows.T @ rows / 400
    weight = weight_of((16, 128))
    mixed = GPTQ().quantize(weight, QuantSpec(3, 32, group_bits=(6, 2, 2, 2)), stats_of(gram))
    uniform = GPTQ().quantize(weight, QuantSpec(3, 32), stats_of(gram))
    assert mixed.group_bits.tolist() == [6, 2, 2, 2]
    assert (mixed.codes[:, 32:] <= 3).all() and mixed.codes[:, :32].max() > 7
    assert row_errors(weight, mixed, gram).sum() < 0.5 * row_errors(weight, uniform, gram).sum()


def test_without_a_gram_it_is_the_clip_search() -> None:
    weight, spec = weight_of((8, 70)), QuantSpec(3, 32)
    diagonal = LayerStats(1, 0.0, 1.0, square_mean=np.linspace(0.1, 9, 70)[None])
    for method, stats in itertools.product((GPTQ(), CD(), Auto()), (None, diagonal)):
        expected = MSE().quantize(weight, spec, stats)
        np.testing.assert_array_equal(method.quantize(weight, spec, stats).dequantize(), expected.dequantize())


def test_scales_are_exact_in_float16() -> None:
    weight, gram = weight_of((8, 70)), gram_of(70)
    for num_inputs in (70, 20):
        part, stats = weight[:, :num_inputs], stats_of(gram[:num_inputs, :num_inputs].copy())
        scales = GPTQ().quantize(part, QuantSpec(4, 32), stats).scales
        assert (scales == scales.astype(np.float16)).all()


def test_chunks_of_rows_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram, spec = weight_of((40, 70)), gram_of(70), QuantSpec(3, 32)
    whole = row_errors(weight, GPTQ(rounds=2).quantize(weight, spec, stats_of(gram)), gram)
    monkeypatch.setattr(_gram, "ROW_ELEMENTS", 7 * 70)
    parts = row_errors(weight, GPTQ(rounds=2).quantize(weight, spec, stats_of(gram)), gram)
    np.testing.assert_allclose(parts, whole, rtol=0.05)  # where a round stops depends on all rows of a part
    assert parts.sum() == pytest.approx(whole.sum(), rel=0.01)


def test_act_order_is_a_choice() -> None:
    weight, gram, spec = weight_of((40, 160)), gram_of(160), QuantSpec(3, 32)
    settings = (GPTQ(rounds=0, restarts=0), GPTQ(act_order=False, rounds=0, restarts=0))
    with_order, without = (
        row_errors(weight, one.quantize(weight, spec, stats_of(gram)), gram).sum() for one in settings
    )
    assert with_order < without


def test_auto_takes_the_settings_of_both() -> None:
    weight, spec, gram = weight_of((10, 70)), QuantSpec(2, 32), gram_of(70)
    stats = stats_of(gram)
    expected = GPTQ(damp=0.5, rounds=1).quantize(weight, spec, stats)
    np.testing.assert_array_equal(Auto(damp=0.5, rounds=1).quantize(weight, spec, stats).codes, expected.codes)
    searched = MSE(steps=3, norm=2.4).quantize(weight, spec, None)
    np.testing.assert_array_equal(Auto(steps=3, norm=2.4).quantize(weight, spec, None).codes, searched.codes)
    both = row_errors(weight, Auto(steps=200).quantize(weight, spec, stats), gram)
    for other in (MSE(steps=200), GPTQ()):
        assert (both <= row_errors(weight, other.quantize(weight, spec, stats), gram) * (1 + 1e-12)).all()


def test_settings_are_checked() -> None:
    for settings, message in (
        ({"damp": -0.1}, "gptq.damp must be at least 0 and at most 100, got -0.1"),
        ({"damp": float("nan")}, "gptq.damp must be at least 0 and at most 100, got nan"),
        ({"rounds": -1}, "gptq.rounds must be at least 0 and at most 1000, got -1"),
        ({"restarts": 101}, "gptq.restarts must be at least 0 and at most 100, got 101"),
        ({"sweeps": 1001}, "gptq.sweeps must be at least 0 and at most 1000, got 1001"),
    ):
        with pytest.raises(InputError, match=message):
            GPTQ(**settings)
        with pytest.raises(InputError, match=message):
            Auto(**settings)
    with pytest.raises(InputError, match=r"mse.steps must be at least 1"):
        Auto(steps=0)


@pytest.mark.parametrize("method", [GPTQ(), CD(), Auto()])
def test_grams_that_do_not_fit_are_refused(method: Any) -> None:
    weight, spec = weight_of((8, 6)), QuantSpec(4)
    for shape in ((1, 5, 5), (3, 6, 6), (0, 6, 6)):
        message = rf"a gram for a weight \[8, 6\] must be \[groups, 6, 6\] with groups dividing 8, got \[{shape[0]}, "
        with pytest.raises(InputError, match=message):
            method.quantize(weight, spec, stats_of(np.zeros(shape)))
    bad = np.eye(6)
    bad[2, 2] = np.nan
    with pytest.raises(InputError, match="the gram holds NaN or infinity; check the calibration data's preprocessing"):
        method.quantize(weight, spec, stats_of(bad))
    indefinite = np.array([[1.0, 1e60], [1e60, 1.0]])
    with pytest.raises(InputError, match="the gram cannot be factored: it is not the product of any data with itself"):
        method.quantize(weight[:, :2], spec, stats_of(indefinite))
