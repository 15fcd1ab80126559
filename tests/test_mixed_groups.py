"""From the command to the file and back through the plan, with groups of different widths in one layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from quantkit.budget import Budget
from quantkit.candidate import seen_by
from quantkit.errors import InputError
from quantkit.methods import make
from quantkit.pipeline import apply, compress
from quantkit.plan import load_plan, plan_from_json, plan_to_json, save_plan
from quantkit.result import Result
from quantkit.types import LayerPlan, LayerStats, Plan, QuantSpec
from tests.helpers import models


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    models.quick(monkeypatch)


def transformer() -> onnx.ModelProto:
    """A block whose embeddings, and with them the inputs of its layers, differ in size from group to group."""
    model = models.block()
    sizes = np.exp(1.2 * np.sin(np.arange(64) / 10))
    for tensor in model.graph.initializer:
        if tensor.name in ("table", "gain"):
            tensor.CopyFrom(
                numpy_helper.from_array((numpy_helper.to_array(tensor) * sizes).astype(np.float32), tensor.name)
            )
    return model


def run(cache: Path, bits: float, **settings: Any) -> Result:
    return compress(
        transformer(),
        calibration=models.tokens(40),
        budget=Budget(avg_bits=bits),
        cache=cache,
        bits=(2, 3, 4, 5, 6, 8),
        group_size=16,
        **settings,
    )


def content(result: Result) -> bytes:
    serialized: bytes = ir.to_proto(result.model).SerializeToString(deterministic=True)
    return serialized


def mixed(plan: Plan) -> dict[str, QuantSpec]:
    specs = {name: layer.spec for name, layer in plan.layers.items()}
    return {name: spec for name, spec in specs.items() if spec is not None and len(set(spec.group_bits or ())) > 1}


CASES: list[tuple[float, Mapping[str, Any]]] = [
    (3, {"allocator": "uniform", "quantizer": "slim"}),
    (3.5, {"quantizer": "slim"}),
    (
        3,
        {
            "allocator": "uniform",
            "quantizer": "slim",
            "activations": "none",
            "settings": {"slim.search": "sweep", "slim.rounder": "nearest"},
        },
    ),
    (
        4,
        {
            "allocator": "uniform",
            "quantizer": "slim",
            "target": "portable",
            "settings": {"slim.levels": "2,3,5,6", "slim.rounder": "nearest"},
        },
    ),
    (3.3, {"allocator": "slim"}),
    (4.25, {"allocator": "slim", "activations": "none"}),
    (2.6, {"allocator": "slim", "quantizer": "slim", "target": "portable"}),
]


@pytest.mark.parametrize(("bits", "settings"), CASES)
def test_compress_verifies_and_its_plan_gives_the_same_bytes(
    tmp_path: Path, bits: float, settings: Mapping[str, Any]
) -> None:
    result = run(tmp_path, bits, **settings)
    assert mixed(result.plan)
    assert result.report.fidelity is not None and result.report.fidelity.parity > 100
    assert not result.report.unmet and result.report.average_bits <= bits + 1e-9
    if settings.get("allocator") == "uniform":
        assert result.report.average_bits == pytest.approx(bits, abs=1e-6)
    else:
        assert result.report.average_bits > bits - 0.1
    save_plan(result.plan, tmp_path / "plan.json")
    assert '"group_bits": "' in (tmp_path / "plan.json").read_text()
    plan = load_plan(tmp_path / "plan.json")
    assert plan == result.plan
    again = apply(transformer(), plan, calibration=models.tokens(40), cache=tmp_path, group_size=16)
    assert content(again) == content(result)
    assert again.plan.layers == result.plan.layers


def test_the_report_tells_average_widths(tmp_path: Path) -> None:
    result = run(tmp_path, 4.25, allocator="slim", activations="none")
    specs = mixed(result.plan)
    rows = {row.name: row for row in result.report.layers}
    total = 0.0
    for name, layer in result.plan.layers.items():
        assert layer.spec is not None
        average = layer.spec.average_bits(rows[name].shape[1])
        assert rows[name].bits == pytest.approx(average, abs=1e-3)
        total += average * rows[name].shape[0] * rows[name].shape[1]
    weights = sum(row.shape[0] * row.shape[1] for row in rows.values())
    assert result.report.average_bits == pytest.approx(total / weights, abs=1e-9)
    assert any(not float(rows[name].bits or 0).is_integer() for name in specs)
    assert all(abs(spec.bits - spec.average_bits(rows[name].shape[1])) <= 0.5 for name, spec in specs.items())


def matmul_plan(form: str, **changes: Any) -> Plan:
    return Plan({"op:MatMul": LayerPlan(QuantSpec(4, 16, **changes), form, "")}, {}, {"quantizer": "rtn"})


@pytest.mark.parametrize("form", ["packed", "dynamic", "matmulnbits", "auto"])
def test_a_plan_written_by_hand_is_followed(tmp_path: Path, form: str) -> None:
    plan = plan_from_json(plan_to_json(matmul_plan(form, group_bits=(4, 2, 3, 4))).replace("4 2 3 4", "4x1 2 3 4"))
    result = apply(models.matmul(), plan, calibration={"x": models.random(20, 64)}, cache=tmp_path)
    (layer,) = result.plan.layers.values()
    assert layer.spec is not None and layer.spec.group_bits == (4, 2, 3, 4)
    assert form in ("auto", layer.form)
    assert result.report.average_bits == 3.25


def test_widths_that_do_not_fit_the_layer_or_the_form_are_refused(tmp_path: Path) -> None:
    data = {"x": models.random(20, 64)}
    wanted = "rule for MatMul/y does not fit it: group_bits must name one width for each of the 4 groups of 64 inputs"
    with pytest.raises(InputError, match=f"{wanted}, got 3"):
        apply(models.matmul(), matmul_plan("packed", group_bits=(4, 2, 3)), calibration=data, cache=tmp_path)
    with pytest.raises(InputError, match=r"asks for the form matmulnbits at .*, which is impossible: mid-rise grid"):
        apply(models.matmul(), matmul_plan("matmulnbits", group_bits=(1, 4, 4, 4)), calibration=data, cache=tmp_path)


def test_statistics_collected_for_the_allocator_do_not_reach_the_quantizer() -> None:
    """A plan is applied without its allocator: the quantizer must see the same numbers then."""
    square_mean, gram = np.ones((1, 4)), np.eye(4)[None]
    stats = LayerStats(5, -1, 1, square_mean=square_mean, gram=gram, rows=np.ones((1, 2, 4), np.float32))
    seen = seen_by(make("quantizers", "mse", {}), stats)
    assert seen == replace(stats, gram=None, rows=None)
    assert seen_by(make("quantizers", "slim", {}), stats).gram is gram  # type: ignore[union-attr]
    assert seen_by(make("quantizers", "mse", {}), None) is None
