"""`--pareto DIR`: the choices between smallest and best as plans that `apply` follows."""

from __future__ import annotations

import json
import math
import typing
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

import quantkit
from quantkit.allocators._table import Allocation, Scores
from quantkit.cli import main
from quantkit.errors import InputError
from quantkit.front import WITHOUT, point_plan, save_front
from quantkit.methods import find, make
from quantkit.plan import load_plan
from quantkit.report.console import loss_text
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
    assert set(points[0]) == {"plan", "estimated_size", "average_bits", "loss", "time"}  # an estimate is called one
    sizes = [row["estimated_size"] for row in points]
    assert sizes == sorted(sizes)
    assert index["nats"] is True and index["quantity"].startswith("nats per sample")
    assert index["estimator"] in ("linearity", "measured", "salience")
    assert [row["loss"] for row in points] == sorted((row["loss"] for row in points), reverse=True)
    sizes.clear()
    for row in (points[0], points[-1]):
        plan = load_plan(files / "front" / row["plan"])
        made = quantkit.apply(files / "m.onnx", plan, calibration=models.tokens(24))
        assert made.report.average_bits == pytest.approx(row["average_bits"], abs=1e-9)
        sizes.append(made.report.size_after)
        assert (
            abs(made.report.size_after - row["estimated_size"]) < 7000
        )  # nodes of every width: much for a model this small
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
    assert {(row.estimator, row.nats) for row in report.front} == {(report.sensitivities[0].estimator, True)}
    assert all(row.nats for row in report.sensitivities)
    chosen = next(row for row in report.contenders if row.chosen)
    assert chosen.predicted == report.predicted
    assert math.isfinite(chosen.loss) and loss_text(report).endswith(f", measured {chosen.loss:.3g}")
    uniform = [row for row in report.contenders if row.name.startswith("uniform")]
    assert uniform and chosen.loss <= min(row.loss for row in uniform)
    plan = point_plan(result, result.allocation.front[0])
    assert all(layer.form is None for layer in plan.layers.values() if layer.spec is not None)


@pytest.mark.parametrize(
    "options",
    [
        "--calib CALIB",
        "--calib CALIB --max-latency 1.2x",
        "--calib CALIB --max-size 100%",
        "--calib CALIB --allocator measured",
        "--allocator salience",
        "--allocator salience --avg-bits 4 --calib CALIB",
    ],
)
def test_where_the_budget_leaves_nothing_to_choose_there_is_a_front_too(files: Path, options: str) -> None:
    words = options.replace("CALIB", str(files / "calib.npz")).split()
    command = ["compress", str(files / "m.onnx"), "-o", str(files / "q.onnx"), "--inputs", "float", "-q", *words]
    assert main([*command, "--pareto", str(files / "front")]) == 0
    index = json.loads((files / "front/front.json").read_text())
    sizes = [row["estimated_size"] for row in index["points"]]
    assert len(sizes) >= 3 and sizes == sorted(sizes) and index["points"][0]["average_bits"] == 2
    raw = "salience" in options
    assert index["nats"] is not raw and (index["quantity"] == "relative squared output error") is raw
    assert len(list((files / "front").glob("plan-*.json"))) == len(sizes)
    timed = "--max-latency" in options
    assert all((row["time"] or 0) > 0 if timed else row["time"] is None for row in index["points"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            "--allocator uniform --calib CALIB",
            "--pareto: the allocator uniform makes no front; choose from auto, fisher, ",
        ),
        ("--allocator slim --calib CALIB", "--pareto: the allocator slim makes no front; choose from auto, fisher, "),
        ("--plan PLAN --calib CALIB", "--pareto writes what a search compares, and --plan leaves nothing to search"),
        ("", "--pareto: the allocator auto compares choices on data only; give --calib or --random-calibration, or"),
    ],
)
def test_what_makes_no_front_is_refused_before_any_work(
    files: Path, capsys: pytest.CaptureFixture[str], options: str, sentence: str
) -> None:
    (files / "broken.onnx").write_text("reading it would be another error")
    (files / "p.json").write_text("no plan at all")
    words = options.replace("CALIB", str(files / "calib.npz")).replace("PLAN", str(files / "p.json")).split()
    command = ["compress", str(files / "broken.onnx"), "-o", str(files / "q.onnx"), *words]
    assert main([*command, "--pareto", str(files / "front")]) == 2
    assert sentence in capsys.readouterr().err
    assert not (files / "q.onnx").exists() and not (files / "front").exists()


def test_those_that_make_no_front_are_known() -> None:
    makers = set()
    for name in find("allocators"):
        method = make("allocators", name, {})
        if typing.get_type_hints(type(method).allocate)["return"] is Allocation:
            makers.add(name)
    assert makers == set(find("allocators")) - set(WITHOUT)


def test_without_a_front(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = quantkit.compress(files / "m.onnx")
    with pytest.raises(InputError, match="there is no front to write: the allocator compared no choices; ask for them"):
        save_front(result, files / "front")
    scores = {"made": Scores({}, "made up")}
    impossible = replace(result, allocation=Allocation(result.allocation.specs, scores=scores))
    with pytest.raises(InputError, match="there is no front to write: no choice of widths is within the budget"):
        save_front(impossible, files / "front")
    command = f"compress {files}/m.onnx -o {files}/q.onnx --calib {files}/calib.npz --avg-bits 1.5 --bits 2,4 -q"
    assert main([*command.split(), "--pareto", str(files / "front")]) == 1  # the model is not lost for it
    assert (files / "q.onnx").exists() and not (files / "front").exists()
    assert "not met: there is no front to write: no choice of widths is within the" in capsys.readouterr().err
    (files / "full").mkdir()
    (files / "full/x").write_text("x")
    for folder, sentence in (
        (files / "full", "must be a new or empty folder; give another name"),
        (files / "m.onnx", "must be a new or empty folder; give another name"),
        (files / "no/front", "create it first"),
    ):
        assert main(["compress", str(files / "m.onnx"), "--pareto", str(folder)]) == 2
        assert sentence in capsys.readouterr().err
