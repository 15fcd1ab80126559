"""Run the float model with some of its weights changed, and say in nats per sample what that does to its outputs.

Activations stay float: this is about weights. Many layers at once go through one session that takes all weights as
inputs. One unit at a time goes through the rest of the network behind it: what lies before is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import onnx_ir as ir

from quantkit.cache import Entry, Store, content_key
from quantkit.divergence import Divergence
from quantkit.graph._checks import measure
from quantkit.graph.expose import Exposed, expose
from quantkit.graph.segments import last_readers, segment, storable
from quantkit.report.progress import Progress
from quantkit.runtime.ort import Session, make_session
from quantkit.types import Array, Feed, FloatArray, Target

LIVE_BYTES = 1 << 30
"""Activations kept at a cut, of all samples together; beyond it, the cut stays where it was."""

Weights = Mapping[str, FloatArray]
Trials = Callable[[], Iterator[Weights]]


@dataclass(frozen=True)
class Probe:
    """The float model on a few samples.

    Attributes:
        model: the float model.
        targets: whose weights may be changed.
        feeds: samples, kept in memory.
        threads: of onnxruntime.
        store: where losses are kept.
    """

    model: ir.Model
    targets: Mapping[str, Target]
    feeds: Sequence[Feed]
    threads: int = 1
    store: Store = field(default_factory=Store)

    @cached_property
    def reference(self) -> list[dict[str, Array]]:
        """The float model's outputs, feed by feed."""
        session = make_session(self.model, threads=self.threads)
        return [session.run(feed) for feed in self.feeds]

    @cached_property
    def divergence(self) -> Divergence:
        return Divergence.of(self.reference)

    @cached_property
    def _exposed(self) -> tuple[Exposed, Session, dict[str, Array]]:
        """All weights as inputs, and the float ones to feed."""
        exposed = expose(self.model, self.targets)
        own = exposed.feed({name: target.load() for name, target in self.targets.items()})
        return exposed, make_session(exposed.model, threads=self.threads), own

    @cached_property
    def _origin(self) -> dict[str, object]:
        """What every loss depends on beside the changed weights."""
        return {"model": measure(self.model)[1], "feeds": self.feeds, "threads": self.threads}

    def _kept(self, kind: str, weights: object, find: Callable[[], list[float]]) -> list[float]:
        """The losses, which are only found where the store does not know them."""
        if not self.store.remembers:
            return find()
        key = content_key(kind, {**self._origin, "weights": weights})
        known = self.store.get(key)
        if known is None:
            known = self.store.put(key, Entry(facts={"losses": find()}))
        return list(known.facts["losses"])

    def loss(self, weights: Weights) -> float:
        """Nats per sample with these weights W[N, K]; all others float."""
        return self._kept("loss", weights, lambda: [self._loss(weights)])[0]

    def _loss(self, weights: Weights) -> float:
        exposed, session, own = self._exposed
        changed = own | exposed.feed(weights)
        return self.divergence.mean(self.reference, [session.run({**feed, **changed}) for feed in self.feeds])

    def losses(self, trials: Mapping[tuple[str, ...], Trials], progress: Progress) -> list[list[float]]:
        """Nats per sample of every trial alone.

        Args:
            trials: names of the targets that change together -> the weights to try, one set after the other.
            progress: where it is shown.

        Returns:
            For each entry of `trials`, in its order, one figure for each of its sets.
        """
        found: dict[tuple[str, ...], list[float]] = {}
        positions = self._positions()
        ordered = sorted(trials, key=lambda names: min(positions[name] for name in names))
        walk = _Walk(self)
        with progress.task("measuring layers", total=len(ordered)) as advance:
            for names in ordered:
                cut = min(positions[name] for name in names)
                found[names] = self._losses(walk, cut, names, trials[names])
                advance(1)
        return [found[names] for names in trials]

    def _losses(self, walk: _Walk, cut: int, names: tuple[str, ...], trials: Trials) -> list[float]:
        def find() -> list[float]:
            walk.advance(cut)
            return walk.measure(names, trials())

        # To know whether they were measured before takes all sets of weights at once.
        return self._kept("losses", list(trials()), find) if self.store.remembers else find()

    def _positions(self) -> dict[str, int]:
        """Target -> position in the main graph of the first node that its weight reaches."""
        places = {str(node.name): position for position, node in enumerate(self.model.graph)}
        found = {}
        for name, target in self.targets.items():
            inner = any(use.node.graph is not self.model.graph for use in target.uses)
            found[name] = 0 if inner else min(places[str(use.node.name)] for use in target.uses)
        return found


class _Walk:
    """Holds what lives at a cut through the float model, for all feeds."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._cut = 0
        self._last = last_readers(probe.model)
        self._outputs = [str(value.name) for value in probe.model.graph.outputs]
        self._values: list[dict[str, Array]] = [dict(feed) for feed in probe.feeds]
        self._names = [str(value.name) for value in probe.model.graph.inputs if str(value.name) in self._values[0]]

    def advance(self, cut: int) -> None:
        """To the cut in front of the node at this position, if all that lives there may be kept."""
        nodes = list(self._probe.model.graph)[self._cut : cut]
        made = {str(value.name): value for node in nodes for value in node.outputs}
        needed = [name for name in made if self._last.get(name, -1) >= cut or name in self._outputs]
        if not nodes or not all(storable(made[name]) for name in needed):
            return
        kept = [name for name in self._names if self._last.get(name, -1) >= cut or name in self._outputs]
        values: list[dict[str, Array]] = [{name: item[name] for name in kept} for item in self._values]
        if needed:
            part = segment(self._probe.model, self._names, needed)
            session = make_session(part, threads=self._probe.threads, arena=False)
            size = 0
            for item, known in zip(values, self._values, strict=True):
                item |= session.run({name: known[name] for name in session.input_names})
                size += sum(value.nbytes for value in item.values())
                if size > LIVE_BYTES:
                    return
        self._cut, self._names, self._values = cut, [*kept, *needed], values

    def measure(self, names: tuple[str, ...], trials: Iterator[Weights]) -> list[float]:
        """Nats per sample of every set of weights of these targets."""
        probe = self._probe
        exposed = expose(probe.model, {name: probe.targets[name] for name in names})
        asked = [name for name in self._outputs if name not in self._names]
        inputs = [str(value.name) for value in exposed.model.graph.inputs if str(value.name) not in self._values[0]]
        changed = [name for name in inputs if name not in probe.feeds[0]]
        session = make_session(segment(exposed.model, [*self._names, *changed], asked), threads=probe.threads)
        found = []
        for weights in trials:
            operands = exposed.feed(weights)
            outputs = []
            for known in self._values:
                feed = {name: operands.get(name, known.get(name)) for name in session.input_names}
                done = session.run({name: value for name, value in feed.items() if value is not None})
                outputs.append({name: done[name] if name in done else known[name] for name in self._outputs})
            found.append(probe.divergence.mean(probe.reference, outputs))
        return found
