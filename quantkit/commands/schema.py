"""quantkit schema: the JSON schema of a plan, or of what a verb prints with --json."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from quantkit.commands import _common
from quantkit.schemas import load_schema, schema_names

HELP = "print the JSON schema of a plan, a report or a --json output"
USAGE = "quantkit schema [NAME] [options]"


def add(parser: ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="?", help="one of those that `quantkit schema` lists")
    _common.add_output(parser)


def run(args: Namespace) -> int:
    if args.name is not None:
        _common.print_json(load_schema(args.name))
        return 0
    rows = [{"name": name, "title": load_schema(name)["title"]} for name in schema_names()]

    from rich.text import Text

    from quantkit.report.console import plain_table

    table = plain_table("", ("name", "describes"))
    for row in rows:
        table.add_row(row["name"], Text(row["title"]))
    _common.console_of(args).print(table)
    if args.json:
        _common.print_json(rows)
    return 0
