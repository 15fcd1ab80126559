"""Convolutions: every way to pad, like onnxruntime; twice differentiable; what torch cannot do is refused."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from quantkit.errors import InputError
from quantkit.runtime.torch_backend import to_torch
from tests.runtime.torch_backend.single_node import Array, Case, by_onnxruntime, by_torch, check_derivatives

RNG = np.random.default_rng(22)


def normal(*shape: int) -> Array:
    return RNG.normal(size=shape).astype(np.float32)


def conv(x: Array, w: Array, *bias: Array, label: str = "", op: str = "Conv", **attributes: Any) -> Case:
    return Case(op, [x, w, *bias], attributes, label=label)


LINE, IMAGE, VOLUME = normal(2, 2, 9), normal(2, 4, 7, 8), normal(1, 2, 5, 4, 6)
KERNEL = normal(6, 4, 3, 2)
CONVOLUTIONS = [
    conv(IMAGE, KERNEL, label="bare"),
    conv(IMAGE, KERNEL, normal(6), label="bias"),
    conv(IMAGE, KERNEL, normal(6), kernel_shape=[3, 2], pads=[1, 1, 1, 1], strides=[2, 1], label="equal pads"),
    conv(IMAGE, KERNEL, normal(6), pads=[0, 1, 2, 0], strides=[2, 3], label="unequal pads"),
    conv(IMAGE, KERNEL, pads=[2, 0, 1, 1], dilations=[2, 3], label="dilated"),
    conv(IMAGE, normal(6, 2, 3, 2), normal(6), group=2, pads=[1, 0, 1, 0], label="groups"),
    conv(IMAGE, normal(4, 1, 3, 3), group=4, pads=[1, 1, 1, 1], label="depthwise"),
    conv(LINE, normal(3, 2, 4), normal(3), auto_pad="SAME_UPPER", strides=[2], label="line, same upper"),
    conv(LINE, normal(3, 2, 4), auto_pad="SAME_LOWER", kernel_shape=[4], label="line, same lower"),
    conv(LINE, normal(3, 2, 1), auto_pad="SAME_UPPER", strides=[3], label="line, jumps"),
    conv(LINE, normal(3, 2, 3), auto_pad="VALID", dilations=[2], label="line, valid"),
    conv(VOLUME, normal(3, 2, 2, 3, 2), normal(3), auto_pad="SAME_UPPER", strides=[2, 1, 2], label="volume, same"),
    conv(VOLUME, normal(2, 1, 2, 1, 3), group=2, pads=[1, 0, 2, 1, 0, 2], label="volume, groups"),
    conv(normal(0, 4, 7, 8), KERNEL, pads=[1, 1, 1, 1], label="no images"),
]
TRANSPOSED_KERNEL = normal(4, 3, 3, 2)


def transposed(x: Array, w: Array, *bias: Array, label: str = "", **attributes: Any) -> Case:
    return conv(x, w, *bias, label=label, op="ConvTranspose", **attributes)


SMALL = normal(2, 4, 3, 4)
TRANSPOSED = [
    transposed(SMALL, TRANSPOSED_KERNEL, label="bare"),
    transposed(SMALL, TRANSPOSED_KERNEL, normal(3), strides=[2, 2], pads=[1, 1, 1, 1], label="equal pads"),
    transposed(SMALL, TRANSPOSED_KERNEL, normal(3), strides=[3, 2], output_padding=[2, 1], label="output padding"),
    transposed(SMALL, TRANSPOSED_KERNEL, normal(3), strides=[2, 3], pads=[0, 1, 2, 0], label="more at the end"),
    transposed(SMALL, TRANSPOSED_KERNEL, strides=[3, 2], pads=[2, 1, 0, 1], label="more at the start"),
    transposed(SMALL, normal(4, 2, 3, 2), normal(4), group=2, dilations=[2, 1], label="groups"),
    transposed(SMALL, TRANSPOSED_KERNEL, strides=[2, 2], auto_pad="SAME_UPPER", label="same upper"),
    transposed(SMALL, normal(4, 3, 4, 3), strides=[3, 2], auto_pad="SAME_LOWER", label="same lower"),
    transposed(SMALL, TRANSPOSED_KERNEL, strides=[2, 2], output_shape=[6, 7], label="shape"),
    transposed(SMALL, normal(4, 3, 4, 4), strides=[3, 2], output_shape=[9, 9], auto_pad="SAME_UPPER", label="upper"),
    transposed(normal(2, 2, 4), normal(2, 3, 3), normal(3), strides=[2], output_padding=[1], label="line"),
    transposed(
        normal(1, 2, 3, 2, 3), normal(2, 2, 2, 3, 2), strides=[2, 1, 2], pads=[1, 0, 0, 0, 1, 1], label="volume"
    ),
]


@pytest.mark.parametrize("case", [*CONVOLUTIONS, *TRANSPOSED], ids=str)
def test_same_as_onnxruntime(case: Case) -> None:
    (found,), (expected,) = by_torch(case), by_onnxruntime(case)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_transposed_output_is_stride_times_input_where_the_kernel_is_smaller() -> None:
    """What the standard says of SAME; elements that no input reaches hold the bias."""
    case = transposed(normal(1, 1, 3), normal(1, 1, 1), np.float32([0.5]), strides=[3], auto_pad="SAME_UPPER")
    (found,) = by_torch(case)
    x, w = case.inputs[0].reshape(-1), case.inputs[1].item()
    expected = np.full(9, 0.5, dtype=np.float32)
    expected[::3] += x * w
    np.testing.assert_allclose(found.reshape(-1), expected, rtol=1e-6)


def deformed(label: str, mask: bool, bias: bool, groups: int, offsets: int, **attributes: Any) -> Case:
    """Offsets of up to 2 pixels reach beyond every edge."""
    x, w = normal(2, 4, 5, 6), normal(6, 4 // groups, 2, 3)
    pads, strides = attributes.get("pads", [0] * 4), attributes.get("strides", [1, 1])
    dilations = attributes.get("dilations", [1, 1])
    out = [
        (x.shape[2 + a] + pads[a] + pads[2 + a] - (w.shape[2 + a] - 1) * dilations[a] - 1) // strides[a] + 1
        for a in (0, 1)
    ]
    offset = (RNG.random((2, offsets * 12, *out)) * 4 - 2).astype(np.float32)
    rest = [normal(6) if bias else None, RNG.random((2, offsets * 6, *out)).astype(np.float32) if mask else None]
    given = {"group": groups, "offset_group": offsets, **attributes}
    return Case("DeformConv", [x, w, offset, *rest], given, label=label, opset=19)


DEFORMED = [
    deformed("plain", False, False, 1, 1),
    deformed("all", True, True, 2, 2, pads=[1, 0, 1, 0], strides=[2, 1], dilations=[1, 2]),
]


@pytest.mark.parametrize("case", DEFORMED, ids=str)
def test_deformable_convolution_same_as_the_reference(case: Case) -> None:
    (expected,) = ReferenceEvaluator(case.model()).run(None, case.feeds())
    np.testing.assert_allclose(by_torch(case)[0], expected, rtol=1e-4, atol=1e-4)


def test_deformable_convolution_without_offsets_is_a_convolution() -> None:
    x, w = normal(1, 4, 6, 5), normal(2, 2, 3, 2)
    plain = conv(x, w, group=2, pads=[1, 0, 2, 1], strides=[2, 1], dilations=[1, 2])
    (expected,) = by_torch(plain)
    offset = np.zeros((1, 12, *expected.shape[2:]), dtype=np.float32)
    (found,) = by_torch(Case("DeformConv", [x, w, offset], plain.attributes))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def col2im(image: list[int], block: list[int], label: str, channels: int = 2, **attributes: Any) -> Case:
    rank = len(image)
    strides, dilations = attributes.get("strides", [1] * rank), attributes.get("dilations", [1] * rank)
    pads = attributes.get("pads", [0] * (2 * rank))
    blocks = [
        (image[a] + pads[a] + pads[rank + a] - (block[a] - 1) * dilations[a] - 1) // strides[a] + 1 for a in range(rank)
    ]
    x = normal(2, channels * int(np.prod(block)), int(np.prod(blocks)))
    return Case("Col2Im", [x, np.array(image), np.array(block)], attributes, constants=[1, 2], label=label)


FOLDED = [
    col2im([5, 6], [2, 3], "image"),
    col2im([5, 6], [2, 3], "equal pads", pads=[1, 1, 1, 1], strides=[2, 2], dilations=[2, 1]),
    col2im([5, 6], [2, 2], "unequal pads", pads=[0, 1, 2, 0], strides=[2, 1]),
    col2im([8], [3], "line", strides=[2], pads=[1, 0]),
    col2im([4, 3, 5], [2, 1, 3], "volume", pads=[1, 0, 1, 0, 0, 1], dilations=[2, 1, 1]),
]


@pytest.mark.parametrize("case", FOLDED, ids=str)
def test_col2im_sums_blocks(case: Case) -> None:
    """Against a loop over every element of every block."""
    x, image, block = (np.asarray(value) for value in case.inputs)
    rank, a = len(image), case.attributes
    strides, dilations = a.get("strides", [1] * rank), a.get("dilations", [1] * rank)
    pads = a.get("pads", [0] * (2 * rank))
    extents = [(b - 1) * d + 1 for b, d in zip(block, dilations, strict=True)]
    blocks = [(image[i] + pads[i] + pads[rank + i] - extents[i]) // strides[i] + 1 for i in range(rank)]
    expected = np.zeros((2, 2, *image))
    parts = x.reshape(2, 2, *block, *blocks)
    for inner in itertools.product(*map(range, block)):
        for outer in itertools.product(*map(range, blocks)):
            place = [o * s + i * d - p for o, s, i, d, p in zip(outer, strides, inner, dilations, pads, strict=False)]
            if all(0 <= at < size for at, size in zip(place, image, strict=True)):
                expected[(slice(None), slice(None), *place)] += parts[(slice(None), slice(None), *inner, *outer)]
    np.testing.assert_allclose(by_torch(case)[0], expected, rtol=1e-5, atol=1e-5)


TINY = normal(1, 2, 4, 3)
MOVING = [
    conv(TINY, normal(2, 1, 2, 2), normal(2), group=2, pads=[1, 1, 1, 1], strides=[2, 1]),
    conv(TINY, normal(2, 2, 2, 2), normal(2), pads=[0, 1, 1, 0], label="unequal"),
    conv(normal(1, 2, 4), normal(2, 2, 2), auto_pad="SAME_LOWER", label="line"),
    transposed(normal(1, 2, 2, 2), normal(2, 1, 2, 2), normal(1), strides=[2, 2], pads=[1, 0, 1, 0]),
    transposed(normal(1, 2, 2, 2), normal(2, 1, 2, 1), normal(1), strides=[3, 3], auto_pad="SAME_UPPER", label="same"),
    Case(
        "DeformConv",
        [normal(1, 2, 2, 3), normal(2, 1, 2, 2), normal(1, 8, 1, 2), normal(2), normal(1, 4, 1, 2)],
        {"group": 2},
    ),
    *(case for case in FOLDED if str(case) in ("Col2Im-image", "Col2Im-line")),
]


@pytest.mark.parametrize("case", MOVING, ids=str)
def test_derivatives(case: Case) -> None:
    check_derivatives(case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    for case in (CONVOLUTIONS[3], TRANSPOSED[3]):
        exact, half = to_torch(case.model()), to_torch(case.model(), dtype=dtype)
        feed = [torch.from_numpy(value) for value in case.feeds().values()]
        found, expected = half(*(value.to(dtype) for value in feed)), exact(*feed)
        assert found.dtype == dtype
        assert float((found.float() - expected).abs().max()) < 0.05 * float(expected.abs().max())


def test_equal_pads_are_one_call_of_the_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """No padded copy of the input, whoever chose the pads."""

    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("padded")

    monkeypatch.setattr(torch.nn.functional, "pad", refused)
    by_torch(CONVOLUTIONS[2])
    by_torch(conv(normal(1, 2, 8, 8), normal(2, 2, 3, 3), auto_pad="SAME_UPPER"))
    by_torch(TRANSPOSED[1])


REFUSED = [
    (conv(normal(1, 1, 2, 2, 2, 2), normal(1, 1, 1, 1, 1, 1), kernel_shape=[1] * 4), "along 1 to 3 axes, not 4"),
    (conv(IMAGE, KERNEL, auto_pad="SAME"), "auto_pad 'SAME' is none of NOTSET, SAME_UPPER, SAME_LOWER, VALID"),
    (conv(IMAGE, KERNEL, kernel_shape=[3, 2], strides=[1]), "strides has 1 values for 2 spatial axes"),
    (conv(IMAGE, KERNEL, kernel_shape=[3, 2], pads=[1, 1]), "pads has 2 values for 2 spatial axes"),
    (conv(LINE, normal(1, 2, 1), normal(1, 1, 1), op="DeformConv", kernel_shape=[1]), "have 2 spatial axes, not 1"),
]


@pytest.mark.parametrize(("case", "message"), REFUSED)
def test_refused(case: Case, message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_torch(case.model())


def test_rank_that_only_the_weights_tell_is_refused_at_the_first_run() -> None:
    case = conv(normal(1, 1, 2, 2, 2, 2), normal(1, 1, 1, 1, 1, 1))
    with pytest.raises(InputError, match="torch convolves along 1 to 3 axes, not 4"):
        by_torch(case)


def test_dynamic_sizes() -> None:
    """SAME pads follow the input of every run."""
    case = conv(normal(1, 2, 7), normal(2, 2, 4), auto_pad="SAME_UPPER", strides=[3])
    module = to_torch(case.model())
    for length in (7, 8, 9, 12):
        x = torch.from_numpy(normal(1, 2, length))
        assert module(x, torch.from_numpy(case.inputs[1])).shape[2] == -(-length // 3)
