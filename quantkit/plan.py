"""Plan <-> JSON that people edit: an ordered list of rules, the first that matches a layer decides.

    {
      "version": 1,
      "layers": [
        {"match": "/conv1/Conv", "float": true, "reason": "first layer"},
        {"match": "op:MatMul", "bits": 4, "group_size": 32, "symmetric": false, "act_bits": null, "form": "auto"},
        {"match": "re:/block[0-9]+/.*", "bits": 8, "act_bits": 8, "form": "qdq", "reason": ""}
      ],
      "activations": {"/relu/Relu_output_0": {"scale": 0.0235, "zero_point": 0}},
      "settings": {"seed": 0}
    }

Groups of different widths are named in order, runs of equal ones together: "group_bits": "4x12 3x4 8" means 12 groups
of 4 bits, 4 of 3 bits and one of 8; a list of numbers says the same. `bits` is then what the layer was asked for.

`Plan.layers` keeps the rules as they stand, `match` -> decision; `resolve` turns them into one decision per layer.
A plan that `compress` made has one rule per layer, by name.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import re
import stat
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from quantkit.errors import InputError
from quantkit.methods import check_settings
from quantkit.options import CALIBRATORS, INPUTS, Options
from quantkit.types import ActParams, LayerPlan, Plan, QuantSpec
from quantkit.wording import few, shown

VERSION = 1
PLAN_KEYS = ("version", "layers", "activations", "settings")
SPEC_KEYS = ("bits", "group_size", "symmetric", "act_bits", "group_bits", "form")
RULE_KEYS = ("match", *SPEC_KEYS, "float", "reason")
ACTIVATION_KEYS = ("scale", "zero_point")
PLANNED = ("quantizer", "target", "seed", "augment", "holdout", "calibration_size")
NUMBERS = ("seed", "augment", "holdout", "calibration_size")
RUN = re.compile("([1-8])(?:x([1-9][0-9]{0,8}))?")
MOST_GROUPS = 1 << 24
"""Groups of all rules together."""
MOST_BYTES = 1 << 26
"""Of a plan file; a rule takes about 150."""
SINGLE = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
"""An escaped letter or a class in a regular expression."""
REPEAT = re.compile(r"[*+{]")
REPEATED_GROUP = re.compile(r"\)[*+{]")
MOST_REPEATS = 6
MOST_PATTERN = 1000
"""Characters of a regular expression."""
T = TypeVar("T")
UNMATCHED = "no rule of the plan matches it"


def plan_to_json(plan: Plan) -> str:
    """One line per rule and per activation; `plan_from_json` gives the same plan back, bit for bit."""
    rules = [_rule_to_dict(match, layer) for match, layer in plan.layers.items()]
    activations = {name: {"scale": act.scale, "zero_point": act.zero_point} for name, act in plan.activations.items()}
    lines = [
        "{",
        f'  "version": {VERSION},',
        f'  "layers": {_lines("[]", [_dump(rule) for rule in rules])},',
        f'  "activations": {_lines("{}", [f"{_dump(name)}: {_dump(act)}" for name, act in activations.items()])},',
        f'  "settings": {_lines("{}", [f"{_dump(name)}: {_dump(value)}" for name, value in plan.settings.items()])}',
        "}",
    ]
    return "\n".join(lines) + "\n"


def decisions_to_json(plan: Plan) -> str:
    """The plan without its reasons: they tell what was measured, which is never twice the same."""
    layers = {match: LayerPlan(layer.spec, layer.form, "") for match, layer in plan.layers.items()}
    return plan_to_json(Plan(layers, plan.activations, plan.settings))


def planned_options(plan: Plan, given: Mapping[str, Any]) -> dict[str, Any]:
    """The caller's options, and for those left out the ones that the plan was made with.

    Raises:
        InputError: the plan holds an option of the wrong kind.
    """
    kept = {key: plan.settings[key] for key in PLANNED if key in plan.settings}
    for key, value in kept.items():
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if not (whole if key in NUMBERS else isinstance(value, str)):
            wanted = "a whole number from 0" if key in NUMBERS else "text"
            raise InputError(f"plan: settings: {key} must be {wanted}, got {value!r}")
    calibrator = plan.settings.get("calibrator", "minmax")
    if calibrator not in CALIBRATORS[1:]:
        raise InputError(f"plan: settings: calibrator must be one of {', '.join(CALIBRATORS[1:])}, got {calibrator!r}")
    inputs = plan.settings.get("inputs", "float")
    if inputs not in INPUTS[1:]:
        raise InputError(f"plan: settings: inputs must be one of {', '.join(INPUTS[1:])}, got {inputs!r}")
    methods = {key: value for key, value in plan.settings.items() if "." in key}
    check_settings(methods)
    chosen = {key: value for key, value in given.items() if key != "quantizer" or value != "auto"}
    return {**kept, **chosen, "settings": {**methods, **given.get("settings", {})}}


def with_options(plan: Plan, options: Options) -> Plan:
    """The plan with the options that are really followed."""
    followed = {key: getattr(options, key) for key in PLANNED}
    if followed["quantizer"] == "auto":
        followed["quantizer"] = plan.settings.get("quantizer", "auto")
    return Plan(plan.layers, plan.activations, {**plan.settings, **followed, **dict(sorted(options.settings.items()))})


def plan_from_json(text: str, where: str = "plan") -> Plan:
    """Strict: every unknown key, wrong type or impossible value is an InputError that says where."""
    data = _object(_parse(text, where), where)
    _check_keys(data, PLAN_KEYS, where)
    if "version" not in data:
        raise InputError(f'{where}: "version" is missing; this version of quantkit writes {VERSION}')
    if data["version"] != VERSION or isinstance(data["version"], bool):
        raise InputError(
            f"{where}: version {shown(data['version'])} is not supported, only {VERSION}; make the plan again"
        )
    rules = data.get("layers")
    if not isinstance(rules, list):
        raise InputError(f'{where}: "layers" must be a list of rules, got {_kind(rules)}')
    layers: dict[str, LayerPlan] = {}
    groups = 0
    for index, rule in enumerate(rules):
        place = f"{where}: layers[{index}]"
        match, layer = _rule_from_dict(rule, place, MOST_GROUPS - groups)
        if match in layers:
            raise InputError(
                f"{place}: {shown(match)} already has a rule above; the first one decides, remove one of them"
            )
        layers[match] = layer
        groups += len(layer.spec.group_bits or ()) if layer.spec else 0
    activations = _object(data.get("activations", {}), f"{where}: activations")
    return Plan(
        layers=layers,
        activations={
            name: _act_from_dict(act, f"{where}: activations[{shown(name)}]") for name, act in activations.items()
        },
        settings=_object(data.get("settings", {}), f"{where}: settings"),
    )


def load_plan(path: str | Path) -> Plan:
    """Read a plan file."""
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "a device or a pipe"
            raise InputError(f"cannot read the plan {path}: it is {what}; give a .json file")
        if status.st_size > MOST_BYTES:
            raise InputError(f"{path} is not a plan: it has {status.st_size} bytes, a plan has at most {MOST_BYTES}")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read the plan {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a plan: not UTF-8 text at byte {error.start}") from error
    except ValueError as error:  # of a path with a zero byte
        raise InputError(f"cannot read the plan {str(path)!r}: {error}") from error
    return plan_from_json(text, where=str(path))


def save_plan(plan: Plan, path: str | Path) -> None:
    """Write a plan file; a half-written one never has the final name."""
    from quantkit.files import write_text

    write_text(Path(path), plan_to_json(plan))


def resolve(rules: Mapping[str, LayerPlan], ops: Mapping[str, str]) -> dict[str, LayerPlan]:
    """One decision per layer, in the order of `ops`; a layer that no rule matches stays float.

    Args:
        rules: match -> decision, first match wins. A match that is exactly a layer's name means that layer;
            `re:` must match the whole name; `op:` compares the operator type.
        ops: layer name -> operator type.

    Raises:
        InputError: rules that match no layer, each with the nearest names.
    """
    unused = [match for match in rules if not any(_matches(match, name, op, ops) for name, op in ops.items())]
    if unused:
        raise InputError("; ".join(_unused_sentence(match, ops) for match in unused))
    decisions: dict[str, LayerPlan] = {}
    for name, op in ops.items():
        matching = (layer for match, layer in rules.items() if _matches(match, name, op, ops))
        decisions[name] = next(matching, LayerPlan(None, None, UNMATCHED))
    return decisions


def _matches(match: str, name: str, op: str, ops: Mapping[str, str]) -> bool:
    if match in ops:
        return match == name
    if match.startswith("re:"):
        return _compile(match, "plan").fullmatch(name) is not None
    return match.startswith("op:") and match[3:] == op


def _compile(match: str, where: str) -> re.Pattern[str]:
    if len(match) > MOST_PATTERN:
        raise InputError(f"{where}: {shown(match)} has {len(match)} characters, the most are {MOST_PATTERN}")
    plain = SINGLE.sub("x", match[3:])
    if REPEATED_GROUP.search(plain) or len(REPEAT.findall(plain)) > MOST_REPEATS:
        raise InputError(
            f"{where}: {shown(match)} repeats a group, or more than {MOST_REPEATS} times, and could search for ever; "
            "repeat single letters or classes"
        )
    try:
        return re.compile(match[3:])
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"{where}: {shown(match)} is not a valid regular expression: {error}") from error


def _unused_sentence(match: str, ops: Mapping[str, str]) -> str:
    if match.startswith("op:"):
        hint = f"the operators are {', '.join(sorted(set(ops.values())))}" if ops else "the model has no layers"
    else:
        near = difflib.get_close_matches(match.removeprefix("re:"), ops, n=3, cutoff=0.3) or list(ops)[:3]
        hint = f"the nearest are {', '.join(map(repr, near))}" if near else "the model has no layers"
    return f"plan rule {match!r} matches no layer; {hint}"


def _rule_to_dict(match: str, layer: LayerPlan) -> dict[str, Any]:
    if layer.spec is None:
        return {"match": match, "float": True, "reason": layer.reason}
    groups = layer.spec.group_bits
    return {
        "match": match,
        "bits": layer.spec.bits,
        "group_size": layer.spec.group_size,
        "symmetric": layer.spec.symmetric,
        "act_bits": layer.spec.act_bits,
        **({} if groups is None else {"group_bits": group_runs(groups)}),
        "form": "auto" if layer.form is None else layer.form,
        "reason": layer.reason,
    }


def group_runs(group_bits: tuple[int, ...]) -> str:
    """(4, 4, 3, 8) -> "4x2 3 8"."""
    runs = ((bits, sum(1 for _ in run)) for bits, run in itertools.groupby(group_bits))
    return " ".join(f"{bits}x{count}" if count > 1 else str(bits) for bits, count in runs)


def _group_bits(value: object, where: str, most: int) -> tuple[int, ...] | None:
    """The inverse of `group_runs`; a list of widths is taken as it stands."""
    if value is None:
        return None
    if isinstance(value, list):
        if not all(isinstance(bits, int) and not isinstance(bits, bool) for bits in value):
            raise InputError(f"{where}: group_bits must be a list of whole numbers, got {shown(value)}")
        return tuple(value)
    if not isinstance(value, str):
        raise InputError(f'{where}: group_bits must be text such as "4x12 3x4 8" or a list, got {shown(value)}')
    runs = [RUN.fullmatch(part) for part in value.split(" ")]
    counts = [int(run[2] or 1) for run in runs if run]
    if len(counts) < len(runs):
        raise InputError(f'{where}: group_bits must be runs of widths 1 to 8 such as "4x12 3x4 8", got {shown(value)}')
    if sum(counts) > most:
        after = "" if most == MOST_GROUPS else " after the rules above"
        raise InputError(f"{where}: group_bits names {sum(counts)} groups; no layer has more than {most}{after}")
    return tuple(int(run[1]) for run, count in zip(runs, counts, strict=True) if run for _ in range(count))


def _rule_from_dict(rule: object, where: str, most_groups: int) -> tuple[str, LayerPlan]:
    data = _object(rule, where)
    _check_keys(data, RULE_KEYS, where)
    match = _typed(data, "match", str, where)
    if match is None:
        raise InputError(f'{where}: "match" is missing; give a layer name, re:PATTERN or op:TYPE')
    if match.startswith("re:"):
        _compile(match, where)
    reason = _typed(data, "reason", str, where) or ""
    is_float = _typed(data, "float", bool, where)
    given = [key for key in SPEC_KEYS if key in data]
    if is_float:
        if given:
            raise InputError(f'{where}: "float": true cannot go with {", ".join(given)}; remove one or the other')
        return match, LayerPlan(None, None, reason)
    bits = _typed(data, "bits", int, where)
    if bits is None:
        raise InputError(f'{where}: needs "bits" (1 to 8) or "float": true')
    group_size = _typed(data, "group_size", int, where)
    form = _typed(data, "form", str, where)
    groups = _group_bits(data.get("group_bits"), where, most_groups)
    try:
        spec = QuantSpec(
            bits=bits,
            group_size=QuantSpec.group_size if group_size is None else group_size,
            symmetric=bool(_typed(data, "symmetric", bool, where)),
            act_bits=_typed(data, "act_bits", int, where),
            group_bits=groups,
        )
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return match, LayerPlan(spec, None if form == "auto" else form, reason)


def _act_from_dict(value: object, where: str) -> ActParams:
    data = _object(value, where)
    _check_keys(data, ACTIVATION_KEYS, where)
    scale, zero_point = data.get("scale"), data.get("zero_point")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale <= sys.float_info.max:
        raise InputError(f"{where}: scale must be a number above 0, got {shown(scale)}")
    if isinstance(zero_point, bool) or not isinstance(zero_point, int) or not 0 <= zero_point <= 255:
        raise InputError(f"{where}: zero_point must be a whole number from 0 to 255, got {shown(zero_point)}")
    return ActParams(scale=float(scale), zero_point=zero_point)


def _parse(text: str, where: str) -> object:
    def refuse_constant(name: str) -> object:
        raise InputError(f"{where}: {name} is not a JSON number")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = sorted(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        if twice:
            raise InputError(f"{where}: {few(twice)} given twice in one object; keep one")
        return dict(pairs)

    def finite(text: str) -> float:
        if math.isinf(number := float(text)):
            raise InputError(f"{where}: {shown(text)} is larger than any number that a plan can hold")
        return number

    try:
        text.encode()
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse_constant, parse_float=finite)
    except InputError:
        raise
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise InputError(
            f"{where} is not JSON that quantkit can read: its lists are too deep for Python's recursion"
        ) from error
    except ValueError as error:
        raise InputError(f"{where} is not JSON that quantkit can read: {error}") from error


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where} must be a JSON object, got {_kind(value)}")
    return value


def _check_keys(data: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    unknown = [key for key in data if key not in known]
    if unknown:
        raise InputError(f"{where}: unknown key {few(unknown)}; known keys: {', '.join(known)}")


def _typed(data: Mapping[str, Any], key: str, kind: type[T], where: str) -> T | None:
    """The value, None when it is absent or null."""
    value = data.get(key)
    if value is None:
        return None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {int: "a whole number", bool: "true or false", str: "text"}
        raise InputError(f"{where}: {key} must be {names[kind]}, got {shown(value)}")
    if isinstance(value, int) and abs(value) > MOST_GROUPS:
        raise InputError(f"{where}: {key} must be a whole number of fewer digits, got {shown(value)}")
    return value


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), "a number")


def _dump(value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"the plan holds a value that JSON cannot: {error}") from error
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: only an escape can carry it
        return json.dumps(value)
    return text


def _lines(brackets: str, items: list[str]) -> str:
    """A JSON list or object with one item per line."""
    if not items:
        return brackets
    return f"{brackets[0]}\n    " + ",\n    ".join(items) + f"\n  {brackets[1]}"
