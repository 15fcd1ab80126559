"""--verbose says what is done line by line, --debug shows where an error came from, and neither leaves a trace."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import quantkit
from quantkit.cli import main
from quantkit.commands._messages import LOGGER, LoggingProgress, logging_to_stderr
from tests.helpers import models


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    models.quick(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))
    onnx.save(models.cnn(), tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", **models.images(24))
    return tmp_path / "m.onnx"


def test_verbose_tells_steps_and_their_times(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--calib", str(model.with_name("x.npz")), "--workers", "1", "-q"]
    assert main(["compress", str(model), *options, "-v"]) == 0
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert shown.out == "" and all(re.match(r"quantkit: +\d+ ms: ", line) for line in lines)
    assert any(re.search(r"calibrating \(\d+\)$", line) for line in lines)
    assert any(re.search(r"verifying: \d+\.\d\d s$", line) for line in lines)
    assert main(["compress", str(model), *options]) == 0
    assert capsys.readouterr().err == "" and not LOGGER.handlers


def test_debug_shows_versions_and_the_way_to_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "none.onnx", "--debug"]) == 2
    err = capsys.readouterr().err
    assert f"quantkit={quantkit.__version__}" in err and "onnxruntime=" in err
    assert "Traceback" in err and "bench.py" in err and "quantkit: error: there is no file none.onnx" in err
    assert not LOGGER.handlers and LOGGER.level == logging.NOTSET
    assert main(["bench", "none.onnx", "-v"]) == 2
    assert capsys.readouterr().err == "quantkit: error: there is no file none.onnx\n"


def test_handlers_of_others_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="quantkit"), logging_to_stderr(None):
        with LoggingProgress().task("reading", total=3) as advance:
            advance(1)
        with pytest.raises(ValueError, match="stop"), LoggingProgress().task("failing"):
            raise ValueError("stop")
    texts = [record.getMessage() for record in caplog.records]
    assert texts[0] == "reading (3)" and re.fullmatch(r"reading: 0\.\d\d s", texts[1]) and texts[2:] == ["failing"]


def test_help_is_fast() -> None:
    """In processor time, which other work on the machine does not lengthen."""
    command = [sys.executable, "-m", "quantkit", "--help"]
    before = os.times()
    subprocess.run(command, capture_output=True, check=True)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert 0 < spent < 0.3  # seconds
