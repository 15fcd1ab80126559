"""Budgets against real runs: what is counted is what is written, and what is measured decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quantkit
from quantkit import candidate as candidates
from quantkit import evaluation as evaluations
from quantkit import measuring
from quantkit.calibration.request import CalibrationRequest, EvaluationRequest
from quantkit.costs import latency
from quantkit.costs.latency import open_cache
from quantkit.errors import InputError
from quantkit.types import Measurement
from tests.helpers import models


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    models.quick(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_a_candidate_is_as_large_as_its_file(tmp_path: Path) -> None:
    report = quantkit.compress(models.cnn(), calibration=models.images(16), calibrator="minmax").report
    chosen = [row for row in report.contenders if row.chosen]
    assert len(chosen) == 1
    assert 0 <= chosen[0].size - report.size_after <= 8  # the allowance for stamps is an upper bound
    result = quantkit.compress(models.cnn())
    result.save(tmp_path / "out.onnx")
    assert result.report.size_after == (tmp_path / "out.onnx").stat().st_size


def test_an_evaluation_without_calibration_decides(tmp_path: Path) -> None:
    np.savez(tmp_path / "eval.npz", **models.images(12))
    evaluation = EvaluationRequest(CalibrationRequest(str(tmp_path / "eval.npz")), "cosine")
    strict = quantkit.compress(models.cnn(), evaluation=evaluation, budget=quantkit.Budget(max_drop=1e-4))
    loose = quantkit.compress(models.cnn(), evaluation=evaluation, budget=quantkit.Budget(max_drop=0.2))
    assert strict.report.average_bits > loose.report.average_bits
    assert not any("cannot be checked" in sentence for sentence in strict.report.unmet)
    assert any("weights only, the metric alone was measured" in note for note in strict.report.notes)
    assert all(np.isnan(row.sqnr) and np.isnan(row.latency) for row in strict.report.contenders)  # no run tells them


def test_an_unknown_drop_meets_no_budget() -> None:
    report = quantkit.compress(models.cnn(), budget=quantkit.Budget(max_drop=0.5)).report
    assert report.average_bits == 8.0
    assert any("the accuracy budget cannot be checked" in sentence for sentence in report.unmet)


def test_floats_are_tried_where_integers_are_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = measuring.measure

    def slow_integers(context: candidates.Context, candidate: candidates.Candidate) -> Measurement:
        integer = any(option.form == "qdq" for option in candidate.chosen.values())
        return replace(measure(context, candidate), latency=2.0 if integer else 0.9)

    monkeypatch.setattr("quantkit.problem.measure", slow_integers)
    result = quantkit.compress(
        models.cnn(),
        calibration=models.images(16),
        calibrator="minmax",
        budget=quantkit.Budget(max_latency=1.0),
    )
    assert {layer.form for layer in result.plan.layers.values()} <= {"packed", "matmulnbits"}


@pytest.mark.parametrize("allocator", ["auto", "uniform"])
def test_bit_operations_are_counted_and_kept(allocator: str) -> None:
    data = models.images(16)
    # Integer activations of 8 bits: weights of b bits cost 8 b for each of float's 1024.
    report = quantkit.compress(
        models.cnn(),
        calibration=data,
        calibrator="minmax",
        allocator=allocator,
        budget=quantkit.Budget(max_bops=Fraction(4 * 8, 1024)),
    ).report
    assert not report.unmet
    conv2 = report.layers[1]  # nearly all multiplications are in it
    assert conv2.bits is not None and conv2.bits <= 4
    weights_only = quantkit.compress(
        models.cnn(), calibration=data, activations="none", budget=quantkit.Budget(max_bops=Fraction(1, 100))
    ).report
    assert weights_only.average_bits == 2
    assert any("bit operations exceed the budget of" in sentence for sentence in weights_only.unmet)


def test_integer_products_keep_bit_operations_that_narrow_weights_need_not() -> None:
    """8-bit weights on 8-bit activations take what 2-bit weights take on float ones."""
    most = Fraction(8 * 8, 1024)
    found = quantkit.compress(
        models.block(), calibration=models.tokens(16), activations="auto", budget=quantkit.Budget(max_bops=most)
    )
    assert not found.report.unmet
    products = {name: layer for name, layer in found.plan.layers.items() if layer.form != "gather"}
    assert {layer.form for layer in products.values()} == {"dynamic"}
    assert {layer.spec.bits for layer in products.values() if layer.spec is not None} == {8}


def timed(monkeypatch: pytest.MonkeyPatch, times: Mapping[str, float]) -> None:
    """Products take `times` of float in each form; a model takes what its layers do, and a twentieth more."""

    def layer(target: Any, spec: Any, form: str, rows: int, **_: Any) -> latency.Cost:
        slow = 0.3 * (8 - spec.bits) / 6 if form == "matmulnbits" else 0.0  # narrow codes take longer to unpack
        return latency.Cost(1.0, times[form] + slow)

    def model(context: candidates.Context, candidate: candidates.Candidate, *_: Any, **__: Any) -> float:
        changes = sum(cost.form_ms - cost.float_ms for cost in context.times.costs(candidate.chosen))
        return 1.05 * (8.0 + changes) / 8.0

    monkeypatch.setattr("quantkit.costs.layers.layer_cost", layer)
    monkeypatch.setattr("quantkit.costs.layers.node_cost", lambda *_, **__: latency.Cost(1.0, 1.0))
    monkeypatch.setattr("quantkit.measuring.relative_latency", model)
    monkeypatch.setattr("quantkit.pipeline.relative_latency", model)
    monkeypatch.setattr("quantkit.candidate.time_sessions", lambda sessions, feed, **_: [8.0] * len(sessions))


@pytest.mark.parametrize("allocator", ["auto", "uniform", "measured"])
@pytest.mark.parametrize(
    ("most", "others"),
    [
        (0.99, {}),
        (0.94, {}),
        (0.94, {"max_size": Fraction(3, 10)}),
        (0.99, {"avg_bits": 5.0}),
        (0.97, {"max_bops": Fraction(1, 5)}),
    ],
)
def test_a_latency_budget_is_kept_with_any_other(
    monkeypatch: pytest.MonkeyPatch, allocator: str, most: float, others: Mapping[str, Any]
) -> None:
    timed(monkeypatch, {"packed": 1.0, "matmulnbits": 0.65, "dynamic": 1.3})
    budget = quantkit.Budget(max_latency=most, **others)
    report = quantkit.compress(models.block(), calibration=models.tokens(16), allocator=allocator, budget=budget).report
    assert report.unmet == () and not any("cannot be met" in note for note in report.notes)
    forms = [row.form for row in report.layers]
    assert forms.count("matmulnbits") >= 2 and "dynamic" not in forms


def test_a_time_out_of_reach_is_told_and_approached(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, {"packed": 1.0, "matmulnbits": 0.65, "dynamic": 1.3})
    report = quantkit.compress(
        models.block(), calibration=models.tokens(16), budget=quantkit.Budget(max_latency=0.2)
    ).report
    assert report.notes[0].startswith("--max-latency 0.2x cannot be met: the smallest predicted is 0.9208")
    assert report.average_bits == 8  # narrower layers would be no faster
    assert any("exceeds the budget of 0.2x" in sentence for sentence in report.unmet)


def test_a_budget_that_cannot_be_met_says_what_could(tmp_path: Path) -> None:
    report = quantkit.compress(models.cnn(), budget=quantkit.Budget(max_size=2000)).report
    assert any("--max-size 2000 bytes cannot be met: the smallest possible is" in note for note in report.notes)
    assert report.unmet and report.average_bits == 2
    met = quantkit.compress(models.cnn(), budget=quantkit.Budget(avg_bits=4)).report
    assert not any("cannot be met" in note for note in met.notes)


def test_a_doubtful_time_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache(tmp_path)
    assert cache.put({"a": 1}, [1.0, 3.0]) == [1.0, 3.0]
    assert cache.put({"a": 1}, [1.0, 1.0]) == [1.0, 3.0]  # the first stays ...
    assert cache.put({"a": 1}, [1.0, 1.0], replace=True) == [1.0, 1.0]  # ... unless it is in doubt
    assert open_cache(tmp_path).get({"a": 1}) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"budget": "4"}, r"budget must be a Budget, got '4'"),
        ({"evaluation": "x"}, r"evaluation must be a EvaluationRequest, got 'x'"),
        ({"plan": {}}, r"plan must be a Plan, got \{\}"),
        ({"seed": "0"}, r"seed must be a whole number, got '0'"),
        ({"seed": -1}, r"seed must be 0 or more, got -1"),
        ({"bits": ("4",)}, r"bits must be widths from 1 to 8, got \['4'\]"),
    ],
)
def test_wrong_arguments(arguments: Mapping[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        quantkit.compress(models.cnn(), **arguments)


def test_natural_arguments(tmp_path: Path) -> None:
    report = quantkit.compress(models.cnn(), bits=4, cache=str(tmp_path / "cache")).report
    assert report.average_bits == 4.0


@pytest.mark.parametrize(("error", "told"), [(0.0, False), (0.05, True)])
def test_an_accuracy_that_is_kept_by_chance_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: float, told: bool
) -> None:
    """Nothing is within a standard error of the budget: what keeps it by measurement alone is taken, and told."""
    np.savez(tmp_path / "eval.npz", **models.images(12))
    evaluation = EvaluationRequest(CalibrationRequest(str(tmp_path / "eval.npz")), "cosine")
    drop = evaluations.Evaluation.drop
    monkeypatch.setattr(evaluations.Evaluation, "drop_with_error", lambda self, session: (drop(self, session), error))
    budget = quantkit.Budget(max_drop=0.04)
    report = quantkit.compress(models.cnn(), evaluation=evaluation, budget=budget).report
    assert report.unmet == () and report.average_bits < 8
    sentence = "the accuracy budget is kept by less than a standard error: the drop is 0.0"
    assert any(note.startswith(sentence) for note in report.notes) == told
