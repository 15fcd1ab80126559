"""ONNX's own conformance suite, driven by its official runner."""

from __future__ import annotations

import re
import tomllib
import unittest
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx.backend.test
import pytest

from quantkit.runtime.torch_backend.backend import TorchBackend

# Passing cases, by category: these numbers may only go up.
PASSING = {"node": 1817, "pytorch-converted": 82, "pytorch-operator": 35, "simple": 15}
TOTAL = {"node": 1884, "pytorch-converted": 82, "pytorch-operator": 35, "simple": 23}
CATEGORIES = {
    "OnnxBackendNodeModelTest": "node",
    "OnnxBackendPyTorchConvertedModelTest": "pytorch-converted",
    "OnnxBackendPyTorchOperatorModelTest": "pytorch-operator",
    "OnnxBackendSimpleModelTest": "simple",
}
LEFT_OUT = Path(__file__).parent / "left_out.toml"


@dataclass(frozen=True)
class Outcome:
    """One case of the suite: `error` is the last line of what went wrong, "" when it passed."""

    category: str
    error: str


@pytest.fixture(scope="module")
def outcomes() -> Mapping[str, Outcome]:
    """Every case that brings its own data, run once."""
    suite = onnx.backend.test.BackendTest(TorchBackend, __name__)
    found = {}
    for class_name, case in suite.test_cases.items():
        if class_name not in CATEGORIES:  # models that would have to be downloaded
            continue
        for name in dir(case):
            if name.startswith("test_") and name.endswith("_cpu"):
                result = unittest.TestResult()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # numpy's, on overflows that the cases provoke
                    case(name).run(result)
                assert not result.skipped, name
                bad = [text for _, text in (*result.errors, *result.failures)]
                error = bad[0].strip().splitlines()[-1] if bad else ""
                found[name.removeprefix("test_").removesuffix("_cpu")] = Outcome(CATEGORIES[class_name], error)
    return found


def groups() -> list[tuple[str, str, bool]]:
    """(pattern, reason, whether such a model is refused)."""
    with LEFT_OUT.open("rb") as file:
        listed = tomllib.load(file)["group"]
    return [(pattern, group["reason"], group["refused"]) for group in listed for pattern in group["patterns"]]


def test_as_many_cases_pass_as_ever(outcomes: Mapping[str, Outcome]) -> None:
    assert dict(Counter(outcome.category for outcome in outcomes.values())) == TOTAL
    assert dict(Counter(outcome.category for outcome in outcomes.values() if not outcome.error)) == PASSING


def test_all_other_cases_are_listed_with_a_reason(outcomes: Mapping[str, Outcome]) -> None:
    patterns = [re.compile(pattern) for pattern, _, _ in groups()]
    failing = {name: outcome.error for name, outcome in outcomes.items() if outcome.error}
    unlisted = {name: error for name, error in failing.items() if not any(p.fullmatch(name) for p in patterns)}
    assert unlisted == {}


def test_every_listed_pattern_is_needed(outcomes: Mapping[str, Outcome]) -> None:
    for pattern, reason, _ in groups():
        named = [name for name in outcomes if re.fullmatch(pattern, name)]
        assert named, f"{pattern} ({reason}) names no case"
        assert any(outcomes[name].error for name in named), f"{pattern} ({reason}) would pass"


def test_what_is_left_out_is_refused_in_one_sentence(outcomes: Mapping[str, Outcome]) -> None:
    refused = [re.compile(pattern) for pattern, _, is_refused in groups() if is_refused]
    failing = {name: outcome.error for name, outcome in outcomes.items() if outcome.error}
    raw = {
        name: error
        for name, error in failing.items()
        if any(p.fullmatch(name) for p in refused) and "quantkit.errors.InputError" not in error
    }
    assert raw == {}
