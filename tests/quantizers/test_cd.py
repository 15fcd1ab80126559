"""Coordinate descent never raises the error and ends where no single change helps; with few inputs, at the optimum."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy.linalg import cholesky

from quantkit.errors import InputError
from quantkit.quantizers import _gram, _small
from quantkit.quantizers._closest import Problem, closest
from quantkit.quantizers.cd import CD, polish
from quantkit.quantizers.gptq import GPTQ
from quantkit.quantizers.mse import MSE
from quantkit.quantizers.rtn import RTN
from quantkit.types import Array, FloatArray, LayerStats, QuantizedWeight, QuantSpec


def gram_of(num_inputs: int, groups: int = 1, num_rows: int = 300, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((groups, num_rows, num_inputs)) * np.exp(0.5 * rng.standard_normal(num_inputs))
    rows += rng.standard_normal((groups, num_rows, 1))
    gram: Array = rows.transpose(0, 2, 1) @ rows / num_rows
    return gram


def weight_of(shape: tuple[int, int], seed: int = 1) -> FloatArray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def stats_of(gram: Array) -> LayerStats:
    return LayerStats(num_tokens=1, low=-1.0, high=1.0, gram=gram)


def errors_of(weight: FloatArray, result: QuantizedWeight, gram: Array) -> Array:
    owner = np.arange(weight.shape[0]) * gram.shape[0] // weight.shape[0]
    difference = result.dequantize().astype(np.float64) - weight
    errors: Array = np.einsum("ni,nij,nj->n", difference, gram[owner], difference)
    return errors


def best_single_change(weight: FloatArray, result: QuantizedWeight, gram: Array) -> Array:
    """[N] the largest relative fall of a row's error when one code moves by any amount, by trying all of them."""
    before = errors_of(weight, result, gram)
    gains = np.zeros(weight.shape[0])
    high = (
        2 ** np.repeat(result.group_bits, result.spec.group_width(weight.shape[1]))[: weight.shape[1]].astype(int) - 1
    )
    for k in range(weight.shape[1]):
        for move in (-2, -1, 1, 2):
            codes = result.codes.astype(int)
            codes[:, k] = np.clip(codes[:, k] + move, 0, high[k])
            after = errors_of(weight, replace(result, codes=codes.astype(np.uint8)), gram)
            gains = np.maximum(gains, (before - after) / before)
    return gains


@pytest.mark.parametrize("start", [RTN(), MSE()])
@pytest.mark.parametrize(
    ("shape", "groups", "spec"),
    [
        ((10, 70), 1, QuantSpec(3, 32)),
        ((10, 70), 2, QuantSpec(4, -1, True)),
        ((10, 70), 1, QuantSpec(1, 32)),
        ((10, 70), 10, QuantSpec(2, 32)),
        ((10, 140), 1, QuantSpec(2, 64, group_bits=(4, 1, 3))),
        ((12, 27), 1, QuantSpec(2, -1)),
        ((12, 9), 12, QuantSpec(4, -1)),
        ((12, 50), 12, QuantSpec(3, -1)),
    ],
)
def test_descent_never_raises_the_error_and_ends_where_no_change_helps(
    start: RTN | MSE, shape: tuple[int, int], groups: int, spec: QuantSpec
) -> None:
    weight, gram = weight_of(shape), gram_of(shape[1], groups)
    first = start.quantize(weight, spec, None)
    result = polish(weight, first, gram)
    before, after = errors_of(weight, first, gram), errors_of(weight, result, gram)
    assert (after <= before * (1 + 1e-12)).all() and after.sum() < 0.9 * before.sum()
    np.testing.assert_array_equal(result.scales, first.scales)
    np.testing.assert_array_equal(result.zero_points, first.zero_points)
    assert best_single_change(weight, first, gram).max() > 1e-3  # the check sees what can be improved
    assert best_single_change(weight, result, gram).max() < 1e-6  # float32 of dequantize()


@pytest.mark.parametrize("sweeps", range(6))
def test_each_sweep_lowers_the_error(sweeps: int) -> None:
    weight, gram = weight_of((20, 200)), gram_of(200)
    first = RTN().quantize(weight, QuantSpec(3, 64), None)
    errors = [errors_of(weight, polish(weight, first, gram, count), gram) for count in (sweeps, sweeps + 1)]
    assert (errors[1] <= errors[0] * (1 + 1e-12)).all()
    assert errors[1].sum() < errors[0].sum()


