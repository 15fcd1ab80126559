"""Methods are found by file name and made with typed settings."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest

from quantkit import methods
from quantkit.errors import InputError

FAKES = {
    "allocators": {"shared": "@dataclass(frozen=True)\nclass Shared:\n    budget: float = 0.5\nMETHOD = Shared\n"},
    "quantizers": {
        "shared": "@dataclass(frozen=True)\nclass Shared:\n    steps: int = 8\nMETHOD = Shared\n",
        "needy": "import torch_is_not_here\nMETHOD = None\n",
        "extra": "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n",
        "picky": "class Picky:\n    def __init__(self):\n        raise ValueError('no')\nMETHOD = Picky\n",
        "strict": "class Strict:\n    def __init__(self):\n        raise InputError('own words')\nMETHOD = Strict\n",
        "_helper": "",
    },
    "emitters": {},
}


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, files in FAKES.items():
        (tmp_path / kind).mkdir()
        for name, source in files.items():
            (tmp_path / kind / f"{name}.py").write_text(f'"""About {name}."""\n{source}')

    def load(module: str) -> ModuleType:
        _, kind, name = module.split(".")
        made = ModuleType(module)
        monkeypatch.setitem(sys.modules, module, made)
        exec(FAKES[kind][name], made.__dict__ | {"dataclass": dataclass, "InputError": InputError}, made.__dict__)
        return made

    monkeypatch.setattr(methods, "_folder", lambda kind: tmp_path / kind)
    monkeypatch.setattr(methods, "import_module", load)


def test_finds_what_there_is() -> None:
    assert {"rtn", "mse"} <= set(methods.find("quantizers"))
    assert "uniform" in methods.find("allocators")
    assert not any(name.startswith("_") for kind in methods.KINDS for name in methods.find(kind))


@pytest.mark.parametrize("kind", methods.KINDS)
def test_every_method_can_be_made_and_explained(kind: str) -> None:
    for name in methods.find(kind):
        assert methods.make(kind, name, {}) is not None
        assert methods.describe(kind, name)
        for setting in methods.settings_of(kind, name):
            assert setting.default is not None


def test_listing_imports_no_method() -> None:
    code = (
        "import sys; from quantkit import methods\n"
        "for kind in methods.KINDS:\n"
        "    for name in methods.find(kind): methods.describe(kind, name)\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'numpy', 'onnx', 'onnx_ir', 'torch'}))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_settings_reach_the_method() -> None:
    assert methods.make("quantizers", "mse", {"steps": "40"}).steps == 40
    methods.check_settings({"mse.steps": "40", "mse.norm": 2})


def test_unknown_names() -> None:
    with pytest.raises(InputError, match="there is no quantizer 'rtm'; did you mean 'rtn'"):
        methods.make("quantizers", "rtm", {})
    kinds = "allocators, quantizers, transforms, emitters, tuners"
    with pytest.raises(InputError, match=f"kind must be one of {kinds}, got 'kernels'"):
        methods.find("kernels")
    with pytest.raises(InputError, match=r"unknown setting 'mse\.stepz'; settings of mse: steps"):
        methods.make("quantizers", "mse", {"stepz": 40})
    with pytest.raises(InputError, match=r"setting 'mse\.steps' must be a whole number, got 'many'"):
        methods.make("quantizers", "mse", {"steps": "many"})


@pytest.mark.parametrize("key", ["mze.steps", "steps", "mse."])
def test_settings_of_nobody(key: str) -> None:
    with pytest.raises(InputError, match=f"setting '{key}' must be METHOD.SETTING with METHOD one of "):
        methods.check_settings({key: 40})


def test_settings_of_a_method_that_is_not_used_are_checked_too() -> None:
    with pytest.raises(InputError, match=r"unknown setting 'mse\.stepz'"):
        methods.check_settings({"mse.stepz": 40})


@pytest.mark.usefixtures("fakes")
def test_two_methods_may_share_a_name() -> None:
    settings = {"budget": "0.25", "steps": "3"}
    assert methods.make("allocators", "shared", settings).budget == 0.25
    assert methods.make("quantizers", "shared", settings).steps == 3
    methods.check_settings({f"shared.{name}": value for name, value in settings.items()})
    with pytest.raises(InputError, match=r"unknown setting 'shared\.other'; settings of shared: steps"):
        methods.make("quantizers", "shared", {"other": 1})


@pytest.mark.usefixtures("fakes")
def test_failures_of_a_method() -> None:
    assert methods.find("quantizers") == ("extra", "needy", "picky", "shared", "strict")
    assert methods.describe("quantizers", "needy") == "About needy."
    with pytest.raises(InputError, match=r"quantizer 'extra': this needs torch: pip install 'quantkit\[torch\]'"):
        methods.make("quantizers", "extra", {})
    with pytest.raises(ModuleNotFoundError):
        methods.make("quantizers", "needy", {})
    with pytest.raises(InputError, match=r"quantizer 'picky' refuses its settings .*: no"):
        methods.make("quantizers", "picky", {})
    with pytest.raises(InputError, match=r"^own words$"):
        methods.make("quantizers", "strict", {})


@pytest.mark.parametrize(
    ("value", "wanted", "expected"),
    [
        ("40", int, 40),
        (40, float, 40.0),
        ("0.5", float, 0.5),
        ("yes", bool, True),
        ("False", bool, False),
        ("auto", str, "auto"),
        ("none", int | None, None),
        ("3", int | None, 3),
        ("a", Literal["a", "b"], "a"),
        ("2", Literal[2, 4], 2),
        ("2,4", tuple[int, ...], (2, 4)),
        ([2, 4], tuple[int, int], (2, 4)),
        ({"a": 1}, Any, {"a": 1}),
    ],
)
def test_conversion(value: object, wanted: object, expected: object) -> None:
    result = methods.convert(value, wanted, "m.s")
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "wanted", "message"),
    [
        ("x", int, "setting 'm.s' must be a whole number, got 'x'"),
        (True, int, "must be a whole number, got True"),
        (1.5, int, "must be a whole number, got 1.5"),
        ("maybe", bool, "must be true or false, got 'maybe'"),
        ("x", float | None, "must be a number or none, got 'x'"),
        ("c", Literal["a", "b"], "must be one of a, b, got 'c'"),
        ("1,x", tuple[int, ...], "must be a list like 8,8, got '1,x'"),
        ("1", tuple[int, int], "must be a list like 8,8, got '1'"),
        (3, tuple[int, ...], "must be a list like 8,8, got 3"),
    ],
)
def test_wrong_values(value: object, wanted: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        methods.convert(value, wanted, "m.s")
