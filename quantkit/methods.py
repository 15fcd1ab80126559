"""Methods are found by their file names: `quantizers/gptq.py` is the quantizer `gptq`.

A method's file ends with `METHOD: type[WeightQuantizer] = GPTQ`, a frozen dataclass whose fields are the settings.
Listing reads file names and docstrings only; `make` imports the one file that is used.
"""

from __future__ import annotations

import ast
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from quantkit.errors import InputError

KINDS = ("allocators", "quantizers", "transforms", "emitters", "tuners")
EXTRAS = types.MappingProxyType(
    {
        "torch": "torch",
        "triton": "gpu",
        "xgboost": "autotune",
        "ray": "cluster",
        "tokenizers": "text",
        "PIL": "images",
        "yaml": "images",
        "sklearn": "demo",
        "matplotlib": "report",
        "jinja2": "report",
        "vl_convert": "report",
    }
)
TRUTHS = types.MappingProxyType({"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False})


@dataclass(frozen=True)
class Setting:
    """One field of a method's dataclass; `default` is its repr, None when the setting is required."""

    name: str
    type: str
    default: str | None


def find(kind: str) -> tuple[str, ...]:
    """Names of the methods of one kind, sorted."""
    return tuple(sorted(item.name for item in iter_modules([str(_folder(kind))]) if not item.name.startswith("_")))


def check(kind: str, name: str) -> None:
    """Raises: InputError when there is no such method."""
    names = find(kind)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"there is no {kind[:-1]} {name!r}; {hint}known {kind}: {', '.join(names) or 'none'}")


def transform_names(text: str | None) -> tuple[str, ...]:
    """`cle,smoothquant` -> ("cle", "smoothquant"); empty for None, `none` and `auto`.

    Raises:
        InputError: a name that there is not, or one that is given twice.
    """
    if text in (None, "none", "auto"):
        return ()
    assert text is not None
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name in ("none", "auto"):
            raise InputError(f"transform {name!r} cannot go with others, got {text!r}")
        check("transforms", name)
        if names.count(name) > 1:
            raise InputError(f"transform {name!r} is given twice in {text!r}")
    return names


def describe(kind: str, name: str) -> str:
    """The docstring of the method's file, read without importing it."""
    check(kind, name)
    source = (_folder(kind) / f"{name}.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)) or ""


def settings_of(kind: str, name: str) -> tuple[Setting, ...]:
    """The settings that `--set NAME.SETTING=VALUE` takes."""
    method = _load(kind, name)
    return tuple(
        Setting(name=item.name, type=_type_name(method, item.name), default=_default(item))
        for item in _init_fields(method)
    )


def make(kind: str, name: str, settings: Mapping[str, Any]) -> Any:
    """The method, ready to use.

    Args:
        kind: `allocators`, `quantizers`, `transforms`, `emitters` or `tuners`.
        name: file name.
        settings: of this method, `{"steps": 40}`; texts are converted to the field's type.

    Raises:
        InputError: unknown method or setting, a value of the wrong type, or a package that is not installed.
    """
    method = _load(kind, name)
    hints = typing.get_type_hints(method) if is_dataclass(method) else {}
    known = [item.name for item in _init_fields(method)]
    values: dict[str, Any] = {}
    for setting, value in settings.items():
        if setting in known:
            values[setting] = convert(value, hints[setting], f"{name}.{setting}")
        elif not _known_elsewhere(kind, name, setting):
            raise InputError(f"unknown setting '{name}.{setting}'; settings of {name}: {', '.join(known) or 'none'}")
    try:
        return method(**values)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"{kind[:-1]} {name!r} refuses its settings {values}: {error}") from error


def check_settings(settings: Mapping[str, Any]) -> None:
    """Settings of all methods as the user gives them, `{"mse.steps": 40}`; also of methods that will not be used.

    Raises:
        InputError: no such method or setting, or a value of the wrong type.
    """
    names = sorted({name for kind in KINDS for name in find(kind)})
    for key, value in settings.items():
        owner, dot, setting = key.partition(".")
        if not dot or not setting or owner not in names:
            raise InputError(f"setting {key!r} must be METHOD.SETTING with METHOD one of {', '.join(names)}")
        for kind in KINDS:
            if owner in find(kind):
                make(kind, owner, {setting: value})


def convert(value: Any, wanted: Any, key: str) -> Any:
    """A setting's value as its field's type; text is parsed, anything else must already fit."""
    options = typing.get_args(wanted) if typing.get_origin(wanted) in (typing.Union, types.UnionType) else (wanted,)
    for option in options:
        found, result = _convert_one(value, option)
        if found:
            return result
    names = " or ".join(_plain_name(option) for option in options)
    raise InputError(f"setting {key!r} must be {names}, got {value!r}")


def missing_extra(error: ModuleNotFoundError) -> InputError | None:
    """The sentence for an optional package that is not installed; None when it is no optional package."""
    package = (error.name or "").partition(".")[0]
    extra = EXTRAS.get(package)
    return InputError(f"this needs {package}: pip install 'quantkit[{extra}]'") if extra else None


def _folder(kind: str) -> Path:
    if kind not in KINDS:
        raise InputError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return Path(__file__).parent / kind


def _load(kind: str, name: str) -> Any:
    check(kind, name)
    try:
        return import_module(f"quantkit.{kind}.{name}").METHOD
    except ModuleNotFoundError as error:
        sentence = missing_extra(error)
        if sentence is None:
            raise
        raise InputError(f"{kind[:-1]} {name!r}: {sentence}") from error


def _init_fields(method: Any) -> list[Any]:
    return [item for item in fields(method) if item.init] if is_dataclass(method) else []


def _known_elsewhere(kind: str, name: str, setting: str) -> bool:
    """An allocator and a quantizer may share a name; the setting may be the other one's."""
    others = [other for other in KINDS if other != kind and name in find(other)]
    return any(setting == item.name for other in others for item in _init_fields(_load(other, name)))


def _convert_one(value: Any, wanted: Any) -> tuple[bool, Any]:
    """(fits, value)."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is typing.Literal:
        matches = [option for option in arguments if option == value or str(option) == value]
        return (True, matches[0]) if matches else (False, None)
    if origin is tuple:
        return _convert_tuple(value, arguments)
    if wanted is type(None):
        return value is None or value in ("none", "None"), None
    if isinstance(value, str) and wanted in (int, float, bool, Path):
        return _parse(value, wanted)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return True, float(value)
    if wanted is int and isinstance(value, bool):
        return False, None
    return wanted is Any or (isinstance(wanted, type) and isinstance(value, wanted)), value


def _convert_tuple(value: Any, arguments: tuple[Any, ...]) -> tuple[bool, Any]:
    if not isinstance(value, str | list | tuple):
        return False, None
    items = [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else list(value)
    kinds = [arguments[0]] * len(items) if len(arguments) == 2 and arguments[1] is ... else list(arguments)
    if len(items) != len(kinds):
        return False, None
    converted = [_convert_one(item, kind) for item, kind in zip(items, kinds, strict=True)]
    return all(fits for fits, _ in converted), tuple(result for _, result in converted)


def _parse(text: str, wanted: Any) -> tuple[bool, Any]:
    if wanted is bool:
        truth = TRUTHS.get(text.strip().lower())
        return truth is not None, truth
    try:
        return True, wanted(text)
    except ValueError:
        return False, None


def _plain_name(wanted: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    if typing.get_origin(wanted) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(wanted)))
    if typing.get_origin(wanted) is tuple:
        return f"a list like {_list_example(typing.get_args(wanted))}"
    return names.get(wanted, getattr(wanted, "__name__", str(wanted)))


def _list_example(arguments: tuple[Any, ...]) -> str:
    sample = {int: "8", float: "0.5", str: "name"}.get(arguments[0], "value") if arguments else "value"
    return f"{sample},{sample}"


def _type_name(method: Any, field_name: str) -> str:
    hint = typing.get_type_hints(method)[field_name]
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _default(item: Any) -> str | None:
    if item.default is not MISSING:
        return repr(item.default)
    return None if item.default_factory is MISSING else repr(item.default_factory())
