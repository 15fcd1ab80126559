"""Measure tiles on the GPU at hand and write the table that `config` reads.

    python -m quantkit_kernels.tune --shape 4096x4096 --shape 28672x8192 --bits 4 8 --group-size 128

Every candidate is checked against the rule's result, then timed as a CUDA graph of calls on rotated copies of the
weight, so that none is read from the cache; the median decides. Tables hold `skinny` and `gemm`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import torch
import triton
from torch import Tensor

from quantkit_kernels import config, launch
from quantkit_kernels.config import Case, Tile
from quantkit_kernels.ops import make_counters
from quantkit_kernels.packing import padded_inputs

CACHE_BYTES = 200 << 20  # of weights per graph: over three times the second-level cache of an H200
REPEATS = 20
TOLERANCE = 2e-3  # relative to the norm of the rule's result
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
FAILURES = (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError, triton.CompilationError)


def candidates(case: Case, arch: int) -> Iterator[Tile]:
    """Tiles around the rule's, which comes first."""
    first = config.rule(case, arch)
    yield first
    if case.kernel == "skinny":
        grid = product((32, 64, 128), (1, 2, 4), (2, 3, 4), (1, 2, 4, 8, 16))
    else:
        grid = product((64, 128), (4, 8), (2, 3, 4), (1, 2, 4))
    for outputs, warps, stages, split in grid:
        tile = replace(first, BN=outputs, warps=warps, stages=stages, split=split)
        if tile != first and split * case.M <= config.SPLIT_ROWS and split * 256 <= case.K:
            yield tile


def tune(case: Case, arch: int, device: torch.device) -> tuple[Tile, float]:
    """(the fastest tile, its seconds per call)."""
    group_size = case.group_size or case.K
    copies = _copies(case, group_size, device)
    x = torch.randn(case.M, case.K, device=device).to(getattr(torch, case.dtype))
    counters = make_counters(device)

    def call(tile: Tile, weight: tuple[Tensor, Tensor]) -> Tensor:
        arguments = (x, *weight, case.bits, group_size, None, "none", counters)
        return launch.nbits_linear(*arguments, tile=tile, kernel=case.kernel)

    best: tuple[Tile, float] | None = None
    expected = call(config.rule(case, arch), copies[0]).float()
    for tile in candidates(case, arch):
        try:
            found = call(tile, copies[0]).float()
        except FAILURES:  # a tile that does not fit the device
            continue
        if not float((found - expected).norm()) <= TOLERANCE * float(expected.norm()):
            raise RuntimeError(f"{case.key()}: {tile} computes something else than the rule's tile")
        seconds = _seconds([partial(call, tile, weight) for weight in copies])
        if best is None or seconds < best[1]:
            best = tile, seconds
    if best is None:
        raise RuntimeError(f"{case.key()}: no tile fits this device")
    return best


def _copies(case: Case, group_size: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Random weights, enough of them to fill the cache three times."""
    words = padded_inputs(case.K, case.bits, group_size) * case.bits // 16
    groups = -(-case.K // group_size)
    count = max(2, -(-CACHE_BYTES // (2 * words * case.N)))
    made = []
    for _ in range(count):
        codes = torch.randint(-32768, 32768, (case.N, words), device=device, dtype=torch.int16)
        scales = (torch.rand(groups, case.N, device=device) + 0.5).half().view(torch.int16).int() & 0xFFFF
        points = torch.randint(0, 1 << case.bits, (groups, case.N), device=device).half().view(torch.int16).int()
        made.append((codes, scales | points << 16))
    return made


def _seconds(calls: list[Callable[[], Tensor]]) -> float:
    """Median over replays of a graph of all calls, per call."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    times: list[float] = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / len(kept))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", required=True, help="NxK, may be repeated")
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--group-size", type=int, nargs="+", default=[128], help="0: one scale per row")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    arguments = parser.parse_args()
    device = torch.device("cuda")
    major, minor = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    tiles = dict(config.table(name, triton.__version__))
    for shape, bits, group_size, rows in product(arguments.shape, arguments.bits, arguments.group_size, arguments.rows):
        num_outputs, num_inputs = (int(size) for size in shape.split("x"))
        case = Case(launch.kernel_for(rows), bits, group_size, num_outputs, num_inputs, rows, arguments.dtype)
        if case.kernel != "dequant":
            tiles[case.key()], seconds = tune(case, 10 * major + minor, device)
            print(f"{case.key()}: {seconds * 1e6:.1f} us, {tiles[case.key()]}", flush=True)
            config.save(tiles, config.table_path(name, triton.__version__))


if __name__ == "__main__":
    main()
