"""JSON schemas (draft 2020-12) of what quantkit reads and prints: one file NAME.schema.json for each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantkit.errors import InputError

SUFFIX = ".schema.json"


def schema_names() -> tuple[str, ...]:
    """Sorted."""
    return tuple(sorted(path.name.removesuffix(SUFFIX) for path in Path(__file__).parent.glob(f"*{SUFFIX}")))


def load_schema(name: str) -> dict[str, Any]:
    """One schema as plain values.

    >>> load_schema("plan")["required"]
    ['version', 'layers']

    Raises:
        InputError: there is no schema of that name.
    """
    if name not in schema_names():
        raise InputError(f"there is no schema {name!r}; known schemas: {', '.join(schema_names())}")
    schema: dict[str, Any] = json.loads((Path(__file__).parent / f"{name}{SUFFIX}").read_text(encoding="utf-8"))
    return schema
