"""The documentation: it builds strictly, covers everything, and all that it tells the reader to run does run."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

import quantkit
from quantkit import methods
from quantkit.cli import VERBS, main
from quantkit.plan import plan_from_json
from quantkit.schemas import schema_names
from quantkit.types import QuantSpec
from tests.helpers import models

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
FENCE = re.compile(r"^ *```(?P<kind>\w+)\n(?P<body>.*?)^ *```$", re.DOTALL | re.MULTILINE)
CODES = {"diff": 1}
"""Exit codes of commands on the pages that are not 0."""


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pages", DOCS / "pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the pages' commands name: model.onnx, samples.npz, test.npz."""
    models.quick(monkeypatch)
    monkeypatch.setattr("quantkit.measuring.time_sessions", lambda sessions, feed, **_: [1.0] * len(sessions))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    onnx.save(models.cnn(), "model.onnx")
    np.savez("samples.npz", **models.images(30))
    np.savez("test.npz", **models.images(40), labels=np.arange(40) % 10)
    return tmp_path


def fences(page: Path, kind: str) -> Iterator[str]:
    for found in FENCE.finditer(page.read_text(encoding="utf-8")):
        if found["kind"] == kind:
            yield found["body"]


def test_builds_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = {str(path.relative_to(tmp_path / "site")) for path in (tmp_path / "site").rglob("*")}
    assert {"index.html", "methods.html", "cli.html", "schemas/plan.schema.json", "examples/cnn_images.py"} <= built
    for path in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', path.read_text())
        assert not loaded, f"{path.name} loads {loaded[0]}"


def test_every_method_has_its_advice(pages: ModuleType) -> None:
    advice = tomllib.loads((DOCS / "advice.toml").read_text())
    assert {kind: sorted(texts) for kind, texts in advice.items()} == {
        kind: sorted(methods.find(kind)) for kind in methods.KINDS
    }
    text = pages.methods_page()
    for kind in methods.KINDS:
        for name in methods.find(kind):
            assert f"### {kind[:-1]} {name}\n" in text
            for number in re.findall(r"arXiv (\d{4}\.\d{5})", methods.describe(kind, name)):
                assert number in text
    assert "`mse.steps`" in text and "https://arxiv.org/abs/2210.17323" in text


def test_made_pages_cover_the_product(pages: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    assert all(f"## quantkit {name}\n" in pages.cli_page() for name, _ in VERBS)
    text = pages.python_page()
    assert all(f"## {name}\n" in text for name in quantkit.__all__) and "InferenceSession.run(" in text
    assert all(f"## {name}\n" in pages.schemas_page() for name in schema_names())
    assert "## resnet20\n" in pages.benchmarks_page()


def test_plain_text_becomes_markdown(pages: ModuleType) -> None:
    text = "a * b_c <d> [e] `x * y`, arXiv 2004.14340, 2011.10680; 1.23456\n\n    s[c] = 2 * t"
    assert pages.prose(text) == (
        "a \\* b\\_c &lt;d&gt; \\[e\\] `x * y`, arXiv [2004.14340](https://arxiv.org/abs/2004.14340), "
        "[2011.10680](https://arxiv.org/abs/2011.10680); 1.23456\n\n    s[c] = 2 * t"
    )
    assert pages._signature("f", plain, "def") == "def f(a: str | None, *, b: dict[str, int] = {}) -> int"


def plain(a: str | None, *, b: dict[str, int] = {}) -> int:  # noqa: B006
    return len(b)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_run(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every `quantkit` line of a page, one after the other, with any placeholder file in place."""
    lines = [line.strip() for body in fences(page, "sh") for line in body.splitlines()]
    for line in lines:
        if not line.startswith("quantkit "):
            continue
        arguments = line.split()[1:]
        if "edited.json" in arguments:
            edit(Path("plan.json"), Path("edited.json"))
        assert main(arguments) == CODES.get(arguments[0], 0), line
        if arguments[0] == "apply":
            assert Path("again.onnx").read_bytes() == Path("model.q.onnx").read_bytes()
    assert "quantkit: error" not in capsys.readouterr().err
    if page.stem in ("quickstart", "plans", "troubleshooting", "formats"):
        assert sum(line.startswith("quantkit ") for line in lines) >= 2


def edit(source: Path, target: Path) -> None:
    data = json.loads(source.read_text())
    data["layers"][0]["bits"] = 7
    target.write_text(json.dumps(data))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_runs(page: Path, folder: Path) -> None:
    for body in fences(page, "python"):
        values: dict[str, Any] = {"__name__": "page"}
        exec(compile(body, page.name, "exec"), values)
        if "Foo" in values:
            weight = values["METHOD"]().quantize(np.ones((4, 70), np.float32), QuantSpec(3, 32), None)
            assert weight.dequantize().shape == (4, 70) and weight.scales.shape == (4, 3)
        if "Three" in values:
            problem = type("Problem", (), {"candidates": {"a": (QuantSpec(8), QuantSpec(3), QuantSpec(2))}})
            assert values["METHOD"]().allocate(problem)["a"].bits == 3
    for body in fences(page, "json"):
        assert plan_from_json(body).layers


def test_the_page_of_plans_names_all_keys() -> None:
    from quantkit.plan import RULE_KEYS

    text = (DOCS / "plans.md").read_text()
    assert all(f"`{key}`" in text for key in RULE_KEYS)
