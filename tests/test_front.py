"""`--pareto DIR`: the choices between smallest and best as plans that `apply` follows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

import quantkit
from quantkit.cli import main
from quantkit.errors import InputError
from quantkit.front import point_plan, save_front
from quantkit.plan import load_plan
from tests.helpers import models


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    models.quick(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))
    onnx.save(models.block(), tmp_path / "m.onnx")
    np.savez(tmp_path / "calib.npz", **models.tokens(24))
    return tmp_path


def test_the_front_is_written_and_applies(files: Path) -> None:
    command = f"compress {files}/m.onnx -o {files}/q.onnx --calib {files}/calib.npz --avg-bits 4 --inputs float "
    assert main([*command.split(), "--pareto", str(files / "front"), "--quiet"]) == 0
    index = json.loads((files / "front/front.json").read_text())
    points = index["points"]
    assert len(points) >= 3
    assert [row["size"] for row in points] == sorted(row["size"] for row in points)
    assert [row["loss"] for row in points] == sorted((row["loss"] for row in points), reverse=True)
    sizes = []
    for row in (points[0], points[-1]):
        plan = load_plan(files / "front" / row["plan"])
        made = quantkit.apply(files / "m.onnx", plan, calibration=models.tokens(24))
        assert made.report.average_bits == pytest.approx(row["average_bits"], abs=1e-9)
        sizes.append(made.report.size_after)
        assert abs(made.report.size_after - row["size"]) < 7000  # nodes of every width: much for a model this small
    assert sizes[0] < sizes[1]


def test_the_plan_and_the_report_explain_widths(files: Path) -> None:
    result = quantkit.compress(
        files / "m.onnx", calibration=models.tokens(24), budget=quantkit.Budget(avg_bits=4), inputs="float"
    )
    report = result.report
    assert {name for row in report.sensitivities for name in row.layers} == set(result.plan.layers)
    assert report.front and report.predicted is not None and report.predicted > 0
    assert any(f"by {report.sensitivities[0].estimator}" in layer.reason for layer in result.plan.layers.values())
    assert report.average_bits <= 4 + 1e-9 and not report.unmet
    chosen = next(row for row in report.contenders if row.chosen)
    uniform = [row for row in report.contenders if row.name.startswith("uniform")]
    assert uniform and chosen.loss <= min(row.loss for row in uniform)
    plan = point_plan(result, result.allocation.front[0])
    assert all(layer.form is None for layer in plan.layers.values() if layer.spec is not None)


def test_without_a_front(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = quantkit.compress(files / "m.onnx")
    with pytest.raises(InputError, match="there is no front to write: the allocator compared no widths"):
        save_front(result, files / "front")
    command = ["compress", str(files / "m.onnx"), "-o", str(files / "q.onnx"), "--pareto", str(files / "front"), "-q"]
    assert main(command) == 1  # the model is not lost for it
    assert (files / "q.onnx").stat().st_size == result.report.size_after and not (files / "front").exists()
    assert "not met: there is no front to write" in capsys.readouterr().err
    (files / "full").mkdir()
    (files / "full/x").write_text("x")
    for folder, sentence in (
        (files / "full", "must be a new or empty folder; give another name"),
        (files / "m.onnx", "must be a new or empty folder; give another name"),
        (files / "no/front", "create it first"),
    ):
        assert main(["compress", str(files / "m.onnx"), "--pareto", str(folder)]) == 2
        assert sentence in capsys.readouterr().err
