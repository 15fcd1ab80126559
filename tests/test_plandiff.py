"""Two plans side by side: nothing that decides is missed, nothing else is reported."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import InputError
from quantkit.plan import plan_from_json, plan_to_json
from quantkit.plandiff import Difference, decision_dict, diff_plans
from quantkit.types import ActParams, LayerPlan, Plan, QuantSpec

OPS = {"conv1": "Conv", "fc1": "Gemm", "fc2": "Gemm"}
FOUR = LayerPlan(QuantSpec(4, 32), "packed", "why")
FLOAT = LayerPlan(None, None, "first layer")
PLAN = Plan({"conv1": FLOAT, "fc1": FOUR, "fc2": FOUR}, {"x": ActParams(0.5, 3)}, {"seed": 0, "list": [1]})

specs = st.builds(
    QuantSpec,
    bits=st.integers(1, 8),
    group_size=st.sampled_from([-1, 32, 128]),
    symmetric=st.booleans(),
    act_bits=st.sampled_from([None, 8]),
    group_bits=st.sampled_from([None, (4,), (4, 8)]),
)
layers = st.one_of(
    st.builds(LayerPlan, specs, st.sampled_from([None, "qdq"]), st.sampled_from(["", "a"])),
    st.builds(LayerPlan, st.none(), st.none(), st.sampled_from(["", "a"])),
)
plans = st.builds(
    Plan,
    st.dictionaries(st.sampled_from(list(OPS)), layers),
    st.dictionaries(st.sampled_from("xy"), st.builds(ActParams, st.sampled_from([0.5, 1.0]), st.integers(0, 2))),
    st.dictionaries(st.sampled_from("st"), st.sampled_from([None, 0, False, "0", [0], [False]])),
)


def without_reasons(plan: Plan) -> dict[str, LayerPlan]:
    return {name: replace(layer, reason="") for name, layer in plan.layers.items()}


@given(plans, plans)
def test_same_is_equality_of_all_but_the_reasons(first: Plan, second: Plan) -> None:
    found = diff_plans(first, second)
    back = diff_plans(second, first)
    texts = [
        plan_to_json(Plan({}, dict(sorted(plan.activations.items())), dict(sorted(plan.settings.items()))))
        for plan in (first, second)
    ]
    equal = without_reasons(first) == without_reasons(second) and texts[0] == texts[1]
    assert found.same is back.same is equal
    assert {row.name for row in found.layers} == {row.name for row in back.layers}
    assert diff_plans(first, first).same


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"bits": 8}, ("bits",)),
        ({"group_size": -1}, ("group_size",)),
        ({"symmetric": True}, ("symmetric",)),
        ({"act_bits": 8}, ("act_bits",)),
        ({"group_bits": (4, 3)}, ("group_bits",)),
        ({"bits": 2, "symmetric": True}, ("bits", "symmetric")),
    ],
)
def test_every_field_counts(change: dict[str, object], fields: tuple[str, ...]) -> None:
    other = LayerPlan(replace(QuantSpec(4, 32), **change), "packed", "another reason")
    found = diff_plans(PLAN, replace(PLAN, layers={**PLAN.layers, "fc1": other}))
    assert found.layers == (Difference("fc1", decision_dict(FOUR), decision_dict(other), fields),)
    assert not (found.activations or found.settings or found.same)


def test_groups_are_told_as_in_the_file() -> None:
    mixed = LayerPlan(QuantSpec(4, 32, group_bits=(4, 4, 3)), None, "")
    assert decision_dict(mixed)["group_bits"] == "4x2 3" and decision_dict(FOUR)["group_bits"] is None


def test_form_float_and_missing() -> None:
    auto = LayerPlan(QuantSpec(4, 32), None, "")
    layers = {"conv1": FOUR, "fc1": auto, "new": FLOAT}
    found = diff_plans(PLAN, replace(PLAN, layers=layers))
    assert [(row.name, row.fields, row.missing) for row in found.layers] == [
        ("conv1", ("float",), None),
        ("fc1", ("form",), None),
        ("fc2", (), "second"),
        ("new", (), "first"),
    ]
    assert found.layers[0].first == {"float": True} and found.layers[3].first is None


def test_activations_and_settings() -> None:
    other = Plan(PLAN.layers, {"x": ActParams(0.5, 4), "y": ActParams(1.0, 0)}, {"seed": False, "list": [True]})
    found = diff_plans(PLAN, other)
    assert [(row.name, row.fields) for row in found.activations] == [("x", ("zero_point",)), ("y", ())]
    assert [(row.name, row.first, row.second) for row in found.settings] == [
        ("seed", 0, False),
        ("list", [1], [True]),
    ]
    data = found.to_dict()
    assert data["same"] is False and data["activations"][1]["missing"] == "first"


def test_rules_are_compared_by_the_layers_they_decide() -> None:
    rules = Plan({"op:Gemm": FOUR, "re:.*": FLOAT}, PLAN.activations, PLAN.settings)
    assert len(diff_plans(PLAN, rules).layers) == 5
    assert diff_plans(PLAN, rules, OPS).same
    unmatched = Plan({"op:Gemm": FOUR}, PLAN.activations, PLAN.settings)
    assert diff_plans(rules, unmatched, OPS).same  # a layer without a rule stays float
    with pytest.raises(InputError, match=r"b\.json: plan rule 'op:LSTM' matches no layer"):
        diff_plans(PLAN, Plan({"op:LSTM": FOUR}, {}, {}), OPS, ("a.json", "b.json"))


def test_the_order_of_patterns_counts() -> None:
    first = Plan({"op:Gemm": FOUR, "re:fc.*": FLOAT, "conv1": FLOAT}, {}, {})
    second = Plan({"re:fc.*": FLOAT, "op:Gemm": FOUR, "conv1": FLOAT}, {}, {})
    assert diff_plans(first, second).reordered and not diff_plans(first, second).same
    found = diff_plans(first, second, OPS)
    assert not found.reordered and [row.name for row in found.layers] == ["fc1", "fc2"]
    names = Plan(dict(reversed(PLAN.layers.items())), PLAN.activations, PLAN.settings)
    assert diff_plans(PLAN, names).same


def test_a_plan_equals_its_file() -> None:
    assert diff_plans(PLAN, plan_from_json(plan_to_json(PLAN))).same
