"""The published schemas say what the dataclasses say: `python -m tests.schemas.test_files` writes them again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from quantkit import plan as plans
from quantkit.calibration.accumulators import SCHEMES
from quantkit.comparison import FileComparison
from quantkit.errors import InputError
from quantkit.options import CALIBRATORS, INPUTS
from quantkit.plandiff import PlanDiff
from quantkit.ranking import Sensitivity
from quantkit.report.types import Report, Timing
from quantkit.schemas import SUFFIX, load_schema, schema_names
from quantkit.types import QuantSpec
from tests.helpers.schemas import Output, build_schema

FOLDER = Path(__file__).parents[2] / "quantkit" / "schemas"
NUMBER: dict[str, Any] = {"type": ["number", "null"]}
SPEEDUP = {Timing: {"speedup": {**NUMBER, "description": "float_ms / quantized_ms"}}}
WRITTEN = {"type": "string", "description": "The model that was written; only in what `compress` and `apply` print."}
WHOLE = {Report: {"ratio": {**NUMBER, "description": "size_before / size_after"}, "budget_met": {"type": "boolean"}}}
TRIAL = {
    "configuration": {"type": "object", "description": "Dimension of the search -> what was tried."},
    "size": {"type": "integer", "description": "Bytes."},
    "loss": {**NUMBER, "description": "Nats per sample."},
    "complete": {
        "type": "boolean",
        "description": "All samples were measured; false = it ended early, or was not run.",
    },
    "sqnr": {**NUMBER, "description": "dB."},
    "drop": {**NUMBER, "description": "Loss of the metric, 0.01 = one point."},
    "latency": {**NUMBER, "description": "Time against float, below 1 is faster."},
    "feasible": {"type": "boolean", "description": "Within the budget."},
    "front": {"type": "boolean", "description": "No other trial is smaller and loses less."},
    "kept": {"type": "boolean", "description": "The best."},
}
SEARCH = {
    "objective": {"type": "string", "description": "What was made small: loss, drop or size."},
    "ended": {"type": "string", "description": "Why the search ended."},
    "known": {"type": "integer", "description": "Trials that were known from before."},
    "trials": {
        "type": "array",
        "items": {"type": "object", "properties": TRIAL, "required": list(TRIAL), "additionalProperties": False},
    },
    "output": {"type": "string", "description": "The model that was written."},
}
OUTPUTS = (
    Output(
        "report",
        Report,
        "What `quantkit compress` and `apply` print with --json, and write with --report",
        {**SPEEDUP, Report: {**WHOLE[Report], "output": WRITTEN}},
        frozenset({"output"}),
    ),
    Output(
        "tune",
        Report,
        "What `quantkit tune` prints with --json: the report of the best trial, and the search",
        {**SPEEDUP, Report: {**WHOLE[Report], **SEARCH}},
    ),
    Output("sensitivity", Sensitivity, "What `quantkit sensitivity` prints with --json"),
    Output("verify", FileComparison, "What `quantkit verify` prints with --json", SPEEDUP),
    Output(
        "diff",
        PlanDiff,
        "What `quantkit diff` prints with --json",
        {
            PlanDiff: {
                "same": {"type": "boolean", "description": "Nothing differs."},
                "first": {"type": "string", "description": "The first plan's file."},
                "second": {"type": "string", "description": "The second plan's file."},
            }
        },
    ),
)


def text_of(output: Output) -> str:
    return json.dumps(build_schema(output), indent=2) + "\n"


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda output: output.name)
def test_the_file_is_what_the_dataclass_says(output: Output) -> None:
    written = (FOLDER / f"{output.name}{SUFFIX}").read_text(encoding="utf-8")
    assert written == text_of(output), "write it again: python -m tests.schemas.test_files"


@pytest.mark.parametrize("name", schema_names())
def test_every_schema_is_valid_and_titled(name: str) -> None:
    schema = load_schema(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$id"] == f"urn:quantkit:schema:{name}" and schema["title"]
    whole = schema if schema["type"] == "object" else schema["items"]
    inner = {key: part for key, part in schema.get("$defs", {}).items() if key != "settings"}  # any JSON
    for part in (whole, *inner.values()):
        assert part["type"] == "object" and part["additionalProperties"] is False


def test_names() -> None:
    assert set(schema_names()) >= {"plan", "inspect", "bench", *(output.name for output in OUTPUTS)}
    with pytest.raises(InputError, match="there is no schema 'plans'; known schemas: bench, "):
        load_schema("plans")


def test_the_plan_schema_has_the_keys_of_the_code() -> None:
    schema = load_schema("plan")
    rule, activation, settings = (schema["$defs"][name] for name in ("rule", "activation", "settings"))
    assert tuple(schema["properties"]) == plans.PLAN_KEYS
    assert tuple(rule["properties"]) == plans.RULE_KEYS
    assert tuple(rule["then"]["properties"]) == plans.SPEC_KEYS
    assert tuple(activation["properties"]) == plans.ACTIVATION_KEYS
    assert set(settings["properties"]) == {*plans.PLANNED, "calibrator", "inputs", "scheme"}
    assert schema["properties"]["version"]["const"] == plans.VERSION
    assert rule["properties"]["match"]["then"]["maxLength"] == plans.MOST_PATTERN
    assert rule["properties"]["group_size"]["default"] == QuantSpec.group_size
    assert rule["properties"]["group_size"]["anyOf"][1]["maximum"] == plans.MOST_GROUPS
    assert settings["properties"]["calibrator"]["enum"] == list(CALIBRATORS[1:])
    assert settings["properties"]["inputs"]["enum"] == list(INPUTS[1:])
    assert settings["properties"]["scheme"]["enum"] == list(SCHEMES)
    whole = {key for key, value in settings["properties"].items() if value.get("type") == "integer"}
    assert whole == set(plans.NUMBERS)


def rewrite() -> None:
    for output in OUTPUTS:
        (FOLDER / f"{output.name}{SUFFIX}").write_text(text_of(output), encoding="utf-8")


if __name__ == "__main__":
    rewrite()
