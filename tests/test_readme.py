"""The README shows the help that the command prints: `python tests/test_readme.py` writes it again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"<!-- help: quantkit (?P<args>.*?) -->\n(?P<body>.*?)<!-- end -->", re.DOTALL)


def help_text(args: str) -> str:
    command = [sys.executable, "-m", "quantkit", *args.split()]
    shown = subprocess.run(command, env={**os.environ, "COLUMNS": "100"}, capture_output=True, text=True, check=True)
    return f"```text\n{shown.stdout.rstrip()}\n```\n"


def test_readme_shows_the_current_help() -> None:
    blocks = list(BLOCK.finditer(README.read_text(encoding="utf-8")))
    assert [block["args"] for block in blocks] == ["--help", "compress --help"]
    for block in blocks:
        assert block["body"] == help_text(block["args"])


def rewrite() -> None:
    text = README.read_text(encoding="utf-8")
    fresh = BLOCK.sub(
        lambda found: f"<!-- help: quantkit {found['args']} -->\n{help_text(found['args'])}<!-- end -->", text
    )
    README.write_text(fresh, encoding="utf-8")


if __name__ == "__main__":
    rewrite()
