"""Progress of the long steps: shown by the command line, silent in the Python API.

with progress.task("calibrating", total=len(batches)) as advance:
    for batch in batches:
        ...
        advance(1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console

Advance = Callable[[int], None]


class Progress(Protocol):
    """Where a run says what it is doing."""

    def task(self, name: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """A step of `total` units (None = unknown); tasks may be nested."""


class SilentProgress:
    """Says nothing."""

    @contextmanager
    def task(self, name: str, total: int | None = None) -> Iterator[Advance]:
        yield lambda count: None


class ConsoleProgress:
    """Bars with elapsed and remaining time, removed when their step is done; silent when not on a terminal."""

    def __init__(self, console: Console) -> None:
        from rich import progress

        columns = (
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
        )
        self._bars = progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._depth = 0

    @contextmanager
    def task(self, name: str, total: int | None = None) -> Iterator[Advance]:
        if self._depth == 0:
            self._bars.start()
        self._depth += 1
        bar = self._bars.add_task(name, total=total)
        try:
            yield lambda count: self._bars.advance(bar, count)
        finally:
            self._bars.remove_task(bar)
            self._depth -= 1
            if self._depth == 0:
                self._bars.stop()
