"""The headline figures and sentences, and the rows behind the figures."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from quantkit.report.chartdata import (
    activation_data,
    depth_data,
    expects,
    layer_data,
    percent,
    plan_data,
    sensitivity_of,
    speaks_nats,
    width_name,
)
from quantkit.report.charts import charts
from quantkit.report.console import loss_text
from quantkit.report.scales import MOST_POINTS, both_signs, logarithmic, thinned
from quantkit.report.summary import cards, checks, sentence
from quantkit.report.types import Fidelity, Report, SensitivityRow, Timing
from tests.helpers.reports import bare, example, layer

TIMES = "\N{MULTIPLICATION SIGN}"


def test_cards() -> None:
    size, accuracy, speed, bits, layers = cards(example())
    assert (size.figure, size.part) == (f"5.0{TIMES} smaller", 0.2)
    assert (accuracy.title, accuracy.figure) == ("Accuracy (top1)", "-0.16 points")
    assert (speed.figure, speed.part) == (f"2.50{TIMES} faster", 0.4) and "8x3x8x8" in speed.detail
    assert (bits.figure, bits.part) == ("4.25", 4.25 / 32)
    assert layers.figure == "10 of 12"


def test_cards_of_worse_models() -> None:
    slow = Timing({"x": (1,)}, 5.0, 10.0)
    worse = example(size_after=2_000_000, timings=(slow,), accuracy=None, fidelity=Fidelity(20, 0.9876, None, 80, 1))
    size, accuracy, speed, _, _ = cards(worse)
    assert (size.figure, size.part) == (f"2.0{TIMES} larger", 1.0)
    assert (accuracy.figure, speed.figure, speed.part) == ("0.9876", f"2.00{TIMES} slower", 1.0)
    assert sentence(worse) == (
        "example.onnx grew from 1 MB to 2 MB. On 1 sample that it had not seen, its outputs point the same way as the "
        "float model's (cosine 0.9876, 1 is equal). It is slower: it takes 2.00 times as long."
    )
    custom = replace(example().accuracy or pytest.fail("none"), metric="m:f", before=12.5, after=11.0)
    assert cards(example(accuracy=custom))[1].figure == "12.5 \N{RIGHTWARDS ARROW} 11"
    agreeing = cards(example(accuracy=None))[1]
    assert (agreeing.title, agreeing.figure) == ("Agreement with float", "98.5%")


def test_sentences_without_figures() -> None:
    assert "Without data nothing could be measured" in sentence(bare())
    assert [card.figure for card in cards(bare())][1:3] == ["not measured", "not measured"]
    even = example(timings=(Timing({"x": (1,)}, 10.0, 10.2),))
    assert sentence(even).endswith("It is as fast as the float model.")
    assert cards(example(size_after=0))[0].figure == "empty"
    assert cards(example(timings=(Timing({}, 0.0, 0.0),)))[2].figure == "not measured"


def test_what_was_asked_for() -> None:
    budget = {"avg_bits": 4.0, "max_size": "25%", "max_drop": 0.01, "max_latency": 0.8, "max_bops": 3_500_000}
    assert checks(example(budget=budget)) == [
        "at most 4 bits per weight on average",
        "a file of at most 25% of the float model's",
        "a loss of accuracy of at most 1 percentage point",
        "at most 0.8 times the float model's time",
        "at most 3,500,000 bit operations",
    ]
    assert checks(example(budget={"max_size": 12_000_000})) == ["a file of at most 12 MB"]
    assert checks(example(budget={})) == []


@pytest.mark.parametrize(
    ("sqnr", "wanted"), [(40.0, 1.0), (0.0, 100.0), (20.0, 10.0), (200.0, None), (-200.0, None), (None, None)]
)
def test_decibels_become_percent(sqnr: float | None, wanted: float | None) -> None:
    assert percent(sqnr) == (None if wanted is None else pytest.approx(wanted))


def test_layer_rows() -> None:
    rows = layer_data(example())
    assert [row["width"] for row in rows[:6]] == ["3", "4", "6", "8", "float", "4"]
    assert rows[4]["bits"] == 32 and rows[4]["error"] is None and rows[4]["reason"] == "ignored"
    assert len({row["key"] for row in rows}) == len(rows)
    assert rows[0]["share"] == 50.0 and rows[0]["sens"] is not None
    assert width_name(replace(layer(0, "x"), bits=0.4)) == "1"
    odd = replace(layer(0, "x"), sqnr=math.nan, time_share=math.inf)
    assert {key: layer_data(example(layers=(odd,)))[0][key] for key in ("error", "share", "sens")} == {
        "error": None,
        "share": None,
        "sens": None,
    }


def test_sensitivities_are_compared_at_one_width() -> None:
    first, second = (
        SensitivityRow(("a", "b"), {3: 0.5, 4: 0.1}, 4, "m"),
        SensitivityRow(("c",), {3: 0.2, 8: 0.0}, 8, "m"),
    )
    found, width = sensitivity_of(example(sensitivities=(first,)))
    assert width == 4 and found["a"] is found["b"] is first
    assert sensitivity_of(example(sensitivities=(first, second)))[1] == 3
    assert sensitivity_of(bare()) == ({}, 4)


def test_activation_rows() -> None:
    (row, *_) = activation_data(example(1))
    assert row["clipped"] == 0.04 and row["shares"][:2] == [20.0, 20.0] and row["zero"] == 42
    (row, *_) = activation_data(example(1, activations=(replace(example().activations[0], clipped=None, least=None),)))
    assert row["clipped"] is None and row["least"] is None


def test_axes() -> None:
    axis = logarithmic([0.03, None, 2.0, -1.0, 0.0], "y")
    assert axis["scale"]["domain"] == [0.01, 10.0] and axis["axis"]["values"] == [0.01, 0.1, 1.0, 10.0]
    assert logarithmic([10.0], "y")["scale"]["domain"] == [10.0, 100.0]
    assert len(logarithmic([1e-12, 1.0], "y")["axis"]["values"]) <= 7
    scale, ticks = both_signs([(1.0, 5.0), (0.0, 200.0)])
    assert scale == {"type": "symlog", "constant": 1.0} and ticks == [-1000.0, -10.0, 0.0, 10.0, 1000.0]
    assert both_signs([(0.0, 0.0)])[1] == [-1.0, 0.0, 1.0]
    assert thinned(list(range(5))) == [0, 1, 2, 3, 4]
    few = thinned(list(range(5000)))
    assert len(few) == MOST_POINTS and few[0] == 0 and few[-1] == 4999


def test_plans_that_no_other_beats() -> None:
    rows = plan_data(example(), "size")
    assert [row["kind"] for row in rows] == ["predicted"] * 6 + ["measured", "measured", "chosen"]
    assert {row["name"]: row["best"] for row in rows[6:]} == {"uniform 4": False, "8 bits": True, "measured 4": True}
    by_time = plan_data(example(), "time")
    assert [row["time"] for row in by_time] == [0.6, 0.7, 0.5]
    unknown = tuple(replace(row, latency=math.inf) for row in example().contenders)
    assert plan_data(example(contenders=unknown), "time") == []
    timed = tuple(replace(row, time=0.5 + place / 10) for place, row in enumerate(example().front))
    expected = [row for row in plan_data(example(front=timed), "time") if row["kind"] == "predicted"]
    assert [row["time"] for row in expected] == [row.time for row in timed] and len(expected) >= 2
    assert plan_data(example(contenders=(), front=example().front), "size") == []


def other_unit() -> Report:
    """By an estimator whose figures only compare layers."""
    front = tuple(replace(row, estimator="hawq", quantity="mean Hessian trace", nats=False) for row in example().front)
    rows = tuple(
        replace(row, estimator="hawq", quantity="mean Hessian trace", nats=False) for row in example().sensitivities
    )
    return example(front=front, sensitivities=rows, predicted=None)


def test_figures_in_another_unit_are_not_called_nats() -> None:
    assert expects(example()) and speaks_nats(example()) and not expects(bare())
    other = other_unit()
    assert not expects(other) and not speaks_nats(other)
    assert [row["kind"] for row in plan_data(other, "size")] == ["measured", "measured", "chosen"]
    wanted = {
        "nats": (example(), "sensitivity: loss with 4 bits, nats", "+ ' nats'"),
        "other": (other, "sensitivity: loss with 4 bits, in the estimator's own unit", "'.3~g') : '-'"),
    }
    for report, title, expression in wanted.values():
        spec = charts(report)["layers"]
        assert title in [panel["title"] for panel in spec["vconcat"]]
        (tip,) = (row["calculate"] for row in spec["transform"] if row["as"] == "tipSens")
        assert expression in tip
    assert "nats" not in json.dumps(charts(other)["layers"])
    assert charts(other)["size"]["encoding"]["y"]["field"] == "loss"
    assert not any(row["kind"] == "predicted" for row in charts(other)["size"]["data"]["values"])


def test_predicted_against_measured() -> None:
    assert loss_text(example()) == "predicted 0.02 nats per sample from the weights alone, measured 0.02"
    assert loss_text(example(contenders=())) == "predicted 0.02 nats per sample from the weights alone"
    assert loss_text(bare()) == ""


def test_depth_rows() -> None:
    rows = depth_data(example(6))
    assert [row["width"] for row in rows] == ["3", "4", "6", "8", "float", "4", "output"]
    assert rows[0]["error"] == pytest.approx(100 * 10**-1.5, rel=1e-4) and rows[4]["alone"] is None
    assert rows[-1]["what"] == "output of the model" and rows[-1]["layer"] == "-"
    exact = tuple(replace(row, sqnr=200.0) for row in example(6).depth)
    assert depth_data(example(6, depth=exact)) == []
