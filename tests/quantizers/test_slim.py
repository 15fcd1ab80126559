"""Widths by groups: exact averages, never worse than uniform, labels that follow salience, the best that there are."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from quantkit.errors import InputError
from quantkit.quantizers import _grid
from quantkit.quantizers._labels import ENUMERABLE, Labelling, Labels, separable, swept
from quantkit.quantizers._salience import Inputs, block_terms, inputs_of, salient
from quantkit.quantizers.gptq import GPTQ
from quantkit.quantizers.mse import MSE, input_importance
from quantkit.quantizers.slim import METHOD, Slim
from quantkit.types import Array, FloatArray, LayerStats, QuantSpec

QUICK: dict[str, Any] = {"rounder": "nearest"}  # the errors are then those of the table


def layer(num_rows: int, num_inputs: int, *, groups: int = 1, seed: int = 0) -> tuple[FloatArray, LayerStats]:
    """A weight, and inputs that go together and differ in size a hundredfold from one run of inputs to the next."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((num_rows, num_inputs)).astype(np.float32)
    size = np.exp(2 * np.sin(np.arange(num_inputs) / 9 + seed))
    rows = rng.standard_normal((groups, 400, num_inputs)) @ (np.eye(num_inputs) + 0.05) * size
    gram = rows.transpose(0, 2, 1) @ rows / rows.shape[1]
    square_mean = np.diagonal(gram, axis1=1, axis2=2)
    return weight, LayerStats(400, float(rows.min()), float(rows.max()), square_mean=square_mean, gram=gram)


def output_error(weight: FloatArray, quantized: FloatArray, stats: LayerStats) -> float:
    """tr(D H D^T), written out."""
    assert stats.gram is not None
    error = quantized.astype(np.float64) - weight
    parts = np.split(error, len(stats.gram))
    return float(sum(np.trace(part @ gram @ part.T) for part, gram in zip(parts, stats.gram, strict=True)))


SHAPES = [(8, 64, 16), (6, 72, 16), (5, 40, 32), (12, 130, 32), (3, 33, 32), (4, 20, 3)]  # most with a short last group