def test_first_sweep_is_gpfq() -> None:
    """From the exact weight, in natural order, a sweep gives each code the error of all codes before: GPFQ."""
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((50, 80)) + rng.standard_normal((50, 1))
    weight = weight_of((6, 80))
    first = RTN().quantize(weight, QuantSpec(3, -1), None)
    columns = _gram.columns_of(first.spec, 80, half=False)
    gram = rows.T @ rows
    state = _gram.open_rows(weight, first, slice(0, 6), columns, gram)
    # Start from codes that stand for the weight itself, as if they need not be whole.
    state.codes[:] = weight.T / state.scales + state.zero_points
    state.values[:], state.slope[:] = weight.T, 0
    _gram.descend(gram, state, columns, 1)
    assert (state.codes % 1 == 0).all()
    missing = np.zeros((50, 6))  # X (w - q) of the inputs decided
    for k in range(80):
        aim = weight[:, k] + rows[:, k] @ missing / (rows[:, k] @ rows[:, k])
        code = np.clip(np.rint(aim / first.scales[:, 0] + first.zero_points[:, 0]), 0, 7)
        np.testing.assert_allclose(state.codes[k], code, atol=1e-6)
        missing += np.outer(rows[:, k], weight[:, k] - (code - first.zero_points[:, 0]) * first.scales[:, 0])


def test_orthogonal_inputs_leave_round_to_nearest_as_it_is() -> None:
    weight = weight_of((20, 96))
    first = RTN().quantize(weight, QuantSpec(4, 32), None)
    for gram in (np.eye(96)[None], np.diag(np.linspace(0.01, 100, 96))[None]):
        np.testing.assert_array_equal(polish(weight, first, gram).codes, first.codes)


def test_inputs_never_seen_keep_their_codes() -> None:
    gram = gram_of(70)
    gram[:, 5], gram[:, :, 5] = 0, 0
    weight = weight_of((8, 70))
    first = MSE().quantize(weight, QuantSpec(2, 32), None)
    result = polish(weight, first, gram)
    np.testing.assert_array_equal(result.codes[:, 5], first.codes[:, 5])
    assert (result.codes != first.codes).any()


@pytest.mark.parametrize("num_inputs", [70, 20])
def test_a_scale_of_the_inputs_is_taken_into_account(num_inputs: int) -> None:
    """Codes of weight * s for input / s: the error of the product is what falls."""
    weight, gram = weight_of((10, num_inputs)), gram_of(num_inputs)
    factors = np.exp(np.random.default_rng(7).standard_normal(num_inputs)).astype(np.float32)
    first = replace(RTN().quantize(weight * factors, QuantSpec(3, 32), None), pre_scale=factors)
    result = polish(weight, first, gram)
    np.testing.assert_array_equal(result.pre_scale, factors)
    before, after = errors_of(weight, first, gram), errors_of(weight, result, gram)
    assert (after <= before * (1 + 1e-6)).all() and after.sum() < 0.8 * before.sum()
    assert best_single_change(weight, result, gram).max() < 1e-5


def brute_force(weight: Array, gram: Array, scale: float, zero: float, bits: int) -> float:
    codes = np.array(list(itertools.product(range(2**bits), repeat=weight.size)))
    difference = (codes - zero) * scale - weight
    return float(np.einsum("ci,ij,cj->c", difference, gram, difference).min())


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("num_inputs", "bits"), [(1, 2), (2, 4), (4, 2), (6, 2), (3, 3), (8, 1)])
def test_few_inputs_reach_the_optimum(num_inputs: int, bits: int, shared: bool) -> None:
    rows = 6
    weight, gram = weight_of((rows, num_inputs)), gram_of(num_inputs, 1 if shared else rows, num_rows=20)
    first = MSE().quantize(weight, QuantSpec(bits, -1), None)
    found = errors_of(weight, polish(weight, first, gram), gram)
    for row in range(rows):
        zero, scale = float(first.zero_points[row, 0]), float(first.scales[row, 0])
        best = brute_force(weight[row].astype(np.float64), gram[0 if shared else row], scale, zero, bits)
        assert found[row] == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("num_inputs", [4, 7])
def test_closest_is_proven_or_at_least_as_good_as_what_was_known(num_inputs: int) -> None:
    rng = np.random.default_rng(2)
    count = 40
    grams = gram_of(num_inputs, 4, num_rows=30)
    owner = np.arange(count) % 4
    problem = Problem(
        targets=rng.standard_normal((count, num_inputs)) * 2,
        factors=np.stack([cholesky(gram) for gram in grams]),
        owner=owner,
        scales=np.broadcast_to(rng.uniform(0.3, 1, (count, 1)), (count, num_inputs)),
        low=np.full((count, num_inputs), -1.0),
        high=np.full((count, num_inputs), 2.0),
    )
    nothing, unknown = np.zeros((count, num_inputs)), np.full(count, np.inf)
    full = closest(problem, 100_000, nothing, unknown)
    assert full.proven.all()
    error = full.levels * problem.scales - problem.targets
    np.testing.assert_allclose(full.costs, np.einsum("mi,mij,mj->m", error, grams[owner], error), rtol=1e-9)
    assert ((full.levels >= -1) & (full.levels <= 2)).all()
    short = closest(problem, num_inputs, nothing, unknown)  # the first point that is reached: Babai's
    assert (short.costs >= full.costs * (1 - 1e-12)).all() and short.costs.sum() > 1.001 * full.costs.sum()
    assert np.isfinite(short.costs).all() and not short.proven.all()
    known = closest(problem, 100_000, full.levels, full.costs * 0.5)  # nothing is that close
    assert known.proven.all()
    np.testing.assert_array_equal(known.costs, full.costs * 0.5)
    np.testing.assert_array_equal(known.levels, full.levels)


