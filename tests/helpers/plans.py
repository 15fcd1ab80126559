"""Plans for tests: random valid ones, and documents that are none with the sentence that refuses them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from quantkit.types import ActParams, LayerPlan, Plan, QuantSpec

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


def rule(**changes: Any) -> dict[str, Any]:
    return {"match": "a", "bits": 4, **changes}


def document(*rules: object, **changes: Any) -> dict[str, Any]:
    return {"version": 1, "layers": list(rules), **changes}


REFUSED: list[tuple[object, str]] = [
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
]
