"""Resize and Upsample: every mode like onnxruntime, old opsets, integers; twice differentiable."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from quantkit.errors import InputError
from quantkit.runtime.torch_backend import to_torch
from tests.runtime.torch_backend.single_node import Array, Case, by_onnxruntime, by_torch, check_derivatives

RNG = np.random.default_rng(25)


def normal(*shape: int) -> Array:
    return RNG.normal(size=shape).astype(np.float32)


X = normal(2, 2, 5, 4)
HALVES = ("half_pixel", "pytorch_half_pixel", "half_pixel_symmetric", "asymmetric", "align_corners")


def resize(
    x: Array,
    scales: Sequence[float] | None = None,
    sizes: Sequence[int] | None = None,
    label: str = "",
    opset: int = 19,
    roi: Sequence[float] | None = None,
    **attributes: Any,
) -> Case:
    values = [
        None if roi is None else np.array(roi, dtype=np.float32),
        None if scales is None else np.array(scales, dtype=np.float32),
        None if sizes is None else np.array(sizes),
    ]
    if opset < 13:
        values = [np.zeros(0, np.float32) if value is None else value for value in values[:2]] + values[2:]
    while values[-1] is None:
        values.pop()
    present = [place + 1 for place, value in enumerate(values) if value is not None]
    name = label or f"{attributes.get('mode', 'nearest')}, {attributes.get('coordinate_transformation_mode', '')}"
    return Case("Resize", [x, *values], attributes, 1, opset, constants=present, label=f"{name}, {scales or sizes}")


def modes(mode: str, target: dict[str, Any], **more: Any) -> list[Case]:
    return [resize(X, mode=mode, coordinate_transformation_mode=name, **target, **more) for name in HALVES]


UP, DOWN = {"scales": [1, 1, 2, 2]}, {"scales": [1, 1, 0.6, 0.5]}
SIZED = {"sizes": [2, 2, 3, 9]}
CROP = {"coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 3.5}
ROI = [0, 0, 0.2, 0.1, 1, 1, 0.7, 1.2]
CASES = [
    *modes("linear", UP),
    *modes("linear", {"scales": [1, 1, 0.6, 0.5]})[:-1],  # onnxruntime rounds the length that corners align in
    *modes("linear", SIZED),
    *modes("cubic", UP),
    *modes("cubic", SIZED, exclude_outside=1, cubic_coeff_a=-0.5),
    *modes("linear", SIZED, antialias=1),
    *modes("cubic", {"scales": [1, 1, 0.6, 0.5]}, antialias=1)[:-1],
    resize(X, mode="linear", sizes=[2, 2, 1, 1], coordinate_transformation_mode="pytorch_half_pixel"),
    resize(X, mode="linear", sizes=[2, 2, 1, 1], coordinate_transformation_mode="align_corners"),
    resize(X, mode="linear", **CROP, roi=ROI, sizes=[2, 2, 3, 7]),
    resize(X, mode="cubic", **CROP, roi=ROI, sizes=[2, 2, 3, 7]),
    resize(X, mode="nearest", nearest_mode="floor", **CROP, roi=ROI, sizes=[2, 2, 3, 7]),
    resize(X, mode="linear", sizes=[10, 7], axes=[2, 3], keep_aspect_ratio_policy="not_larger", label="not larger"),
    resize(X, mode="linear", sizes=[10, 7], axes=[2, 3], keep_aspect_ratio_policy="not_smaller", label="not smaller"),
    resize(X, mode="linear", scales=[2.5, 1.5], axes=[3, 2], label="swapped axes"),
    resize(normal(2, 2, 5), mode="linear", scales=[1, 1, 2.5], label="line"),
    resize(normal(1, 2, 3, 4, 2), mode="linear", scales=[1, 1, 2, 1.5, 3], label="volume"),
    resize(X, mode="linear", scales=[1, 1, 2, 2], opset=11, label="opset 11"),
    resize(X, mode="linear", sizes=[2, 2, 10, 8], opset=13, label="opset 13"),
    resize(X, scales=[1, 1, 0.6, 0.5], opset=11, coordinate_transformation_mode="tf_half_pixel_for_nn"),
    resize(X, scales=[1, 1, 1, 1], label="nothing to do"),
]
NEAREST = [
    resize(X, nearest_mode=rounding, coordinate_transformation_mode=name, label=f"{rounding}, {name}", **target)
    for rounding in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
    for name, target in itertools.product(("half_pixel", "asymmetric", "align_corners"), (UP, DOWN, SIZED))
    if not (name == "align_corners" and target is DOWN)
]


@pytest.mark.parametrize("case", [*CASES, *NEAREST], ids=str)
def test_same_as_onnxruntime(case: Case) -> None:
    (found,), (expected,) = by_torch(case), by_onnxruntime(case)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def old(op: str, opset: int, scales: Sequence[float], **attributes: Any) -> Case:
    """Scales as an input, as an attribute before opset 9."""
    if opset < 9:
        return Case(op, [X], {"scales": scales, **attributes}, opset=opset, label=f"{opset}, {scales}")
    values = [X, np.array(scales, dtype=np.float32)]
    return Case(op, values, attributes, opset=opset, constants=[1], label=f"{opset}, {scales}")


OLD = [
    old(op, opset, scales, mode=mode)
    for op, opset in (("Upsample", 7), ("Upsample", 9), ("Resize", 10))
    for mode in ("nearest", "linear")
    for scales in ([1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 1.5, 3.0])
] + [old("Resize", 10, [1.0, 1.0, 0.6, 0.5], mode=mode) for mode in ("nearest", "linear")]


@pytest.mark.parametrize("case", OLD, ids=str)
def test_old_opsets_same_as_onnxruntime(case: Case) -> None:
    (found,), (expected,) = by_torch(case), by_onnxruntime(case)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_first_upsample() -> None:
    case = Case("Upsample", [X], {"height_scale": 2.0, "width_scale": 3.0}, opset=1)
    np.testing.assert_array_equal(by_torch(case)[0], X.repeat(2, 2).repeat(3, 3))


def test_region_of_an_axis_that_keeps_its_length() -> None:
    """onnxruntime skips such an axis; the standard's own implementation does not."""
    case = resize(X, mode="linear", **CROP, roi=ROI, sizes=[2, 2, 5, 4])
    (expected,) = ReferenceEvaluator(case.model()).run(None, case.feeds())
    np.testing.assert_allclose(by_torch(case)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_integers(dtype: type) -> None:
    x = RNG.integers(0, 100, (1, 2, 3, 3)).astype(dtype)
    (doubled,) = by_torch(resize(x, scales=[1, 1, 2, 2]))
    np.testing.assert_array_equal(doubled, x.repeat(2, 2).repeat(2, 3))
    (found,) = by_torch(resize(x, mode="linear", scales=[1, 1, 2, 4]))
    (expected,) = by_torch(resize(x.astype(np.float64), mode="linear", scales=[1, 1, 2, 4]))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, np.trunc(expected).astype(dtype))


