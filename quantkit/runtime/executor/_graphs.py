"""CUDA graphs, one per combination of input shapes, the least recently used forgotten first.

A graph replays all kernels of a run with one call, which at small batches is most of the time. Shapes that appear once
are not worth a capture: a graph is made when they come again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakSet

import torch

Tensors = Mapping[str, torch.Tensor]
Run = Callable[[Tensors], dict[str, torch.Tensor]]
Key = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
Entry = Run | Literal["seen", "refused"]
WARM_UPS = 2


class GraphCache:
    """Runs a function, after the first time with the same shapes from a graph."""

    def __init__(self, run: Run, capture: Callable[[Tensors], Run | None], size: int) -> None:
        """Nothing is captured yet.

        Args:
            run: the function itself.
            capture: what replays it for inputs of these shapes, or None where it waits for the device.
            size: how many shapes are remembered; 0 = no graphs.
        """
        self._run, self._capture, self._size = run, capture, size
        self._entries: OrderedDict[Key, Entry] = OrderedDict()

    def __call__(self, feeds: Tensors) -> dict[str, torch.Tensor]:
        if self._size <= 0:
            return self._run(feeds)
        key = tuple(sorted((name, tuple(item.shape), item.dtype) for name, item in feeds.items()))
        entry: Entry | None = self._entries.get(key)
        if entry == "seen":
            entry = self._capture(feeds) or "refused"
        elif entry is None:
            entry = "seen"
        self._entries[key] = entry
        self._entries.move_to_end(key)
        if len(self._entries) > self._size:
            self._entries.popitem(last=False)
        return self._run(feeds) if isinstance(entry, str) else entry(feeds)

    def counts(self) -> dict[str, int]:
        """How many of the remembered shapes run from a graph, were seen once, or cannot be captured."""
        found = {"captured": 0, "seen": 0, "refused": 0}
        for entry in self._entries.values():
            found[entry if isinstance(entry, str) else "captured"] += 1
        return found


@dataclass(frozen=True, eq=False)
class _Replay:
    """A captured run.

    Attributes:
        static: the tensors that the graph reads its inputs from.
        outputs: the tensors that it writes to.
        held: what else it reads.
    """

    graph: torch.cuda.CUDAGraph
    static: Tensors
    outputs: Tensors
    held: tuple[torch.Tensor, ...]

    def __call__(self, feeds: Tensors) -> dict[str, torch.Tensor]:
        for name, item in self.static.items():
            item.copy_(feeds[name], non_blocking=True)
        self.graph.replay()
        # The next replay writes over the graph's own outputs.
        return {name: item.clone() for name, item in self.outputs.items()}


class CudaCapture:
    """Makes graphs that share one memory pool: their intermediate values may overlap, since they run one at a time."""

    def __init__(self, run: Run, held: Callable[[], tuple[torch.Tensor, ...]], device: torch.device) -> None:
        """Nothing is captured yet.

        Args:
            run: what is captured.
            held: tensors that a graph of `run` reads and nothing else may keep alive.
        """
        self._run, self._held, self._device = run, held, device
        self._pool: Any = None
        self._alive: WeakSet[_Replay] = WeakSet()

    def __call__(self, feeds: Tensors) -> Run | None:
        static = {name: item.clone() for name, item in feeds.items()}
        if not self._warm_up(static):
            return None
        if not self._alive:  # a pool ends with the last of its graphs
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = self._run(static)
        except RuntimeError:  # something on the way cannot be captured: such shapes run step by step
            torch.cuda.synchronize(self._device)
            return None
        if not all(isinstance(item, torch.Tensor) for item in outputs.values()):
            return None
        replay = _Replay(graph, static, outputs, self._held())
        self._alive.add(replay)
        return replay

    def _warm_up(self, static: Tensors) -> bool:
        """Compile kernels and fill caches on a stream of their own; False where a step waits for the device."""
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        before = torch.cuda.get_sync_debug_mode()
        stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self._run(static)
                torch.cuda.set_sync_debug_mode("error")
                self._run(static)
        except RuntimeError:
            return False
        finally:
            torch.cuda.set_sync_debug_mode(before)
            torch.cuda.current_stream(self._device).wait_stream(stream)
        return True
