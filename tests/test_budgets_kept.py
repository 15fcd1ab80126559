"""What comes after allocation (corrected biases, other forms, quantized inputs) breaks no budget that was kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import quantkit
from quantkit import candidate as candidates
from quantkit import measuring, pipeline
from quantkit.allocation import _keeps_as_much
from quantkit.budget import Budget
from quantkit.calibration.request import CalibrationRequest, EvaluationRequest
from quantkit.errors import InputError
from quantkit.report.types import Contender, Report
from quantkit.runtime.ort import DeferredSession, Session, make_session
from quantkit.types import Measurement
from tests.helpers import models

CORRECTED, SEQUENTIAL, PLAIN = "bias corrected", "on quantized inputs", "weights only"
Change = Callable[[str, Measurement], Measurement]


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    models.quick(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))


def run(
    monkeypatch: pytest.MonkeyPatch, budget: Budget, change: Change, evaluation: EvaluationRequest | None = None
) -> tuple[Report, list[str]]:
    """The report of a run whose measurements are changed, and what was measured, in order."""
    asked: list[str] = []
    measure = measuring.measure

    def changed(context: candidates.Context, candidate: candidates.Candidate) -> Measurement:
        asked.append(candidate.name)
        return change(candidate.name, replace(measure(context, candidate), latency=0.9))

    monkeypatch.setattr("quantkit.problem.measure", changed)
    report = quantkit.compress(
        models.cnn(),
        calibration=models.images(20),
        calibrator="minmax",
        quantizer="rtn",
        budget=budget,
        evaluation=evaluation,
    ).report
    return report, asked


def chosen(report: Report) -> Contender:
    (row,) = [row for row in report.contenders if row.chosen]
    return row


def better_but(name: str, **figures: float) -> Change:
    """The kind of candidate gains 6 dB and loses a tenth, and has these figures beside."""

    def change(label: str, found: Measurement) -> Measurement:
        if not label.endswith(name):
            return found
        return replace(found, sqnr=found.sqnr + 6, loss=found.loss / 10, sample_losses=(), **figures)

    return change


def judged(tmp_path: Path) -> EvaluationRequest:
    np.savez(tmp_path / "eval.npz", **models.images(12))
    return EvaluationRequest(CalibrationRequest(str(tmp_path / "eval.npz")), "cosine")


@pytest.mark.parametrize("kind", [CORRECTED, SEQUENTIAL])
def test_an_accuracy_that_was_kept_stays_kept(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    evaluation, budget = judged(tmp_path), Budget(max_drop=0.05)
    worse, _ = run(monkeypatch, budget, better_but(kind, drop=0.5), evaluation)
    assert kind in " ".join(row.name for row in worse.contenders) and kind not in chosen(worse).name
    as_good, _ = run(monkeypatch, budget, better_but(kind, drop=0.04), evaluation)
    assert kind in chosen(as_good).name


@pytest.mark.parametrize("kind", [CORRECTED, SEQUENTIAL])
def test_a_time_that_was_kept_stays_kept(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget(avg_bits=4, max_latency=1.0)
    slower, _ = run(monkeypatch, budget, better_but(kind, latency=1.2))
    assert kind in " ".join(row.name for row in slower.contenders) and kind not in chosen(slower).name
    slow_enough, _ = run(monkeypatch, budget, better_but(kind, latency=0.99))
    assert kind in chosen(slow_enough).name


def test_floats_in_the_place_of_slow_integers_keep_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(name: str, found: Measurement) -> Measurement:
        larger = found.size + 10_000 if PLAIN in name else found.size
        return replace(found, latency=1.0 if PLAIN in name else 1.3, size=larger)

    free, _ = run(monkeypatch, Budget(avg_bits=4), change)
    assert PLAIN in chosen(free).name
    bound, _ = run(monkeypatch, Budget(avg_bits=4, max_size=9000), change)
    assert PLAIN in " ".join(row.name for row in bound.contenders) and PLAIN not in chosen(bound).name


def test_nothing_is_measured_twice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Searching for an accuracy tries the same widths again and again."""
    report, asked = run(monkeypatch, Budget(max_drop=0.02, max_size=9000), lambda name, found: found, judged(tmp_path))
    assert len(asked) == len(report.contenders) >= 3
    names = [row.name for row in report.contenders]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("budget", "before", "after", "kept"),
    [
        (Budget(), (10, 0.5, 2.0), (20, 0.9, 3.0), True),
        (Budget(max_size=10), (10, 0.0, 1.0), (11, 0.0, 1.0), False),
        (Budget(max_size=5), (10, 0.0, 1.0), (10, 0.0, 1.0), True),
        (Budget(max_latency=1.0), (1, 0.0, 0.5), (1, 0.0, 1.0), True),
        (Budget(max_latency=1.0), (1, 0.0, 1.2), (1, 0.0, 1.3), False),
        (Budget(max_drop=0.1), (1, 0.0, 1.0), (1, 0.1, 1.0), True),
        (Budget(max_drop=0.1), (1, 0.2, 1.0), (1, 0.3, 1.0), False),
        (Budget(max_drop=0.1), (1, 0.3, 1.0), (1, 0.2, 1.0), True),
    ],
)
def test_what_may_take_a_place(
    budget: Budget, before: tuple[int, float, float], after: tuple[int, float, float], kept: bool
) -> None:
    """(size, drop, latency)."""
    one, other = (Measurement(size, 30.0, drop, latency) for size, drop, latency in (before, after))
    ledger: Any = SimpleNamespace(context=SimpleNamespace(loaded=SimpleNamespace(size=100)))
    assert _keeps_as_much(budget, one, other, ledger) is kept


