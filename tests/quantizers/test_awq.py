"""awq: never worse than plain rounding or clip search on the output's error; scales where they pay."""

from __future__ import annotations

import numpy as np
import pytest

from quantkit.errors import InputError
from quantkit.quantizers.awq import AWQ
from quantkit.quantizers.mse import MSE
from quantkit.quantizers.rtn import RTN
from quantkit.types import FloatArray, LayerStats, QuantizedWeight, QuantSpec


def problem(num_rows: int, num_inputs: int, outlier: float = 20.0, groups: int = 1) -> tuple[FloatArray, LayerStats]:
    rng = np.random.default_rng(num_rows)
    weight = rng.standard_normal((num_rows, num_inputs)).astype(np.float32)
    rows = rng.standard_normal((groups, 300, num_inputs))
    rows[:, :, ::13] *= outlier
    gram = rows.transpose(0, 2, 1) @ rows / 300
    stats = LayerStats(300, 0.0, 1.0, abs_mean=np.abs(rows).mean(1), square_mean=(rows**2).mean(1), gram=gram)
    return weight, stats


def error(result: QuantizedWeight, weight: FloatArray, stats: LayerStats) -> float:
    """E |(W' - W) x|^2 in float64."""
    assert stats.gram is not None
    groups = stats.gram.shape[0]
    delta = (result.dequantize().astype(np.float64) - weight).reshape(groups, -1, weight.shape[1])
    return float(np.einsum("gnk,gkl,gnl->", delta, stats.gram, delta))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("outlier", [1.0, 20.0])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_never_worse_than_rounding_or_clipping(bits: int, outlier: float, symmetric: bool) -> None:
    for shape in [(9, 70), (600, 48)]:
        weight, stats = problem(*shape, outlier)
        spec = QuantSpec(bits, 16, symmetric)
        ours = error(AWQ().quantize(weight, spec, stats), weight, stats)
        for other in (RTN(), MSE()):
            assert ours <= error(other.quantize(weight, spec, stats), weight, stats) * (1 + 1e-6)


def test_outliers_are_scaled_and_that_pays() -> None:
    weight, stats = problem(32, 64)
    spec = QuantSpec(3, 16)
    result = AWQ(clip=False).quantize(weight, spec, stats)
    assert result.pre_scale is not None
    assert result.pre_scale[::13].min() > np.median(result.pre_scale)
    assert error(result, weight, stats) < 0.7 * error(RTN().quantize(weight, spec, stats), weight, stats)
    # The codes are those of the scaled matrix.
    again = RTN().quantize(weight * result.pre_scale, spec, None)
    assert again.codes.tobytes() == result.codes.tobytes()


def test_scales_that_gain_little_are_left_out() -> None:
    weight, stats = problem(32, 64, outlier=1.0)
    assert AWQ(min_gain=0.3).quantize(weight, QuantSpec(3, 16), stats).pre_scale is None


@pytest.mark.parametrize("spec", [QuantSpec(3, -1), QuantSpec(3, 64), QuantSpec(1, 16)])
def test_no_scales_for_whole_rows_and_signs(spec: QuantSpec) -> None:
    weight, stats = problem(32, 64)
    assert AWQ(min_gain=0).quantize(weight, spec, stats).pre_scale is None


def test_without_statistics_it_is_the_clip_search() -> None:
    weight, _ = problem(8, 40)
    spec = QuantSpec(3, 16)
    assert AWQ().quantize(weight, spec, None).codes.tobytes() == MSE().quantize(weight, spec, None).codes.tobytes()
    assert (
        AWQ(clip=False).quantize(weight, spec, None).codes.tobytes()
        == RTN().quantize(weight, spec, None).codes.tobytes()
    )


def test_convolution_groups_share_the_scales_and_count_with_their_own_inputs() -> None:
    weight, stats = problem(12, 40, groups=4)
    spec = QuantSpec(3, 16)
    result = AWQ().quantize(weight, spec, stats)
    assert error(result, weight, stats) <= error(MSE().quantize(weight, spec, stats), weight, stats) * (1 + 1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "awq.steps must be at least 1 and at most 1000, got 0"),
        ({"min_gain": 1.0}, "awq.min_gain must be at least 0 and below 1, got 1.0"),
        ({"rows": 0}, "awq.rows must be at least 1, got 0"),
    ],
)
def test_settings_are_checked(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AWQ(**settings)  # type: ignore[arg-type]
