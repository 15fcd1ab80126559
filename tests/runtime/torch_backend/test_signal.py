"""Fourier transforms like numpy's, windows and mel filters like onnxruntime's, random numbers by their statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from quantkit.runtime.torch_backend import to_torch
from tests.runtime.torch_backend.single_node import Array, Case, by_onnxruntime, by_torch, check_derivatives

RNG = np.random.default_rng(27)
MANY = 20_000
SEED = 7.5


def normal(*shape: int) -> Array:
    return RNG.normal(size=shape).astype(np.float32)


def number(value: int) -> Array:
    return np.array(value, dtype=np.int64)


REAL, COMPLEX = normal(2, 6, 5, 1), normal(2, 6, 5, 2)


def dft(x: Array, length: int | None = None, axis: int | None = None, opset: int = 20, **attributes: Any) -> Case:
    values: list[Any] = [x, None if length is None else number(length), None if axis is None else number(axis)]
    while values[-1] is None:
        values.pop()
    present = [place for place in range(1, len(values)) if values[place] is not None]
    label = f"{x.shape[-1]}, {length}, {axis}, {attributes}, {opset}"
    return Case("DFT", values, attributes, opset=opset, constants=present, label=label)


TRANSFORMS = [
    dft(x, length, axis, inverse=inverse)
    for x in (REAL, COMPLEX)
    for length, axis in ((None, None), (4, 1), (9, -3), (7, 0))
    for inverse in (0, 1)
] + [
    Case("DFT", [REAL, number(4)], {"axis": 2}, opset=17, constants=[1], label="opset 17"),
    dft(COMPLEX, None, None, 17, inverse=1),
]


def as_complex(x: Array) -> Array:
    wide: Array = x.astype(np.float64)
    return wide[..., 0] if x.shape[-1] == 1 else wide[..., 0] + 1j * wide[..., 1]


@pytest.mark.parametrize("case", TRANSFORMS, ids=str)
def test_transforms_like_numpy(case: Case) -> None:
    x, length, axis = (*case.inputs, None, None)[:3]
    along = int(axis) if axis is not None else -2 if case.opset >= 20 else case.attributes.get("axis", 1)
    transform = np.fft.ifft if case.attributes.get("inverse") else np.fft.fft
    expected = transform(as_complex(x), None if length is None else int(length), along % 4)
    (found,) = by_torch(case)
    assert found.dtype == np.float32
    np.testing.assert_allclose(as_complex(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [None, 8, 7, 4])
def test_one_sided_transforms_like_numpy(length: int | None) -> None:
    (forward,) = by_torch(dft(REAL, length, 1, onesided=1))
    np.testing.assert_allclose(as_complex(forward), np.fft.rfft(REAL[..., 0], length, 1), rtol=1e-4, atol=1e-5)
    (back,) = by_torch(dft(forward, length, 1, onesided=1, inverse=1))
    expected = np.zeros((2, length or 6, 5, 1))
    kept = min(length or 6, 6)
    expected[:, :kept] = REAL[:, :kept]
    np.testing.assert_allclose(back, expected, rtol=1e-4, atol=1e-5)


def test_one_sided_transform_of_complex_values_is_cut() -> None:
    (found,) = by_torch(dft(COMPLEX, None, 1, onesided=1))
    np.testing.assert_allclose(as_complex(found), np.fft.fft(as_complex(COMPLEX), axis=1)[:, :4], rtol=1e-4, atol=1e-5)


def stft(x: Array, window: Array | None, length: int | None, label: str, step: int = 3, **attributes: Any) -> Case:
    values: list[Any] = [x, number(step), window, None if length is None else number(length)]
    while values[-1] is None:
        values.pop()
    constants = [1, 3] if len(values) == 4 else [1]
    return Case("STFT", values, attributes, opset=17, constants=constants, label=label)


WINDOW = (RNG.random(6) + 0.5).astype(np.float32)
FRAMES = [
    stft(normal(2, 17, 1), WINDOW, None, "window"),
    stft(normal(2, 17, 1), WINDOW, 6, "both", onesided=0),
    stft(normal(2, 17, 1), None, 7, "length"),
    stft(normal(2, 17, 2), WINDOW, 6, "complex", onesided=0),
]


@pytest.mark.parametrize("case", FRAMES, ids=str)
def test_frames_like_numpy(case: Case) -> None:
    x, _, window, length = (*case.inputs, None)[:4]
    size = 6 if length is None else int(length)
    weights = np.ones(size) if window is None else window
    signal = as_complex(case.inputs[0])
    frames = np.stack([signal[:, at : at + size] * weights for at in range(0, x.shape[1] - size + 1, 3)], 1)
    expected = np.fft.fft(frames) if case.attributes.get("onesided") == 0 else np.fft.rfft(frames)
    np.testing.assert_allclose(as_complex(by_torch(case)[0]), expected, rtol=1e-4, atol=1e-5)


WINDOWS = [
    Case(f"{name}Window", [number(size)], {"periodic": periodic}, opset=17, constants=[0], label=f"{size}, {periodic}")
    for name in ("Hann", "Hamming", "Blackman")
    for size, periodic in ((7, 0), (8, 1))
]
MEL = [
    Case(
        "MelWeightMatrix",
        [number(bins), number(length), number(16000), np.float32(20), np.float32(7000)],
        opset=17,
        constants=range(5),
        label=f"{bins}, {length}",
    )
    for bins, length in ((8, 64), (40, 64), (5, 33))
]


@pytest.mark.parametrize("case", [*WINDOWS, *MEL], ids=str)
def test_same_as_onnxruntime(case: Case) -> None:
    (found,), (expected,) = by_torch(case), by_onnxruntime(case)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "dtype"), [(10, np.float16), (11, np.float64)])
def test_other_types_of_windows(kind: int, dtype: type) -> None:
    case = Case("HannWindow", [number(9)], {"output_datatype": kind}, opset=17, constants=[0])
    (found,) = by_torch(case)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, np.hanning(10)[:-1], atol=1e-3 if dtype == np.float16 else 1e-12)


MOVING = [
    dft(normal(1, 3, 2)),
    dft(normal(1, 3, 2), onesided=1, inverse=1),
    dft(normal(1, 4, 1), onesided=1),
    stft(normal(1, 5, 1), WINDOW[:3], None, "window", step=2),
    Case("Dropout", [normal(2, 3)]),
]


@pytest.mark.parametrize("case", MOVING, ids=str)
def test_derivatives(case: Case) -> None:
    check_derivatives(case)


def test_half_precision() -> None:
    (found,) = by_torch(dft(REAL.astype(np.float16)))
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, by_torch(dft(REAL))[0], rtol=1e-2, atol=2e-2)


LIKE = np.zeros((MANY,), dtype=np.float32)
NORMAL, UNIFORM = {"mean": 2.0, "scale": 0.5}, {"low": -1.0, "high": 3.0}
DRAWN = [
    (Case("RandomNormal", [], {"shape": [MANY], "seed": SEED, **NORMAL}), 2.0, 0.5),
    (Case("RandomNormalLike", [LIKE], {"seed": SEED, **NORMAL}), 2.0, 0.5),
    (Case("RandomUniform", [], {"shape": [MANY], "seed": SEED, **UNIFORM}), 1.0, 4 / 12**0.5),
    (Case("RandomUniformLike", [LIKE], {"seed": SEED, **UNIFORM}), 1.0, 4 / 12**0.5),
    (Case("Bernoulli", [LIKE + np.float32(0.3)], {"seed": SEED}), 0.3, (0.3 * 0.7) ** 0.5),
    (
        Case("Multinomial", [np.log(np.float32([[0.2, 0.3, 0.5]])) + 4], {"sample_size": MANY, "seed": SEED}),
        1.3,
        0.61**0.5,
    ),
]


@pytest.mark.parametrize(("case", "mean", "deviation"), DRAWN, ids=lambda value: str(value))
def test_distributions(case: Case, mean: float, deviation: float) -> None:
    module = to_torch(case.model())
    feed = [torch.from_numpy(value) for value in case.feeds().values()]
    first, second = module(*feed).double(), module(*feed).double()
    assert abs(float(first.mean()) - mean) < 5 * deviation / MANY**0.5
    assert abs(float(first.std()) - deviation) < 0.05 * deviation
    assert not torch.equal(first, second), "every run draws anew"
    again = to_torch(case.model())
    assert torch.equal(again(*feed).double(), first), "a seed repeats the first run"
    other = Case(case.op, case.inputs, {**case.attributes, "seed": SEED + 0.25})
    assert not torch.equal(to_torch(other.model())(*feed).double(), first), "another seed, other numbers"


def test_types_of_random_numbers() -> None:
    assert by_torch(Case("RandomNormal", [], {"shape": [2, 3], "dtype": 11}))[0].dtype == np.float64
    assert by_torch(Case("RandomUniformLike", [LIKE], {"dtype": 10}))[0].dtype == np.float16
    assert by_torch(Case("RandomNormalLike", [LIKE.astype(np.float64)]))[0].dtype == np.float64
    assert by_torch(Case("Bernoulli", [LIKE], {"dtype": 6}))[0].dtype == np.int32
    assert by_torch(Case("Multinomial", [LIKE[None, :3]], {"dtype": 7}))[0].dtype == np.int64


def test_numbers_without_a_seed_follow_torch() -> None:
    module = to_torch(Case("RandomNormal", [], {"shape": [5]}).model())
    torch.manual_seed(3)
    first = module()
    torch.manual_seed(3)
    assert torch.equal(module(), first)


X = normal(MANY)
RATIO, TRAINING = np.float32(0.3), np.array(True)


def test_dropout_in_training() -> None:
    case = Case("Dropout", [X, RATIO, TRAINING], {"seed": 3}, 2, opset=13, constants=[1, 2])
    y, mask = by_torch(case)
    assert mask.dtype == bool
    assert abs(mask.mean() - 0.7) < 5 * (0.21 / MANY) ** 0.5
    np.testing.assert_allclose(y, X * mask / 0.7, rtol=1e-5)
    (alone,) = by_torch(Case("Dropout", [X, RATIO, TRAINING], {"seed": 3}, opset=13, constants=[1, 2]))
    np.testing.assert_array_equal(alone, y)
    half, _ = by_torch(Case("Dropout", [X, None, TRAINING], {}, 2, opset=13, constants=[2]))
    np.testing.assert_allclose(half[half != 0], 2 * X[half != 0], rtol=1e-5)
    assert 0.45 < (half == 0).mean() < 0.55


@pytest.mark.parametrize(
    "case",
    [
        Case("Dropout", [X, RATIO], {}, 2, opset=13, constants=[1], label="inference"),
        Case("Dropout", [X, np.float32(0), TRAINING], {}, 2, opset=13, constants=[1, 2], label="no ratio"),
        Case("Dropout", [X], {"ratio": 0.9}, 2, opset=10, label="opset 10"),
        Case("Dropout", [X], {"ratio": 0.9}, 2, opset=7, label="opset 7"),
        Case("Dropout", [X], {"is_test": 1}, 2, opset=6, label="opset 6"),
    ],
    ids=str,
)
def test_dropout_that_drops_nothing(case: Case) -> None:
    y, mask = by_torch(case)
    np.testing.assert_array_equal(y, X)
    assert mask.all()
    assert mask.dtype == (np.float32 if case.opset < 10 else bool)


def test_first_dropout_drops() -> None:
    y, mask = by_torch(Case("Dropout", [X], {"ratio": 0.25}, 2, opset=6))
    np.testing.assert_allclose(y, X * mask / 0.75, rtol=1e-5)
    assert 0.7 < mask.mean() < 0.8