def test_cubic_overshoot_of_bytes_is_clamped() -> None:
    x = np.array([0, 0, 255, 255, 0, 0], dtype=np.uint8).reshape(1, 1, 6, 1)
    exact = by_torch(resize(x.astype(np.float32), mode="cubic", scales=[1, 1, 3, 1]))[0]
    assert exact.max() > 260
    assert exact.min() < -5
    (found,) = by_torch(resize(x, mode="cubic", scales=[1, 1, 3, 1]))
    np.testing.assert_allclose(found, exact.clip(0, 255), atol=1)


def test_sizes_are_rounded_as_float32() -> None:
    """10 * 0.7 is 7 in float32 and below 7 in exact arithmetic on the same scale."""
    x = normal(1, 1, 10, 10)
    assert by_torch(resize(x, scales=[1, 1, 0.7, 0.7]))[0].shape == (1, 1, 7, 7)
    (wide,) = to_torch(resize(x, scales=[1, 1, 0.7, 0.7]).model(), dtype=torch.float64)(torch.from_numpy(x)).shape[3:]
    assert wide == 7


def test_half_precision_and_empty() -> None:
    for case in (CASES[0], CASES[10], CASES[15]):
        values = [X.astype(np.float16), *case.inputs[1:]]
        half = Case(case.op, values, case.attributes, opset=19, constants=case.constants)
        (found,), (expected,) = by_torch(half), by_torch(case)
        assert found.dtype == np.float16
        np.testing.assert_allclose(found, expected, rtol=2e-2, atol=2e-2)
    for mode in ("nearest", "linear"):
        assert by_torch(resize(normal(0, 2, 3, 3), scales=[1, 1, 2, 1.5], mode=mode))[0].shape == (0, 2, 6, 4)


TINY = normal(1, 1, 3, 2)
MOVING = [
    resize(TINY, scales=[1, 1, 2, 2]),
    resize(TINY, scales=[1, 1, 1.5, 0.5]),
    resize(TINY, mode="linear", scales=[1, 1, 2, 2]),
    resize(TINY, mode="linear", scales=[1, 1, 1.5, 2], coordinate_transformation_mode="asymmetric"),
    resize(TINY, mode="cubic", sizes=[1, 1, 4, 3]),
    resize(TINY, mode="cubic", sizes=[1, 1, 2, 3], antialias=1, exclude_outside=1, label="antialias"),
    resize(TINY, mode="linear", **CROP, roi=ROI, sizes=[1, 1, 3, 4]),
]


@pytest.mark.parametrize("case", MOVING, ids=str)
def test_derivatives(case: Case) -> None:
    check_derivatives(case)


REFUSED = [
    (resize(X, UP["scales"], mode="area"), "mode 'area' is none of nearest, linear, cubic"),
    (resize(X, UP["scales"], coordinate_transformation_mode="middle"), "'middle' is none of half_pixel, "),
    (resize(X, UP["scales"], nearest_mode="simple"), "nearest_mode 'simple' is none of round_prefer_floor, "),
    (resize(X, sizes=[2, 2, 3, 3], keep_aspect_ratio_policy="fit"), "policy 'fit' is none of stretch, not_larger"),
    (old("Upsample", 9, [1, 1, 2, 2], mode="cubic"), "Upsample 'the_node': mode 'cubic' is neither nearest nor linear"),
]


@pytest.mark.parametrize(("case", "message"), REFUSED)
def test_refused(case: Case, message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_torch(case.model())
