"""Layers of a network on the samples of a feed, and the prediction of a whole model's time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantkit.costs import latency
from quantkit.costs.latency import open_cache
from quantkit.costs.layers import LayerTimes, median_rows
from quantkit.forms import Chooser, Option, choose_forms
from quantkit.graph.load import load_model
from quantkit.graph.targets import find_targets
from quantkit.methods import make
from quantkit.types import LayerStats, QuantizedWeight, QuantSpec, Target
from tests.helpers.models import build, random

SPEC = QuantSpec(4, 32)
CONV = "g (float[N,8,9,7] x) => (float[N,16,9,7] y) { y = Conv<pads=[1,1,1,1]>(x, w) }"
PRODUCT = "g (float[N,64] x) => (float[N,48] y) { y = MatMul(x, w) }"


def layer(name: str) -> Target:
    text, shape = (CONV, (16, 8, 3, 3)) if name == "conv" else (PRODUCT, (64, 48))
    (found,) = find_targets(load_model(build(text, {"w": random(*shape)})).model)[0].values()
    return replace(found, name=name)


def option(form: str, spec: QuantSpec = SPEC) -> Option:
    return Option(form, spec, 0.0, 0.0, 0.0)


def times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **changes: Any) -> LayerTimes:
    """A convolution takes 4 ms in float and 1 as integers, a product 2 ms for every 8 rows, and half of that."""
    monkeypatch.setattr(latency, "_measure", lambda shape, spec, form, rows, *_: (2.0 * rows / 8, 1.0 * rows / 8))
    monkeypatch.setattr(latency, "_measure_node", lambda *_: (4.0, 1.0))
    items = {name: layer(name) for name in ("conv", "product")}
    shapes = {"conv": {(2, 8, 9, 7): 4}, "product": {(10, 64): 4}}
    stats = {name: LayerStats(1, 0.0, 0.0, data_shapes=shapes[name]) for name in items}
    fields: dict[str, Any] = {
        "targets": items,
        "stats": stats,
        "calibrated": 8,
        "samples": 2,
        "cache": open_cache(tmp_path),
        "runtime": "ort-cpu",
        "threads": 1,
    }
    return LayerTimes(**{**fields, **changes})


def test_layers_are_timed_on_the_samples_of_the_feed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = times(monkeypatch, tmp_path)  # 8 samples in 4 runs: 2 a run, as in the feed
    assert made.cost(made.targets["product"], SPEC, "packed", 8) == pytest.approx((2.5, 1.25))
    assert made.cost(made.targets["conv"], SPEC, "qdq", 8) == (4.0, 1.0)
    cut = times(monkeypatch, tmp_path, samples=6)
    assert cut.cost(cut.targets["product"], SPEC, "packed", 8) == pytest.approx((7.5, 3.75))
    plain = times(monkeypatch, tmp_path, calibrated=None)
    assert plain.cost(plain.targets["product"], SPEC, "packed", 8) == pytest.approx((2.5, 1.25))


def test_a_layer_is_timed_at_every_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = times(monkeypatch, tmp_path, calibrated=None)
    item = made.targets["product"]
    twice = replace(item, uses=item.uses * 2)
    assert made.cost(twice, SPEC, "packed", 8) == pytest.approx((5.0, 2.5))


def test_the_widest_group_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[QuantSpec] = []
    made = times(monkeypatch, tmp_path)
    monkeypatch.setattr(latency, "_measure", lambda shape, spec, *_: (asked.append(spec), (1.0, 1.0))[1])
    made.cost(made.targets["product"], QuantSpec(3, 32, group_bits=(2, 4)), "matmulnbits", 8)
    assert asked == [QuantSpec(4, 32)]


def test_unknown_shapes_cost_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = times(monkeypatch, tmp_path, stats={})
    assert made.cost(made.targets["conv"], SPEC, "qdq", 1) == (0.0, 0.0)
    assert median_rows(None) == 1.0


def test_a_measured_model_corrects_the_next_prediction(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = times(monkeypatch, tmp_path)
    integers = {"conv": option("qdq"), "product": option("packed")}
    assert made.predicted_ms(20.0, integers) == pytest.approx(20 - 3 - 1.25)
    assert made.correction(20.0, ["conv"]) == 1
    made.remember(integers, 14.0)  # its pooling runs on integers, too
    assert made.correction(20.0, ["conv"]) == pytest.approx(14 / 15.75)
    assert made.predicted_ms(20.0, integers) == pytest.approx(14.0)
    assert made.predicted_ms(20.0, {"conv": option("qdq")}) == pytest.approx((20 - 3) * 14 / 15.75)
    # Other static layers, another correction; and the first measurement stays.
    assert made.predicted_ms(20.0, {"product": option("packed")}) == pytest.approx(20 - 1.25)
    made.remember(integers, 99.0)
    assert made.predicted_ms(20.0, integers) == pytest.approx(14.0)


# --- Forms by these times


def chooser(made: LayerTimes, *, timed: bool, static: tuple[str, ...] = ()) -> Chooser:
    def quantize(target: Target, spec: QuantSpec) -> QuantizedWeight:
        found: QuantizedWeight = make("quantizers", "rtn", {}).quantize(target.load(), spec, None)
        return found

    return Chooser(
        runtime="ort-cpu",
        activations="none",
        group_size=None,
        static=frozenset(static),
        activation_of={},
        stats=made.stats,
        quantize=quantize,
        cost=made.cost,
        timed=timed,
    )


def test_layers_without_a_choice_are_timed_when_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = times(monkeypatch, tmp_path)
    item = made.targets["conv"]
    (plain,), (timed,) = (chooser(made, timed=timed).options(item, SPEC) for timed in (False, True))
    assert (plain.float_ms, plain.milliseconds, plain.ratio) == (0.0, 0.0, None)
    assert (timed.float_ms, timed.milliseconds, timed.ratio) == (4.0, 1.0, 0.25)
    assert plain.noise == timed.noise and plain.spec == timed.spec


def test_the_time_of_a_width_is_that_of_its_fastest_form(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = times(monkeypatch, tmp_path)
    slow = {"packed": 3.0, "matmulnbits": 0.5}
    monkeypatch.setattr(
        latency, "_measure", lambda shape, spec, form, rows, *_: (2.0 * rows / 8, slow[form] * rows / 8)
    )
    item = made.targets["product"]
    assert chooser(made, timed=True).milliseconds(item, QuantSpec(4)) == pytest.approx(0.5 * 10 / 8)
    assert chooser(made, timed=True).milliseconds(item, None) == pytest.approx(2.5)
    assert chooser(made, timed=True).milliseconds(made.targets["conv"], QuantSpec(3)) == 1.0
    assert chooser(made, timed=True).milliseconds(made.targets["conv"], None) == 4.0


def test_what_no_layer_shows_counts_against_the_latency() -> None:
    """Two forms: exact and slow, or noisy and fast; 10 ms of model, of which 4 are this layer."""
    forms = [Option("packed", SPEC, 0.1, 4.0, 4.0), Option("dynamic", SPEC, 0.2, 1.0, 4.0)]
    for correction, wanted in ((1.0, "packed"), (1.1, "dynamic"), (0.8, "packed")):
        found = choose_forms({"layer": forms}, model_ms=10.0, max_latency=1.05, correction=correction)
        assert found["layer"].form == wanted
    fast = choose_forms({"layer": forms}, model_ms=10.0, max_latency=0.75, correction=1.0)
    slow = choose_forms({"layer": forms}, model_ms=10.0, max_latency=0.75, correction=0.74)
    assert (fast["layer"].form, slow["layer"].form) == ("dynamic", "packed")


def test_what_layers_alone_save_more_than_all_of_is_not_corrected(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = times(monkeypatch, tmp_path)
    made.remember({"conv": option("qdq")}, 1.0)
    assert made.correction(2.0, ["conv"]) == 1.0  # 2 ms less 3 is no time


def test_figures_are_looked_up_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = times(monkeypatch, tmp_path)
    item = made.targets["product"]
    first = made.cost(item, SPEC, "packed", 8)
    monkeypatch.setattr("quantkit.costs.layers.layer_cost", None)
    assert made.cost(item, SPEC, "packed", 8) == first
