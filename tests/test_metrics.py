"""Figures of agreement between two models' outputs, on numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from quantkit.errors import InputError
from quantkit.metrics import class_scores, cosine, join, sqnr, top1, top1_agreement
from quantkit.types import Array


def test_sqnr_in_decibels() -> None:
    reference = np.array([3.0, 4.0], np.float32)
    assert sqnr(reference, reference + np.array([0.03, 0.04], np.float32)) == pytest.approx(40, abs=1e-3)
    assert sqnr(reference, 2 * reference) == pytest.approx(0, abs=1e-9)
    assert sqnr(reference, reference.copy()) == 200.0


def test_sqnr_of_extremes() -> None:
    one = np.ones(4, np.float32)
    assert sqnr(np.zeros(4, np.float32), one) == -200.0
    assert sqnr(np.zeros(4, np.float32), np.zeros(4, np.float32)) == 200.0
    for bad in (np.nan, np.inf):
        assert sqnr(one, np.array([1, 1, 1, bad], np.float32)) == -200.0
    huge = np.full(4, 1e30, np.float32)
    assert sqnr(huge, huge * np.float32(1.01)) == pytest.approx(40, abs=1e-2)  # squares overflow float32
    assert sqnr(one * np.float32(1e-30), one) == -200.0


def test_cosine_is_a_mean_over_samples() -> None:
    reference = np.array([[1.0, 0.0], [0.0, 2.0]], np.float32)
    measured = np.array([[5.0, 0.0], [3.0, 0.0]], np.float32)
    assert cosine(reference, measured) == pytest.approx(0.5, abs=1e-12)
    assert cosine(reference, -reference) == pytest.approx(-1, abs=1e-12)
    assert cosine(np.zeros((2, 3)), np.zeros((2, 3))) == 1.0
    assert cosine(np.zeros((1, 3)), np.ones((1, 3))) == 0.0
    assert cosine(np.ones((2, 3, 4)), np.ones((2, 3, 4))) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("shape", [(5, 10), (5, 10, 1, 1), (5, 1, 10)])
def test_class_scores(shape: tuple[int, ...]) -> None:
    scores = class_scores(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    assert scores is not None and scores.shape == (5, 10)


def test_what_is_no_class_score() -> None:
    rng = np.random.default_rng(0)
    unit = rng.standard_normal((5, 10))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    others: list[Array] = [unit, np.ones(5), np.ones((5, 1)), np.ones((5, 4, 6)), np.ones((5, 10), np.int64)]
    assert [class_scores(other) for other in others] == [None] * 5
    assert class_scores(np.abs(unit)) is not None  # never negative: it may be a distribution
    assert top1_agreement(unit, rng.standard_normal((5, 10))) is None
    assert top1_agreement(rng.standard_normal((5, 10)), unit) is None


def test_agreement_on_the_best_class() -> None:
    reference = np.array([[1.0, 2.0, 0.0], [9.0, 2.0, 0.0], [0.0, 2.0, 3.0], [0.0, 1.0, 0.5]])
    measured = np.array([[0.0, 2.0, 0.0], [1.0, 2.0, 0.0], [0.0, 2.0, 4.0], [0.0, 1.0, 0.5]])
    assert top1_agreement(reference, measured) == 0.75


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 1, 1), (4, 1, 3)])
def test_top1_against_labels(shape: tuple[int, ...]) -> None:
    scores = np.array([[1, 2, 0], [9, 2, 0], [0, 2, 3], [0, 1, 0.5]], np.float32).reshape(shape)
    assert top1(scores, np.array([1, 0, 0, 1])) == 0.75
    assert top1(scores, np.array([[1], [0], [2], [1]])) == 1.0


@pytest.mark.parametrize("labels", [np.array([1]), np.array([], np.int64), np.arange(5)])
def test_each_sample_needs_one_label(labels: Array) -> None:
    with pytest.raises(InputError, match=f"one label for each of 4 samples, got {labels.size}"):
        top1(np.ones((4, 3)), labels)


@pytest.mark.parametrize(("labels", "told"), [([0, 1, 2, 3], "3 of sample 3"), ([0, -1, 2, 9], "-1 of sample 1")])
def test_a_label_that_is_no_class(labels: list[int], told: str) -> None:
    with pytest.raises(InputError, match=f"the label {told} is none of the 3 classes 0 to 2 of the model's output; n"):
        top1(np.ones((4, 3, 1, 1)), np.array(labels))


@pytest.mark.parametrize("shape", [(4,), (4, 5, 3), (4, 1)])
def test_top1_needs_class_scores(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"top1 needs an output \[samples, classes\], got \[4"):
        top1(np.ones(shape), np.zeros(4, np.int64))


def test_join_keeps_samples_apart() -> None:
    batches = [{"y": np.ones((2, 3)), "s": np.array(1.0)}, {"y": np.zeros((1, 3)), "s": np.array(2.0)}]
    joined = join(batches)
    assert joined["y"].shape == (3, 3) and joined["y"].sum() == 6
    assert joined["s"].tolist() == [1, 2]


def test_join_of_sequences_of_different_length() -> None:
    joined = join([{"y": np.arange(6).reshape(1, 3, 2)}, {"y": np.arange(4).reshape(1, 2, 2)}])
    assert joined["y"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]]
