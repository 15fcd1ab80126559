"""The drop on images that a run did not see, its standard error, and the rows about it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks.data import Labelled
from benchmarks.harness import Record, append_records, read_records
from benchmarks.max_drop import Task, compressed, paired_drop, part, records_of, verdict
from quantkit.calibration.request import CalibrationRequest
from quantkit.runtime.ort import make_session
from tests.benchmarks.test_kernels import WHERE
from tests.helpers import models


def test_a_drop_is_that_of_the_images_that_change() -> None:
    labels = np.zeros(100, np.int64)
    reference, measured = labels.copy(), labels.copy()
    reference[:20] = 1  # wrong in float
    measured[:15] = 1  # five of them right now
    measured[50:60] = 1  # ten others no longer
    drop, error = paired_drop(reference, measured, labels)
    assert drop == pytest.approx(0.05)
    assert error == pytest.approx(math.sqrt((0.15 - 0.05**2) / 99), rel=1e-9)
    assert paired_drop(reference, reference, labels) == (0.0, 0.0)


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.quick(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))
    onnx.save(models.cnn(), str(tmp_path / "cnn.onnx"))
    np.savez(tmp_path / "calib.npz", **models.images(16))
    images = np.random.default_rng(7).standard_normal((60, 3, 8, 8)).astype(np.float32)
    labels = make_session(tmp_path / "cnn.onnx").run({"x": images})["y"].argmax(axis=1)
    test = Labelled(images, labels)
    request = CalibrationRequest(str(tmp_path / "calib.npz"))
    task = Task(
        "tiny", tmp_path / "cnn.onnx", request, "x", part(test, slice(0, None, 2)), part(test, slice(1, None, 2))
    )
    assert len(task.seen.images) == len(task.unseen.labels) == 30
    found = compressed(task, tmp_path, 0.2, quantizer="rtn", calibrator="minmax", allocator="salience")
    records = records_of(task, found, tmp_path, WHERE, "rtn")
    assert [record.setting for record in records] == ["max drop 20%", "8 bits"]
    ours, plain = records
    assert ours.details["average_bits"] < plain.details["average_bits"] == 8
    assert ours.accuracy["seen drop"] + ours.accuracy["seen drop s.e."] <= 0.2 + 0.01  # errors differ by a sixth
    assert ours.details["quantizer"] == "rtn"
    assert ours.details["samples"] == {"seen": 30, "unseen": 30}
    append_records(tmp_path / "rows.jsonl", records)
    assert read_records(tmp_path / "rows.jsonl") == records


def test_the_verdict_allows_one_standard_error() -> None:
    def record(drop: float, size: int) -> Record:
        accuracy = {"unseen drop": drop, "unseen drop s.e.": 0.004}
        return Record("max-drop-x", "x", "quantkit", "s", WHERE, size_bytes=size, accuracy=accuracy)

    assert "kept (1.30% +- 0.40%" in verdict([record(0.013, 75), record(0.0, 100)], 0.01)
    sentence = verdict([record(0.015, 75), record(0.0, 100)], 0.01)
    assert "not kept (1.50%" in sentence and "25.0% smaller than 8 bits (75 and 100 B)" in sentence
