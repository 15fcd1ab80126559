"""Plan <-> JSON: exact round trip, strict keys, rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import InputError
from quantkit.plan import UNMATCHED, load_plan, plan_from_json, plan_to_json, resolve, save_plan
from quantkit.types import ActParams, LayerPlan, Plan, QuantSpec

OPS = {"/conv1/Conv": "Conv", "/block1/conv/Conv": "Conv", "/fc/Gemm": "Gemm"}

specs = st.builds(
    QuantSpec,
    bits=st.integers(1, 8),
    group_size=st.one_of(st.just(-1), st.integers(1, 4096)),
    symmetric=st.booleans(),
    act_bits=st.sampled_from([None, 8]),
    group_bits=st.one_of(st.none(), st.lists(st.sampled_from([1, 3, 4, 8]), min_size=1, max_size=40).map(tuple)),
)
names = st.text(min_size=1, max_size=20).filter(lambda name: not name.startswith("re:"))
layers = st.one_of(
    st.builds(LayerPlan, spec=specs, form=st.sampled_from([None, "qdq", "packed"]), reason=st.text(max_size=20)),
    st.builds(LayerPlan, spec=st.none(), form=st.none(), reason=st.text(max_size=20)),
)
scales = st.floats(min_value=1e-300, max_value=1e300)
plans = st.builds(
    Plan,
    layers=st.dictionaries(names, layers, max_size=5),
    activations=st.dictionaries(names, st.builds(ActParams, scale=scales, zero_point=st.integers(0, 255)), max_size=3),
    settings=st.dictionaries(names, st.one_of(st.none(), st.integers(), st.text(), st.lists(st.booleans()))),
)


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


def rule(**changes: Any) -> dict[str, Any]:
    return {"match": "a", "bits": 4, **changes}


def document(*rules: object, **changes: Any) -> dict[str, Any]:
    return {"version": 1, "layers": list(rules), **changes}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "plan must be a JSON object, got a list"),
        ({"layers": []}, 'plan: "version" is missing'),
        (document(version=2), "plan: version 2 is not supported, only 1"),
        (document(version=True), "plan: version True is not supported"),
        ({"version": 1}, 'plan: "layers" must be a list of rules, got nothing'),
        ({"version": 1, "layers": {}}, 'plan: "layers" must be a list of rules, got an object'),
        (document(layer=1), "plan: unknown key 'layer'; known keys: version, layers, activations, settings"),
        (document("a"), r"plan: layers\[0\] must be a JSON object, got text"),
        (document(rule(), rule(bit=4)), r"layers\[1\]: unknown key 'bit'; known keys: match, bits,"),
        (document({"bits": 4}), r'layers\[0\]: "match" is missing'),
        (document(rule(match=3)), r"layers\[0\]: match must be text, got 3"),
        (document(rule(bits="4")), r"layers\[0\]: bits must be a whole number, got '4'"),
        (document(rule(bits=True)), r"layers\[0\]: bits must be a whole number, got True"),
        (document(rule(bits=9)), r"layers\[0\]: bits must be 1 to 8, got 9"),
        (document(rule(group_size=0)), r"layers\[0\]: group_size must be -1"),
        (document(rule(act_bits=4)), r"layers\[0\]: act_bits must be 8 or None"),
        (document(rule(group_bits=4)), r'layers\[0\]: group_bits must be text such as "4x12 3x4 8" or a list, got 4'),
        (document(rule(group_bits="4x2, 3")), r"layers\[0\]: group_bits must be runs of widths 1 to 8 .*got '4x2, 3'"),
        (document(rule(group_bits="4x0")), r"layers\[0\]: group_bits must be runs of widths 1 to 8 .*, got '4x0'"),
        (document(rule(group_bits="9x2")), r"layers\[0\]: group_bits must be runs of widths 1 to 8 .*, got '9x2'"),
        (document(rule(group_bits="4  3")), r"layers\[0\]: group_bits must be runs of widths 1 to 8 .*, got '4  3'"),
        (document(rule(group_bits="")), r"layers\[0\]: group_bits must be runs of widths 1 to 8 .*, got ''"),
        (
            document(rule(group_bits="4x999999999")),
            r"group_bits names 999999999 groups; no layer has more than 16777216",
        ),
        (document(rule(group_bits=[])), r"layers\[0\]: group_bits must name at least one width, each 1 to 8, got \[\]"),
        (document(rule(group_bits=[4, 0])), r"layers\[0\]: group_bits must name at least one width, .*got \[4, 0\]"),
        (document(rule(group_bits=[4, True])), r"group_bits must be a list of whole numbers, got \[4, True\]"),
        (document(rule(group_bits=[4, "3"])), r"group_bits must be a list of whole numbers, got \[4, '3'\]"),
        (document({"match": "a", "float": True, "group_bits": "4"}), "cannot go with group_bits"),
        (document({"match": "a", "group_bits": "4"}), r'needs "bits" \(1 to 8\)'),
        (document(rule(symmetric=1)), r"layers\[0\]: symmetric must be true or false, got 1"),
        (document({"match": "a"}), r'layers\[0\]: needs "bits" \(1 to 8\) or "float": true'),
        (document(rule(float=True)), r'layers\[0\]: "float": true cannot go with bits'),
        (document(rule(), rule()), r"layers\[1\]: 'a' already has a rule above"),
        (document(rule(match="re:(")), r"layers\[0\]: 're:\(' is not a valid regular expression"),
        (document(activations={"x": 1}), r"activations\['x'\] must be a JSON object, got a number"),
        (document(activations={"x": {"scale": 0, "zero_point": 0}}), r"\['x'\]: scale must be a number above 0, got 0"),
        (document(activations={"x": {"scale": 10**400, "zero_point": 0}}), "scale must be a number above 0"),
        (document(activations={"x": {"scale": 1, "zero_point": 256}}), "zero_point must be a whole number from 0 to"),
        (document(activations={"x": {"zero": 1}}), "unknown key 'zero'; known keys: scale, zero_point"),
        (document(settings=[]), "plan: settings must be a JSON object, got a list"),
    ],
)
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
