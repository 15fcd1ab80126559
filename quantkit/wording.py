"""What was found, as an error tells it: never more than a line, whatever it was."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 100
"""Characters of a wrong value that an error repeats."""
FEW = 5
"""Names of a list that it repeats."""


def shown(value: object) -> str:
    """The beginning of a value's `repr`."""
    if isinstance(value, str):
        return repr(value if len(value) <= SHOWN else f"{value[:SHOWN]}...")
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # ValueError: a number of more digits than Python prints
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def few(names: Sequence[str]) -> str:
    """The first names of a list."""
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(map(shown, names[:FEW])) + more
