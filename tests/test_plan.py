"""Plan <-> JSON: exact round trip, strict keys, rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given

from quantkit.errors import InputError
from quantkit.plan import UNMATCHED, load_plan, plan_from_json, plan_to_json, resolve, save_plan
from quantkit.types import ActParams, LayerPlan, Plan, QuantSpec
from tests.helpers.plans import REFUSED, document, plans

OPS = {"/conv1/Conv": "Conv", "/block1/conv/Conv": "Conv", "/fc/Gemm": "Gemm"}


@given(plans)
def test_round_trip_is_exact(plan: Plan) -> None:
    back = plan_from_json(plan_to_json(plan))
    assert back == plan
    assert list(back.layers) == list(plan.layers)
    assert plan_to_json(back) == plan_to_json(plan)


def test_half_a_surrogate_pair_survives() -> None:
    plan = Plan({"\ud800": LayerPlan(None, None, "")}, {}, {})
    assert plan_from_json(plan_to_json(plan)) == plan


def test_widths_of_groups_are_written_as_runs() -> None:
    spec = QuantSpec(4, 32, group_bits=(4,) * 12 + (3,) * 4 + (8,))
    text = plan_to_json(Plan({"a": LayerPlan(spec, "packed", "")}, {}, {}))
    assert '"group_bits": "4x12 3x4 8"' in text
    assert "group_bits" not in plan_to_json(Plan({"a": LayerPlan(QuantSpec(4, 32), "packed", "")}, {}, {}))
    for other in ('"4x12 3x4 8"', str(list(spec.group_bits or ())), '"4x6 4x6 3 3 3x2 8x1"'):
        assert plan_from_json(text.replace('"4x12 3x4 8"', other)).layers["a"].spec == spec


def test_one_line_per_layer() -> None:
    plan = Plan({name: LayerPlan(QuantSpec(4), "packed", "grüße") for name in OPS}, {}, {"seed": 0})
    lines = plan_to_json(plan).splitlines()
    assert sum('"match"' in line for line in lines) == 3
    assert "grüße" in lines[3]


def test_files(tmp_path: Path) -> None:
    plan = Plan({"a": LayerPlan(QuantSpec(4), None, "")}, {"x": ActParams(0.1, 3)}, {"seed": 0})
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + plan_to_json(plan).encode())
    assert load_plan(str(tmp_path / "bom.json")) == plan


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the plan .*none\.json: No such file"):
        load_plan(tmp_path / "none.json")
    (tmp_path / "model.onnx").write_bytes(b"\x08\x0a\xff\xfe")
    with pytest.raises(InputError, match=r"model\.onnx is not a plan: not UTF-8 text at byte 2"):
        load_plan(tmp_path / "model.onnx")


@pytest.mark.parametrize(("data", "message"), REFUSED)
def test_refused(data: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "plan is not JSON: Expecting value at line 1, column 1"),
        ("{\n,}", "plan is not JSON: .* at line 2, column 1"),
        ('{"version": NaN}', "plan: NaN is not a JSON number"),
        ('{"version": 1, "version": 1}', "plan: 'version' given twice in one object"),
        ("[" * 100_000, "plan is not JSON that quantkit can read: .*recursion"),
        ("1" * 5000, "plan is not JSON that quantkit can read: .*digits"),
    ],
)
def test_garbage(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_from_json(text)


def test_not_json_values_are_refused() -> None:
    with pytest.raises(InputError, match="the plan holds a value that JSON cannot"):
        plan_to_json(Plan({}, {}, {"x": object()}))


def test_first_match_wins() -> None:
    plan = plan_from_json(
        json.dumps(
            document(
                {"match": "/conv1/Conv", "float": True, "reason": "first"},
                {"match": "op:Conv", "bits": 4, "form": "packed"},
                {"match": "re:/.*", "bits": 8},
            )
        )
    )
    found = resolve(plan.layers, OPS)
    assert list(found) == list(OPS)
    assert found["/conv1/Conv"] == LayerPlan(None, None, "first")
    assert found["/block1/conv/Conv"] == LayerPlan(QuantSpec(4), "packed", "")
    assert found["/fc/Gemm"] == LayerPlan(QuantSpec(8), None, "")


def test_patterns_match_the_whole_name_and_names_come_first() -> None:
    eight, four = LayerPlan(QuantSpec(8), None, ""), LayerPlan(QuantSpec(4), None, "")
    with pytest.raises(InputError, match="plan rule 're:/fc' matches no layer; the nearest are '/fc/Gemm'"):
        resolve({"re:/fc": eight}, OPS)
    assert resolve({"op:x": eight, "re:.*": four}, {"op:x": "Conv", "y": "x"}) == {"op:x": eight, "y": four}


def test_unmatched_layers_stay_float() -> None:
    found = resolve({"op:Gemm": LayerPlan(QuantSpec(8), None, "")}, OPS)
    assert found["/conv1/Conv"] == LayerPlan(None, None, UNMATCHED)


def test_unused_rules_are_all_named() -> None:
    layer = LayerPlan(QuantSpec(8), None, "")
    with pytest.raises(InputError, match=r"'/conv2/Conv' matches no layer; the nearest are '/conv1/Conv'.*'op:LSTM'"):
        resolve({"/conv2/Conv": layer, "op:LSTM": layer}, OPS)
    with pytest.raises(InputError, match="the operators are Conv, Gemm"):
        resolve({"op:LSTM": layer}, OPS)
    with pytest.raises(InputError, match="the model has no layers"):
        resolve({"a": layer}, {})
    with pytest.raises(InputError, match="not a valid regular expression"):
        resolve({"re:(": layer}, OPS)
