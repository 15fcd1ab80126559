"""What each transform chooses, on arrays: awq never errs more, cle equalizes, smoothquant splits ranges evenly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from quantkit.calibration.accumulators import Moments
from quantkit.errors import InputError
from quantkit.quantizers.mse import MSE
from quantkit.quantizers.rtn import RTN
from quantkit.transforms._problem import Reader, ScaleGroup, Source
from quantkit.transforms.awq import AWQ
from quantkit.transforms.cle import CLE
from quantkit.transforms.smoothquant import SmoothQuant
from quantkit.types import Array, FloatArray, LayerStats, QuantSpec


def weights(*shape: int, seed: int = 0) -> FloatArray:
    weight = np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)
    weight.setflags(write=False)
    return weight


def inputs(num_inputs: int, groups: int = 1, seed: int = 3) -> LayerStats:
    """A few channels are far larger than the rest."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((groups, 400, num_inputs))
    rows[:, :, :: max(num_inputs // 4, 1)] *= 20
    gram = rows.transpose(0, 2, 1) @ rows / 400
    return LayerStats(400, 0.0, 1.0, abs_mean=np.abs(rows).mean(1), gram=gram, abs_max=np.abs(rows).max(1))


def reader(
    name: str,
    weight: FloatArray,
    stats: LayerStats | None,
    *,
    channels: Array | None = None,
    bits: int = 3,
    op: str = "MatMul",
) -> Reader:
    columns = np.arange(weight.shape[1])[None] if channels is None else channels
    return Reader(name, op, columns, QuantSpec(bits, 16), lambda: np.array(weight), stats)


def group(*readers: Reader, size: int, source: Source | None = None, kind: str = "norm") -> ScaleGroup:
    return ScaleGroup("g", kind, size, readers, source, kind == "norm")


def output_error(parts: ScaleGroup, scales: Array, method: Any) -> float:
    """The definition, in float64 and without anything of the transform: sum of E |(Q(W s) / s - W) x|^2."""
    total = 0.0
    for item in parts.readers:
        assert item.stats is not None and item.stats.gram is not None
        weight, columns = item.load().astype(np.float64), scales[item.channels[0]]
        inner = LayerStats(1, 0, 1, square_mean=(np.diagonal(item.stats.gram[0]) / columns**2)[None])
        rounded = method.quantize((weight * columns).astype(np.float32), item.spec, inner).dequantize() / columns
        delta = rounded - weight
        total += float(np.einsum("nk,kl,nl->", delta, item.stats.gram[0], delta))
    return total


@pytest.mark.parametrize("rounding", ["rtn", "mse"])
@pytest.mark.parametrize("duo", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_awq_errs_less_than_without(bits: int, duo: bool, rounding: Any) -> None:
    stats = inputs(64)
    parts = group(*(reader(f"r{at}", weights(24, 64, seed=at), stats, bits=bits) for at in range(3)), size=64)
    method = AWQ(duo=duo, rounding=rounding, gain=0.0)
    found = method.scales([parts])
    rounder = RTN() if rounding == "rtn" else MSE()
    plain = output_error(parts, np.ones(64), rounder)
    with_scales = output_error(parts, found.get("g", np.ones(64)), rounder)
    assert with_scales <= plain * (1 + 1e-6)
    assert with_scales < 0.9 * plain  # these inputs have outliers, so there is much to gain


def test_awq_large_inputs_get_large_scales() -> None:
    scales = AWQ(duo=False).scales([group(reader("r", weights(32, 64), inputs(64)), size=64)])["g"]
    assert scales[::16].min() > scales[1::16].max()
    assert scales.max() * scales.min() == pytest.approx(1, rel=1e-6)


def test_awq_leaves_what_gains_nothing() -> None:
    """Every weight lies on the grid already: no scale can beat an error of zero."""
    weight = np.tile(np.array([-4, -3, -2, -1, 0, 1, 2, 3], np.float32), (8, 8))
    assert AWQ().scales([group(reader("r", weight, inputs(64), bits=3), size=64)]) == {}


def test_awq_needs_statistics_of_every_reader() -> None:
    some = reader("a", weights(8, 32), inputs(32))
    assert AWQ().scales([group(some, reader("b", weights(8, 32), None), size=32)]) == {}
    assert AWQ().scales([]) == {}


def test_awq_does_not_depend_on_the_order_of_channels() -> None:
    """With one scale for all inputs, channels may be permuted without changing the answer."""
    stats, weight = inputs(32), weights(8, 32)
    assert stats.gram is not None and stats.abs_mean is not None
    order = np.random.default_rng(0).permutation(32)
    moved = LayerStats(1, 0, 1, abs_mean=stats.abs_mean[:, order], gram=stats.gram[:, order][:, :, order])
    spec = QuantSpec(3, -1)
    channels = np.arange(32)[None]
    first = Reader("r", "MatMul", channels, spec, lambda: np.array(weight), stats)
    second = Reader("r", "MatMul", channels, spec, lambda: np.array(weight[:, order]), moved)
    ours, theirs = (AWQ().scales([group(item, size=32)])["g"] for item in (first, second))
    np.testing.assert_allclose(theirs, ours[order], rtol=1e-9)


def test_awq_tied_heads_share_their_scales() -> None:
    """Two query heads read each channel of v: one scale for both, from the mean of their activations."""
    channels = np.concatenate([np.arange(16), np.arange(16)])[None]
    tied = AWQ(duo=False).scales([group(reader("o", weights(16, 32), inputs(32), channels=channels), size=16)])
    assert tied["g"].shape == (16,)


def test_awq_is_settled_after_one_run() -> None:
    """A second run on the scaled layer finds (almost) nothing left to gain."""
    weight, stats = weights(48, 64), inputs(64)
    once = AWQ(gain=0.1)
    scales = once.scales([group(reader("r", weight, stats), size=64)])["g"]
    assert stats.gram is not None and stats.abs_mean is not None
    divided = LayerStats(1, 0, 1, abs_mean=stats.abs_mean / scales, gram=stats.gram / scales / scales[:, None])
    scaled = (weight * scales).astype(np.float32)
    assert once.scales([group(reader("r", scaled, divided), size=64)]) == {}


def equalized(parts: list[ScaleGroup]) -> dict[str, Array]:
    return dict(CLE().scales(parts))


def test_cle_makes_ranges_equal() -> None:
    first, second = weights(12, 20) * np.logspace(-2, 2, 12, dtype=np.float32)[:, None], weights(7, 12, seed=1)
    source = Source("a", np.arange(12), lambda: np.array(first))
    scales = equalized([group(reader("b", second, None), size=12, source=source)])["g"]
    before = np.abs(first).max(axis=1) / scales
    behind = np.abs(second).max(axis=0) * scales
    np.testing.assert_allclose(before, behind, rtol=2e-3)
    np.testing.assert_allclose(scales, np.sqrt(np.abs(first).max(1) / np.abs(second).max(0)), rtol=2e-3)


def test_cle_through_a_depthwise_convolution() -> None:
    """conv (12 rows) - depthwise (12 groups of 9) - conv: the middle layer is scaled from both sides."""
    spread = np.logspace(-1, 1, 12, dtype=np.float32)[:, None]
    first, middle, last = weights(12, 27) * spread, weights(12, 9, seed=1), weights(5, 12, seed=2)
    depthwise = Reader(
        "m", "Conv", np.arange(12)[:, None].repeat(9, 1), QuantSpec(4, -1), lambda: np.array(middle), None
    )
    pairs = [
        ScaleGroup("one", "layer", 12, (depthwise,), Source("f", np.arange(12), lambda: np.array(first)), False),
        ScaleGroup(
            "two", "layer", 12, (reader("l", last, None),), Source("m", np.arange(12), lambda: np.array(middle)), False
        ),
    ]
    scales = equalized(pairs)
    one, two = scales["one"], scales["two"]
    ranges = [
        np.abs(first).max(1) / one,
        np.abs(middle).max(1) * one / two,
        np.abs(last).max(0) * two,
    ]
    np.testing.assert_allclose(ranges[0], ranges[1], rtol=1e-2)
    np.testing.assert_allclose(ranges[1], ranges[2], rtol=1e-2)


def test_cle_leaves_dead_channels_and_norms() -> None:
    first, second = np.array(weights(6, 8)), np.array(weights(4, 6, seed=1))
    first[2], second[:, 4] = 0, 0
    source = Source("a", np.arange(6), lambda: first)
    scales = equalized([group(reader("b", second, None), size=6, source=source)])["g"]
    assert scales[2] == 1 and scales[4] == 1 and (scales[[0, 1, 3, 5]] != 1).all()
    assert equalized([group(reader("b", second, None), size=6)]) == {}


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smoothquant_formula_over_all_readers(alpha: float) -> None:
    stats, pair = inputs(32), (weights(8, 32), weights(12, 32, seed=1))
    assert stats.abs_max is not None
    scales = SmoothQuant(alpha=alpha).scales(
        [group(*(reader(f"r{at}", item, stats) for at, item in enumerate(pair)), size=32)]
    )["g"]
    largest = np.abs(np.concatenate(pair)).max(axis=0)
    np.testing.assert_allclose(scales, stats.abs_max[0] ** alpha / largest ** (1 - alpha), rtol=1e-6)
    if alpha == 0.5:  # both sides end up with equal ranges
        np.testing.assert_allclose(stats.abs_max[0] / scales, largest * scales, rtol=1e-6)


def test_smoothquant_takes_norms_unless_asked() -> None:
    parts = group(reader("r", weights(8, 32), inputs(32)), size=32, kind="layer")
    assert SmoothQuant().scales([parts]) == {}
    assert set(SmoothQuant(layers=True).scales([parts])) == {"g"}
    assert SmoothQuant().scales([group(reader("r", weights(8, 32), None), size=32)]) == {}


def test_smoothquant_survives_dead_channels() -> None:
    stats, weight = inputs(16), np.array(weights(8, 16))
    assert stats.abs_max is not None
    dead = np.array(stats.abs_max)
    dead[0, 3], weight[:, 5] = 0, 0
    scales = SmoothQuant().scales([group(reader("r", weight, LayerStats(1, 0, 1, abs_max=dead)), size=16)])["g"]
    assert np.isfinite(scales).all() and (scales > 0).all()
    nothing = LayerStats(1, 0, 1, abs_max=np.zeros((1, 16)))
    assert (SmoothQuant().scales([group(reader("r", weight, nothing), size=16)])["g"] == 1).all()


@pytest.mark.parametrize(
    "make",
    [
        (lambda: AWQ(steps=0), "awq.steps must be at least 1 and at most 1000, got 0"),
        (lambda: AWQ(gain=1.0), "awq.gain must be at least 0 and below 1, got 1.0"),
        (lambda: AWQ(rows=0), "awq.rows must be at least 1, got 0"),
        (lambda: CLE(passes=0), "cle.passes must be at least 1, got 0"),
        (lambda: CLE(tolerance=0.0), "cle.tolerance must be above 0, got 0.0"),
        (lambda: SmoothQuant(alpha=1.5), "smoothquant.alpha must be from 0 to 1, got 1.5"),
    ],
)
def test_settings_are_checked(make: Any) -> None:
    method, message = make
    with pytest.raises(InputError, match=message):
        method()


def test_largest_magnitudes_over_batches() -> None:
    rows = np.random.default_rng(5).standard_normal((3, 40, 7)).astype(np.float32)
    moments = Moments()
    for part in np.split(rows, 4, axis=1):
        moments.add(part)
    np.testing.assert_array_equal(moments.abs_max, np.abs(rows).max(axis=1))
    masked = Moments()
    masked.add(rows, weights=np.arange(40) < 10)
    np.testing.assert_array_equal(masked.abs_max, np.abs(rows[:, :10]).max(axis=1))
    with pytest.raises(InputError, match="no calibration row reached this layer"):
        _ = Moments().abs_max
