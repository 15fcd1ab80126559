"""Run a model piece by piece: what lives at a cut lies on disk, one file a batch, so that each node runs once a batch.

Neither the whole model nor all of its activations are in memory: a piece's session holds the weights of that piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path

import numpy as np
import onnx_ir as ir

from quantkit.graph.segments import last_readers, segment, storable
from quantkit.runtime.ort import make_session
from quantkit.types import Array, Feed

PREFIX = "v:"  # of names in a file of arrays: a value may be called as an argument of numpy's is


class Spool:
    """Brings a model from cut to cut, over all batches.

    Attributes:
        batches: how many there are.
    """

    def __init__(
        self,
        model: ir.Model,
        folder: Path,
        feeds: Iterable[Feed],
        *,
        threads: int,
        until: Mapping[str, int] | None = None,
        lean: bool = False,
    ) -> None:
        """
        Args:
            model: what lies behind the cut may still be changed while it moves.
            folder: made here; its files are the batches.
            feeds: the model's inputs.
            until: value name -> position in front of which it must not be forgotten.
            lean: see `make_session`.
        """
        self._model, self._folder, self._threads, self._lean = model, folder, threads, lean
        self._base, self._last = -1, last_readers(model)
        self._names = [str(value.name) for value in model.graph.inputs]
        self._last |= {name: max(self._last.get(name, -1), place) for name, place in (until or {}).items()}
        folder.mkdir()
        self.batches = 0
        for feed in feeds:
            self._write(feed, self.batches)
            self.batches += 1

    def values(self, position: int, names: Set[str]) -> Iterator[dict[str, Array]]:
        """Each batch's values: those at the cut, and `names`.

        Once all are read, the cut lies behind the node at `position`, if all that lives there can be stored.

        Args:
            position: of a node of the main graph; -1 = in front of the first.
            names: of values made up to there.
        """
        nodes = list(self._model.graph)[self._base + 1 : position + 1]
        made = {str(value.name): value for node in nodes for value in node.outputs}
        living = [name for name in [*self._names, *made] if self._last.get(name, -1) > position]
        moves = position > self._base and all(storable(made[name]) for name in living if name in made)
        asked = [name for name in made if name in names or (moves and name in living)]
        run = self._segment(asked)
        for number in range(self.batches):
            known = self._read(number)
            known |= run(known)
            if moves:
                self._write({name: known[name] for name in living}, number)
            yield known
        if moves:
            self._base, self._names = position, living

    def _segment(self, asked: Sequence[str]) -> Callable[[Feed], Feed]:
        """Runs what lies between the cut and the values asked for."""
        if not asked:
            return lambda _: {}
        part = segment(self._model, self._names, asked)
        session = make_session(part, threads=self._threads, arena=False, lean=self._lean)
        return lambda values: session.run({name: values[name] for name in session.input_names})

    def _write(self, values: Feed, number: int) -> None:
        with (self._folder / f"{number}.npz").open("wb") as file:
            np.savez(file, allow_pickle=False, **{f"{PREFIX}{name}": array for name, array in values.items()})

    def _read(self, number: int) -> dict[str, Array]:
        with np.load(self._folder / f"{number}.npz") as stored:
            return {key.removeprefix(PREFIX): stored[key] for key in stored.files}
