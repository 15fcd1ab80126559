"""--loss: a function of the user's own goes to the methods that differentiate it, and is found before any work."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from quantkit import cli
from tests.helpers import models

OWN = """def mse(outputs, reference):
    return (outputs['y'] - reference['y']).square().sum(1).mean()
def twice(outputs, reference):
    return 2 * mse(outputs, reference)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    models.quick(monkeypatch)
    onnx.save(models.cnn(), "m.onnx")
    np.savez("d.npz", **models.images(20))
    Path("own_loss.py").write_text(OWN)
    return tmp_path


def table(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, list[float]]:
    """Estimator -> losses of all layers."""
    common = ("sensitivity", "m.onnx", "--calib", "d.npz", "--bits", "3,8", "--quantizer", "rtn", "--json", "-q")
    assert cli.main([*common, *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    names = [item["name"] for item in found["estimators"]]
    return {name: [figure for row in found["rows"] for figure in row["losses"][name]] for name in names}


def test_curvature_is_that_of_the_loss(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twice the loss has twice the curvature; a method that differentiates nothing keeps its figures."""
    once = table(capsys, "--estimators", "quadratic,salience", "--loss", "own_loss:mse")
    twice = table(capsys, "--estimators", "quadratic,salience", "--loss", "own_loss:twice")
    plain = table(capsys, "--estimators", "quadratic,salience")
    assert twice["quadratic"] == pytest.approx([2 * figure for figure in once["quadratic"]], rel=1e-4)
    assert plain["quadratic"] != pytest.approx(once["quadratic"], rel=0.1)
    assert once["salience"] == plain["salience"]


def test_compress_plans_by_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("compress", "m.onnx", "--calib", "d.npz", "--avg-bits", "4", "--allocator", "hawq", "--quantizer", "rtn")
    assert cli.main([*common, "--loss", "own_loss:mse", "--save-plan", "p.json", "-q"]) == 0
    assert json.loads(Path("p.json").read_text())["settings"]["hawq.loss"] == "own_loss:mse"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("compress", "m.onnx", "--loss", "own_loss:mse"),
            "--loss is for methods that differentiate; give --allocator one of fisher, hawq, quadratic",
        ),
        (
            ("sensitivity", "m.onnx", "--loss", "own_loss:mse"),
            "--loss is for methods that differentiate; give --estimators one of fisher, hawq, quadratic",
        ),
        (
            ("compress", "m.onnx", "--allocator", "hawq", "--loss", "own_loss:mse", "--set", "hawq.loss=own_loss:mse"),
            "--loss and --set hawq.loss are the same setting; give one of them",
        ),
        (
            ("tune", "m.onnx", "--calib", "d.npz", "--allocator", "fisher", "--loss", "mse"),
            "fisher.loss must be module:function, got 'mse'",
        ),
        (
            ("sensitivity", "m.onnx", "--estimators", "quadratic", "--loss", "own_loss:absent"),
            "the loss 'own_loss:absent' cannot be imported: module 'own_loss' has no attribute 'absent'",
        ),
        (
            ("compress", "m.onnx", "--allocator", "hawq", "--set", "hawq.loss=nowhere:mse"),
            "the loss 'nowhere:mse' cannot be imported: No module named 'nowhere'",
        ),
    ],
)
def test_one_sentence_before_any_work(
    arguments: tuple[str, ...], sentence: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(here.iterdir())
    assert cli.main(list(arguments)) == 2
    assert sentence in capsys.readouterr().err
    assert sorted(here.iterdir()) == before
