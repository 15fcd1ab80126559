"""The command `quantkit`: parse, run one verb, turn errors into one sentence.

Exit codes: 0 = done, 1 = done but the budget or the accuracy asked for was not met, 2 = not done.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import current_thread, main_thread
from typing import NoReturn

from quantkit.commands import (
    apply,
    bench,
    completion,
    compress,
    demo,
    diff,
    inspect,
    methods,
    schema,
    sensitivity,
    tune,
    verify,
)
from quantkit.commands._common import flush_stdout
from quantkit.errors import InputError, VerificationError

VERBS = (
    ("compress", compress),
    ("tune", tune),
    ("apply", apply),
    ("diff", diff),
    ("inspect", inspect),
    ("sensitivity", sensitivity),
    ("verify", verify),
    ("bench", bench),
    ("methods", methods),
    ("schema", schema),
    ("demo", demo),
    ("completion", completion),
)
BAD_INPUT = 2
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
EPILOG = (
    "Tables go to standard error, --json to standard output. "
    "Exit codes: 0 = done; 1 = done, but the budget or the accuracy asked for was not met, or the plans "
    "differ; 2 = not done."
)


class Formatter(argparse.HelpFormatter):
    """`-o, --output OUT` with the same spacing on every Python version."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"


class Parser(argparse.ArgumentParser):
    """An error is one sentence, like every other error of the command."""

    def error(self, message: str) -> NoReturn:
        _complain(f"{message}; see {self.prog} --help")
        raise SystemExit(BAD_INPUT)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; builds in milliseconds and imports nothing heavy."""
    parser = Parser(
        prog="quantkit",
        usage="quantkit [--help] [--version] COMMAND ...",
        description="Compress ONNX models by mixed-precision quantization.",
        epilog=EPILOG,
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", title="commands", prog="quantkit", parser_class=Parser
    )
    for name, module in VERBS:
        command = commands.add_parser(
            name,
            help=module.HELP,
            usage=module.USAGE,
            description=f"{module.HELP[0].upper()}{module.HELP[1:]}.",
            formatter_class=Formatter,
            allow_abbrev=False,
        )
        module.add(command)
        command.set_defaults(run=module.run)
    return parser


class Version(argparse.Action):
    """--version."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from quantkit import __version__

        print(f"quantkit {__version__}")
        raise SystemExit(0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = build_parser()
    try:
        args, unknown = parser.parse_known_args(argv)
        if unknown:
            parser.prog = f"quantkit {args.command or ''}".strip()  # whose help has them
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        args.argv = list(sys.argv[1:] if argv is None else argv)
        if args.command is None:
            parser.print_help(sys.stderr)
            return BAD_INPUT
    except SystemExit as stop:
        flush_stdout()
        return int(stop.code or 0)
    from quantkit.commands._messages import logging_to_stderr, print_traceback

    level = "DEBUG" if args.debug else "INFO" if args.verbose else None
    try:
        with logging_to_stderr(level), stopped_like_ctrl_c():
            return int(args.run(args))
    except BaseException as error:  # every failure becomes one sentence here; --debug shows the rest
        if isinstance(error, SystemExit | GeneratorExit):
            raise
        if args.debug:
            print_traceback(error)
        _complain(explain(error, getattr(args, "output", None)))
        return BAD_INPUT


@contextmanager
def stopped_like_ctrl_c() -> Iterator[None]:
    """SIGTERM, by which job queues and containers stop a command, cleans up and explains itself as Ctrl-C does."""
    mine = current_thread() is main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if mine:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def explain(error: BaseException, output: str | None) -> str:
    """One sentence for any failure."""
    from quantkit.methods import missing_extra

    if isinstance(error, InputError | VerificationError):
        return _one_line(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; no half-written file is left"
    if isinstance(error, ModuleNotFoundError) and (sentence := missing_extra(error)) is not None:
        return str(sentence)
    if isinstance(error, MemoryError):
        return "not enough memory; --batch-size and --memory-limit reduce what calibration needs"
    if isinstance(error, OSError) and error.errno is not None:
        reason = error.strerror or os.strerror(error.errno)
        where = str(error.filename or output or "file")
        return f"{where}: {reason}{_space_hint(where) if error.errno in FULL else ''}"
    return f"internal error, {type(error).__name__}: {_one_line(error)}; --debug shows where"


def _space_hint(where: str) -> str:
    scratch = Path(where).parent.name.startswith("quantkit-")  # where a model is proved before it is saved
    return f"; free some space or {'set TMPDIR to another folder' if scratch else 'write elsewhere with -o'}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _complain(sentence: str) -> None:
    try:
        sys.stderr.write(f"quantkit: error: {sentence}\n")
        sys.stderr.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
