"""`quantkit sensitivity` and `quantkit.sensitivity()`: which layer hurts, on the command line and in Python."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from quantkit.cli import main
from quantkit.errors import InputError
from quantkit.ranking import estimator_names, loss_at, sensitivity
from tests.helpers import models


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    models.quick(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))
    onnx.save(models.block(), tmp_path / "m.onnx")
    np.savez(tmp_path / "calib.npz", **models.tokens(24))
    return tmp_path


def test_rows_are_units_and_wider_loses_less() -> None:
    found = sensitivity(
        models.block(), calibration=models.tokens(24), estimators=("measured", "salience"), tries=6, bits=(2, 4, 8)
    )
    assert [row.layers for row in found.rows][1] == tuple(name for name in found.rows[1].layers)
    assert max(len(row.layers) for row in found.rows) == 3  # query, key and value are decided together
    for row in found.rows:
        assert row.bits == (2, 4, 8)
        for losses in row.losses.values():
            assert losses[0] > losses[1] > losses[2] >= 0
    measured, salience = found.estimators
    assert measured.nats and not salience.nats and salience.ratio is None
    assert measured.rank is not None and -1 <= measured.rank <= 1
    assert measured.error is not None and measured.error >= 0 and measured.ratio is not None and measured.ratio > 0
    ranked = found.ranking("measured", 4)
    assert [loss_at(row, "measured", 4) for row in ranked] == sorted(
        (loss_at(row, "measured", 4) for row in found.rows), reverse=True
    )
    assert loss_at(found.rows[0], "measured", 3) == found.rows[0].losses["measured"][1]
    assert loss_at(found.rows[0], "measured", 9) == found.rows[0].losses["measured"][-1]
    assert json.loads(json.dumps(found.to_dict()))["samples"] == found.samples > 0


def test_the_worst_layer_is_the_one_that_was_spoiled() -> None:
    """A weight whose rows each hold one large number that multiplies zeros: only its rounding becomes coarse."""
    data = models.images(24)
    data["x"][:, 0] = 0
    model = models.cnn()
    spoiled = models.cnn()
    for tensor in spoiled.graph.initializer:
        if tensor.name == "w1":
            weight = onnx.numpy_helper.to_array(tensor).copy()
            weight[:, 0, 0, 0] = 20 * np.abs(weight).max()
            tensor.CopyFrom(onnx.numpy_helper.from_array(weight, "w1"))
    first, second = (
        sensitivity(item, calibration=data, bits=(4,), quantizer="rtn", group_size=-1) for item in (model, spoiled)
    )
    before, after = (found.rows[0].losses["measured"][0] for found in (first, second))
    assert after > 20 * before
    assert second.ranking("measured", 4)[0] is second.rows[0]
    for row, other in zip(first.rows[1:], second.rows[1:], strict=True):
        assert row.losses["measured"][0] == pytest.approx(other.losses["measured"][0], rel=1e-3)


def test_the_command(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = files / "out.png"
    command = (
        f"sensitivity {files}/m.onnx --calib {files}/calib.npz --estimators measured,salience --tries 4 --bits 2,3,8 "
        f"--plot {plot} --json --cache {files}/cache"
    )
    assert main(command.split()) == 0
    shown = capsys.readouterr()
    data = json.loads(shown.out)
    assert [row["name"] for row in data["estimators"]] == ["measured", "salience"]
    assert all(set(row["losses"]) == {"measured", "salience"} for row in data["rows"])
    assert "what layers lose, by measured at 3 bits" in shown.err and "+2" in shown.err
    assert all(len(line) <= 80 for line in shown.err.splitlines() if "rank correlation" not in line)
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "sensitivity needs calibration data: give --calib"),
        ("--calib CALIB --estimators uniform", "uniform fills no table of sensitivities; choose from "),
        ("--calib CALIB --estimators none", "there is no allocator 'none'; known allocators: "),
        ("--calib CALIB --estimators ,", "sensitivity needs at least one estimator, such as "),
        ("--calib CALIB --tries 2", "tries must be 0 or at least 3, got 2"),
        ("--calib CALIB --at 5", "--at must be one of the widths 2, 3, 4, 8, got 5"),
        ("--calib CALIB --plot out.jpg", "--plot must end in .png or .svg, got out.jpg"),
    ],
)
def test_wrong_input(files: Path, capsys: pytest.CaptureFixture[str], arguments: str, sentence: str) -> None:
    words = [f"{files}/calib.npz" if word == "CALIB" else word for word in arguments.split()]
    assert main(["sensitivity", f"{files}/m.onnx", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_too_few_assignments_are_no_verdict(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With one width there is one assignment."""
    command = f"sensitivity {files}/m.onnx --calib {files}/calib.npz --tries 5 --bits 4 --estimators measured,salience"
    assert main([*command.split(), "--json"]) == 0
    shown = capsys.readouterr()
    for row in json.loads(shown.out)["estimators"]:
        assert row["rank"] is row["error"] is row["ratio"] is None
        assert row["notes"][-1].startswith(
            "too few different assignments to judge the estimators by: give other --bits"
        )
    text = " ".join(shown.err.split())
    assert " inf" not in text and " nan" not in text and "random assignments with rank" not in text
    assert "note: too few different assignments to judge the estimators by" in text


def test_every_estimator_is_listed() -> None:
    names = estimator_names()
    assert {"measured", "salience"} <= set(names) and "uniform" not in names and "auto" not in names
    with pytest.raises(InputError, match="auto fills no table of sensitivities"):
        sensitivity(models.matmul(), calibration={"x": np.ones((4, 64), np.float32)}, estimators=("auto",))
