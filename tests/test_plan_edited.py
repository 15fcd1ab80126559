"""A plan edited by hand, one layer from 4 to 8 bits: that layer changes alone, and the file is verified anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from quantkit.cli import main
from tests.helpers import models

MODELS = {
    "cnn": (models.cnn, models.images, "Conv/c2", ["Conv/c1", "MatMul/y"]),
    "block": (models.block, models.tokens, "MatMul/h", ["Gather/e", "MatMul/q", "MatMul/k", "MatMul/v", "MatMul/o"]),
}
ANONYMOUS = ("shape", "zero")
"""Constants that layers share: they are numbered as they come, and hold no weights."""


def compressed(folder: Path, capsys: pytest.CaptureFixture[str], kind: str, *options: str) -> Any:
    make, samples, _, _ = MODELS[kind]
    onnx.save(make(), folder / "m.onnx")
    np.savez(folder / "x.npz", **samples(24))
    plan = ("-o", "a.onnx", "--save-plan", "a.json", "--allocator", "uniform", "--bits", "4")
    return run(capsys, "compress", "m.onnx", *plan, *options)


def applied(folder: Path, capsys: pytest.CaptureFixture[str], layer: str) -> Any:
    """The report of the plan with this layer at 8 bits."""
    plan = json.loads((folder / "a.json").read_text())
    (rule,) = [rule for rule in plan["layers"] if rule["match"] == layer]
    assert rule["bits"] == 4
    rule["bits"] = 8
    (folder / "b.json").write_text(json.dumps(plan))
    return run(capsys, "apply", "m.onnx", "b.json", "-o", "b.onnx", "--save-plan", "c.json")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--calib", "x.npz", "--workers", "1", "--json", "-q"]) == 0
    return json.loads(capsys.readouterr().out)


def tensors(path: Path) -> dict[str, tuple[int, bytes]]:
    """Initializer -> element type, bytes."""
    graph = onnx.load(path).graph
    found = {item.name: (item.data_type, onnx.numpy_helper.to_array(item).tobytes()) for item in graph.initializer}
    return {name: value for name, value in found.items() if name.partition(".")[0] not in ANONYMOUS}


def changed(folder: Path) -> set[str]:
    """Layers whose tensors are not the same in both files."""
    first, second = tensors(folder / "a.onnx"), tensors(folder / "b.onnx")
    names = {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}
    return {name.partition(".")[0] for name in names}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    models.quick(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("options", [("--inputs", "float"), ("--inputs", "float", "--activations", "none")])
@pytest.mark.parametrize("kind", MODELS)
def test_only_the_edited_layer_changes(
    folder: Path, capsys: pytest.CaptureFixture[str], kind: str, options: tuple[str, ...]
) -> None:
    _, _, layer, others = MODELS[kind]
    before = compressed(folder, capsys, kind, *options)
    after = applied(folder, capsys, layer)
    assert changed(folder) == {layer}
    rows = [{row["name"]: row for row in report["layers"]} for report in (before, after)]
    assert rows[0].keys() == {layer, *others}
    assert (rows[0][layer]["bits"], rows[1][layer]["bits"]) == (4, 8)
    assert rows[1][layer]["sqnr"] > rows[0][layer]["sqnr"] + 12  # four bits more: 24 dB, less for 8-bit activations
    for name in others:
        assert rows[0][name]["bits"] == rows[1][name]["bits"] and rows[0][name]["form"] == rows[1][name]["form"]
    assert after["size_after"] > before["size_after"]
    assert main(["diff", "a.json", "c.json", "--model", "m.onnx", "--json", "-q"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["fields"]) for row in found["layers"]] == [(layer, ["bits"])]
    assert not found["activations"] and not found["settings"]


def test_the_edited_plan_is_verified_and_stamped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = compressed(folder, capsys, "cnn", "--inputs", "float")
    after = applied(folder, capsys, "Conv/c2")
    assert after["fidelity"]["parity"] > 40 and after["fidelity"]["sqnr"] > before["fidelity"]["sqnr"]
    stamps = [report["provenance"]["quantkit.plan"] for report in (before, after)]
    assert stamps[0] != stamps[1]
    metadata = {item.key: item.value for item in onnx.load(folder / "b.onnx").metadata_props}
    assert metadata["quantkit.plan"] == stamps[1]
    assert main(["verify", "b.onnx", "--against", "m.onnx", "--calib", "x.npz", "-q"]) == 0


def test_layers_behind_it_follow_where_they_are_fitted_to_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With `inputs` quantized a layer is fitted to what those before it produce: it is made again, as decided."""
    compressed(folder, capsys, "cnn", "--inputs", "quantized", "--activations", "none")
    applied(folder, capsys, "Conv/c2")
    assert changed(folder) == {"Conv/c2", "MatMul/y"}
    assert main(["diff", "a.json", "c.json", "--json", "-q"]) == 1
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["layers"]] == ["Conv/c2"]


def test_an_impossible_edit_leaves_no_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compressed(folder, capsys, "cnn")
    plan = json.loads((folder / "a.json").read_text())
    plan["layers"][1].update(form="gather")
    (folder / "b.json").write_text(json.dumps(plan))
    assert main(["apply", "m.onnx", "b.json", "-o", "b.onnx", "--calib", "x.npz"]) == 2
    assert "the plan asks for the form gather at Conv/c2, which is impossible" in capsys.readouterr().err
    assert not (folder / "b.onnx").exists()
