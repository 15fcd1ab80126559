"""Completion scripts: complete, valid in their shell, and made without anything heavy."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from quantkit.cli import VERBS, main


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_every_verb_is_completed(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    shown = capsys.readouterr()
    assert shown.err == "" and all(name in shown.out for name, _ in VERBS)
    assert "max-latency" in shown.out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["shell"] == "bash" and "_shtab_quantkit" in data["script"]


def complete(folder: Path, *words: str) -> set[str]:
    """What bash offers for the last word."""
    line = " ".join(words)
    code = f"""source {folder}/quantkit.bash
COMP_WORDS=({line}{" ''" if words[-1] == "" else ""}); COMP_CWORD={len(words) - 1}; COMP_LINE={line!r}
_shtab_quantkit
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    return set(done.stdout.split())


def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shutil.which("bash")
    assert main(["completion", "bash"]) == 0
    (tmp_path / "quantkit.bash").write_text(capsys.readouterr().out)
    assert complete(tmp_path, "quantkit", "sens") == {"sensitivity"}
    assert complete(tmp_path, "quantkit", "compress", "--max-s") == {"--max-size"}
    assert complete(tmp_path, "quantkit", "compress", "--target", "p") == {"portable"}
    assert complete(tmp_path, "quantkit", "compress", "--quantizer", "gp") == {"gptq"}
    assert complete(tmp_path, "quantkit", "schema", "pl") == {"plan"}
    (tmp_path / "model.onnx").touch()
    (tmp_path / "folder").mkdir()
    assert complete(tmp_path, "quantkit", "inspect", "mod") == {"model.onnx"}
    assert complete(tmp_path, "quantkit", "compress", "--calib", "mod") == {"model.onnx"}
    assert complete(tmp_path, "quantkit", "compress", "--cache", "f") == {"folder"}


def test_unknown_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "fish"]) == 2
    assert "invalid choice: 'fish'" in capsys.readouterr().err
