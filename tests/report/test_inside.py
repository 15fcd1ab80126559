"""What a report says of a model's inside: error along the depth, activation ranges, shares of the time, the call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import quantkit
from quantkit import metrics
from quantkit.budget import Budget
from quantkit.calibration.accumulators import Histogram
from quantkit.calibration.request import CalibrationRequest, EvaluationRequest
from quantkit.errors import InputError
from quantkit.graph.targets import find_targets
from quantkit.report import build, kernels
from quantkit.report.depth import error_along_depth
from quantkit.report.kernels import layer_nodes, time_shares, with_fused
from quantkit.report.ranges import BINS, activation_rows
from quantkit.result import Result
from quantkit.runtime.ort import make_session, optimized_nodes
from quantkit.types import ActParams
from tests.helpers import models

FEED = {"x": models.random(4, 3, 8, 8, seed=5)}


def net() -> ir.Model:
    return ir.from_proto(models.cnn())


def grids(model: ir.Model) -> dict[str, tuple[float, float]]:
    """Value -> scale and zero point that the graph rounds it with."""
    found = {}
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            value, *constants = node.inputs
            step, zero = (ir.convenience.get_const_tensor(item) for item in constants if item is not None)
            assert value is not None and step is not None and zero is not None
            found[str(value.name)] = (float(step.numpy()), float(zero.numpy()))
    return found


@pytest.fixture(scope="module")
def made() -> Result:
    return quantkit.compress(models.cnn(), calibration=models.images(), activations="8", bits=(4,))


def test_depth_follows_the_layers_in_order(made: Result) -> None:
    rows = made.report.depth
    assert [(row.name, row.layer, row.output) for row in rows] == [
        ("r1", "Conv/c1", False),
        ("r2", "Conv/c2", False),
        ("y", "MatMul/y", True),
    ]
    assert all(5 < row.sqnr < 40 for row in rows)


def test_depth_compares_what_readers_see(made: Result) -> None:
    """Behind the Relu that vanished, rounded to the grid: computed here by hand from the graph that was emitted."""
    reference, emitted = net(), made.model.clone()
    (row, *_) = error_along_depth(reference, emitted, find_targets(reference)[0], FEED, threads=1)
    step, zero = grids(emitted)["r1"]
    floats, quantized = reference.clone(), made.model.clone()
    for model, name in ((floats, "r1"), (quantized, "r1")):
        value = next(value for node in model.graph for value in node.outputs if value.name == name)
        value.type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.outputs.append(value)
    wanted = make_session(floats, optimize="fold").run(FEED)["r1"].astype(np.float64)
    before = make_session(quantized, optimize="fold").run(FEED)["r1"].astype(np.float64)
    assert before.min() < 0 <= wanted.min()
    seen = (np.clip(np.round(before / step) + zero, 0, 255) - zero) * step
    assert row.sqnr == pytest.approx(metrics.sqnr(wanted, seen), abs=0.05)


def test_depth_of_a_model_against_itself() -> None:
    rows = error_along_depth(net(), net(), find_targets(net())[0], FEED, threads=1)
    assert [row.name for row in rows] == ["c1", "c2", "y"]
    assert [row.sqnr for row in rows] == [200.0] * 3


def test_depth_leaves_out_what_only_one_model_has() -> None:
    other = net()
    value = next(value for node in other.graph for value in node.outputs if value.name == "c2")
    value.name = "renamed"
    rows = error_along_depth(net(), other, find_targets(net())[0], FEED, threads=1)
    assert [row.name for row in rows] == ["c1", "r2", "y"]
    broken = net()  # what comes behind the infinite values is left out, too
    broken.graph.initializers["w2"].const_value = ir.tensor(np.full((32, 16, 3, 3), np.inf, np.float32))
    assert [row.name for row in error_along_depth(broken, broken, find_targets(broken)[0], FEED, threads=1)] == ["c1"]


def test_depth_leaves_out_what_is_no_array_of_floats() -> None:
    text = """g (float[N,8] x, float[8,8] w) => (seq(float[N,8]) s, int64[N] best, float[N,8] y) {
        y = MatMul(x, w)
        s = SequenceConstruct(y, y)
        best = ArgMax<axis=1,keepdims=0>(y)
    }"""
    model = ir.from_proto(models.build(text, {"w": models.random(8, 8)}))
    rows = error_along_depth(model, model, find_targets(model)[0], {"x": models.random(3, 8)}, threads=1)
    assert [(row.name, row.sqnr) for row in rows] == [("y", 200.0)]


def test_ranges_are_those_of_the_file(made: Result) -> None:
    rows = made.report.activations
    assert [(row.name, row.layers) for row in rows][:2] == [("x", ("Conv/c1",)), ("r1", ("Conv/c2",))]
    steps = grids(made.model)
    assert set(steps) >= {"x", "r1"}
    for row in rows:
        if row.name in steps:
            assert steps[row.name][0] == pytest.approx(row.scale, rel=1e-6)
            assert steps[row.name][1] == row.zero_point
        assert row.low == pytest.approx(-row.scale * row.zero_point)
        assert row.high - row.low == pytest.approx(255 * row.scale)
        assert row.clipped is not None and 0 <= row.clipped < 0.1
        assert len(row.shares) == BINS and sum(row.shares) == pytest.approx(1, abs=1e-3)
    assert rows[1].least == 0.0 and rows[1].low == 0.0


class FakeRegions:
    groups: Mapping[str, str] = {"a": "a", "b": "a", "c": "c"}

    def members(self, group: str) -> list[str]:
        return [name for name, owner in self.groups.items() if owner == group]


class FakeEmission:
    regions = FakeRegions()
    layers: Mapping[str, Any] = {}
    activations: Mapping[str, ActParams] = {"a": ActParams(0.1, 50), "c": ActParams(1.0, 0)}


def test_ranges_of_shared_groups_and_of_plans() -> None:
    seen = Histogram()
    seen.add(np.concatenate([np.linspace(-4, 19, 900), np.full(100, 30.0)]).astype(np.float32))
    first, second = activation_rows(FakeEmission(), {}, {"b": seen.result()})  # type: ignore[arg-type]
    assert (first.least, first.greatest, first.layers) == (-4.0, 30.0, ())
    assert first.clipped == pytest.approx(0.1, abs=0.005)
    assert (second.least, second.greatest, second.clipped, second.shares) == (None, None, None, ())
    constant = Histogram()
    constant.add(np.zeros(5, np.float32))
    assert activation_rows(FakeEmission(), {}, {"a": constant.result()})[0].shares == (1.0,)  # type: ignore[arg-type]


def test_shares_of_the_time(made: Result) -> None:
    large = {"x": models.random(64, 3, 8, 8)}
    names = with_fused(net(), {"first": frozenset({"c1"}), "second": frozenset({"c2"}), "none": frozenset({"nothing"})})
    found = time_shares(net(), names, large, threads=1)
    assert set(found) == {"first", "second"} and 0 < sum(found.values()) < 1
    assert found["second"] > found["first"]  # five times the multiplications
    assert [row.time_share is not None for row in made.report.layers] == [True] * 3


@pytest.mark.parametrize("activations", ["8", "none"])
def test_every_kernel_is_found(activations: str) -> None:
    """Also where the runtime has fused a Relu into the layer and works on blocks of channels."""
    report = quantkit.compress(models.cnn(), calibration=models.images(), activations=activations, bits=(4,)).report
    assert all(row.kernel and row.time_share for row in report.layers), report.layers
    shares = [row.time_share or 0 for row in report.layers]
    assert 0.2 < sum(shares) <= 1 and shares[2] == min(shares)


def test_a_loop_body_counts_inside_its_loop() -> None:
    events = [{"cat": "Node", "name": "n0_kernel_time", "dur": dur} for dur in (90, 5, 1, 7, 3, 5)] + [
        {"cat": "Session", "name": "model_run", "dur": 99},
        {"cat": "Node", "name": "n0_fence_before", "dur": 99},
    ]
    assert kernels._medians(events, 3) == {"n0": 4.0}


def test_names_reach_behind_activation_functions() -> None:
    found = with_fused(net(), {"c": frozenset({"c1"}), "p": frozenset({"r2", "unknown"})})
    assert found == {"c": {"c1", "r1"}, "p": {"r2", "unknown"}}
    kernels_of = layer_nodes(optimized_nodes(net()), found)
    assert kernels_of["c"].op_type == "Conv"


def test_a_failure_inside_is_a_note_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object, **settings: object) -> Any:
        raise InputError("no such kernel")

    monkeypatch.setattr(build, "error_along_depth", fails)
    monkeypatch.setattr(build, "time_shares", fails)
    report = quantkit.compress(models.cnn(), calibration=models.images(), bits=(8,)).report
    assert report.depth == () and {row.time_share for row in report.layers} == {None}
    assert report.notes[-2:] == (
        "the error along the depth is not known: no such kernel",
        "the layers' shares of the time are not known: no such kernel",
    )


def test_a_runtime_that_fails_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> int:
        raise RuntimeError("boom")

    monkeypatch.setattr(kernels, "_run", fails)
    with pytest.raises(InputError, match="onnxruntime cannot run its own optimised graph: boom"):
        time_shares(net(), {}, FEED, threads=1)


def test_large_models_are_not_opened() -> None:
    class Context:
        held_out, large = object(), True

    found = build.look_inside(Context(), None, FEED)  # type: ignore[arg-type]
    assert found.depth == () and "more than 1 GiB of weights" in found.notes[0]


def test_without_data() -> None:
    report = quantkit.compress(models.cnn(), bits=(4,)).report
    assert (report.depth, report.activations, report.accuracy, report.timings) == ((), (), None, ())
    assert report.command == "quantkit.compress('g', bits=(4,))"


def test_the_call_in_python(made: Result) -> None:
    assert made.report.command == "quantkit.compress('g', calibration=calibration, bits=(4,), activations='8')"
    budget = Budget(avg_bits=5.0, max_size=Fraction(1, 2))
    options: dict[str, Any] = {"calibration": models.images(), "budget": budget, "settings": {"mse.steps": 8}}
    options |= {"allocator": "uniform", "quantizer": "rtn"}
    report = quantkit.compress(models.cnn(), **options).report
    assert report.budget == {"avg_bits": 5.0, "max_size": "50%"}
    assert report.command == (
        "quantkit.compress('g', calibration=calibration, budget=quantkit.Budget(avg_bits=5.0, "
        "max_size=Fraction(1, 2)), allocator='uniform', quantizer='rtn', settings={'mse.steps': 8})"
    )
    again = quantkit.apply(models.cnn(), made.plan, calibration=models.images()).report
    assert again.command.startswith("quantkit.apply('g', plan, calibration=calibration")


def test_accuracy_before_and_after(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **models.images())
    request = EvaluationRequest(data=CalibrationRequest(source=str(tmp_path / "x.npz")), metric="cosine")
    found = quantkit.compress(models.cnn(), calibration=models.images(), evaluation=request, bits=(3,)).report.accuracy
    assert found is not None and found.metric == "cosine"
    assert found.before == pytest.approx(1.0) and 0.5 < found.after < 1.0


def test_notes_stay_when_the_report_is_replaced(made: Result) -> None:
    assert not any(math.isnan(row.sqnr) for row in made.report.depth)
    assert replace(made.report, notes=()).depth == made.report.depth


def test_shares_of_the_time_of_a_big_model_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The profiled graph holds all weights, and is in memory several times."""
    models.quick(monkeypatch)
    monkeypatch.setattr(build, "PROTOBUF_LIMIT", 1000)
    report = quantkit.compress(models.cnn(), calibration=models.images(), bits=(4,)).report
    assert all(row.time_share is None for row in report.layers) and report.depth
    assert "more than 256 MiB of weights: shares of the time are not measured" in report.notes
