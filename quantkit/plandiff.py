"""Two plans side by side: decisions, activation ranges and settings that differ.

Decisions are compared layer by layer where the model is known, so that `re:` and `op:` rules are compared by what they
decide; otherwise rule by rule, and the order of rules counts where it may decide. Reasons are never compared: they tell
what was measured, which is never twice the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from quantkit.errors import InputError
from quantkit.plan import group_runs, resolve
from quantkit.types import LayerPlan, Plan

FIELDS = ("bits", "group_size", "symmetric", "act_bits", "group_bits", "form")
PATTERNS = ("re:", "op:")


@dataclass(frozen=True)
class Difference:
    """Something that the plans say differently.

    Attributes:
        name: of the layer (or the rule's `match`), of the activation, or of the setting.
        first, second: what each plan says, as in its JSON.
        fields: the keys that differ; empty for a setting, and where one of the plans says nothing.
        missing: which plan says nothing, `first` or `second`; None = both say something.
    """

    name: str
    first: Any
    second: Any
    fields: tuple[str, ...] = ()
    missing: Literal["first", "second"] | None = None


@dataclass(frozen=True)
class PlanDiff:
    """What differs between two plans.

    Attributes:
        per_layer: rules were resolved with a model; `layers` then names layers, not rules.
        reordered: the plans have the same patterns in another order, so that another rule may decide.
    """

    layers: tuple[Difference, ...]
    activations: tuple[Difference, ...]
    settings: tuple[Difference, ...]
    per_layer: bool
    reordered: bool

    @property
    def same(self) -> bool:
        return not (self.layers or self.activations or self.settings or self.reordered)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "same": self.same}


def diff_plans(
    first: Plan,
    second: Plan,
    ops: Mapping[str, str] | None = None,
    names: tuple[str, str] = ("the first plan", "the second plan"),
) -> PlanDiff:
    """Compare two plans.

    >>> from quantkit import LayerPlan, Plan, QuantSpec, diff_plans
    >>> four, eight = (LayerPlan(QuantSpec(bits), None, "") for bits in (4, 8))
    >>> found = diff_plans(Plan({"a": four, "b": four}, {}, {}), Plan({"a": eight, "op:Conv": four}, {}, {}))
    >>> [(row.name, row.fields, row.missing) for row in found.layers]
    [('a', ('bits',), None), ('b', (), 'second'), ('op:Conv', (), 'first')]

    Args:
        ops: layer name -> operator type of the model that both are for; None = compare rule by rule.
        names: of the two, for messages.

    Raises:
        InputError: a rule matches no layer of the model.
    """
    rules = [first.layers, second.layers]
    if ops is not None:
        rules = [_resolved(plan, ops, name) for plan, name in zip((first, second), names, strict=True)]
    return PlanDiff(
        layers=_differences(*({name: decision_dict(layer) for name, layer in side.items()} for side in rules)),
        activations=_differences(
            *({name: asdict(act) for name, act in plan.activations.items()} for plan in (first, second))
        ),
        settings=_differences(first.settings, second.settings),
        per_layer=ops is not None,
        reordered=ops is None and _reordered(first, second),
    )


def decision_dict(layer: LayerPlan) -> dict[str, Any]:
    """What is decided, with the keys of a rule: {"float": True}, or FIELDS."""
    if layer.spec is None:
        return {"float": True}
    groups = layer.spec.group_bits
    runs = None if groups is None else group_runs(groups)
    values = {**asdict(layer.spec), "group_bits": runs, "form": layer.form or "auto"}
    return {key: values[key] for key in FIELDS}


def _resolved(plan: Plan, ops: Mapping[str, str], name: str) -> Mapping[str, LayerPlan]:
    try:
        return resolve(plan.layers, ops)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[Difference, ...]:
    """In the order of the first, then what only the second has."""
    found = []
    for name in dict.fromkeys((*first, *second)):
        if name not in first:
            found.append(Difference(name, None, second[name], missing="first"))
        elif name not in second:
            found.append(Difference(name, first[name], None, missing="second"))
        elif not _equal(first[name], second[name]):
            found.append(Difference(name, first[name], second[name], _fields(first[name], second[name])))
    return tuple(found)


def _equal(first: object, second: object) -> bool:
    """JSON's equality: 1 and true are two things, 1 and 1.0 are one."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(_equal, first, second))
    return isinstance(first, bool) == isinstance(second, bool) and first == second


def _fields(first: object, second: object) -> tuple[str, ...]:
    """Keys with different values, or `float` where only one side is quantized."""
    if not (isinstance(first, dict) and isinstance(second, dict)):
        return ()
    if first.keys() != second.keys():
        return tuple(key for key in ("float",) if key in first or key in second)
    return tuple(key for key in first if not _equal(first[key], second[key]))


def _reordered(first: Plan, second: Plan) -> bool:
    """Rules that both have stand in another order, and one of them is a pattern, which may overlap with others."""
    here = [match for match in first.layers if match in second.layers]
    there = [match for match in second.layers if match in first.layers]
    return here != there and any(match.startswith(PATTERNS) for match in here)
