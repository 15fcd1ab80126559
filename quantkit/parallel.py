"""Quantize many layers at once, in processes; what comes out does not depend on how many there are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from threadpoolctl import threadpool_limits

from quantkit.types import FloatArray, LayerStats, QuantizedWeight, QuantSpec, WeightQuantizer

WORTHWHILE = 2e9
"""Products of rounding against a Gram, N K^2, from which on starting processes pays."""


@dataclass(frozen=True)
class Task:
    """One layer with every spec that is wanted of it.

    Attributes:
        weight: [N, K] float32.
        stats: what the quantizer may see.
    """

    name: str
    weight: FloatArray
    stats: LayerStats | None
    specs: tuple[QuantSpec, ...]

    @property
    def work(self) -> float:
        rows, columns = self.weight.shape
        return float(rows * columns * columns * len(self.specs))


def worker_count(asked: int) -> int:
    """Processes to use: as many as asked, or (0) as there are cores that this process may use."""
    if asked:
        return asked
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quantize_all(
    quantizer: WeightQuantizer, tasks: Sequence[Task], workers: int
) -> Iterator[tuple[str, tuple[QuantizedWeight, ...]]]:
    """(name, one weight for each spec) of every task, in any order.

    Args:
        workers: as in `worker_count`; a process is only started where there is work for it.
    """
    ordered = sorted(tasks, key=lambda task: -task.work)  # the long ones first: nobody waits for one at the end
    count = min(worker_count(workers), len(ordered))
    if count < 2 or sum(task.work for task in ordered) < WORTHWHILE:
        for task in ordered:
            yield task.name, quantize_one(quantizer, task)
        return
    from joblib import Parallel, delayed

    run = Parallel(n_jobs=count, return_as="generator_unordered", pre_dispatch="n_jobs + 1", batch_size=1)
    yield from run(delayed(_named)(quantizer, task) for task in ordered)


def quantize_one(quantizer: WeightQuantizer, task: Task) -> tuple[QuantizedWeight, ...]:
    """Small products lose tenfold by threads, and one thread gives the same bits whatever the number of cores."""
    with threadpool_limits(limits=1):
        return tuple(quantizer.quantize(task.weight, spec, task.stats) for spec in task.specs)


def _named(quantizer: WeightQuantizer, task: Task) -> tuple[str, tuple[QuantizedWeight, ...]]:
    return task.name, quantize_one(quantizer, task)
