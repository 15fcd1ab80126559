"""The plan's schema and `plan_from_json` accept and refuse the same, but for what no schema can say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from quantkit.calibration.accumulators import SCHEMES
from quantkit.errors import InputError
from quantkit.plan import ACTIVATION_KEYS, MOST_GROUPS, RULE_KEYS, plan_from_json, plan_to_json, planned_options
from quantkit.schemas import load_schema
from quantkit.types import Plan
from tests.helpers.plans import REFUSED, document, plans, rule

VALIDATOR = jsonschema.Draft202012Validator(load_schema("plan"))
CORPUS = Path(__file__).parents[1] / "corpus"
BEYOND = ("already has a rule above", "regular expression", "repeats a group", "no layer has more than")
"""Refusals that no schema can say."""


def refusal(data: object) -> str | None:
    """The sentence that refuses a document, None when it is a plan that can be followed."""
    try:
        plan = plan_from_json(json.dumps(data))
        planned_options(plan, {})
    except InputError as error:
        return str(error)
    scheme = plan.settings.get("scheme", "asymmetric")
    return None if scheme in SCHEMES else f"scheme {scheme!r}"


@given(plans)
def test_plans_are_valid(plan: Plan) -> None:
    VALIDATOR.validate(json.loads(plan_to_json(plan)))


@pytest.mark.parametrize("name", ["plan.json", "groups.json"])
def test_plans_by_hand_are_valid(name: str) -> None:
    data = json.loads((CORPUS / name).read_text())
    plan_from_json(json.dumps(data))
    VALIDATOR.validate(data)


@pytest.mark.parametrize(("data", "message"), REFUSED)
def test_what_the_code_refuses(data: object, message: str) -> None:
    found = refusal(data)
    assert found is not None
    assert VALIDATOR.is_valid(data) is any(part in found for part in BEYOND)


NUMBERS = (0, 1, 4, 8, 9, 255, 256, -1, -2, 4.5, MOST_GROUPS, MOST_GROUPS + 1, 1e-300)
RUNS = ("", "4", "4x2 8", "4x2\n", "4x2 8\n", "9", "0x1", "4x0", "4 x2", "4  3", " 4")
WORDS = ("auto", "qdq", "re:a+", "op:Conv", "minmax", "float", "quantized", "power", "symmetric")
PATTERNS = ("re:" + "a" * 997, "re:" + "a" * 998)
LISTS = ([], [4], [4, 3], [4, True], [9], ["4"], [[4]], {}, {"bits": 4})
odd = st.sampled_from((None, True, False, *NUMBERS, *RUNS, *WORDS, *PATTERNS, *LISTS))
rules = st.one_of(
    st.fixed_dictionaries({}, optional=dict.fromkeys((*RULE_KEYS, "bit"), odd)),
    st.fixed_dictionaries({"match": st.sampled_from("abcd"), "bits": st.integers(0, 9)}, optional={"group_size": odd}),
    st.fixed_dictionaries({"match": st.just("x"), "float": odd}, optional={"reason": odd}),
    st.builds(rule, group_bits=odd),
    st.builds(rule, match=odd),
    odd,
)
ranges = st.one_of(odd, st.fixed_dictionaries({}, optional=dict.fromkeys((*ACTIVATION_KEYS, "zero"), odd)))
KNOWN = ("seed", "augment", "holdout", "calibration_size", "quantizer", "target", "calibrator", "inputs", "scheme", "x")
documents = st.one_of(
    st.builds(document, rules),
    st.builds(document, rules, rules),
    st.builds(document, activations=st.one_of(odd, st.dictionaries(st.sampled_from("xy"), ranges))),
    st.builds(document, settings=st.one_of(odd, st.dictionaries(st.sampled_from(KNOWN), odd))),
    st.fixed_dictionaries({}, optional={"version": odd, "layers": st.just([]), "other": odd}),
    odd,
)


@settings(max_examples=500)
@given(documents)
@example(document(rule(reason=None, symmetric=None, act_bits=None, group_bits=None, form=None)))
@example(document({"match": "a", "float": None, "bits": 4}))
@example(document({"match": "a", "float": True, "bits": None}))
@example(document({"match": "a", "bits": None}))
@example(document(rule(group_size=MOST_GROUPS)))
@example(document(rule(match="re:" + "a" * 998)))
def test_schema_and_code_agree(data: Any) -> None:
    found = refusal(data)
    assume(found is None or not any(part in found for part in BEYOND[:3]))
    assert VALIDATOR.is_valid(data) is (found is None), found
