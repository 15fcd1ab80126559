"""The page: one file, whole, safe, the same for the same report, and still small for a thousand layers."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import onnx
import pytest
import vl_convert

from quantkit.cli import main
from quantkit.errors import InputError
from quantkit.report import html
from quantkit.report.html import check_html, report_html
from quantkit.report.types import Report
from tests.helpers import models
from tests.helpers.reports import HOSTILE, bare, example, hostile

SECTIONS = {"summary", "tradeoff", "layers", "depth", "bits", "ranges", "rescaled", "float", "reproduce"}
LIMIT = 3_000_000
VOID = {"meta", "input", "br", "img", "link", "hr"}


class Parsed(HTMLParser):
    """Tags with their attributes, the text outside scripts, and the scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.scripts: list[tuple[str | None, str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs).get("type"), ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            kind, text = self.scripts[-1]
            self.scripts[-1] = (kind, text + data)
        elif self.open and self.open[-1] != "style":
            self.text += data

    def ids(self) -> set[str]:
        return {str(attrs["id"]) for _, attrs in self.tags if "id" in attrs}

    def data(self) -> Any:
        (text,) = (text for kind, text in self.scripts if kind == "application/json")
        return json.loads(text)


@pytest.fixture(scope="module")
def page() -> str:
    return report_html(example())


def test_every_section_and_every_figure_is_there(page: str) -> None:
    found = Parsed(page)
    assert found.open == []
    assert found.ids() >= SECTIONS
    names = ("size", "time", "layers", "depth", "bits", "ranges", "histogram")
    assert found.ids() >= {f"chart-{name}" for name in names}
    assert set(found.data()["charts"]) == set(names)
    links = {str(attrs["href"]) for tag, attrs in found.tags if tag == "a"}
    assert links == {f"#{name}" for name in SECTIONS}


def test_the_page_says_what_counts(page: str) -> None:
    text = " ".join(Parsed(page).text.split())
    for part in (
        "example.onnx shrank from 1 MB to 200 kB.",
        "Its top1 went from 73.11% to 72.95% on 800 evaluation samples.",
        "Budget met at most 4.25 bits per weight on average",
        "5.0\N{MULTIPLICATION SIGN} smaller",
        "2.50\N{MULTIPLICATION SIGN} faster",
        "-0.16 points",
        "10 of 12",
        "2 left in float, reasons below",
        "Contenders in the pool (3)",
        "both operands are activations",
        "quantkit compress example.onnx --avg-bits 4.25 --report report.html",
        "ab" * 32,
        "80.0 dB between the written file",
    ):
        assert part in text, part


def test_predicted_stands_beside_measured(page: str) -> None:
    text = " ".join(Parsed(page).text.split())
    assert "Loss: predicted 0.02 nats per sample from the weights alone, measured 0.02." in text
    assert "predicted, nats" not in text  # no plan of the example carries a prediction
    told = tuple(replace(row, predicted=0.0123 if row.chosen else None) for row in example().contenders)
    found = " ".join(Parsed(report_html(example(contenders=told))).text.split())
    assert "predicted, nats" in found and "200 kB0.01230.0231.5" in found.replace(" ", "").replace("kB", " kB")
    assert "Loss: " not in " ".join(Parsed(report_html(example(predicted=None))).text.split())


def test_figures_in_another_unit_are_named(page: str) -> None:
    text = " ".join(Parsed(page).text.split())
    assert "The dots are what the planner expected" in text and "(nats per sample, by measured)" in text
    front = tuple(replace(row, estimator="hawq", quantity="trace x error", nats=False) for row in example().front)
    rows = tuple(replace(row, estimator="hawq", quantity="<b>", nats=False) for row in example().sensitivities)
    found = Parsed(report_html(example(front=front, sensitivities=rows)))
    text = " ".join(found.text.split())
    assert "is in another unit than nats (trace x error, by hawq), so it is not drawn here." in text
    assert "The dots are" not in text and "more bits (<b>, by hawq)." in text
    plain = " ".join(Parsed(report_html(example(front=()))).text.split())
    assert "The dots are" not in plain and "is not drawn here" not in plain


def test_nothing_comes_from_outside(page: str) -> None:
    found = Parsed(page)
    for tag, attrs in found.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base"), tag
        assert "src" not in attrs and not any(name.startswith("on") for name in attrs), (tag, attrs)
        assert str(attrs.get("href", "#")).startswith("#")
    styles = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in styles and "@import" not in styles
    policies = [attrs["content"] for _, attrs in found.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1 and str(policies[0]).startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in str(policies[0])


def test_the_same_report_gives_the_same_bytes(page: str) -> None:
    assert report_html(example()) == page
    assert report_html(example(11)) != page


def test_a_thousand_layers_stay_small() -> None:
    big = report_html(example(1000))
    assert len(big.encode()) < LIMIT
    assert len(Parsed(big).data()["layers"]) == 1000


def test_hostile_names_stay_text() -> None:
    attacked = report_html(hostile())
    found = Parsed(attacked)
    assert found.open == []
    assert len(found.scripts) == 3 and "img" not in {tag for tag, _ in found.tags}
    assert "<script>alert" not in attacked and "onerror" not in {name for _, attrs in found.tags for name in attrs}
    assert found.text.count(HOSTILE) >= 15 and "49" not in re.findall(r"\{\{|49", found.text.replace(HOSTILE, ""))
    data = found.data()
    assert data["layers"][3]["name"] == f"{HOSTILE}3" and data["activations"][0]["name"] == HOSTILE


def test_names_never_become_expressions() -> None:
    def walk(item: Any, key: str) -> None:
        if isinstance(item, dict):
            for name, value in item.items():
                if name != "values":
                    walk(value, name)
        elif isinstance(item, list):
            for value in item:
                walk(value, key)
        elif isinstance(item, str):
            assert "script" not in item, (key, item)

    walk(Parsed(report_html(hostile())).data()["charts"], "")


@pytest.mark.parametrize(
    ("report", "wanted"),
    [
        (bare(), ("no budget was given", "not measured", "No plans were measured", "(there is no calibration data)")),
        (example(0, layers=()), ("no layer that could be quantized", "There are no weights to count")),
        (example(unmet=("size 9 bytes exceeds",)), ("Budget not met", "size 9 bytes exceeds")),
        (example(3, activations=()), ("no layer runs as a static integer layer.",)),
    ],
)
def test_what_is_missing_is_said(report: Report, wanted: tuple[str, ...]) -> None:
    found = Parsed(report_html(report))
    text = " ".join(found.text.split())
    assert found.open == [] and [part for part in wanted if part not in text] == []
    assert {f"chart-{name}" for name in found.data()["charts"]} <= found.ids()


def test_undefined_figures_are_dashes() -> None:
    odd = example(
        4,
        fidelity=replace(example().fidelity or pytest.fail("no fidelity"), sqnr=math.inf, cosine=math.nan),
        contenders=(replace(example().contenders[0], loss=math.inf, latency=math.nan),),
        depth=tuple(replace(row, sqnr=-200.0) for row in example().depth),
    )
    found = Parsed(report_html(odd))
    assert "size" not in found.data()["charts"] and "depth" not in found.data()["charts"]


@pytest.mark.parametrize("package", ["jinja2", "vl_convert"])
def test_a_missing_extra_is_said_before_the_work(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(html, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(InputError, match=rf"this needs {package}: pip install 'quantkit\[report\]'"):
        check_html()
    path = tmp_path / "m.onnx"
    path.write_bytes(b"no model at all: reading it would be another error")
    assert main(["compress", str(path), "--report", str(tmp_path / "r.html")]) == 2
    assert capsys.readouterr().err == f"quantkit: error: this needs {package}: pip install 'quantkit[report]'\n"
    assert main(["compress", str(path), "--report", str(tmp_path / "r.json")]) == 2
    assert "pip install" not in capsys.readouterr().err


def test_from_a_real_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "net.onnx"
    onnx.save(models.cnn(), model)
    command = [
        "compress",
        str(model),
        "--random-calibration",
        "--activations",
        "8",
        "--report",
        str(tmp_path / "r.html"),
    ]
    command += ["--json", "--holdout", "50"]
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    found = Parsed((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert printed["command"] == " ".join(["quantkit", *command]) and printed["command"] in found.text
    assert [row["name"] for row in printed["layers"]] == [row["name"] for row in found.data()["layers"]]
    assert [row["layer"] for row in printed["depth"]] == ["Conv/c1", "Conv/c2", "MatMul/y"]
    assert 0 < sum(row["time_share"] or 0 for row in printed["layers"]) <= 1
    assert len(printed["activations"]) == len(found.data()["activations"]) > 0


def test_every_figure_compiles() -> None:
    """By the library itself, without a browser: a wrong specification raises or warns."""
    for report in (example(), example(300), bare()):
        found = Parsed(report_html(report)).data()
        datasets = {"layers": found["layers"], "bins": [], "clips": []}
        for name, spec in found["charts"].items():
            drawn = vl_convert.vegalite_to_svg(
                {**spec, "datasets": datasets, **({} if "vconcat" in spec else {"width": 400})}
            )
            assert drawn.startswith("<svg") and len(drawn) > 1000, name
