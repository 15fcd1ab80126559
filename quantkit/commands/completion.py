"""quantkit completion: a script with which the shell completes commands, options, their values, and paths."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace, _SubParsersAction

from quantkit import methods
from quantkit.commands import _common

HELP = "print a script that makes the shell complete quantkit's commands"
USAGE = "quantkit completion {bash,zsh,tcsh} [options]"
SHELLS = ("bash", "zsh", "tcsh")
FILES = frozenset({"MODEL", "PLAN", "PLAN_A", "PLAN_B", "OUT", "FILE", "SRC"})
FOLDERS = frozenset({"DIR"})


def add(parser: ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="whose language the script is in")
    _common.add_output(parser)


def run(args: Namespace) -> int:
    import shtab

    from quantkit.cli import build_parser

    parser = build_parser()
    _complete_values(parser)
    script = shtab.complete(parser, shell=args.shell)
    if args.json:
        _common.print_json({"shell": args.shell, "script": script})
    else:
        sys.stdout.write(f"{script}\n")
        _common.flush_stdout()
    return 0


def _complete_values(parser: ArgumentParser) -> None:
    """Say what each value is: a path, or the name of a method. The parser is good for nothing else afterwards."""
    import shtab

    from quantkit.schemas import schema_names

    names = {f"--{kind[:-1]}": ("auto", *methods.find(kind)) for kind in ("allocators", "quantizers", "tuners")}
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            for command, inner in action.choices.items():
                _complete_values(inner)
                if command == "schema":
                    next(item for item in inner._actions if item.dest == "name").choices = schema_names()
        elif action.metavar in FILES | FOLDERS:
            kind = shtab.FILE if action.metavar in FILES else shtab.DIRECTORY
            action.complete = kind  # type: ignore[attr-defined]  # read by shtab
        else:
            known = [names[option] for option in action.option_strings if option in names]
            action.choices = known[0] if known else action.choices
