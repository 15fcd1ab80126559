"""Figures of the HTML report about activation ranges: all of them, and how the values of one are spread."""

from __future__ import annotations

from quantkit.report.chartdata import activation_data
from quantkit.report.scales import HOVER, MANY, Spec, both_signs
from quantkit.report.types import Report


def range_chart(report: Report) -> Spec | None:
    rows = [{key: value for key, value in row.items() if key != "shares"} for row in activation_data(report)]
    if not rows:
        return None
    scale, ticks = both_signs([abs(row[end] or 0) for end in ("low", "high")] for row in rows)
    x = {"field": "key", "type": "ordinal", "sort": None, "axis": None, "scale": {"paddingInner": 0.25}}
    y = {"type": "quantitative", "scale": scale, "title": None, "axis": {"values": ticks, "format": ".6~g"}}
    tips = [
        ("name", "value", None),
        ("readers", "read by", None),
        ("least", "least seen", ".4~g"),
        ("greatest", "greatest seen", ".4~g"),
        ("low", "codes begin", ".4~g"),
        ("high", "codes end", ".4~g"),
        ("scale", "step", ".3~g"),
        ("zero", "code of zero", None),
        ("clipped", "clipped, %", ".3~g"),
    ]
    tooltip = [
        {"field": field, "title": title, **({"type": "quantitative", "format": form} if form else {"type": "nominal"})}
        for field, title, form in tips
    ]
    chosen = {"condition": {"param": "hover", "empty": False, "value": 1}, "value": 0}
    return {
        "data": {"values": rows},
        "height": 240,
        "title": "value of the activation (the scale is logarithmic away from zero)",
        "encoding": {"x": x},
        "layer": [
            {
                "params": [HOVER],
                "mark": {"type": "bar", "color": "@column", "cursor": "pointer"},
                "encoding": {"y": {"value": 0}, "y2": {"value": 240}, "opacity": chosen, "tooltip": tooltip},
            },
            {
                "mark": {"type": "bar", "color": "@codes", "tooltip": None, "cornerRadius": 1},
                "encoding": {"y": {**y, "field": "low"}, "y2": {"field": "high"}},
            },
            {
                "mark": {
                    "type": "rule",
                    "color": "@ink",
                    "strokeWidth": 0.5 if len(rows) > MANY else 1.3,
                    "tooltip": None,
                },
                "encoding": {"y": {**y, "field": "least"}, "y2": {"field": "greatest"}},
            },
        ],
    }


def histogram_chart() -> Spec:
    """The page fills in what value it shows: bins, and the two clip points."""
    x = {"type": "quantitative", "title": "value", "scale": {"nice": False, "zero": False}}
    return {
        "height": 170,
        "title": "share of what was seen, % (square-root scale)",
        "layer": [
            {
                "data": {"name": "bins"},
                "mark": {"type": "bar", "color": "@codes"},
                "encoding": {
                    "x": {**x, "field": "from"},
                    "x2": {"field": "to"},
                    "y": {"field": "share", "type": "quantitative", "scale": {"type": "sqrt"}, "title": None},
                    "y2": {"datum": 0},
                    "tooltip": [
                        {"field": "from", "type": "quantitative", "format": ".3~g"},
                        {"field": "to", "type": "quantitative", "format": ".3~g"},
                        {"field": "share", "type": "quantitative", "format": ".3~g", "title": "share, %"},
                    ],
                },
            },
            {
                "data": {"name": "clips"},
                "mark": {"type": "rule", "color": "@chosen", "strokeWidth": 2, "strokeDash": [5, 3]},
                "encoding": {
                    "x": {**x, "field": "at"},
                    "tooltip": [{"field": "at", "type": "quantitative", "format": ".4~g", "title": "codes end at"}],
                },
            },
        ],
    }
