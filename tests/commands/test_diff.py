"""`quantkit diff`: exit codes like those of diff(1), a table that fits, the same as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from quantkit.cli import main
from quantkit.demo import initial_weights, to_onnx
from quantkit.plan import save_plan
from quantkit.types import ActParams, LayerPlan, Plan, QuantSpec

EIGHT = LayerPlan(QuantSpec(8, -1, symmetric=True, act_bits=8), "qdq", "")
FOUR = LayerPlan(QuantSpec(4, 32), None, "")
PLAN = Plan({"conv2": EIGHT, "fc1": FOUR, "fc2": FOUR}, {"relu": ActParams(0.1, 3)}, {"seed": 0})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    save_plan(PLAN, "a.json")
    changed = Plan({**PLAN.layers, "fc1": EIGHT}, {"relu": ActParams(0.2, 3)}, {"seed": 1, "long": "x" * 200})
    save_plan(changed, "b.json")
    save_plan(Plan({"op:Gemm": FOUR, "re:.*": EIGHT}, PLAN.activations, PLAN.settings), "rules.json")
    return tmp_path


def test_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "a.json", "a.json"]) == 0
    assert capsys.readouterr() == ("", "the plans decide the same\n")


def test_differences_are_told_and_exit_with_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "a.json", "b.json", "--json"]) == 1
    shown = capsys.readouterr()
    assert max(map(len, shown.err.splitlines())) <= 80
    for part in ("rules that differ (1)", "activation ranges that differ (1)", "settings that differ (2)"):
        assert part in shown.err
    rows = [line.split() for line in shown.err.splitlines()]
    assert ["fc1", "bits", "4", "8"] in rows and ["act_bits", "null", "8"] in rows and ["seed", "0", "1"] in rows
    data = json.loads(shown.out)
    assert data["same"] is False and data["per_layer"] is False
    assert [row["name"] for row in data["layers"]] == ["fc1"]
    assert data["layers"][0]["fields"] == ["bits", "group_size", "symmetric", "act_bits", "form"]


def test_a_model_resolves_rules(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ir.save(to_onnx(initial_weights(np.random.default_rng(0))), "m.onnx")
    assert main(["diff", "a.json", "rules.json"]) == 1
    shown = capsys.readouterr().err
    assert "rules that differ (5)" in shown and max(map(len, shown.splitlines())) <= 80
    assert main(["diff", "a.json", "rules.json", "--model", "m.onnx"]) == 0
    capsys.readouterr()
    save_plan(Plan({"op:Gemm": FOUR}, PLAN.activations, PLAN.settings), "fewer.json")
    assert main(["diff", "a.json", "fewer.json", "--model", "m.onnx"]) == 1
    shown = capsys.readouterr().err
    assert "layers that differ (1)" in shown and "float" in shown


def test_reordered_rules(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_plan(Plan({"re:.*": EIGHT, "op:Gemm": FOUR}, PLAN.activations, PLAN.settings), "other.json")
    assert main(["diff", "rules.json", "other.json"]) == 1
    assert "rules stand in another order" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("a.json none.json", "there is no file none.json"),
        ("a.json", "the following arguments are required: PLAN_B"),
        ("a.json m.onnx", "m.onnx is a model, which holds no more than its plan's hash"),
        ("a.json broken.json", "broken.json: version 7 is not supported"),
        ("a.json wrong.json --model m.onnx", "wrong.json: plan rule 'fc9' matches no layer; the nearest are"),
        ("a.json b.json --model none.onnx", "there is no file none.onnx"),
    ],
)
def test_bad_input(folder: Path, capsys: pytest.CaptureFixture[str], arguments: str, sentence: str) -> None:
    ir.save(to_onnx(initial_weights(np.random.default_rng(0))), "m.onnx")
    Path("broken.json").write_text('{"version": 7, "layers": []}')
    save_plan(Plan({"fc9": FOUR}, {}, {}), "wrong.json")
    assert main(["diff", *arguments.split()]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and sentence in shown.err and shown.err.count("\n") == 1
