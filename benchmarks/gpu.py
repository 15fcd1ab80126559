"""Measuring on a CUDA device: graphs over rotated copies, floors and ceilings of the same machine, statistics.

A call is captured many times in one CUDA graph, every time with its own copy of the weights, so that what is read comes
from memory and not from the second-level cache, and launching costs what it costs inside a graph. The graphs of all
contestants take turns, and ratios are taken within each round.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

CACHES = 4
"""Bytes of all copies over bytes of the second-level cache, at least."""
LEAST_COPIES, MOST_COPIES = 3, 64
COPY_BYTES = 4 << 30
FLOOR_CALLS = 200
ROUNDS = 30


@dataclass(frozen=True)
class Statistics:
    """Of samples in any unit: 20, 50 and 80 % percentiles."""

    p20: float
    median: float
    p80: float


def statistics(samples: Sequence[float]) -> Statistics:
    low, middle, high = (float(value) for value in np.percentile(np.asarray(samples), (20, 50, 80)))
    return Statistics(low, middle, high)


def num_copies(num_bytes: int, cache_bytes: int) -> int:
    """Copies of a weight that together are some times as large as the cache."""
    return int(min(max(-(-CACHES * cache_bytes // max(num_bytes, 1)), LEAST_COPIES), MOST_COPIES))


@dataclass(frozen=True)
class Ceilings:
    """What the device can do, measured in the same run.

    Attributes:
        copy_bandwidth: bytes per second, read plus written, of a large copy on the device.
        launch_seconds: of a kernel that does next to nothing, inside a graph.
        flops: floating-point operations per second of a large product in half precision.
    """

    copy_bandwidth: float
    launch_seconds: float
    flops: float


def require_cuda(what: str) -> None:
    """Leave with one sentence and exit code 2 where there is no CUDA device."""
    if not torch.cuda.is_available():
        print(f"{what} needs a CUDA device, and PyTorch finds none here", file=sys.stderr)
        raise SystemExit(2)


def device_name() -> str:
    """`NVIDIA H200, 132 processors, 60 MB of cache, CUDA 13.0`."""
    found = torch.cuda.get_device_properties(0)
    cache = found.L2_cache_size / 1e6
    return f"{found.name}, {found.multi_processor_count} processors, {cache:.0f} MB of cache, CUDA {torch.version.cuda}"


def cache_bytes() -> int:
    return int(torch.cuda.get_device_properties(0).L2_cache_size)


def captured(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """One graph of all calls, in order; each has run before."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def seconds_of(runs: Sequence[Callable[[], Any]], rounds: int = ROUNDS) -> list[list[float]]:
    """Seconds of each run in each round; the first of a round differs each time."""
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    torch.cuda.synchronize()
    for turn in range(rounds):
        for step in range(len(runs)):
            place = (turn + step) % len(runs)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            runs[place]()
            end.record()
            end.synchronize()
            times[place].append(start.elapsed_time(end) / 1000)
    return times


def ceilings(dtype: torch.dtype) -> Ceilings:
    """The device's own limits, now."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    (copies,) = seconds_of([partial(target.copy_, source)], 10)
    del source, target
    tiny = torch.zeros(1, device="cuda")
    graph = captured([lambda: tiny.add_(1)] * FLOOR_CALLS)
    (floors,) = seconds_of([graph.replay])
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    (products,) = seconds_of([lambda: a @ b], 10)
    return Ceilings(
        2 * COPY_BYTES / statistics(copies).median,
        statistics(floors).median / FLOOR_CALLS,
        2 * size**3 / statistics(products).median,
    )


def parsed(text: str) -> list[int]:
    """`1,2,4` -> [1, 2, 4]."""
    return [int(item) for item in text.split(",")]
