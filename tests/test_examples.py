"""Every script in examples/ runs with --tiny and says what it found."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from tests.helpers import models

FOLDER = Path(__file__).parents[1] / "examples"
EXPECTED = {
    "cnn_images": ["top-1", "4 bits", "the models are in"],
    "custom_metric": ["x smaller", "second: ", "no more than 0.02 is lost"],
    "gpu_session": ["onnxruntime runs the file on the CPU", "from the CPU's result"],
    "language_model": ["perplexity", "4 bits", "the models are in"],
    "sentence_encoder": ["same neighbour", "4 bits", "the models are in"],
}


def test_every_script_is_listed() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(EXPECTED)
    page = (FOLDER.parent / "docs" / "examples.md").read_text()
    assert all(f"[{name}.py](examples/{name}.py)" in page for name in EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    models.quick(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [name, "--tiny"])
    monkeypatch.syspath_prepend(FOLDER)
    if name == "gpu_session":
        monkeypatch.setattr("quantkit.runtime.session._missing", lambda: "no GPU in tests")
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    shown = capsys.readouterr().out
    for part in EXPECTED[name]:
        assert part in shown
