"""Every plan and every --json output validates against the schema that quantkit publishes for it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest

from quantkit.cli import main
from quantkit.commands._common import to_json
from quantkit.demo import DemoRow
from quantkit.schemas import load_schema, schema_names
from tests.helpers import models


@cache
def validator(name: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(load_schema(name))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    models.quick(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    onnx.save(models.cnn(), "m.onnx")
    np.savez("x.npz", **models.images(24))
    return tmp_path


def output(capsys: pytest.CaptureFixture[str], schema: str, command: str, code: int = 0) -> Any:
    """What a command prints, validated."""
    assert main([*command.split(), "--json", "-q"]) == code
    data = json.loads(capsys.readouterr().out)
    validator(schema).validate(data)
    return data


def valid_file(schema: str, path: str | Path) -> Any:
    data = json.loads(Path(path).read_text())
    validator(schema).validate(data)
    return data


def test_compress_and_apply(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = "--calib x.npz --workers 1 --seed 3"
    command = f"compress m.onnx -o q.onnx {common} --avg-bits 4 --eval x.npz --metric agreement --save-plan p.json"
    data = output(capsys, "report", f"{command} --pareto front --report r.json")
    assert data["fidelity"]["samples"] > 0 and data["sensitivities"] and data["output"] == "q.onnx"
    assert "output" not in valid_file("report", "r.json")
    assert valid_file("plan", "p.json")["settings"]["seed"] == 3
    points = valid_file("front", "front/front.json")["points"]
    assert points
    for point in points:
        valid_file("plan", folder / "front" / point["plan"])
    again = output(capsys, "report", "apply m.onnx p.json -o q.onnx --calib x.npz --workers 1 --save-plan again.json")
    assert again["size_after"] == data["size_after"]
    valid_file("plan", "again.json")
    output(capsys, "inspect", "inspect q.onnx")
    output(capsys, "diff", "diff p.json again.json")


@pytest.mark.parametrize("transform", ["none", "cle"])
def test_compress_without_data_and_missed(folder: Path, capsys: pytest.CaptureFixture[str], transform: str) -> None:
    command = f"compress m.onnx -o q.onnx --max-size 100B --save-plan p.json --transform {transform} --bits 3,8"
    data = output(capsys, "report", command, code=1)
    assert data["budget_met"] is False and data["fidelity"] is None
    valid_file("plan", "p.json")


@pytest.mark.parametrize("quantizer", ["slim", "awq", "gptq"])
def test_plans_of_quantizers(folder: Path, capsys: pytest.CaptureFixture[str], quantizer: str) -> None:
    command = f"compress m.onnx -o q.onnx --calib x.npz --workers 1 --quantizer {quantizer} --bits 4"
    output(capsys, "report", f"{command} --allocator uniform --save-plan p.json --set gptq.damp=0.05 --group-size 16")
    valid_file("plan", "p.json")


def test_sensitivity(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = output(
        capsys,
        "sensitivity",
        "sensitivity m.onnx --calib x.npz --tries 5 --bits 2,3,4,5,6,7,8 --estimators measured,salience",
    )
    assert data["estimators"][0]["rank"] is not None and data["estimators"][1]["ratio"] is None
    output(capsys, "sensitivity", "sensitivity m.onnx --calib x.npz --bits 4")


def test_verify_and_bench(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys, "verify", "verify m.onnx --against m.onnx --calib x.npz")["timings"]
    data = output(capsys, "bench", "bench m.onnx m.onnx --shape x=2x3x8x8 --seconds 0.01")
    assert data["rows"][0]["shapes"] == {"x": [2, 3, 8, 8]}


def test_inspect_and_methods(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(models.block(), "b.onnx")
    assert output(capsys, "inspect", "inspect b.onnx")["inputs"][0]["shape"] == ["B", "S"]
    output(capsys, "inspect", "inspect m.onnx --ignore re:.*")
    output(capsys, "methods", "methods")
    output(capsys, "methods", "methods slim")


def test_tune(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = output(capsys, "tune", "tune m.onnx -o q.onnx --calib x.npz --avg-bits 5 --trials 3 --tuner random")
    assert len(data["trials"]) >= 3 and sum(trial["kept"] for trial in data["trials"]) == 1


def test_demo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [DemoRow("float32", 100, 0.9, 1.0, ()), DemoRow("4 bits", 20, 0.8, 0.5, ("size",))]
    monkeypatch.setattr("quantkit.demo.run_demo", lambda folder, progress: rows)
    assert [row["size"] for row in output(capsys, "demo", "demo")] == [100, 20]


@pytest.mark.parametrize("name", schema_names())
def test_schema_prints_one(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", name]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == load_schema(name) and shown.err == ""


def test_schema_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "--json"]) == 0
    shown = capsys.readouterr()
    assert [row["name"] for row in json.loads(shown.out)] == list(schema_names())
    assert "`quantkit bench` prints with --json" in shown.err
    assert main(["schema", "plans"]) == 2
    assert "there is no schema 'plans'; known schemas: bench, " in capsys.readouterr().err


def test_undefined_figures_are_null() -> None:
    figures = {"sqnr": float("inf"), "cosine": float("nan"), "top1_agreement": None}
    found: dict[str, Any] = {
        "fidelity": figures,
        "samples": 1,
        "size": 1,
        "reference_size": 1,
        "timings": (),
        "accuracy": None,
    }
    found["drop_error"] = 0.0
    validator("verify").validate(json.loads(to_json(found)))
