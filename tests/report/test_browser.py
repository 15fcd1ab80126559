"""The page as a browser shows it: `pytest -m browser`, with Debian's package `chromium`. Any complaint is a failure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from quantkit.report.html import report_html
from quantkit.report.types import Report
from tests.helpers.browser import Page, browser
from tests.helpers.reports import HOSTILE, bare, example, hostile

pytestmark = pytest.mark.browser

PHONE, DESKTOP = 390, 1280
SECONDS = 2.0
FIRST_CELLS = "[...document.querySelectorAll('#table tbody tr')].map((row) => row.cells[1].firstChild.textContent)"
TIP = "document.getElementById('vg-tooltip-element')?.innerText ?? ''"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(tab: Page) -> Iterator[Page]:
    tab.problems.clear()
    tab.requests.clear()
    yield tab
    tab.run("0")  # what has been said meanwhile
    assert tab.problems == [] and tab.requests == []


def show(page: Page, report: Report, folder: Path, *, width: int = DESKTOP, dark: bool = False) -> float:
    path = folder / "report.html"
    path.write_text(report_html(report), encoding="utf-8")
    return page.open(path, width=width, height=900, dark=dark, phone=width == PHONE)


def centre(page: Page, marks: str, index: int) -> tuple[float, float]:
    """Of one mark of a figure, brought into view."""
    code = f"(() => {{ const mark = [...document.querySelectorAll({marks!r})][{index}]; "
    code += "mark.scrollIntoView({block: 'center', behavior: 'instant'}); const box = mark.getBoundingClientRect(); "
    x, y = page.run(code + "return [box.x + box.width / 2, box.y + box.height / 2]; })()")
    return float(x), float(y)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [PHONE, 768, DESKTOP])
@pytest.mark.parametrize(
    "report", [example(), bare(), example(0, layers=()), example(1)], ids=["full", "bare", "none", "one"]
)
def test_all_figures_are_drawn_and_nothing_is_wider_than_the_screen(
    page: Page, tmp_path: Path, report: Report, width: int, dark: bool
) -> None:
    show(page, report, tmp_path, width=width, dark=dark)
    assert page.run("document.documentElement.scrollWidth") == width
    boxes = page.run(
        "[...document.querySelectorAll('.chart')].map((box) => [box.id, box.clientWidth, "
        "box.querySelector('svg')?.getBoundingClientRect().width ?? 0, box.querySelectorAll('svg path').length])"
    )
    assert boxes or report.layers == ()
    for name, room, drawn, marks in boxes:
        assert 0 < drawn <= room + 1 and marks > 2, (name, room, drawn, marks)
    back = page.run("getComputedStyle(document.body).backgroundColor")
    assert back == ("rgb(15, 20, 26)" if dark else "rgb(246, 247, 249)")


def test_pointing_at_a_layer_tells_its_figures(page: Page, tmp_path: Path) -> None:
    show(page, example(), tmp_path)
    page.move(
        *centre(
            page,
            "#chart-layers .mark-rect.role-mark.layer_0_marks path, #chart-layers path[aria-roledescription='bar']",
            3,
        )
    )
    page.wait(f"({TIP}).includes('projection_3/MatMul')")
    tip = page.run(TIP)
    for part in ("operator", "sensitivity", "nats", "share of the time"):
        assert part in tip, tip


def test_order_and_filter(page: Page, tmp_path: Path) -> None:
    show(page, example(), tmp_path)
    names = [row.name for row in example().layers]
    assert page.run(FIRST_CELLS) == names
    page.run(
        "(() => { const order = document.getElementById('order'); order.value = 'error'; "
        "order.dispatchEvent(new Event('change')); })()"
    )
    ordered = sorted(example().layers, key=lambda row: (row.sqnr is None, row.sqnr or 0.0, names.index(row.name)))
    assert page.run(FIRST_CELLS) == [row.name for row in ordered]
    page.run("document.querySelector('th[data-by=name]').click()")
    assert page.run(FIRST_CELLS) == sorted(names)
    page.run("document.querySelector('th[data-by=name]').click()")
    assert page.run(FIRST_CELLS) == sorted(names, reverse=True)
    for typed, wanted in (
        ("projection_1", 3),
        ("8 bits", 2),
        ("float", 2),
        ("8-bit projection_3", 1),
        ("none such", 0),
    ):
        page.run(
            f"(() => {{ const box = document.getElementById('filter'); box.value = {typed!r}; "
            "box.dispatchEvent(new Event('input')); })()"
        )
        page.wait(f"document.querySelectorAll('#table tbody tr').length === {wanted}")
        assert page.run("document.getElementById('count').textContent") == f"{wanted} of 12 layers"


def test_pressing_a_column_finds_the_layer(page: Page, tmp_path: Path) -> None:
    show(page, example(60), tmp_path)
    page.press(*centre(page, "#chart-layers path[aria-roledescription='bar']", 50))
    page.wait("document.querySelector('tr.found')?.id === 'layer-50'")
    assert page.run("document.getElementById('table-box').scrollTop") > 500


def test_pressing_a_range_shows_its_values(page: Page, tmp_path: Path) -> None:
    show(page, example(), tmp_path)
    assert "projection_0/" in page.run("document.getElementById('facts').textContent")
    page.press(*centre(page, "#chart-ranges path[aria-roledescription='bar']", 4))
    page.wait("document.getElementById('facts').textContent.includes('projection_4/MatMul:in')")
    assert page.run("document.getElementById('value').value") == "4"


def test_the_button_changes_the_theme_and_the_figures(page: Page, tmp_path: Path) -> None:
    show(page, example(), tmp_path)
    colour = "document.querySelector('#chart-bits path[aria-roledescription=bar]').getAttribute('fill')"
    light = page.run(colour)
    page.run("document.getElementById('theme').click()")
    page.wait(f"document.documentElement.dataset.theme === 'dark' && ({colour}) !== {light!r}")
    page.run("localStorage.clear()")


def test_hostile_names_run_nothing(page: Page, tmp_path: Path) -> None:
    show(page, hostile(), tmp_path)
    assert page.run(FIRST_CELLS) == [f"{HOSTILE}{index}" for index in range(6)]
    page.move(*centre(page, "#chart-layers path[aria-roledescription='bar']", 2))
    page.wait(f"({TIP}).includes('alert(1)')")
    assert page.run("document.querySelectorAll('img, iframe, script').length") == 3
    assert page.run("document.title").startswith(HOSTILE.rpartition("/")[2])


def test_the_policy_lets_no_other_script_run(page: Page, tmp_path: Path) -> None:
    show(page, example(), tmp_path)
    page.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.ran = 1\">')")
    page.run("new Promise((done) => setTimeout(done, 100))")
    assert page.run("window.ran") is None
    assert any("Content Security Policy" in text for text in page.problems)
    page.problems.clear()


def test_a_thousand_layers_are_there_in_two_seconds(page: Page, tmp_path: Path) -> None:
    """The best of three: other work on the machine is not the page's."""
    assert min(show(page, example(1000), tmp_path) for _ in range(3)) < SECONDS
    assert page.run("document.querySelectorAll('#table tbody tr').length") == 1000
