"""Normalizations: fused where possible, the same numbers when not; twice differentiable, also by the statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from quantkit.runtime.torch_backend import to_torch
from tests.runtime.torch_backend.single_node import Array, Case, by_onnxruntime, by_torch, check_derivatives

RNG = np.random.default_rng(24)


def normal(*shape: int) -> Array:
    return RNG.normal(size=shape).astype(np.float32)


def positive(*shape: int) -> Array:
    return (RNG.random(shape) + 0.5).astype(np.float32)


X, LINE, ROWS = normal(3, 4, 5, 2), normal(3, 4, 6), normal(5, 4)
STATISTICS = [positive(4), normal(4), normal(4), positive(4)]
LAST = [positive(5, 2), normal(5, 2)]


def batch_norm(x: Array, label: str = "", outputs: int = 1, opset: int = 15, **attributes: Any) -> Case:
    return Case("BatchNormalization", [x, *STATISTICS], attributes, outputs, opset, label=label)


LIKE_ONNXRUNTIME = [
    batch_norm(X),
    batch_norm(X, "opset 9", opset=9, epsilon=1e-2),
    batch_norm(X, "opset 7", opset=7),
    batch_norm(ROWS, "rows"),
    batch_norm(X, "training", 3, training_mode=1, momentum=0.7),
    Case("InstanceNormalization", [X, positive(4), normal(4)], {"epsilon": 1e-2}),
    Case("InstanceNormalization", [LINE, positive(4), normal(4)], label="line"),
    Case("LayerNormalization", [X, positive(2), normal(2)], opset=17),
    Case("LayerNormalization", [X, *LAST], {"axis": 2, "epsilon": 1e-2}, opset=17, label="two axes"),
    Case("LayerNormalization", [X, positive(5, 2)], {"axis": -2}, opset=17, label="no bias"),
    Case("LayerNormalization", [X, *LAST], {"axis": 2}, 3, opset=17, label="statistics"),
    Case("LayerNormalization", [X, *LAST], {"axis": -2}, (1, 0, 1), opset=17, label="deviation only"),
    Case("LayerNormalization", [X, positive(5, 1), normal(5, 2)], {"axis": 2}, opset=17, label="broadcast scale"),
    Case("GroupNormalization", [X, positive(4), normal(4)], {"num_groups": 2, "epsilon": 1e-2}, opset=21),
    Case("LRN", [normal(2, 7, 3, 4)], {"size": 3, "alpha": 0.3, "beta": 0.6, "bias": 1.5}),
    Case("LRN", [normal(2, 7, 3, 4)], {"size": 5, "alpha": 0.3}, opset=7, label="opset 7"),
    Case("LpNormalization", [X], {"axis": 1, "p": 1}),
    Case("LpNormalization", [X], {"axis": -1}, label="2"),
    Case("MeanVarianceNormalization", [X]),
    Case("MeanVarianceNormalization", [X], {"axes": [1, 3]}, opset=9, label="axes"),
]


@pytest.mark.parametrize("case", LIKE_ONNXRUNTIME, ids=str)
def test_same_as_onnxruntime(case: Case) -> None:
    for found, expected in zip(by_torch(case), by_onnxruntime(case), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def formula(x: Array, scale: Array, b: Array, mean: Array, var: Array, epsilon: float = 1e-5) -> Array:
    result: Array = (x - mean) / np.sqrt(var + epsilon) * scale + b
    return result


def test_old_batch_normalization_per_element() -> None:
    statistics = [positive(4, 5, 2), normal(4, 5, 2), normal(4, 5, 2), positive(4, 5, 2)]
    case = Case("BatchNormalization", [X, *statistics], {"spatial": 0}, opset=7)
    np.testing.assert_allclose(by_torch(case)[0], formula(X, *statistics), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("opset", [6, 9])
def test_old_batch_normalization_with_several_outputs_trains(opset: int) -> None:
    y, mean, var, batch_mean, batch_var = by_torch(batch_norm(LINE, "", 5, opset, momentum=0.6))
    wide = LINE.astype(np.float64)
    expected_mean, expected_var = wide.mean((0, 2)), wide.var((0, 2))
    column = [value[:, None] for value in (*STATISTICS[:2], expected_mean, expected_var)]
    np.testing.assert_allclose(y, formula(LINE, *column), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mean, STATISTICS[2] * 0.6 + expected_mean * 0.4, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(var, STATISTICS[3] * 0.6 + expected_var * 0.4, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(batch_mean, expected_mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(batch_var, expected_var, rtol=1e-4, atol=1e-5)


def test_old_batch_normalization_in_test_mode_keeps_its_statistics() -> None:
    y, mean, _ = by_torch(batch_norm(LINE, "", 3, 6, is_test=1))
    np.testing.assert_allclose(y, by_torch(batch_norm(LINE))[0], rtol=1e-6)
    np.testing.assert_array_equal(mean, STATISTICS[2])


def test_mixed_types_of_batch_normalization() -> None:
    """Opset 15 allows half inputs with float statistics."""
    half = Case("BatchNormalization", [X.astype(np.float16), *STATISTICS], opset=15)
    (found,) = by_torch(half)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, by_torch(batch_norm(X))[0], rtol=2e-2, atol=2e-2)


def test_group_normalization_of_opset_18_has_one_scale_per_group() -> None:
    scale, b = positive(2), normal(2)
    (old,) = by_torch(Case("GroupNormalization", [X, scale, b], {"num_groups": 2}, opset=18))
    (new,) = by_torch(Case("GroupNormalization", [X, scale.repeat(2), b.repeat(2)], {"num_groups": 2}))
    np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("scale", [positive(5, 2), positive(5, 1)], ids=["whole", "broadcast"])
def test_root_mean_square(scale: Array) -> None:
    (found,) = by_torch(Case("RMSNormalization", [X, scale], {"axis": 2, "epsilon": 1e-2}, opset=23))
    expected = X / np.sqrt((X.astype(np.float64) ** 2).mean((2, 3), keepdims=True) + 1e-2) * scale
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_response_normalization_of_any_size(size: int) -> None:
    """An even window reaches one channel further up than down."""
    x = normal(2, 5, 3)
    (found,) = by_torch(Case("LRN", [x], {"size": size, "alpha": 0.5, "beta": 0.5, "bias": 2.0}))
    sums = np.zeros(x.shape)
    for channel in range(5):
        low, high = max(0, channel - (size - 1) // 2), min(5, channel + size // 2 + 1)
        sums[:, channel] = (x[:, low:high].astype(np.float64) ** 2).sum(1)
    np.testing.assert_allclose(found, x / np.sqrt(2.0 + 0.5 / size * sums), rtol=1e-5)


def test_zeros_stay_zeros() -> None:
    (found,) = by_torch(Case("LpNormalization", [np.zeros((2, 3), np.float32)]))
    np.testing.assert_array_equal(found, np.zeros((2, 3)))


SMALL = normal(2, 2, 3)
PAIR = [positive(2), normal(2)]
MOVING = [
    Case("BatchNormalization", [SMALL, *PAIR, normal(2), positive(2)], label="by the statistics"),
    Case("BatchNormalization", [SMALL, *PAIR, normal(2), positive(2)], constants=[3, 4]),
    Case("BatchNormalization", [SMALL, *PAIR, normal(2), positive(2)], {"training_mode": 1}, 3, label="training"),
    Case("InstanceNormalization", [SMALL, *PAIR]),
    Case("LayerNormalization", [SMALL, positive(3), normal(3)]),
    Case("LayerNormalization", [SMALL, positive(3), normal(3)], {}, 3, label="statistics"),
    Case("GroupNormalization", [SMALL, *PAIR], {"num_groups": 1}),
    Case("GroupNormalization", [SMALL, *PAIR], {"num_groups": 2}, opset=18, label="opset 18"),
    Case("RMSNormalization", [SMALL, positive(3)], opset=23),
    Case("LRN", [SMALL], {"size": 2, "alpha": 0.5}),
    Case("LpNormalization", [SMALL], {"axis": 1}),
    Case("LpNormalization", [SMALL], {"axis": 1, "p": 1}, label="1"),
    Case("MeanVarianceNormalization", [SMALL], {"axes": [0, 2]}),
]


@pytest.mark.parametrize("case", MOVING, ids=str)
def test_derivatives(case: Case) -> None:
    check_derivatives(case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Large values: the statistics have to be summed in float."""
    cases = [LIKE_ONNXRUNTIME[4], *LIKE_ONNXRUNTIME[5:9], LIKE_ONNXRUNTIME[13]]
    for case in (*cases, Case("RMSNormalization", [X, positive(2)], opset=23)):
        exact, half = to_torch(case.model()), to_torch(case.model(), dtype=dtype)
        feed = [torch.from_numpy(value) for value in case.feeds().values()]
        feed[0] = (feed[0] * 100).to(dtype).float()
        found, expected = half(*(value.to(dtype) for value in feed)), exact(*feed)
        if isinstance(found, tuple):
            found, expected = found[0], expected[0]
        assert found.dtype == dtype
        assert float((found.float() - expected).abs().max()) < 0.04 * float(expected.abs().max())
