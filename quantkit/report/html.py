"""The report as one self-contained HTML page that opens offline: figures by Vega-Lite, text by Jinja.

Whatever a model or a user gave (names, paths, reasons) reaches the page as escaped text or as data, and the page's
policy lets only its own two scripts run and nothing be fetched. The same report gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Any

from quantkit.errors import InputError
from quantkit.methods import missing_extra
from quantkit.report.chartdata import activation_data, expects, layer_data, sensitivity_of
from quantkit.report.charts import charts
from quantkit.report.console import FORMS, loss_text, short_bytes
from quantkit.report.summary import cards, checks, sentence
from quantkit.report.types import Report

NEEDED = ("jinja2", "vl_convert")
SNIPPET = "window.vegaEmbed = vegaEmbed;"
FOLDER = Path(__file__).parent / "page"


def check_html() -> None:
    """Raises: InputError where a package that `report_html` needs is not installed; to be asked before the work."""
    for package in NEEDED:
        if find_spec(package) is None:
            raise missing_extra(ModuleNotFoundError(name=package)) or InputError(f"the report needs {package}")


def report_html(report: Report) -> str:
    """The whole page.

    Raises:
        InputError: a package of the extra `report` is not installed.
    """
    check_html()
    import jinja2
    import vl_convert

    loader = jinja2.FileSystemLoader(FOLDER)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    specs = charts(report)
    own, style = ((FOLDER / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    scripts = [f"(() => {{{vl_convert.javascript_bundle(SNIPPET)}}})();".replace("</script", "<\\/script"), own]
    page = environment.get_template("page.html").render(
        report=report,
        name=PurePath(report.model).name,
        command=report.command.split(" "),
        sentence=sentence(report),
        cards=cards(report),
        checks=checks(report),
        loss=loss_text(report),
        expects=expects(report),
        foretold=any(row.predicted is not None for row in report.contenders),
        estimators=dict.fromkeys((row.estimator, row.quantity) for row in report.sensitivities),
        captions={key: spec.pop("title", "") for key, spec in specs.items()},
        kept=[row for row in report.layers if row.bits is None],
        forms=[(form, FORMS[form]) for form in FORMS if any(row.form == form for row in report.layers)],
        sensitivity_width=sensitivity_of(report)[1],
        size=short_bytes,
        figure_or_dash=_figure,
        contents=_contents(report, specs),
        policy=_policy(scripts),
        style=_raw(style),
        scripts=[_raw(script) for script in scripts],
        data=_raw(_data(report, specs)),
    )
    return page.rstrip() + "\n"


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else form % value


def _raw(text: str) -> Any:
    """Text of the page's own, or text that has nothing left to escape."""
    from markupsafe import Markup

    return Markup(text)


def _data(report: Report, specs: dict[str, Any]) -> str:
    """JSON in which no markup can begin or end."""
    data = {"charts": specs, "layers": layer_data(report), "activations": activation_data(report)}
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _policy(scripts: Sequence[str]) -> str:
    """Nothing from outside, no other script than these, no text that becomes code."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"


def _contents(report: Report, specs: dict[str, Any]) -> list[tuple[str, str]]:
    """(id, title) of the sections that this report has."""
    kept = any(row.bits is None for row in report.layers) or bool(report.untouched)
    return [
        ("summary", "Summary"),
        ("tradeoff", "Trade-off"),
        ("layers", "Layer by layer"),
        ("depth", "Error along the depth"),
        ("bits", "Bits"),
        ("ranges", "Activation ranges"),
        *([("rescaled", "Rescaled layers")] if report.scales else []),
        *([("float", "Left in float")] if kept else []),
        ("reproduce", "Reproduce"),
    ]