def test_a_search_that_is_cut_short_still_ends_where_no_change_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_small, "STEPS", 30)
    weight, gram = weight_of((12, 25)), gram_of(25, 12)
    first = RTN().quantize(weight, QuantSpec(3, -1), None)
    result = polish(weight, first, gram)
    assert best_single_change(weight, result, gram).max() < 1e-6


@pytest.mark.parametrize(("bits", "group_size"), [(2, -1), (4, -1), (4, 4), (1, -1)])
def test_depthwise_layers_are_better_than_by_descent(bits: int, group_size: int) -> None:
    weight, gram = weight_of((48, 9)), gram_of(9, 48)
    spec, stats = QuantSpec(bits, group_size), stats_of(gram)
    methods = (RTN(), MSE(), CD(), GPTQ())
    rtn, mse, cd, gptq = (errors_of(weight, method.quantize(weight, spec, stats), gram) for method in methods)
    for other in (rtn, mse):
        assert (cd <= other * (1 + 1e-9)).all() and (gptq <= other * (1 + 1e-9)).all()
    assert gptq.sum() < 0.99 * cd.sum() and cd.sum() < 0.75 * mse.sum()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_row_is_worse_than_rtn_or_mse(bits: int) -> None:
    weight, gram = weight_of((20, 100)), gram_of(100)
    spec, stats = QuantSpec(bits, 32), stats_of(gram)
    found = errors_of(weight, CD().quantize(weight, spec, stats), gram)
    for other in (RTN(), MSE()):
        assert (found <= errors_of(weight, other.quantize(weight, spec, stats), gram) * (1 + 1e-12)).all()
    assert found.sum() < 0.7 * errors_of(weight, MSE().quantize(weight, spec, stats), gram).sum()
    none = CD(sweeps=0).quantize(weight, spec, stats)
    assert errors_of(weight, none, gram).sum() > 1.2 * found.sum()


def test_best_rows_takes_each_row_from_the_best() -> None:
    weight, gram, spec = weight_of((20, 40)), gram_of(40), QuantSpec(3, 16)
    candidates = [RTN().quantize(weight, spec, None), MSE().quantize(weight, spec, None)]
    candidates.append(polish(weight, candidates[0], gram, 1))
    errors = np.stack([errors_of(weight, one, gram) for one in candidates])
    best = _gram.best_rows(weight, gram, candidates)
    np.testing.assert_allclose(errors_of(weight, best, gram), errors.min(axis=0))
    first = errors.argmin(axis=0)
    for row in range(20):
        np.testing.assert_array_equal(best.codes[row], candidates[first[row]].codes[row])
        np.testing.assert_array_equal(best.scales[row], candidates[first[row]].scales[row])


def test_errors_are_those_of_the_outputs() -> None:
    """d H d^T = mean |x d|^2 over the rows that H was made of."""
    rows = np.random.default_rng(0).standard_normal((3, 50, 12))
    gram = rows.transpose(0, 2, 1) @ rows / 50
    weight, values = weight_of((9, 12)), weight_of((9, 12), seed=4)
    difference = (values.astype(np.float64) - weight).reshape(3, 3, 12)
    outputs = np.einsum("gtk,gnk->gtn", rows, difference)
    np.testing.assert_allclose(_gram.row_errors(weight, values, gram), np.square(outputs).mean(axis=1).reshape(-1))


def test_damping() -> None:
    gram = np.diag([1.0, 4.0, 9.0])
    np.testing.assert_allclose(_gram.damped(gram, 0.5), gram + 0.5 * 4 * np.eye(3))  # (1 + 2 + 3)^2 / 3^2
    np.testing.assert_array_equal(_gram.damped(gram, 0.0), gram)
    singular = np.ones((3, 3))
    found = _gram.damped(singular, 0.0)
    assert 0 < found[0, 0] - 1 < 1e-4 and np.linalg.eigvalsh(found).min() > 0
    np.testing.assert_array_equal(_gram.damped(np.zeros((3, 3)), 0.1), np.eye(3))


def test_settings_are_checked() -> None:
    with pytest.raises(InputError, match=r"cd.damp must be at least 0 and at most 100, got -1"):
        CD(damp=-1)
    with pytest.raises(InputError, match=r"cd.sweeps must be at least 0 and at most 10000, got -3"):
        CD(sweeps=-3)
