"""Poolings: windows, pads, counts and indices like onnxruntime; twice differentiable; the rest is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from quantkit.errors import InputError
from quantkit.runtime.torch_backend import to_torch
from tests.runtime.torch_backend.single_node import Array, Case, by_onnxruntime, by_torch, check_derivatives

RNG = np.random.default_rng(23)


def distinct(*shape: int, dtype: type = np.float32) -> Array:
    """No ties, and far enough from each other for differences."""
    return (RNG.permutation(int(np.prod(shape))).reshape(shape) / 4 - 3).astype(dtype)


def codes(*shape: int, dtype: type) -> Array:
    return RNG.integers(np.iinfo(dtype).min, np.iinfo(dtype).max + 1, shape).astype(dtype)


def pool(op: str, x: Array, kernel: list[int], label: str = "", outputs: int = 1, **attributes: Any) -> Case:
    opset = attributes.pop("opset", 21)
    return Case(op, [x], {"kernel_shape": kernel, **attributes}, outputs, opset, label=label)


LINE, IMAGE, VOLUME = distinct(2, 2, 9), distinct(2, 3, 7, 8), distinct(1, 2, 5, 4, 6)
SHAPES: list[tuple[str, Array, list[int], dict[str, Any]]] = [
    ("bare", IMAGE, [2, 3], {}),
    ("equal pads", IMAGE, [3, 3], {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    ("unequal pads", IMAGE, [3, 2], {"pads": [2, 0, 1, 1], "strides": [2, 1]}),
    ("wide pads", IMAGE, [3, 3], {"pads": [2, 2, 2, 2]}),
    ("ceil", IMAGE, [3, 3], {"strides": [2, 2], "ceil_mode": 1}),
    ("ceil, pads", IMAGE, [3, 3], {"strides": [3, 3], "pads": [0, 1, 1, 1], "ceil_mode": 1}),
    ("last window in the pads", IMAGE, [2, 2], {"strides": [3, 3], "pads": [1, 1, 1, 1], "ceil_mode": 1}),
    ("same upper", LINE, [4], {"auto_pad": "SAME_UPPER", "strides": [2]}),
    ("same lower", VOLUME, [2, 3, 2], {"auto_pad": "SAME_LOWER", "strides": [1, 2, 2]}),
    ("equal by themselves", IMAGE, [3, 3], {"auto_pad": "SAME_UPPER"}),
    ("jumps", LINE, [1], {"auto_pad": "SAME_UPPER", "strides": [3]}),
    ("valid", LINE, [3], {"auto_pad": "VALID", "strides": [2]}),
    ("volume", VOLUME, [2, 2, 3], {"pads": [1, 0, 1, 0, 1, 1], "strides": [2, 1, 2]}),
]
DILATED: list[tuple[str, Array, list[int], dict[str, Any]]] = [
    ("dilated", IMAGE, [2, 3], {"dilations": [2, 2], "pads": [1, 1, 1, 1]}),
    ("dilated, ceil", IMAGE, [3, 2], {"dilations": [2, 3], "strides": [2, 2], "ceil_mode": 1, "pads": [0, 1, 2, 0]}),
    ("dilated line", LINE, [3], {"dilations": [3], "strides": [2]}),
]
MAX = [
    pool("MaxPool", x, kernel, label, **given)
    for label, x, kernel, given in SHAPES + DILATED
    if label != "jumps"  # onnxruntime only computes it with indices
]
INDEXED = [pool("MaxPool", x, kernel, f"{label}, indices", 2, **given) for label, x, kernel, given in SHAPES + DILATED]
COLUMNS = [
    pool("MaxPool", IMAGE, [2, 2], "columns", 2, storage_order=1, strides=[2, 1]),
    pool("MaxPool", VOLUME, [2, 2, 2], "volume of columns", 2, storage_order=1, pads=[1, 0, 1, 0, 1, 0]),
]
AVERAGE = [
    pool("AveragePool", x, kernel, f"{label}, {count}", count_include_pad=count, **given)
    for label, x, kernel, given in SHAPES + DILATED
    for count in (0, 1)
]
LP = [
    pool("LpPool", x, kernel, f"{label}, {p}", p=p, **given)
    for p, (label, x, kernel, given) in enumerate(SHAPES[:8] + DILATED)
    if p
]
INTEGERS = [
    pool("MaxPool", codes(2, 3, 7, 8, dtype=np.uint8), [3, 3], "bytes", pads=[1, 1, 1, 1], strides=[2, 2]),
    pool("MaxPool", codes(2, 3, 7, 8, dtype=np.int8), [3, 2], "signed", pads=[2, 0, 1, 1]),
    pool("MaxPool", codes(2, 3, 9, dtype=np.int8), [3], "signed line", pads=[1, 1]),
    pool("MaxPool", codes(2, 3, 9, dtype=np.uint8), [3], "line, indices", 2, auto_pad="SAME_UPPER", strides=[2]),
]
OLD = [
    pool("MaxPool", IMAGE, [3, 3], "opset 7", opset=7, pads=[1, 0, 1, 0]),
    pool("AveragePool", IMAGE, [3, 3], "opset 7", opset=7, pads=[1, 0, 1, 0]),
    pool("LpPool", IMAGE, [3, 3], "opset 7", opset=7, pads=[1, 0, 1, 0], p=3),
]
GLOBAL = [
    *(Case(op, [x], label=f"{x.ndim - 2}d") for op in ("GlobalAveragePool", "GlobalMaxPool") for x in (LINE, VOLUME)),
    Case("GlobalLpPool", [IMAGE], {"p": 3}),
    Case("GlobalLpPool", [IMAGE], label="2"),
]
UNPOOLED = Case(
    "MaxUnpool",
    by_torch(pool("MaxPool", IMAGE[:, :, :6], [2, 2], outputs=2, strides=[2, 2])),
    {"kernel_shape": [2, 2], "strides": [2, 2]},
)


@pytest.mark.parametrize("case", [*MAX, *INDEXED, *COLUMNS, *AVERAGE, *LP, *INTEGERS, *OLD, *GLOBAL, UNPOOLED], ids=str)
def test_same_as_onnxruntime(case: Case) -> None:
    for found, expected in zip(by_torch(case), by_onnxruntime(case), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_unpooling_undoes_pooling() -> None:
    x = distinct(2, 2, 5, 6)
    y, index = by_torch(pool("MaxPool", x, [2, 2], outputs=2, strides=[2, 2]))
    attributes = {"kernel_shape": [2, 2], "strides": [2, 2]}
    kept = np.isin(x, y)
    # The indices count in 5 rows, of which windows read 4: the planes start elsewhere.
    rows = index // 30 * 24 + index % 30
    (found,) = by_torch(Case("MaxUnpool", [y, rows, np.array([2, 2, 5, 6])], attributes, constants=[2]))
    np.testing.assert_array_equal(found, np.where(kept, x, 0))


def regions(op: str, rois: Array, *rest: Array, label: str = "", **attributes: Any) -> Case:
    constants = range(1, 2 + len(rest))
    return Case(op, [distinct(2, 3, 9, 11), rois, *rest], attributes, label=label, constants=constants)


BOXES = np.array(
    [[0.3, 1.1, 6.2, 7.9], [-1.5, -0.7, 12.5, 9.9], [4.0, 4.0, 4.2, 4.1], [9.5, 2.2, 3.1, 8.0]], dtype=np.float32
)
BATCH = np.array([0, 1, 1, 0])
CELLS = np.concatenate([BATCH[:, None], BOXES.clip(0)], axis=1).astype(np.float32)
ALIGNED = [
    regions(
        "RoiAlign",
        BOXES if coordinates == "output_half_pixel" else BOXES[:3],  # onnxruntime wants ends after starts otherwise
        BATCH if coordinates == "output_half_pixel" else BATCH[:3],
        label=f"{mode}, {ratio}, {coordinates}",
        mode=mode,
        sampling_ratio=ratio,
        output_height=2,
        output_width=3,
        spatial_scale=0.75,
        coordinate_transformation_mode=coordinates,
    )
    for mode in ("avg", "max")
    for ratio in (0, 2)
    for coordinates in ("half_pixel", "output_half_pixel")
]
REGIONS = [
    *ALIGNED,
    Case(
        "RoiAlign",
        [distinct(1, 3, 9, 11), BOXES[:3], 0 * BATCH[:3]],
        {"output_height": 3, "output_width": 2},
        label="one",
    ),
    Case("RoiAlign", [distinct(2, 3, 9, 11), BOXES, BATCH], {"output_height": 2}, opset=10, label="opset 10"),
    Case("RoiAlign", [IMAGE, np.zeros((0, 4), np.float32), np.zeros(0, np.int64)], label="none"),
    regions("MaxRoiPool", CELLS, pooled_shape=[2, 3]),
    regions("MaxRoiPool", CELLS, pooled_shape=[7, 1], spatial_scale=0.5, label="scaled"),
]


@pytest.mark.parametrize("case", REGIONS, ids=str)
def test_regions_same_as_onnxruntime(case: Case) -> None:
    (found,), (expected,) = by_torch(case), by_onnxruntime(case)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_regions_in_groups_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [ALIGNED[0], ALIGNED[-1], REGIONS[-1]]
    whole = [by_torch(case)[0] for case in cases]
    monkeypatch.setattr("quantkit.runtime.torch_backend.regions.LARGEST", 300)
    for case, expected in zip(cases, whole, strict=True):
        np.testing.assert_allclose(by_torch(case)[0], expected, rtol=1e-6, atol=1e-6)


SMALL = distinct(1, 2, 4, 3)
MOVING = [
    pool("MaxPool", SMALL, [2, 2], pads=[1, 1, 1, 1]),
    pool("MaxPool", SMALL, [2, 2], "unequal", 2, pads=[0, 1, 1, 0]),
    pool("AveragePool", SMALL, [2, 2], pads=[1, 1, 1, 1]),
    pool("AveragePool", SMALL, [2, 2], "unequal", pads=[0, 1, 1, 0], strides=[2, 1]),
    pool("AveragePool", SMALL, [2, 2], "dilated", dilations=[2, 1], pads=[0, 1, 1, 0]),
    *(pool("LpPool", SMALL + 0.1, [2, 2], f"{p}", p=p, pads=[0, 1, 1, 0], strides=[2, 2]) for p in (1, 2, 3)),
    Case("GlobalAveragePool", [SMALL]),
    Case("GlobalMaxPool", [SMALL]),
    Case("GlobalLpPool", [SMALL + 0.1], {"p": 3}),
    Case("MaxUnpool", [distinct(1, 1, 2, 2), np.array([[[[1, 3], [8, 6]]]])], {"kernel_shape": [2, 2]}),
    Case("RoiAlign", [SMALL, BOXES[:1] / 3.1, BATCH[:1]], {"output_height": 2, "sampling_ratio": 2}),
    Case("RoiAlign", [SMALL + 0.1, BOXES[:1] / 3.1, BATCH[:1]], {"mode": "max", "sampling_ratio": 1}, label="max"),
    Case("MaxRoiPool", [SMALL, CELLS[:1] / 2], {"pooled_shape": [2, 1]}, constants=[1]),
]


@pytest.mark.parametrize("case", MOVING, ids=str)
def test_derivatives(case: Case) -> None:
    check_derivatives(case)


def test_windows_of_zeros_have_derivatives() -> None:
    """A root has none at 0: after a rectifier whole windows are."""
    module = to_torch(pool("LpPool", SMALL, [2, 2]).model())
    x = torch.zeros(1, 2, 4, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(module(x).sum(), x)
    assert torch.equal(gradient, torch.zeros_like(x))


def test_half_precision() -> None:
    for case in (MAX[1], AVERAGE[4], LP[1], GLOBAL[0]):
        half = Case(case.op, [case.inputs[0].astype(np.float16)], case.attributes)
        (found,), (expected,) = by_torch(half), by_torch(case)
        assert found.dtype == np.float16
        np.testing.assert_allclose(found, expected, rtol=2e-2, atol=2e-2)


def test_equal_pads_are_one_call_of_the_pooling(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("padded")

    monkeypatch.setattr(torch.nn.functional, "pad", refused)
    for label in ("equal pads", "ceil", "equal by themselves"):
        for case in (*MAX, *INDEXED[:2], *AVERAGE):
            if case.label.startswith(label) and "pads, i" not in case.label and "ceil, p" not in case.label:
                by_torch(case)


REFUSED = [
    (pool("MaxPool", distinct(1, 1, 2, 2, 2, 2), [1, 1, 1, 1]), "torch pools along 1 to 3 axes, not 4"),
    (pool("MaxPool", IMAGE, [2, 2], strides=[1]), "strides has 1 values for 2 spatial axes"),
    (Case("RoiAlign", [IMAGE, BOXES, BATCH], {"mode": "sum"}), "mode 'sum' is neither avg nor max"),
]


@pytest.mark.parametrize(("case", "message"), REFUSED)
def test_refused(case: Case, message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_torch(case.model())


def test_malformed_regions_are_empty() -> None:
    """Ends before starts: no samples, where no size is forced."""
    case = regions("RoiAlign", BOXES[3:], BATCH[3:], output_height=2, output_width=2)
    np.testing.assert_array_equal(by_torch(case)[0], np.zeros((1, 3, 2, 2), dtype=np.float32))
