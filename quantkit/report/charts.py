"""The figures of the HTML report, as Vega-Lite specifications (version 6) of the report's own data.

Colours, fonts and widths are the page's: it has a light and a dark theme and any width, so a specification has neither.
Names that a model or a user gave stand in data only, never in an expression.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quantkit.report.chartdata import (
    SHAPES,
    depth_data,
    finite,
    layer_data,
    plan_data,
    sensitivity_of,
    speaks_nats,
    width_name,
)
from quantkit.report.rangecharts import histogram_chart, range_chart
from quantkit.report.scales import HOVER, MANY, Spec, logarithmic, near_points
from quantkit.report.types import LayerRow, Report

WIDTHS = ("1", "2", "3", "4", "5", "6", "7", "8", "float")
TIPS = (
    ("name", "layer"),
    ("op", "operator"),
    ("tipBits", "bits"),
    ("tipSens", "sensitivity"),
    ("tipError", "error, this layer alone"),
    ("tipShare", "share of the time"),
    ("tipSize", "weights"),
)


def charts(report: Report) -> dict[str, Spec]:
    """Name of the figure -> specification; a figure without data is absent."""
    found = {
        "size": _tradeoff(report, "size", "size of the file, MB"),
        "time": _tradeoff(report, "time", "time of one run, float model = 1"),
        "bits": _bits(report.layers),
        "layers": _layers(report),
        "depth": _depth(report),
        "ranges": range_chart(report),
        "histogram": histogram_chart() if report.activations else None,
    }
    return {name: spec for name, spec in found.items() if spec is not None}


def _tradeoff(report: Report, by: str, title: str) -> Spec | None:
    rows = plan_data(report, by)
    if not rows:
        return None
    kinds = [kind for kind in SHAPES if any(row["kind"] == kind for row in rows)]
    x = {"field": by, "type": "quantitative", "title": title, "axis": {"tickCount": 6}}
    y = {**logarithmic([row["loss"] for row in rows], "loss"), "title": None}
    lines = [("datum.best", "@measured", [1, 0])]
    if "predicted" in kinds:
        lines.insert(0, ("datum.kind == 'predicted'", "@quiet", [2, 3]))
    nominal = {"field": "kind", "type": "nominal"}
    points = {
        "color": {
            **nominal,
            "scale": {"domain": kinds, "range": [f"@{kind}" for kind in kinds]},
            "legend": {"orient": "bottom", "title": None},
        },
        "shape": {**nominal, "scale": {"domain": kinds, "range": [SHAPES[kind] for kind in kinds]}},
        "size": {"condition": _when("kind", SIZES), "value": SIZES["measured"]},
        "tooltip": [
            {"field": "name", "type": "nominal", "title": "plan"},
            {"field": "kind", "type": "nominal", "title": "figures are"},
            {"field": "loss", "type": "quantitative", "format": ".3~g", "title": "loss, nats"},
            {"field": by, "type": "quantitative", "format": ".4~g", "title": title},
        ],
    }
    return {
        "data": {"values": rows},
        "height": 260,
        "title": "loss against the float model, nats per sample (lower is better)",
        "encoding": {"x": {**x, "scale": {"zero": False, "padding": 14}}, "y": y},
        "layer": [*(_stairs(*line) for line in lines), near_points(points)],
    }


def _stairs(test: str, colour: str, dash: Sequence[int]) -> Spec:
    mark = {"type": "line", "interpolate": "step-after", "color": colour, "strokeWidth": 1.6, "strokeDash": dash}
    return {"transform": [{"filter": test}], "mark": mark}


SIZES = {"predicted": 14, "measured": 110, "chosen": 330}


def _when(field: str, values: Mapping[str, float]) -> list[Spec]:
    return [{"test": f"datum.{field} == '{name}'", "value": value} for name, value in values.items()]


def _bits(layers: Sequence[LayerRow]) -> Spec | None:
    total = sum(row.shape[0] * row.shape[1] for row in layers)
    if not total:
        return None
    rows = []
    for width in WIDTHS:
        members = [row for row in layers if width_name(row) == width]
        weights = sum(row.shape[0] * row.shape[1] for row in members)
        share = finite(100 * weights / total)
        rows.append({"width": width, "share": share, "layers": len(members), "weights": weights})
    return {
        "data": {"values": rows},
        "height": 200,
        "title": "share of the weights, %; above each bar the number of layers",
        "encoding": {
            "x": {
                "field": "width",
                "type": "ordinal",
                "sort": list(WIDTHS),
                "title": "bits per weight",
                "axis": {"labelAngle": 0},
            },
            "y": {"field": "share", "type": "quantitative", "title": None},
            "tooltip": [
                {"field": "width", "type": "nominal", "title": "bits"},
                {"field": "share", "type": "quantitative", "format": ".3~g", "title": "share of the weights, %"},
                {"field": "weights", "type": "quantitative", "format": ",", "title": "weights"},
                {"field": "layers", "type": "nominal", "title": "layers"},
            ],
        },
        "layer": [
            {"mark": {"type": "bar", "cornerRadiusEnd": 3}, "encoding": {"color": _width_colour(WIDTHS)}},
            {
                "transform": [{"filter": "datum.layers > 0"}],
                "mark": {"type": "text", "dy": -8, "color": "@soft", "fontSize": 11.5},
                "encoding": {"text": {"field": "layers", "type": "nominal"}},
            },
        ],
    }


def _layers(report: Report) -> Spec | None:
    rows = layer_data(report)
    if not rows:
        return None
    _, width = sensitivity_of(report)
    unit = "nats" if speaks_nats(report) else "in the estimator's own unit"
    suffix = " + ' nats'" if speaks_nats(report) else ""
    kept = any(row["bits"] == 32 for row in rows)
    scale = {"domain": [0, 9 if kept else 8]}
    title = f"bits per weight{' (grey: float)' if kept else ''}"
    panels = [_panel("bits", title, {"scale": scale, "axis": {"values": [0, 2, 4, 6, 8]}})]
    for field, title in (
        ("sens", f"sensitivity: loss with {width} bits, {unit}"),
        ("error", "error of the layer alone, %"),
    ):
        values = [row[field] for row in rows]
        if any(value is not None and value > 0 for value in values):
            panels.append(_panel(field, title, logarithmic(values, field)))
    if any(row["share"] for row in rows):
        domain = [0, max(row["share"] or 0 for row in rows)]
        panels.append(_panel("share", "share of the time, %", {"scale": {"domain": domain, "nice": True}}))
    panels[-1]["layer"][0]["encoding"]["x"] = {**KEY, "axis": {"labels": True, "title": None}}
    return {
        "data": {"name": "layers"},
        "transform": [
            {"calculate": "datum.bits == 32 ? 'float' : format(datum.bits, '.3~g')", "as": "tipBits"},
            {"calculate": f"isValid(datum.sens) ? format(datum.sens, '.3~g'){suffix} : '-'", "as": "tipSens"},
            {"calculate": "isValid(datum.error) ? format(datum.error, '.3~g') + ' %' : '-'", "as": "tipError"},
            {"calculate": "isValid(datum.share) ? format(datum.share, '.3~g') + ' %' : '-'", "as": "tipShare"},
            {"calculate": "format(datum.before, ',') + ' > ' + format(datum.after, ',') + ' B'", "as": "tipSize"},
        ],
        "params": [{**HOVER, "views": [panel["layer"][0]["name"] for panel in panels]}],
        "spacing": 14,
        "vconcat": panels,
    }


AXIS = {"minExtent": 44, "maxExtent": 44, "title": None, "tickCount": 4}
KEY = {"field": "key", "type": "ordinal", "sort": None, "axis": None, "scale": {"paddingInner": 0.12}}


def _panel(field: str, title: str, y: Spec) -> Spec:
    """Bars of one figure, behind them columns that the pointer finds at any height."""
    height = 84
    axis = {**AXIS, **y.get("axis", {})}
    value = {"field": field, "type": "quantitative", **{key: item for key, item in y.items() if key != "field"}}
    base = y.get("scale", {}).get("domain", [0])[0]
    bars = {
        "x": KEY,
        "y": {**value, "axis": axis, "stack": None},
        "y2": {"datum": base},
        "color": _width_colour(WIDTHS),
    }
    column = {
        "x": KEY,
        "y": {"value": 0},
        "y2": {"value": height},
        "opacity": {"condition": {"param": "hover", "empty": False, "value": 1}, "value": 0},
        "tooltip": [{"field": name, "type": "nominal", "title": text} for name, text in TIPS],
    }
    return {
        "height": height,
        "title": title,
        "layer": [
            {"name": field, "mark": {"type": "bar", "color": "@column", "cursor": "pointer"}, "encoding": column},
            {"mark": {"type": "bar", "tooltip": None, "cornerRadiusEnd": 1, "clip": True}, "encoding": bars},
        ],
    }


def _depth(report: Report) -> Spec | None:
    rows = depth_data(report)
    if not rows:
        return None
    many, used = len(rows) > MANY, {row["width"] for row in rows}
    axis = logarithmic([value for row in rows for value in (row["error"], row["alone"])], "error")
    y = {**axis, "title": None}
    ticks = {"tickMinStep": 1, "grid": False, "labelExpr": "datum.value < 1 ? '' : datum.label"}
    x = {"field": "place", "type": "quantitative", "title": "place in the model", "axis": ticks}
    alone = {
        "mark": {"type": "tick", "color": "@quiet", "orient": "horizontal", "thickness": 2, "size": 12},
        "encoding": {"y": {**y, "field": "alone"}},
    }
    points = {
        "y": y,
        "color": _width_colour([item for item in (*WIDTHS, "output") if item in used], legend=True),
        "shape": {
            "field": "what",
            "type": "nominal",
            "legend": None,
            "scale": {"domain": ["layer", "output of the model"], "range": ["circle", "diamond"]},
        },
        "size": {"condition": {"test": "datum.what != 'layer'", "value": 260}, "value": 12 if many else 60},
        "tooltip": [
            {"field": "layer", "type": "nominal"},
            {"field": "value", "type": "nominal"},
            {"field": "width", "type": "nominal", "title": "bits"},
            {"field": "error", "type": "quantitative", "format": ".3~g", "title": "error so far, %"},
            {"field": "alone", "type": "quantitative", "format": ".3~g", "title": "this layer alone, %"},
        ],
    }
    return {
        "data": {"values": rows},
        "height": 260,
        "title": "relative error, % of the value",
        "encoding": {"x": {**x, "scale": {"nice": False, "padding": 10}}},
        "layer": [
            *([alone] if not many and any(row["alone"] is not None for row in rows) else []),
            {"mark": {"type": "line", "color": "@quiet", "strokeWidth": 1.6}, "encoding": {"y": y}},
            near_points(points),
        ],
    }


def _width_colour(widths: Sequence[str], *, legend: bool = False) -> Spec:
    shown = {"orient": "bottom", "title": "bits", "titleOrient": "left", "symbolType": "circle"} if legend else None
    scale = {"domain": list(widths), "range": [f"@bits{width}" for width in widths]}
    return {"field": "width", "type": "nominal", "scale": scale, "legend": shown}
