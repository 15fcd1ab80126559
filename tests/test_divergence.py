"""Nats between outputs, against the formulas written out in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from quantkit.divergence import Divergence
from quantkit.types import Array

RNG = np.random.default_rng(3)


def softmax(scores: Array) -> Array:
    powers = np.exp(scores.astype(np.float64) - scores.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def kl(first: Array, second: Array) -> float:
    """Of each row of probabilities, added up."""
    return float((first * (np.log(first) - np.log(second))).sum())


def noisy(values: Array, size: float = 0.3) -> Array:
    changed: Array = (values + size * RNG.standard_normal(values.shape)).astype(values.dtype)
    return changed


def test_scores_of_classes_by_kullback_and_leibler() -> None:
    wanted = (4 * RNG.standard_normal((7, 5))).astype(np.float32)
    got = noisy(wanted)
    made = Divergence.of([{"y": wanted}])
    assert made.outputs["y"].kind == "logits"
    expected = kl(softmax(wanted), softmax(got))
    assert made.sum({"y": wanted}, {"y": got}) == pytest.approx(expected, rel=1e-12)
    assert made.mean([{"y": wanted}], [{"y": got}]) == pytest.approx(expected / 7, rel=1e-12)
    # Not symmetric, and blind to what a softmax does not see.
    assert made.sum({"y": got}, {"y": wanted}) != pytest.approx(expected, rel=1e-3)
    shifted = wanted + RNG.standard_normal((7, 1)).astype(np.float32)
    assert made.sum({"y": wanted}, {"y": shifted}) == pytest.approx(0, abs=1e-10)


def test_probabilities_are_compared_as_they_are() -> None:
    wanted = softmax(RNG.standard_normal((7, 5))).astype(np.float32)
    got = softmax(RNG.standard_normal((7, 5))).astype(np.float32)
    made = Divergence.of([{"y": wanted}])
    assert made.outputs["y"].kind == "probabilities"
    assert made.sum({"y": wanted}, {"y": got}) == pytest.approx(kl(wanted, got), rel=1e-5)
    # As scores, the same numbers are something else.
    assert kl(softmax(wanted), softmax(got)) != pytest.approx(kl(wanted, got), rel=0.1)


def test_certain_classes_give_a_large_figure_and_not_an_infinite_one() -> None:
    wanted, got = np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32)[::-1]
    found = Divergence.of([{"y": wanted}]).sum({"y": wanted}, {"y": got})
    assert found == pytest.approx(4 * math.log(1e12), rel=1e-3)


def test_the_axes_behind_the_first_two_are_one_sample_of_values() -> None:
    wanted = RNG.standard_normal((6, 3, 4)).astype(np.float32)
    got = noisy(wanted)
    made = Divergence.of([{"y": wanted}])
    assert made.outputs["y"].kind == "values"
    energy = float(np.square(wanted, dtype=np.float64).sum()) / 6
    expected = float(np.square(got.astype(np.float64) - wanted).sum()) / (2 * energy)
    assert made.sum({"y": wanted}, {"y": got}) == pytest.approx(expected, rel=1e-12)
    assert made.mean([{"y": wanted}], [{"y": got}]) == pytest.approx(expected / 6, rel=1e-12)


def test_of_unit_vectors_it_is_one_minus_the_cosine() -> None:
    first, second = RNG.standard_normal((2, 5, 2, 8))
    wanted, got = (item / np.linalg.norm(item, axis=(1, 2), keepdims=True) for item in (first, second))
    cosines = (wanted * got).sum(axis=(1, 2))
    made = Divergence.of([{"y": wanted}])
    assert made.mean([{"y": wanted}], [{"y": got}]) == pytest.approx(float((1 - cosines).mean()), rel=1e-12)


@pytest.mark.parametrize("shape", [(7, 5), (7, 3, 4), (7, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_equal_outputs_are_zero(shape: tuple[int, ...], dtype: type) -> None:
    wanted = RNG.standard_normal(shape).astype(dtype)
    made = Divergence.of([{"y": wanted}])
    assert made.mean([{"y": wanted}], [{"y": wanted.copy()}]) == 0


def test_several_outputs_add_up_and_integers_do_not_count() -> None:
    logits, values = RNG.standard_normal((6, 5)).astype(np.float32), RNG.standard_normal((6, 3, 4)).astype(np.float32)
    wanted = {"a": logits, "b": values, "best": logits.argmax(axis=1)}
    got = {"a": noisy(logits), "b": noisy(values), "best": np.zeros(6, np.int64)}
    made = Divergence.of([wanted])
    assert set(made.outputs) == {"a", "b"}
    apart = [Divergence.of([{key: wanted[key]}]).sum({key: wanted[key]}, {key: got[key]}) for key in ("a", "b")]
    assert made.sum(wanted, got) == pytest.approx(sum(apart), rel=1e-12)


def test_batches_of_different_sizes_weigh_by_their_samples() -> None:
    wanted = RNG.standard_normal((7, 5)).astype(np.float32)
    got = noisy(wanted)
    cut = [slice(0, 4), slice(4, 6), slice(6, 7)]
    parts = [{"y": wanted[rows]} for rows in cut]
    made = Divergence.of(parts)
    assert made == Divergence.of([{"y": wanted}])
    found = made.mean(parts, [{"y": got[rows]} for rows in cut])
    assert found == pytest.approx(made.mean([{"y": wanted}], [{"y": got}]), rel=1e-12)


def test_ragged_outputs_are_compared_batch_by_batch() -> None:
    """Sentences of other lengths: the energy is that of all of them."""
    parts = [RNG.standard_normal((2, 9, 4)).astype(np.float32), RNG.standard_normal((3, 5, 4)).astype(np.float32)]
    got = [noisy(part) for part in parts]
    made = Divergence.of([{"y": part} for part in parts])
    energy = sum(float(np.square(part, dtype=np.float64).sum()) for part in parts) / 5
    errors = sum(float(np.square(b.astype(np.float64) - a).sum()) for a, b in zip(parts, got, strict=True))
    found = made.mean([{"y": part} for part in parts], [{"y": part} for part in got])
    assert found == pytest.approx(errors / (2 * energy) / 5, rel=1e-6)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_infinitely_far(broken: float) -> None:
    wanted = RNG.standard_normal((4, 5)).astype(np.float32)
    got = wanted.copy()
    got[2, 1] = broken
    assert Divergence.of([{"y": wanted}]).sum({"y": wanted}, {"y": got}) == math.inf


def test_another_shape_is_infinitely_far() -> None:
    wanted = RNG.standard_normal((4, 5)).astype(np.float32)
    assert Divergence.of([{"y": wanted}]).sum({"y": wanted}, {"y": wanted[:3]}) == math.inf


def test_a_float_model_that_is_not_finite_itself_can_still_be_compared() -> None:
    wanted = RNG.standard_normal((4, 3, 5)).astype(np.float32)
    wanted[0, 0, 0] = np.inf
    made = Divergence.of([{"y": wanted}])
    assert math.isfinite(made.sum({"y": wanted}, {"y": wanted})) and made.sum({"y": wanted}, {"y": wanted}) == 0


def test_outputs_of_zeros_have_an_energy_of_one() -> None:
    wanted = np.zeros((4, 2, 3), np.float32)
    assert Divergence.of([{"y": wanted}]).sum({"y": wanted}, {"y": wanted + 1}) == 12


def test_an_output_without_axes_is_one_sample() -> None:
    wanted, got = np.array(2.0, np.float32), np.array(3.0, np.float32)
    assert Divergence.of([{"y": wanted}]).mean([{"y": wanted}], [{"y": got}]) == pytest.approx(1 / 8)


def test_single_samples_add_up_to_the_whole() -> None:
    """Logits, values and an output that belongs to no sample; what is broken is infinite where it is."""
    rng = np.random.default_rng(3)
    wanted = {
        "y": rng.standard_normal((6, 10)).astype(np.float32),
        "v": rng.standard_normal((6, 2, 3, 4)).astype(np.float32),
        "one": rng.standard_normal((3,)).astype(np.float32),
    }
    got = {name: value + 0.1 * rng.standard_normal(value.shape).astype(np.float32) for name, value in wanted.items()}
    found = Divergence.of([wanted])
    each = found.each(wanted, got)
    assert each.shape == (6,) and (each > 0).all()
    assert each.sum() == pytest.approx(found.sum(wanted, got), rel=1e-9)
    assert found.each(wanted, wanted).tolist() == [0.0] * 6
    broken = {**got, "v": got["v"].copy()}
    broken["v"][4, 0, 0, 0] = np.nan
    assert np.isinf(found.each(wanted, broken)).tolist() == [False] * 4 + [True, False]
    assert np.isinf(found.each(wanted, {**got, "one": got["one"] * np.inf})).all()
    assert np.isinf(found.each(wanted, {**got, "y": got["y"][:, :9]})).all()
