"""Learned rounding: better than what it starts from, never worse on any row, and hard at the end."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from quantkit.errors import InputError
from quantkit.quantizers import _gram, adaround
from quantkit.quantizers.adaround import AdaRound
from quantkit.quantizers.gptq import GPTQ
from quantkit.quantizers.mse import MSE
from quantkit.quantizers.rtn import RTN
from quantkit.types import Array, FloatArray, LayerStats, QuantizedWeight, QuantSpec


def problem(shape: tuple[int, int], groups: int = 1, seed: int = 0) -> tuple[FloatArray, LayerStats]:
    """A weight, and statistics of correlated inputs that are mostly positive, as behind a Relu."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape).astype(np.float32)
    mix = rng.standard_normal((groups, shape[1], shape[1])) / np.sqrt(shape[1])
    rows = np.maximum(rng.standard_normal((groups, 4 * shape[1], shape[1])) @ mix + 0.3, 0)
    gram = rows.transpose(0, 2, 1) @ rows / rows.shape[1]
    return weight, LayerStats(num_tokens=rows.shape[1], low=0.0, high=9.0, gram=gram)


def errors(weight: FloatArray, result: QuantizedWeight, stats: LayerStats) -> Array:
    """[N] mean squared output error, float64, one row at a time."""
    assert stats.gram is not None
    delta = result.dequantize().astype(np.float64) - weight
    groups = stats.gram.shape[0]
    return np.array([d @ stats.gram[n * groups // len(delta)] @ d for n, d in enumerate(delta)])


SPECS = [QuantSpec(4, -1, True), QuantSpec(2, 16), QuantSpec(3, 20), QuantSpec(1, 16), QuantSpec(4, 16, True)]


@pytest.mark.parametrize("learn_scales", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_row_is_worse_than_with_gptq_mse_or_rtn(spec: QuantSpec, learn_scales: bool) -> None:
    weight, stats = problem((24, 50))
    found = errors(weight, AdaRound(iterations=60, learn_scales=learn_scales).quantize(weight, spec, stats), stats)
    for other in (GPTQ(), MSE(), RTN()):
        assert (found <= errors(weight, other.quantize(weight, spec, stats), stats) * (1 + 1e-9)).all()


def test_it_improves_on_its_start() -> None:
    weight, stats = problem((64, 96))
    spec = QuantSpec(3, -1, True)
    start = errors(weight, GPTQ().quantize(weight, spec, stats), stats).sum()
    found = errors(weight, AdaRound().quantize(weight, spec, stats), stats).sum()
    assert found < 0.99 * start  # measured: 0.96


@pytest.mark.parametrize("seed", range(3))
def test_tiny_layers_come_close_to_the_best_rounding(seed: int) -> None:
    weight, stats = problem((6, 7), seed=seed)
    spec = QuantSpec(2, -1, True)
    result = AdaRound(damp=0.0).quantize(weight, spec, stats)
    ups = np.array(list(itertools.product((0, 1), repeat=7)))
    found = errors(weight, result, stats)
    for row in range(6):
        scale = float(result.scales[row, 0])
        floors = np.floor(weight[row].astype(np.float64) / scale + 2)
        delta = (np.clip(floors + ups, 0, 3) - 2) * scale - weight[row]
        assert stats.gram is not None
        best = np.einsum("ck,ck->c", delta @ stats.gram[0], delta).min()
        assert found[row] <= 1.2 * best


@pytest.mark.parametrize("double", [False, True])
def test_rounding_becomes_hard(double: bool) -> None:
    weight, stats = problem((8, 30))
    method = AdaRound(double=double)
    assert stats.gram is not None
    start = RTN().quantize(weight, QuantSpec(4, -1, True), stats)
    task = adaround._Problem(weight, start, stats.gram, torch.float64 if double else torch.float32, torch)
    seen: list[torch.Tensor] = []
    finish = task.result
    task.result = lambda soft, factor: (seen.append(soft), finish(soft, factor))[1]  # type: ignore[method-assign]
    task.weights = 8 * method.iterations  # as many steps as a large layer takes
    method._optimize(task, torch)
    middle = (seen[0] > 0.01) & (seen[0] < 0.99)
    assert middle.double().mean() < 0.01


def test_the_gradient_is_that_of_the_error_under_the_gram() -> None:
    weight, stats = problem((4, 12), groups=2)
    assert stats.gram is not None
    start = RTN().quantize(weight, QuantSpec(3, 5), stats)
    task = adaround._Problem(weight, start, stats.gram, torch.float64, torch)
    value = task.start_values().requires_grad_(True)
    factor = task.log_factors().requires_grad_(True)
    soft = adaround._soft(value)
    soft.retain_grad()
    task.error(soft, factor).backward()
    slope, scale_slope = soft.grad, factor.grad
    assert slope is not None and scale_slope is not None

    def error(shares: Array, logs: Array) -> float:
        """From the definition: soft codes, scales exp(log) times the start's, rows in the units of their costs."""
        width = np.repeat(np.arange(3), 5)[:12]
        scales = (start.scales * np.exp(logs.reshape(4, 3)))[:, width].astype(np.float64)
        places = weight / start.scales[:, width].astype(np.float64) + start.zero_points[:, width]
        floors = np.clip(np.floor(places), start.codes.astype(int) - 1, start.codes)
        delta = (np.clip(floors + shares.reshape(4, 12), 0, 7) - start.zero_points[:, width]) * scales - weight
        total = 0.0
        for row in range(4):
            assert stats.gram is not None
            gram = stats.gram[row // 2]
            cost = np.mean(np.diagonal(gram) * start.scales[row, width].astype(np.float64) ** 2)
            total += delta[row] @ gram @ delta[row] / cost
        return float(total)

    shares, logs = soft.detach().numpy().copy(), np.zeros((2, 2, 3))
    for place in [(0, 0, 1), (0, 1, 7), (1, 0, 11), (1, 1, 4)]:
        moved = shares.copy()
        moved[place] += 1e-5
        back = shares.copy()
        back[place] -= 1e-5
        assert slope[place].item() == pytest.approx((error(moved, logs) - error(back, logs)) / 2e-5, rel=1e-5, abs=1e-6)
    bump = np.zeros_like(logs)
    bump[1, 0, 2] = 1e-5
    expected = (error(shares, bump) - error(shares, -bump)) / 2e-5
    assert scale_slope[1, 0, 2].item() == pytest.approx(expected, rel=1e-5)


def test_refitted_scales_are_the_least_squares_solution() -> None:
    weight, stats = problem((5, 23))
    assert stats.gram is not None
    start = RTN().quantize(weight * np.float32(1.02), QuantSpec(3, 8), stats)
    found = adaround._refitted(weight, start, stats.gram)
    root = np.linalg.cholesky(stats.gram[0])
    for row in range(5):
        columns = np.zeros((23, 3))
        for k in range(23):
            columns[k, k // 8] = float(start.codes[row, k]) - start.zero_points[row, k // 8]
        exact = np.linalg.lstsq(root.T @ columns, root.T @ weight[row].astype(np.float64), rcond=None)[0]
        np.testing.assert_allclose(found.scales[row], exact, rtol=2.0**-10)  # float16's rounding
    assert (found.scales == found.scales.astype(np.float16)).all()


def test_convolution_groups_read_their_own_gram_and_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, stats = problem((12, 9), groups=4)
    spec = QuantSpec(3, -1, True)
    whole = AdaRound(iterations=25).quantize(weight, spec, stats)
    assert stats.gram is not None
    for group in range(4):
        rows = slice(3 * group, 3 * group + 3)
        alone = AdaRound(iterations=25).quantize(weight[rows], spec, replace(stats, gram=stats.gram[group : group + 1]))
        # Alone, a group counts as a smaller layer and takes fewer steps; here both take the fewest.
        np.testing.assert_array_equal(alone.codes, whole.codes[rows])
    monkeypatch.setattr(adaround, "BATCH_WEIGHTS", 60)
    np.testing.assert_array_equal(AdaRound(iterations=25).quantize(weight, spec, stats).codes, whole.codes)


def test_mixed_widths_stay_within_each_groups_codes() -> None:
    weight, stats = problem((10, 40))
    spec = QuantSpec(3, 16, group_bits=(4, 2, 1))
    result = AdaRound(iterations=60, learn_scales=True).quantize(weight, spec, stats)
    assert result.group_bits.tolist() == [4, 2, 1]
    assert [int(result.codes[:, part].max()) for part in (slice(16), slice(16, 32), slice(32, 40))] == [15, 3, 1]


def test_the_same_inputs_give_the_same_bytes() -> None:
    weight, stats = problem((16, 33))
    torch.manual_seed(1)
    first = AdaRound(learn_scales=True).quantize(weight, QuantSpec(3, 16), stats)
    torch.manual_seed(2)
    second = AdaRound(learn_scales=True).quantize(weight, QuantSpec(3, 16), stats)
    assert first.codes.tobytes() == second.codes.tobytes() and first.scales.tobytes() == second.scales.tobytes()


def test_without_a_gram_it_is_the_clip_search_and_needs_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    weight, _ = problem((8, 20))
    found, expected = (method.quantize(weight, QuantSpec(3, 16), None) for method in (AdaRound(), MSE()))
    np.testing.assert_array_equal(found.dequantize(), expected.dequantize())


def test_missing_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    weight, stats = problem((8, 20))
    with pytest.raises(InputError, match=r"adaround needs torch; run: pip install 'quantkit\[torch\]'"):
        AdaRound().quantize(weight, QuantSpec(3, 16), stats)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_learns_where_the_caller_has_gradients_switched_off(mode: type[torch.no_grad]) -> None:
    weight, stats = problem((16, 33))
    expected = AdaRound().quantize(weight, QuantSpec(3, 16), stats)
    with mode():
        found = AdaRound().quantize(weight, QuantSpec(3, 16), stats)
    np.testing.assert_array_equal(found.codes, expected.codes)


def test_inputs_that_are_never_seen_change_nothing() -> None:
    weight, stats = problem((6, 12))
    dead = replace(stats, gram=np.zeros((1, 12, 12)))
    result = AdaRound().quantize(weight, QuantSpec(4, -1, True), dead)
    assert np.abs(result.dequantize() - weight).max() < np.abs(weight).max() / 4


def test_row_errors_agree_with_the_shared_function() -> None:
    weight, stats = problem((6, 12), groups=2)
    result = RTN().quantize(weight, QuantSpec(3, -1), stats)
    assert stats.gram is not None
    np.testing.assert_allclose(_gram.row_errors(weight, result.dequantize(), stats.gram), errors(weight, result, stats))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": 0}, r"adaround\.iterations must be at least 1 and at most 1000000, got 0"),
        ({"rate": 0.0}, r"adaround\.rate must be above 0, got 0\.0"),
        ({"strength": -1.0}, r"adaround\.strength must be above 0, got -1\.0"),
        ({"warm": 1.0}, r"adaround\.warm must be at least 0 and below 1, got 1\.0"),
        ({"beta_end": 1.0}, r"adaround\.beta_start must be at least adaround\.beta_end, .* got 20\.0 and 1\.0"),
        ({"beta_start": 1.5}, r"adaround\.beta_start must be .* got 1\.5 and 2\.0"),
        ({"scale_rate": 0.0}, r"adaround\.scale_rate must be above 0, got 0\.0"),
    ],
)
def test_settings_are_checked(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AdaRound(**settings)  # type: ignore[arg-type]