@pytest.mark.parametrize("search", ["exact", "sweep"])
@pytest.mark.parametrize("levels", [(), (2, 4, 8), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_the_average_is_exact_and_the_error_never_above_uniform(
    bits: int, levels: tuple[int, ...], search: Any
) -> None:
    method, uniform_found = Slim(levels=levels, search=search, **QUICK), 0
    for shape in SHAPES:
        weight, stats = layer(*shape[:2])
        spec = QuantSpec(bits, shape[2])
        for known in (stats, replace(stats, gram=None), None):
            found = method.quantize(weight, spec, known)
            labels = found.spec.group_bits
            assert found.spec.average_bits(shape[1]) == pytest.approx(bits, abs=1e-6)
            assert found.group_bits.tolist() == found.spec.widths(shape[1]).tolist()
            assert set(found.group_bits.tolist()) <= {bits, *(levels or (bits - 1, bits + 1))}
            uniform_found += labels is None
            if known is stats:
                uniform = method.quantize(weight, replace(spec, group_bits=(bits,) * spec.num_groups(shape[1])), stats)
                errors = [output_error(weight, item.dequantize(), stats) for item in (found, uniform)]
                assert errors[0] <= errors[1] * (1 + 1e-9)
                assert labels is None or errors[0] < errors[1]
    # Two bits less cost sixteenfold: the sweep finds no use for {2, 4, 8} here.
    mixing = bits in (2, 3, 4) and (levels != (2, 4, 8) or (bits == 4 and search == "exact"))
    assert (uniform_found < 3 * len(SHAPES)) or not mixing  # the search does find something where there is something


def test_labels_given_are_followed_and_repeat_the_same_bytes() -> None:
    weight, stats = layer(12, 130)
    found = Slim().quantize(weight, QuantSpec(3, 16), stats)
    assert found.spec.group_bits is not None and len(set(found.spec.group_bits)) > 1
    again = Slim().quantize(weight, found.spec, stats)
    assert again.spec == found.spec
    for name in ("codes", "scales", "zero_points", "group_bits"):
        assert getattr(again, name).tobytes() == getattr(found, name).tobytes()


@pytest.mark.parametrize("spec", [QuantSpec(3, -1), QuantSpec(3, 64), QuantSpec(3, 100)])
def test_one_group_is_uniform(spec: QuantSpec) -> None:
    weight, stats = layer(8, 64)
    found = Slim().quantize(weight, spec, stats)
    assert found.spec == spec and found.group_bits.tolist() == [3]


@pytest.mark.parametrize("norm", [2.0, 2.4])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_ranges_of_weight_one_are_the_plain_search(bits: int, norm: float) -> None:
    weight, stats = layer(12, 70)
    for known in (stats, replace(stats, gram=None), None):
        spec = QuantSpec(bits, 32, group_bits=(bits,) * 3)
        found = Slim(salient_weight=1, norm=norm, **QUICK).quantize(weight, spec, known)
        wanted = MSE(norm=norm).quantize(weight, spec, known)
        for name in ("codes", "scales", "zero_points"):
            assert getattr(found, name).tobytes() == getattr(wanted, name).tobytes()


def test_ranges_spare_salient_weights() -> None:
    """The more a salient weight counts, the less its error; and never worse than covering ranges by that measure."""
    weight, stats = layer(16, 96)
    spec = QuantSpec(2, 32, group_bits=(2, 2, 2))
    inputs = inputs_of(stats, weight.shape)
    marks = salient(inputs.salience(weight), 32)
    assert 0.01 < marks.mean() < 0.3
    importance = np.repeat(input_importance(stats), len(weight), axis=0)
    errors = {}
    for factor in (1.0, 4.0, 1000.0):
        found = Slim(salient_weight=factor, **QUICK).quantize(weight, spec, stats)
        squares = importance * np.square(found.dequantize().astype(np.float64) - weight)
        errors[factor] = (squares[marks].sum(), squares[~marks].sum())
        covering = _grid.quantized(weight, spec, _grid.minmax_grid(weight, spec), _grid.all_codes(spec, 96))
        plain = importance * np.square(covering.dequantize().astype(np.float64) - weight)
        counted = np.where(marks, factor, 1.0)
        assert (counted * squares).sum() <= (counted * plain).sum() * (1 + 1e-5)
    assert errors[1000.0][0] < errors[4.0][0] < errors[1.0][0]
    assert errors[1000.0][1] > errors[1.0][1]


def test_salience_is_what_removing_a_weight_costs() -> None:
    """w^2 / U_ii^2, U the Cholesky factor of the inverse: by the definition, and by the best repair, in float64."""
    weight, stats = layer(4, 12)
    assert stats.gram is not None
    size = np.sqrt(np.diagonal(stats.gram[0])).mean() ** 2
    gram = stats.gram[0] + 0.01 * size * np.eye(12)
    factor = np.linalg.cholesky(np.linalg.inv(gram)).T
    wanted = np.square(weight.astype(np.float64)) / np.square(np.diagonal(factor))
    np.testing.assert_allclose(inputs_of(stats, weight.shape).salience(weight), wanted, rtol=1e-9)
    for i in range(12):  # later inputs make up: the Schur complement of the rest
        rest = gram[i + 1 :, i]
        kept = gram[i, i] - (rest @ np.linalg.solve(gram[i + 1 :, i + 1 :], rest) if i < 11 else 0)
        np.testing.assert_allclose(inputs_of(stats, weight.shape).leftover[0, i], kept, rtol=1e-9)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("num_inputs", "width"), [(48, 16), (70, 32), (40, 64), (1100, 64)])
def test_the_table_scores_every_labelling_exactly(num_inputs: int, width: int, groups: int) -> None:
    weight, stats = layer(6, num_inputs, groups=groups)
    assert stats.gram is not None
    errors = [np.random.default_rng(i).standard_normal(weight.shape).astype(np.float32) for i in range(3)]
    terms = block_terms(errors, stats.gram, width)
    count = -(-num_inputs // width)
    labelling = Labelling(terms, np.zeros((count, 3), np.int64))
    rng = np.random.default_rng(5)
    for _ in range(5):
        labels = tuple(rng.integers(0, 3, count).tolist())
        mixed = np.select([np.repeat(labels, width)[:num_inputs] == level for level in range(3)], errors)
        assert labelling.error(labels) == pytest.approx(output_error(weight, weight + mixed, stats), rel=1e-4)
        inputs = inputs_of(stats, weight.shape)
        assert inputs.error(mixed) == pytest.approx(output_error(np.zeros_like(mixed), mixed, stats), rel=1e-6)
    np.testing.assert_allclose(
        [terms[g, 1, g, 1] for g in range(count)],
        inputs.own_terms(errors[1], width),
        rtol=1e-4,
        atol=1e-6 * terms.max(),
    )


@pytest.mark.parametrize("bits", [2, 3])
def test_what_ships_is_never_worse_than_uniform_gptq_or_the_nearest_codes(bits: int) -> None:
    weight, stats = layer(24, 128)
    spec = QuantSpec(bits, 16)
    found = Slim().quantize(weight, spec, stats)
    error = output_error(weight, found.dequantize(), stats)
    for other in (GPTQ(), Slim(**QUICK), Slim(search="sweep", **QUICK)):
        assert error <= output_error(weight, other.quantize(weight, spec, stats).dequantize(), stats) * (1 + 1e-9)


def labelling_of(num_groups: int, levels: tuple[int, ...], bits: int, *, last: int = 16, seed: int = 0) -> Labelling:
    """Random errors of random size, and groups of 16 inputs but for the last."""
    rng = np.random.default_rng(seed)
    width = 16
    num_inputs = (num_groups - 1) * width + last
    mix = rng.standard_normal((num_inputs, num_inputs))
    size = np.exp(rng.standard_normal(num_groups)).repeat(width)[:num_inputs]
    errors = [(rng.standard_normal((5, num_inputs)) * size * 2.0**-b).astype(np.float32) for b in levels]
    terms = block_terms(errors, (mix.T @ mix / num_inputs)[None], width)
    return Labelling(terms, np.outer(_grid.group_lengths(num_inputs, width), np.array(levels) - bits))


def enumerated(labelling: Labelling) -> float:
    """The least error of all balanced labellings, one after the other."""
    groups, levels = labelling.balance.shape
    best = np.inf
    for labels in itertools.product(range(levels), repeat=groups):
        if sum(labelling.balance[g, level] for g, level in enumerate(labels)) == 0:
            best = min(best, labelling.error(labels))
    return best


@pytest.mark.parametrize("last", [16, 8])
@pytest.mark.parametrize(("levels", "bits"), [((1, 2, 3), 2), ((2, 3, 4), 3), ((2, 4, 8), 4), ((2, 3, 4, 5), 3)])
@pytest.mark.parametrize("num_groups", [1, 2, 3, 4, 5, 6])
def test_small_searches_are_exhaustive(num_groups: int, levels: tuple[int, ...], bits: int, last: int) -> None:
    labelling = labelling_of(num_groups, levels, bits, last=last, seed=num_groups)
    found = labelling.best()
    assert sum(labelling.balance[g, level] for g, level in enumerate(found)) == 0
    assert labelling.error(found) == pytest.approx(enumerated(labelling), rel=1e-9)


@pytest.mark.parametrize(("levels", "bits"), [((1, 2, 3), 2), ((2, 4, 8), 4)])
def test_large_searches_end_where_no_two_groups_improve(levels: tuple[int, ...], bits: int) -> None:
    labelling = labelling_of(10, levels, bits, last=8, seed=3)
    assert ENUMERABLE < 3**10
    alone = np.diagonal(labelling.terms.reshape(30, -1)).reshape(10, 3)
    found = labelling.best([separable(alone, labelling.balance)])
    least = labelling.error(found)
    assert least < labelling.error(labelling.neutral)
    assert least <= enumerated(labelling) * 1.02  # it is the best here, or within two percent
    for g, h in itertools.combinations(range(10), 2):
        for a, b in itertools.product(range(3), repeat=2):
            other = list(found)
            other[g], other[h] = a, b
            if sum(labelling.balance[k, level] for k, level in enumerate(other)) == 0:
                assert labelling.error(tuple(other)) >= least * (1 - 1e-9)


@pytest.mark.parametrize("last", [16, 12, 7])
def test_separable_costs_are_solved_exactly(last: int) -> None:
    rng = np.random.default_rng(last)
    lengths = np.array([16, 16, 16, 16, 16, last])
    balance = np.outer(lengths, np.array([-2, -1, 0, 1, 4]))
    costs = rng.random((6, 5))
    every = [
        labels
        for labels in itertools.product(range(5), repeat=6)
        if sum(balance[g, level] for g, level in enumerate(labels)) == 0
    ]
    wanted = min(sum(costs[g, level] for g, level in enumerate(labels)) for labels in every)
    found = separable(costs, balance)
    assert found in every
    assert sum(costs[g, level] for g, level in enumerate(found)) == pytest.approx(wanted, rel=1e-12)


def monotone(labels: Labels, salience: Array) -> bool:
    order = np.argsort(salience, kind="stable")
    return bool((np.diff(np.array(labels)[order]) >= 0).all())


@pytest.mark.parametrize(("levels", "bits", "shares"), [((1, 2, 3), 2, (1, 1)), ((2, 4, 8), 4, (2, 1))])
def test_the_sweep_follows_salience(levels: tuple[int, ...], bits: int, shares: tuple[int, int]) -> None:
    salience = np.random.default_rng(0).random(11)
    found = swept(salience, levels, bits, 10)
    assert [labels.count(0) for labels in found] == [shares[0] * (i + 1) for i in range(len(found))]
    assert [labels.count(2) for labels in found] == [shares[1] * (i + 1) for i in range(len(found))]
    assert len(found) == 10 // sum(shares)
    for labels in found:
        assert monotone(labels[:10], salience[:10]) and labels[10] == 1
    assert swept(salience, (3, 4), 4, 10) == [] and swept(salience, (4, 5), 4, 10) == []


def test_a_sweep_through_the_quantizer_is_monotone_in_salience() -> None:
    weight, stats = layer(8, 96)
    found = Slim(search="sweep", **QUICK).quantize(weight, QuantSpec(3, 16), stats)
    assert found.spec.group_bits is not None
    salience = np.add.reduceat(inputs_of(stats, weight.shape).salience(weight).sum(axis=0), np.arange(0, 96, 16))
    assert monotone(found.spec.group_bits, salience)


def test_convolution_groups_share_the_labels_of_their_inputs() -> None:
    weight, stats = layer(12, 64, groups=3)
    found = Slim().quantize(weight, QuantSpec(3, 16), stats)
    uniform = Slim().quantize(weight, QuantSpec(3, 16, group_bits=(3,) * 4), stats)
    assert output_error(weight, found.dequantize(), stats) <= output_error(weight, uniform.dequantize(), stats)


def test_unseen_inputs_count_alike() -> None:
    """A Gram matrix or mean squares of zeros tell nothing."""
    weight, stats = layer(6, 48)
    zeros = replace(stats, gram=np.zeros((1, 48, 48)), square_mean=np.zeros((1, 48)))
    nothing = inputs_of(None, weight.shape)
    for known in (inputs_of(zeros, weight.shape), inputs_of(replace(zeros, gram=None), weight.shape)):
        assert known.gram is None and np.array_equal(known.energy, nothing.energy)
    assert isinstance(nothing, Inputs) and np.array_equal(nothing.energy, np.ones((1, 48)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": (0, 4)}, r"slim\.levels must be widths from 1 to 8, got \[0, 4\]"),
        ({"salient_weight": 0.5}, r"slim\.salient_weight must be at least 1, got 0\.5"),
        ({"salient_weight": float("inf")}, r"slim\.salient_weight must be at least 1, got inf"),
        ({"norm": 0.0}, r"slim\.norm must be above 0, got 0\.0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Slim(**settings)


def test_the_method_asks_for_the_gram_matrix() -> None:
    assert METHOD is Slim and "gram" in Slim().stats
