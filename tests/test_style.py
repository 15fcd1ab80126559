"""Sizes: a file has at most 400 lines, a function at most 60."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE_LINES = 400
FUNCTION_LINES = 60


def sources() -> Iterator[Path]:
    for folder in ("quantkit", "kernels", "benchmarks"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def test_files_are_short() -> None:
    counts = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    assert counts
    assert {str(path.relative_to(ROOT)): count for path, count in counts.items() if count > FILE_LINES} == {}


def test_functions_are_short() -> None:
    long = {}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES:
                    long[f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"] = length
    assert long == {}
