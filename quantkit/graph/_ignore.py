"""Match the user's list of layers to leave alone against what the model has."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from quantkit.errors import InputError
from quantkit.types import Target


def apply_ignore(
    entries: Sequence[str], targets: Mapping[str, Target], others: Sequence[tuple[str, str]]
) -> frozenset[str]:
    """Names of the targets to leave alone; `others` are the (name, operator) that are no targets anyway."""
    names = {name: _names(target) for name, target in targets.items()}
    known = {name for aliases in names.values() for name in aliases} | {name for name, _ in others}
    operators = {target.op for target in targets.values()} | {op for _, op in others}
    ignored: set[str] = set()
    for entry in entries:
        matches = _matches(entry, known, operators)
        for name, target in targets.items():
            if (entry.startswith("op:") and target.op in matches) or matches & names[name]:
                ignored.add(name)
    return frozenset(ignored)


def _names(target: Target) -> frozenset[str]:
    nodes = {use.node.name for use in target.uses}
    return frozenset(name for name in {target.name, target.weight.name, *nodes} if name)


def _matches(entry: str, known: Iterable[str], operators: Iterable[str]) -> frozenset[str]:
    """The names (or, for `op:`, the operators) that one entry means."""
    if entry.startswith("op:"):
        matched = frozenset(operators) & {entry[3:]}
        if not matched:
            have = ", ".join(sorted(operators)) or "none"
            raise InputError(f"ignore entry '{entry}' matches no layer: the model's weights are read by {have}")
        return matched
    if entry.startswith("re:"):
        try:
            pattern = re.compile(entry[3:])
        except re.error as error:
            raise InputError(f"ignore entry '{entry}' is not a regular expression: {error}") from error
        matched = frozenset(name for name in known if pattern.fullmatch(name))
        hint = "it must match a whole name, so '.*' may be missing at its ends"
    else:
        matched = frozenset(known) & {entry}
        close = difflib.get_close_matches(entry, sorted(known), n=3, cutoff=0.4)
        hint = f"the nearest names are {', '.join(close)}" if close else "no name comes near"
    if not matched:
        raise InputError(f"ignore entry '{entry}' matches no layer: {hint}")
    return matched
