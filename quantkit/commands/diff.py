"""quantkit diff: what two plans decide differently."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.commands import _common
from quantkit.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from quantkit.plandiff import Difference, PlanDiff

HELP = "compare two plans (exit code 1 where they differ)"
USAGE = "quantkit diff PLAN_A PLAN_B [--model MODEL] [options]"
VALUE_WIDTH = 20
LONGEST = 90


def add(parser: ArgumentParser) -> None:
    parser.add_argument("first", metavar="PLAN_A", help="a plan as `compress --save-plan` writes it")
    parser.add_argument("second", metavar="PLAN_B", help="the plan to compare with it")
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="the .onnx file that both are for: rules are compared by the layers they decide",
    )
    _common.add_output(parser)


def run(args: Namespace) -> int:
    paths = [_plan_file(text) for text in (args.first, args.second)]
    model = None if args.model is None else _common.existing_file(args.model)

    from quantkit.plan import load_plan
    from quantkit.plandiff import diff_plans

    first, second = map(load_plan, paths)
    ops = None if model is None else _operators(model)
    found = diff_plans(first, second, ops, (str(paths[0]), str(paths[1])))
    show(found, (str(paths[0]), str(paths[1])), _common.console_of(args))
    if args.json:
        _common.print_json({"first": paths[0], "second": paths[1], **found.to_dict()})
    return 0 if found.same else 1


def _plan_file(text: str) -> Path:
    path = _common.existing_file(text)
    if path.suffix == ".onnx":
        raise InputError(
            f"{path} is a model, which holds no more than its plan's hash; give the file that --save-plan wrote"
        )
    return path


def _operators(model: Path) -> dict[str, str]:
    """Layer -> operator, in the model's order."""
    from quantkit.graph.load import load_model
    from quantkit.graph.targets import find_targets

    targets, _ = find_targets(load_model(model).model)
    return {name: target.op for name, target in targets.items()}


def show(found: PlanDiff, names: tuple[str, str], console: Console) -> None:
    """One row for each key that differs."""
    from rich.text import Text

    from quantkit.report.console import NAME_WIDTH, plain_table, shorten

    kinds = (
        ("layers" if found.per_layer else "rules", found.layers),
        ("activation ranges", found.activations),
        ("settings", found.settings),
    )
    for title, rows in kinds:
        heading = f"{title} that differ ({len(rows)})"
        table = plain_table(heading, ("name", "what"))
        table.min_width = len(heading) + 1  # else a narrow table breaks its title
        for path in names:
            table.add_column(Text(shorten(path, VALUE_WIDTH)), overflow="fold")
        for row in rows:
            for place, (key, values) in enumerate(_lines(row)):
                name = shorten(row.name, NAME_WIDTH) if place == 0 else ""
                table.add_row(Text(name), key, *(Text(shorten(value, LONGEST)) for value in values))
        if rows:
            console.print(table)
    if found.reordered:
        console.print("rules stand in another order: where several match a layer, the first decides (--model compares)")
    if found.same:
        console.print("the plans decide the same")


def _lines(row: Difference) -> Iterator[tuple[str, tuple[str, str]]]:
    """(key, what each plan says) of one difference; the key is empty where the whole of it differs."""
    if row.missing is None and row.fields and not any("float" in side for side in (row.first, row.second)):
        for key in row.fields:
            yield key, (_text(row.first[key]), _text(row.second[key]))
        return
    first = "-" if row.missing == "first" else _text(row.first)
    yield "", (first, "-" if row.missing == "second" else _text(row.second))


def _text(value: Any) -> str:
    """A decision or a range in words, else JSON."""
    if isinstance(value, dict) and value.get("float") is True:
        return "float"
    if isinstance(value, dict) and value:
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items() if item is not None)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
