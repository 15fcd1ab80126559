"""Tables fit 80 columns and stay readable there; pictures are written."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import numpy as np
import onnx
import pytest
from rich.console import Console

from quantkit.cli import main
from quantkit.commands.sensitivity import show
from quantkit.ranking import EstimatorRow, Sensitivity, UnitRow
from tests.helpers import models

PNG = b"\x89PNG\r\n"
LONG = "/model/a_rather_long_name_of_a_module/encoder/layer.11/attention/output"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    models.quick(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    model = models.block()
    for node in model.graph.node:
        node.name = f"{LONG}/{node.op_type}_{node.output[0]}"
    long = "a_rather_long_name_of_a_folder_with_models_in_it_that_nobody_would_want_to_type_twice"
    Path(long).mkdir()
    onnx.save(model, f"{long}/m.onnx")
    np.savez("x.npz", **models.tokens(24))
    return Path(long)


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    """The lines on standard error, none of them longer than 80."""
    assert main([*map(str, arguments)]) == 0
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.splitlines()
    assert max(map(len, lines)) <= 80, [line for line in lines if len(line) > 80]
    return lines


def test_inspect(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "inspect", folder / "m.onnx", "--ignore", f"re:{LONG}/MatMul_[qk]")
    assert any(line.split()[1:] == ["MatMul", "64x64", "4,096", "16.4", "kB"] for line in lines)


def test_verify_and_bench(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = folder / "m.onnx"
    lines = shown(capsys, "verify", model, "--against", model, "--calib", "x.npz")
    assert any(line.split() == ["samples", "24"] for line in lines)
    lines = shown(capsys, "bench", model, model, "--calib", "x.npz", "--seconds", "0.01", "--plot", "b.png")
    assert sum("1.00x" in line for line in lines) >= 1
    assert Path("b.png").read_bytes().startswith(PNG)


def test_sensitivity(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--bits", "1,2,3,4,5,6,7,8", "--estimators", "measured,salience", "--plot", "s.png", "--workers", "1")
    lines = shown(capsys, "sensitivity", folder / "m.onnx", "--calib", "x.npz", *options)
    headings = [line.split() for line in lines if line.split()[:1] == ["layer"]]
    assert len(headings) > 1 and headings[0][:2] == ["layer", "weights"]
    assert [word for heading in headings for word in heading if word.isdigit()] == list("12345678")
    assert headings[-1][-1] == "salience" and any("the same layers" in line for line in lines)
    assert Path("s.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_figure_is_cut(width: int) -> None:
    widths = tuple(range(1, 9))
    losses = {"measured": tuple(1.25e-05 * bits for bits in widths), "interlayer": (3e-11,) * 8}
    rows = tuple(UnitRow((LONG,) * count, "Conv", 25_600_000_000, widths, losses) for count in (1, 12))
    estimators = tuple(EstimatorRow(name, "nats", True, None, None, None, ()) for name in losses)
    console = Console(file=StringIO(), width=width, markup=False, highlight=False)
    show(Sensitivity("m", 5, rows, estimators), 3, console, all_rows=False)
    assert isinstance(console.file, StringIO)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    for figure in ("25,600,000,000", "3e-11", "+11", *(f"{1.25e-05 * bits:.2g}" for bits in widths)):
        assert figure in text


@pytest.mark.parametrize("command", ["bench m.onnx", "sensitivity m.onnx --calib x.npz"])
def test_plots_are_refused_before_the_work(folder: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    onnx.save(models.cnn(), "m.onnx")
    for plot, sentence in (
        ("p.jpg", "--plot must end in .png or .svg, got p.jpg"),
        ("none/p.png", "--plot none/p.png: there is no folder none; create it first"),
    ):
        assert main([*command.split(), "--plot", plot]) == 2
        assert sentence in capsys.readouterr().err
