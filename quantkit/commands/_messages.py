"""What --verbose and --debug add on standard error: log lines instead of bars, and coloured tracebacks."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from platform import python_version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantkit.report.progress import Advance

LOGGER = logging.getLogger("quantkit")
FORMAT = "quantkit: %(relativeCreated)7.0f ms: %(message)s"


@contextmanager
def logging_to_stderr(level: str | None) -> Iterator[None]:
    """Messages of quantkit from this level (`INFO`, `DEBUG`) on to standard error; None = nowhere."""
    if level is None:
        yield
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(FORMAT))
    before = LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(level)
    try:
        if LOGGER.isEnabledFor(logging.DEBUG):
            from quantkit.provenance import versions

            LOGGER.debug("python=%s %s", python_version(), versions())
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(before)


class LoggingProgress:
    """A line when a step begins, and one with its seconds when it has ended."""

    @contextmanager
    def task(self, name: str, total: int | None = None) -> Iterator[Advance]:
        start = time.perf_counter()
        LOGGER.info("%s%s", name, "" if total is None else f" ({total})")
        yield lambda count: None
        LOGGER.info("%s: %.2f s", name, time.perf_counter() - start)


def print_traceback(error: BaseException) -> None:
    """The whole way to an error, without the values of variables: they may be large, or private."""
    from rich.traceback import Traceback

    from quantkit.report.console import ErrorConsole

    ErrorConsole().print(Traceback.from_exception(type(error), error, error.__traceback__))