def test_the_table_has_the_time_that_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "relative_latency", lambda *arguments, **options: 0.77)
    report, _ = run(monkeypatch, Budget(avg_bits=4), lambda name, found: found)
    assert chosen(report).latency == 0.77
    assert {row.latency for row in report.contenders if not row.chosen} == {0.9}


def test_a_deferred_session_is_asked_once() -> None:
    made: list[Session] = []

    def make() -> Session:
        made.append(make_session(ir.from_proto(models.matmul())))
        return made[-1]

    session = DeferredSession(make)
    assert not made
    feed = {"x": models.random(2, 64)}
    first = session.run(feed)
    assert len(made) == 1 and {"_session", "output_names"} <= vars(session).keys()
    np.testing.assert_array_equal(session.run(feed)["y"], first["y"])
    assert len(made) == 1
    with pytest.raises(AttributeError, match="nothing_like_it"):
        session.nothing_like_it  # noqa: B018


def test_what_is_ignored_is_told_not_to_count() -> None:
    report = quantkit.compress(models.cnn(), ignore=("Conv/c2",), quantizer="rtn").report
    share = round(100 * 32 * 144 / (16 * 27 + 32 * 144 + 10 * 32))
    assert f"ignored layers stay float (1, {share}% of the weights): averages of bits" in " ".join(report.notes)
    assert "ignored layers" not in " ".join(quantkit.compress(models.cnn(), quantizer="rtn").report.notes)


def test_one_sample_is_told_to_do_both() -> None:
    alone = {name: values[:1] for name, values in models.images(1).items()}
    notes = quantkit.compress(models.cnn(), calibration=alone, quantizer="rtn", bits=(8,)).report.notes
    assert any("both calibrates and measures, so that the figures mean little" in note for note in notes)
    notes = quantkit.compress(models.cnn(), calibration=models.images(2), quantizer="rtn", bits=(8,)).report.notes
    assert not any("both calibrate" in note for note in notes)


def test_labels_that_cannot_be_are_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "eval.npz", **models.images(12), labels=np.arange(900, 912))
    evaluation = EvaluationRequest(CalibrationRequest(str(tmp_path / "eval.npz")), "top1")
    monkeypatch.setattr(pipeline, "collect", lambda *arguments: pytest.fail("calibration has begun"))
    with pytest.raises(InputError, match=r"the label 900 of sample 0 is none of the 10 classes 0 to 9"):
        quantkit.compress(models.cnn(), calibration=models.images(20), evaluation=evaluation)
