"""GridSample, AffineGrid, CenterCropPad and the block operators: like onnxruntime; twice differentiable."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

from quantkit.errors import InputError
from quantkit.runtime.torch_backend import to_torch
from tests.runtime.torch_backend.single_node import Array, Case, by_onnxruntime, by_torch, check_derivatives

RNG = np.random.default_rng(26)


def normal(*shape: int) -> Array:
    return RNG.normal(size=shape).astype(np.float32)


def places(*shape: int) -> Array:
    """Also outside, up to more than one width away."""
    return (RNG.random(shape) * 6 - 3).astype(np.float32)


IMAGE, GRID = normal(2, 2, 5, 4), places(2, 3, 4, 2)
VOLUME, SPACE = normal(1, 2, 3, 4, 5), places(1, 2, 3, 2, 3)
PADDINGS = ("zeros", "border", "reflection")


def grid_sample(x: Array, grid: Array, opset: int = 20, **attributes: Any) -> Case:
    label = f"{x.ndim - 2}d, {', '.join(str(value) for value in attributes.values())}"
    return Case("GridSample", [x, grid], attributes, opset=opset, label=label)


SAMPLED = [
    grid_sample(x, grid, mode=mode, padding_mode=padding, align_corners=corners)
    for x, grid, names in ((IMAGE, GRID, ("linear", "nearest", "cubic")), (VOLUME, SPACE, ("linear", "nearest")))
    for mode, padding, corners in itertools.product(names, PADDINGS, (0, 1))
] + [grid_sample(IMAGE, GRID, 16, mode=mode) for mode in ("bilinear", "bicubic")]


@pytest.mark.parametrize("case", SAMPLED, ids=str)
def test_samples_same_as_onnxruntime(case: Case) -> None:
    (found,), (expected,) = by_torch(case), by_onnxruntime(case)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("corners", [0, 1])
@pytest.mark.parametrize("mode", ["linear", "nearest", "cubic"])
def test_any_number_of_axes_same_as_the_reference(mode: str, padding: str, corners: int) -> None:
    """What torch has no function for. A cubic kernel at the border differs where the place itself is outside."""
    inside = padding == "border" and mode == "cubic"
    for x, grid in ((normal(2, 2, 6), places(2, 5, 1)), (VOLUME, SPACE)):
        where = grid / 3.4 if inside else grid
        case = grid_sample(x, where, mode=mode, padding_mode=padding, align_corners=corners)
        (expected,) = ReferenceEvaluator(case.model()).run(None, case.feeds())
        np.testing.assert_allclose(by_torch(case)[0], expected, rtol=1e-4, atol=1e-4)


def test_mixed_types() -> None:
    case = grid_sample(IMAGE.astype(np.float16), GRID)
    (found,) = by_torch(case)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, by_torch(grid_sample(IMAGE, GRID))[0], rtol=1e-2, atol=1e-2)


THETA, THETA_3D = normal(2, 2, 3), normal(1, 3, 4)
MOVED = [
    Case("AffineGrid", [THETA, np.array([2, 3, 4, 5])], {"align_corners": c}, constants=[1], label=f"image, {c}")
    for c in (0, 1)
] + [Case("AffineGrid", [THETA_3D, np.array([1, 2, 3, 4, 5])], constants=[1], label="volume", opset=20)]
X = normal(1, 8, 4, 6)
BLOCKS = [
    *(Case("DepthToSpace", [X], {"blocksize": 2, "mode": mode}, opset=13, label=mode) for mode in ("DCR", "CRD")),
    Case("DepthToSpace", [X], {"blocksize": 2}, opset=1, label="opset 1"),
    Case("SpaceToDepth", [X], {"blocksize": 2}, opset=13),
    Case("SpaceToDepth", [normal(2, 3, 6, 9)], {"blocksize": 3}, opset=1, label="opset 1"),
]
CROPS = [
    Case("CenterCropPad", [X, np.array(shape)], attributes, opset=18, constants=[1], label=f"{shape}")
    for shape, attributes in (([1, 5, 7, 3], {}), ([9, 3], {"axes": [2, 3]}), ([3, 7], {"axes": [-1, 1]}))
]


@pytest.mark.parametrize("case", [*MOVED, *BLOCKS, *CROPS], ids=str)
def test_same_as_onnxruntime(case: Case) -> None:
    (found,), (expected,) = by_torch(case), by_onnxruntime(case)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_blocks_come_back(mode: str) -> None:
    attributes = {"blocksize": 2, "mode": mode}
    (wide,) = by_torch(Case("DepthToSpace", [X], attributes))
    given = attributes if mode == "CRD" else {"blocksize": 2}
    np.testing.assert_array_equal(by_torch(Case("SpaceToDepth", [wide], given))[0], X)


TINY, FEW = normal(1, 1, 3, 3), places(1, 1, 2, 2) / 3.4
MOVING = [
    *(grid_sample(TINY, FEW, mode=mode, padding_mode="reflection") for mode in ("linear", "cubic")),
    grid_sample(TINY, FEW, mode="nearest"),
    *(grid_sample(normal(1, 1, 4), places(1, 3, 1) / 3.4, mode=mode) for mode in ("linear", "cubic")),
    MOVED[0],
    Case("DepthToSpace", [normal(1, 4, 1, 2)], {"blocksize": 2}),
    Case("SpaceToDepth", [normal(1, 1, 2, 4)], {"blocksize": 2}),
    Case("CenterCropPad", [normal(3, 2), np.array([2, 3])], constants=[1]),
]


@pytest.mark.parametrize("case", MOVING, ids=str)
def test_derivatives(case: Case) -> None:
    check_derivatives(case)


REFUSED = [
    (grid_sample(IMAGE, GRID, mode="area"), "GridSample 'the_node': mode 'area' is none of bilinear, linear, nearest"),
    (grid_sample(IMAGE, GRID, padding_mode="wrap"), "padding_mode 'wrap' is none of zeros, border, reflection"),
    (Case("DepthToSpace", [X], {"blocksize": 2, "mode": "RCD"}), "mode 'RCD' is neither DCR nor CRD"),
]


@pytest.mark.parametrize(("case", "message"), REFUSED)
def test_refused(case: Case, message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_torch(case.model())
