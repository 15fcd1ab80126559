"""Quantize many layers at once, in processes; what comes out does not depend on how many there are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from threadpoolctl import threadpool_limits

from quantkit.types import FloatArray, LayerStats, QuantizedWeight, QuantSpec, WeightQuantizer

WORTHWHILE = 2e9
"""Products of rounding against a Gram, N K^2, from which on starting processes pays."""


WEIGHT_COPIES = 16
"""Bytes for each weight while a layer is quantized: itself, its working copy in float64, codes and temporaries."""
GRAM_COPIES = 6
"""Matrices of a Gram's size while a layer is quantized on it: itself, damped, permuted, inverted, factored."""


@dataclass(frozen=True)
class Task:
    """One layer with every spec that is wanted of it.

    Attributes:
        shape: (N, K).
        load: W[N, K] float32; called when the layer's turn comes.
        stats: what the quantizer may see.
    """

    name: str
    shape: tuple[int, int]
    load: Callable[[], FloatArray]
    stats: LayerStats | None
    specs: tuple[QuantSpec, ...]

    @property
    def work(self) -> float:
        rows, columns = self.shape
        return float(rows * columns * columns * len(self.specs))

    @property
    def memory(self) -> int:
        """Bytes that quantizing it takes, about."""
        gram = None if self.stats is None else self.stats.gram
        return WEIGHT_COPIES * self.shape[0] * self.shape[1] + (0 if gram is None else GRAM_COPIES * gram.nbytes)


def worker_count(asked: int) -> int:
    """Processes to use: as many as asked, or (0) as there are cores that this process may use."""
    if asked:
        return asked
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spare_memory() -> int:
    """Bytes that may go to processes side by side: a quarter of what is free; 4 GiB where that is unknown."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 // 4
    except (OSError, ValueError, IndexError):
        pass
    return 4 << 30


def quantize_all(
    quantizer: WeightQuantizer, tasks: Sequence[Task], workers: int, *, memory: int | None = None
) -> Iterator[tuple[str, tuple[QuantizedWeight, ...]]]:
    """(name, one weight for each spec) of every task, in any order.

    Args:
        workers: as in `worker_count`; a process is only started where there is work for it.
        memory: bytes that all of them together should stay within; None = `spare_memory`. One always works.
    """
    ordered = sorted(tasks, key=lambda task: -task.work)  # the long ones first: nobody waits for one at the end
    room = spare_memory() if memory is None else memory
    fitting = room // max((task.memory for task in ordered), default=1)
    count = min(worker_count(workers), len(ordered), fitting)
    if count < 2 or not quantizer.stats or sum(task.work for task in ordered) < WORTHWHILE:
        for task in ordered:
            yield task.name, quantize_one(quantizer, task)
        return
    from joblib import Parallel, delayed

    run = Parallel(n_jobs=count, return_as="generator_unordered", pre_dispatch="n_jobs + 1", batch_size=1)
    # Weights are read when a process is about to be free: those of the layers that wait are not in memory.
    yield from run(delayed(_named)(quantizer, task.name, task.load(), task.stats, task.specs) for task in ordered)


def quantize_one(quantizer: WeightQuantizer, task: Task) -> tuple[QuantizedWeight, ...]:
    """Every spec of one layer."""
    return _quantized(quantizer, task.load(), task.stats, task.specs)


def _quantized(
    quantizer: WeightQuantizer, weight: FloatArray, stats: LayerStats | None, specs: tuple[QuantSpec, ...]
) -> tuple[QuantizedWeight, ...]:
    """Small products lose tenfold by threads, and one thread gives the same bits whatever the number of cores."""
    with threadpool_limits(limits=1):
        return tuple(quantizer.quantize(weight, spec, stats) for spec in specs)


def _named(
    quantizer: WeightQuantizer,
    name: str,
    weight: FloatArray,
    stats: LayerStats | None,
    specs: tuple[QuantSpec, ...],
) -> tuple[str, tuple[QuantizedWeight, ...]]:
    return name, _quantized(quantizer, weight, stats, specs)
