"""The best configuration made again with nearly all samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantkit.budget import Budget
from quantkit.candidate import Candidate, Context
from quantkit.pipeline import apply
from quantkit.tuning import final
from quantkit.tuning.history import Trial
from quantkit.tuning.tune import Tuned, TuneSettings, tune
from quantkit.types import Measurement
from tests.helpers import models


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.quick(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))


def tuned(**changes: Any) -> Tuned:
    return tune(
        models.cnn(),
        calibration=models.images(120),
        budget=Budget(avg_bits=4.0),
        search_settings=TuneSettings(3, **changes),
        allocator="uniform",
        quantizer="mse",
    )


def fixed(monkeypatch: pytest.MonkeyPatch, refitted_loss: float) -> None:
    """What is made again loses so much on held-out samples, everything else 1."""
    plain = final.measure

    def measured(context: Context, candidate: Candidate) -> Measurement:
        found = plain(context, candidate)
        loss = refitted_loss if candidate.name.endswith(final.REFITTED) else 1.0
        return Measurement(found.size, found.sqnr, found.drop, found.latency, loss)

    monkeypatch.setattr(final, "measure", measured)


def test_more_samples_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed(monkeypatch, 1.4)
    found = tuned()
    assert found.result.plan.settings["holdout"] == 10
    assert any("made again with 108 samples" in note for note in found.result.report.notes)
    (chosen,) = [row for row in found.result.report.contenders if row.chosen]
    assert chosen.name.endswith(", refitted")
    found.result.save(tmp_path / "q.onnx")
    apply(models.cnn(), found.result.plan, calibration=models.images(120)).save(tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "q.onnx").read_bytes()


@pytest.mark.parametrize("slow", [1, 2, 9])
def test_what_is_slower_than_float_is_passed_over_and_told_of(slow: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first models whose time is measured are slow; where all of those are, the best is kept all the same."""
    asked: list[str] = []

    def latency(context: Context, candidate: Candidate, session: object) -> float:
        asked.append(candidate.name)
        return 1.25 if len(asked) <= slow else 1.0

    monkeypatch.setattr(final, "relative_latency", latency)
    found = tuned(refit=False)
    order = sorted((i for i, fits in enumerate(found.feasible) if fits), key=lambda i: found.trials[i].loss)
    told = [note for note in found.result.report.notes if "passed over" in note]
    if slow >= len(order):
        assert found.best == order[0] and not told
        return
    assert found.best == order[slow]
    assert told == [
        f"number {index + 1} ranked higher (a loss of {found.trials[index].loss:.3g} nats), but took 1.25x the float "
        "model's time: passed over"
        for index in order[:slow]
    ]


@pytest.mark.parametrize(
    ("objective", "told"), [("loss", "a loss of 0.0123 nats"), ("drop", "a drop of 1.5 %"), ("size", "1,234 bytes")]
)
def test_what_a_trial_is_ranked_by(objective: str, told: str) -> None:
    trial = Trial({}, 1234, 0.01234, (), True, 30.0, 0.015, None, 1.0)
    assert final._figure(trial, objective) == told


def test_not_where_it_goes_wrong_or_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed(monkeypatch, 1.6)
    for found in (tuned(), tuned(refit=False)):
        assert found.result.plan.settings["holdout"] == 40
        assert not any("made again" in note for note in found.result.report.notes)
        (chosen,) = [row for row in found.result.report.contenders if row.chosen]
        assert chosen.name.startswith(f"{found.best + 1}: ")
