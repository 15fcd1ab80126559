"""JSON schemas made from dataclasses: fields are the keys, docstrings the descriptions."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

DRAFT = "https://json-schema.org/draft/2020-12/schema"
ENTRY = re.compile(r"^(?P<names>\w+(?:, \w+)*): (?P<text>.*)$")
PLAIN: Mapping[Any, dict[str, Any]] = types.MappingProxyType(
    {
        str: {"type": "string"},
        bool: {"type": "boolean"},
        int: {"type": "integer"},
        float: {"type": ["number", "null"]},  # infinite and undefined figures are null in JSON
        Any: {},
    }
)


@dataclass(frozen=True)
class Output:
    """A dataclass as a verb prints it.

    Attributes:
        name: of the schema.
        kind: the dataclass behind it.
        title: one line.
        extra: dataclass -> keys that its JSON has beside its fields.
        optional: keys of the whole that may be absent.
    """

    name: str
    kind: type
    title: str
    extra: Mapping[type, Mapping[str, dict[str, Any]]] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()


def build_schema(output: Output) -> dict[str, Any]:
    """The whole schema; nested dataclasses stand in $defs."""
    found: dict[type, dict[str, Any]] = {}
    whole = _of_class(output.kind, output, found)
    whole["required"] = [key for key in whole["required"] if key not in output.optional]
    inner = {kind.__name__: schema for kind, schema in sorted(found.items(), key=lambda item: item[0].__name__)}
    head = {"$schema": DRAFT, "$id": f"urn:quantkit:schema:{output.name}", "title": output.title}
    return {**head, **whole, "$defs": inner}


def _of_class(kind: type, output: Output, found: dict[type, dict[str, Any]]) -> dict[str, Any]:
    hints, texts = typing.get_type_hints(kind), descriptions(kind)
    properties: dict[str, Any] = {}
    for item in fields(kind):
        described = {"description": texts[item.name]} if item.name in texts else {}
        properties[item.name] = {**_of(hints[item.name], output, found), **described}
    properties.update(output.extra.get(kind, {}))
    summary = " ".join(inspect.getdoc(kind).partition("\n\n")[0].split()) if kind.__doc__ else ""
    return {
        "description": summary,
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _of(hint: Any, output: Output, found: dict[type, dict[str, Any]]) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in PLAIN:
        return dict(PLAIN[hint])
    if is_dataclass(hint) and isinstance(hint, type):
        if hint not in found:
            found[hint] = {}
            found[hint] = _of_class(hint, output, found)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    if origin in (typing.Union, types.UnionType):
        kinds = [_of(item, output, found) for item in arguments if item is not type(None)]
        if type(None) in arguments:
            kinds.append({"type": "null"})
        if all(kind.keys() == {"type"} for kind in kinds):
            names = [name for kind in kinds for name in _names(kind["type"])]
            return {"type": list(dict.fromkeys(names))}
        return {"anyOf": kinds}
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin is tuple and arguments[1:] == (...,):
        return {"type": "array", "items": _of(arguments[0], output, found)}
    if origin is tuple:
        items = [_of(item, output, found) for item in arguments]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    assert origin is Mapping or origin is typing.get_origin(Mapping[str, int]), hint
    names = {"propertyNames": {"pattern": "^[0-9]+$"}} if arguments[0] is int else {}
    return {"type": "object", **names, "additionalProperties": _of(arguments[1], output, found)}


def _names(types_: str | list[str]) -> list[str]:
    return [types_] if isinstance(types_, str) else types_


def descriptions(kind: type) -> dict[str, str]:
    """Field -> its text under `Attributes:` of the docstring."""
    lines = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2].splitlines()
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in lines:
        if line and not line.startswith(" "):
            break
        entry = ENTRY.match(line.strip()) if line.startswith("    ") and not line.startswith("     ") else None
        if entry is not None:
            names = entry["names"].split(", ")
            texts.update(dict.fromkeys(names, entry["text"]))
        else:
            texts.update({name: f"{texts[name]} {line.strip()}".strip() for name in names})
    return texts
