"""quantkit methods: what there is to choose from, and the settings of each."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from quantkit import methods
from quantkit.commands import _common
from quantkit.errors import InputError

HELP = "list allocators, quantizers, transforms and emitted forms, or explain one"
USAGE = "quantkit methods [NAME] [options]"


def add(parser: ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="?", help="show this method's description and settings")
    _common.add_output(parser)


def run(args: Namespace) -> int:
    if args.name is None:
        return _list(args)
    kinds = [kind for kind in methods.KINDS if args.name in methods.find(kind)]
    if not kinds:
        known = "; ".join(f"{kind}: {', '.join(methods.find(kind)) or 'none'}" for kind in methods.KINDS)
        raise InputError(f"there is no method {args.name!r}; {known}")
    data = [_explain(kind, args.name) for kind in kinds]
    console = _common.console_of(args)

    from rich.text import Text

    from quantkit.report.console import plain_table

    for method in data:
        console.print(Text(f"{method['kind'][:-1]} {method['name']}", style="bold"))
        for paragraph in method["description"].split("\n\n"):
            console.print(Text(" ".join(paragraph.split())))
        if not method["settings"]:
            console.print("no settings")
            continue
        table = plain_table("", ("setting", "type", "default"))
        for setting in method["settings"]:
            default = "required" if setting["default"] is None else setting["default"]
            table.add_row(Text(f"{method['name']}.{setting['name']}"), Text(setting["type"]), Text(default))
        console.print(table)
    if args.json:
        _common.print_json(data)
    return 0


def _list(args: Namespace) -> int:
    data = [
        {"kind": kind, "name": name, "description": methods.describe(kind, name)}
        for kind in methods.KINDS
        for name in methods.find(kind)
    ]

    from rich.text import Text

    from quantkit.report.console import plain_table

    table = plain_table("", ("kind", "name", "what it does"))
    for row in data:
        first = row["description"].partition("\n\n")[0].replace("\n", " ")
        table.add_row(row["kind"][:-1], row["name"], Text(first))
    _common.console_of(args).print(table)
    if args.json:
        _common.print_json(data)
    return 0


def _explain(kind: str, name: str) -> dict[str, Any]:
    settings = methods.settings_of(kind, name)
    return {
        "kind": kind,
        "name": name,
        "description": methods.describe(kind, name),
        "settings": [{"name": item.name, "type": item.type, "default": item.default} for item in settings],
    }
