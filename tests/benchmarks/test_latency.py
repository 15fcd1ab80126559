"""Predictions beside measurements: what a row says, and that nothing is predicted from what it is compared with."""

from __future__ import annotations

from argparse import Namespace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from benchmarks import latency
from benchmarks.allocation import Study
from benchmarks.harness import read_records
from benchmarks.latency import (
    BUDGETS,
    SIZES,
    Case,
    budgets_of,
    cases_of,
    context_of,
    errors_of,
    measure,
    predictions,
    summary,
    wait_until_quiet,
)
from quantkit.budget import Budget
from quantkit.calibration.request import CalibrationRequest
from quantkit.costs.latency import STATIC_FORM
from tests.benchmarks.test_kernels import WHERE
from tests.helpers import models


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A tiny encoder whose layers and models all take as long as in float."""
    models.quick(monkeypatch)
    onnx.save(models.block(), str(tmp_path / "block.onnx"))
    np.savez(tmp_path / "calib.npz", **models.tokens(16))
    request = CalibrationRequest(str(tmp_path / "calib.npz"))
    return Study("tiny", tmp_path / "block.onnx", request, [models.tokens(4)], None)


def arguments(**changes: Any) -> Namespace:
    plain = {"budgets": "1.2,0.5", "load": 1e9, "patience": 0.0, "seconds": 0.05}
    return Namespace(**{**plain, **changes})


def test_rows(study: Study, tmp_path: Path) -> None:
    records = measure(study, arguments(), tmp_path / "cache", WHERE)
    assert [record.setting for record in records] == [
        "at most 1.2x",
        "at most 0.5x",
        "at most 1.2x, 18% of the size",
        "at most 0.5x, 18% of the size",
    ]
    for record in records:
        assert record.benchmark == "latency-tiny" and record.environment == WHERE
        (speed,) = record.speed
        assert record.accuracy["measured"] == 1 / speed.median
        found = record.accuracy
        assert found["error"] == pytest.approx(abs(found["predicted"] / found["measured"] - 1))
        assert found["predicted"] == pytest.approx(1.0, abs=0.05)  # the layer that is timed by kernels is small
        assert sum(record.details["forms"].values()) == 6 and record.details["load before"] >= 0
    size = study.model.stat().st_size
    assert records[2].size_bytes is not None and records[2].size_bytes <= 0.18 * size
    assert any("--max-latency 0.5x" in note for note in records[1].details["notes"])
    latency.append_records(tmp_path / "rows.jsonl", records)
    assert read_records(tmp_path / "rows.jsonl") == records
    assert summary(records).startswith("latency-tiny: median error ")


def test_nothing_is_predicted_from_the_model_itself(study: Study, tmp_path: Path) -> None:
    context = context_of(study, tmp_path / "cache")
    (case,) = cases_of(context, [Budget(max_latency=1.2)])
    assert context.model_ms == 1.0
    static = frozenset(name for name, option in case.candidate.chosen.items() if option.form == STATIC_FORM)
    context.times.measured[static] = (case.candidate.chosen, 99.0)
    alone, predicted = predictions(context, case.candidate, 1.0)
    assert alone == predicted == pytest.approx(1.0, abs=0.05)
    context.times.measured[static] = (dict(case.candidate.chosen), 99.0)  # another one with the same forms
    assert predictions(context, case.candidate, 1.0) == (alone, pytest.approx(99.0))


def test_errors_are_shares_of_what_was_measured() -> None:
    case = Case(Budget(max_latency=0.5), None, 0.3, 0.44, ())  # type: ignore[arg-type]
    found = errors_of(case, 0.4)
    assert found["error"] == pytest.approx(0.1) and found["error of layers alone"] == pytest.approx(0.25)
    assert found["budget kept"] == 1.0 and errors_of(case, 0.51)["budget kept"] == 0.0


def test_budgets_come_with_and_without_a_size() -> None:
    found = budgets_of(arguments(budgets=",".join(map(str, BUDGETS))))
    assert len(found) == len(BUDGETS) * len(SIZES) and {item.max_size for item in found} == {None, Fraction(18, 100)}


def test_waiting_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = [3.0, 2.0, 1.0]
    monkeypatch.setattr("benchmarks.latency.os.getloadavg", lambda: (loads.pop(0), 0, 0))
    monkeypatch.setattr("benchmarks.latency.time.sleep", lambda seconds: None)
    wait_until_quiet(1.5, 1e9)
    assert loads == []
    loads = [3.0]
    wait_until_quiet(1.5, 0.0)
    assert loads == []
