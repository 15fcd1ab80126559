"""What lies at the values that one wave watches, batch by batch: of the whole model, or of the piece up to there.

With several waves, each runs only what lies between the cut behind the one before and its own: a transformer's blocks
are pieces, because nothing is as narrow as the value between two of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

import numpy as np
import onnx_ir as ir

from quantkit.graph.segments import last_readers
from quantkit.runtime.ort import make_session
from quantkit.runtime.spool import Spool
from quantkit.types import Array, Feed

UNKNOWN_AXIS = 128
Feeds = Callable[[], Iterable[Feed]]


def main_graph_values(model: ir.Model) -> dict[str, ir.Value]:
    """In the order in which they are there."""
    values = {str(value.name): value for value in model.graph.inputs}
    return values | {str(value.name): value for node in model.graph for value in node.outputs}


def dimension_sizes(model: ir.Model, feed: Mapping[str, Array]) -> dict[str, int]:
    """What the feed says about the model's symbolic dimensions."""
    sizes: dict[str, int] = {}
    for value in model.graph.inputs:
        array = feed.get(str(value.name))
        if value.shape is None or array is None or len(value.shape) != array.ndim:
            continue
        for dimension, size in zip(value.shape, array.shape, strict=True):
            if not isinstance(dimension, int) and dimension.value is not None:
                sizes[dimension.value] = int(size)
    return sizes


def elements(value: ir.Value, sizes: Mapping[str, int]) -> int:
    """How many numbers a value has, with guesses where nothing tells."""
    if value.shape is None:
        return UNKNOWN_AXIS**3
    total = 1
    for dimension in value.shape:
        if isinstance(dimension, int):
            total *= dimension
        else:
            total *= sizes.get(dimension.value or "", UNKNOWN_AXIS)
    return total


def instrumented(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """A copy that also returns these values."""
    copy = model.clone()
    present = {str(value.name) for value in copy.graph.outputs}
    inputs = {str(value.name) for value in copy.graph.inputs}
    values = main_graph_values(copy)
    for name in names:
        if name not in present and name not in inputs:
            value = values[name]
            if value.type is None:
                value.type = ir.TensorType(ir.DataType.FLOAT)
            copy.graph.outputs.append(value)
    return copy


class Pieces:
    """Runs a model for one wave after the other; a wave may be left out."""

    def __init__(
        self,
        model: ir.Model,
        feeds: Feeds,
        waves: Sequence[Sequence[str]],
        *,
        threads: int,
        lean: bool = False,
        folder: Path | None = None,
    ) -> None:
        """
        Args:
            feeds: the batches, the same ones each time.
            waves: names of the values that each watches, in graph order.
            lean: see `make_session`.
            folder: where values lie between two pieces; None = among the system's temporary files.
        """
        self._model, self._feeds, self._waves = model, feeds, waves
        self._threads, self._lean, self._folder = threads, lean, folder
        self._spool: Spool | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Pieces:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def run(self, wave: int) -> Iterator[tuple[Feed, dict[str, Array]]]:
        """(feed, the values that the wave watches) of every batch."""
        if len(self._waves) == 1:
            yield from self._whole(self._waves[wave])
            return
        if self._spool is None:
            self._positions = cuts(self._model, next(iter(self._feeds()), {}), self._waves)
            until = {name: self._positions[number] + 1 for number, names in enumerate(self._waves) for name in names}
            place = self._stack.enter_context(TemporaryDirectory(prefix="quantkit-", dir=self._folder))
            self._spool = Spool(
                self._model, Path(place, "values"), self._feeds(), threads=self._threads, until=until, lean=self._lean
            )
        names = set(self._waves[wave])
        for feed, values in zip(self._feeds(), self._spool.values(self._positions[wave], names), strict=True):
            yield feed, {name: values[name] for name in names}

    def _whole(self, names: Sequence[str]) -> Iterator[tuple[Feed, dict[str, Array]]]:
        model = instrumented(self._model, names)
        session = make_session(model, threads=self._threads, arena=False, lean=self._lean)
        for feed in self._feeds():
            found = {**feed, **session.run(feed)}
            yield feed, {name: found.pop(name) for name in names}


def cuts(model: ir.Model, feed: Feed, waves: Sequence[Sequence[str]]) -> list[int]:
    """For each wave the position of a node behind which to cut: where least lives between its values and the next's."""
    values = main_graph_values(model)
    made = dict.fromkeys((str(value.name) for value in model.graph.inputs), -1)
    made |= {str(value.name): place for place, node in enumerate(model.graph) for value in node.outputs}
    sizes, last = dimension_sizes(model, feed), last_readers(model)
    change = np.zeros(len(list(model.graph)) + 2)
    for name, place in made.items():
        if last.get(name, -1) > place:
            count = elements(values[name], sizes)
            change[place + 1] += count
            change[last[name] + 1] -= count
    living = np.cumsum(change)  # [p + 1]: numbers that live behind the node at p
    ready = [max(made[name] for name in names) for names in waves]
    found: list[int] = []
    for place, following in itertools.zip_longest(ready, [min(made[name] for name in names) for names in waves[1:]]):
        low = max([place, *found[-1:]])
        high = max(low, low if following is None else following - 1)
        found.append(low + int(np.argmin(living[low + 1 : high + 2])))
    return found
