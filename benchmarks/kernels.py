"""Products of packed weights on a GPU: quantkit's kernels, the same product in half precision, and peers.

python -m benchmarks.kernels --out results.jsonl --shapes 28672x8192 --rows 1,4,16,64 --bits 4,3

Everyone multiplies the same random codes, scales and zero points; where `exact` is false, a peer quantized on its own.
Before timing, the result is compared with the product in float64.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu import (
    ROUNDS,
    Ceilings,
    cache_bytes,
    captured,
    ceilings,
    device_name,
    num_copies,
    parsed,
    require_cuda,
    seconds_of,
    statistics,
)
from benchmarks.harness import Environment, Record, append_records, environment, speed_of
from benchmarks.kernel_cases import (
    BITS,
    DTYPES,
    GROUPS,
    ROWS,
    SHAPES,
    Case,
    by_weight,
    cases,
    exact,
    random_input,
    random_weights,
    relative_error,
)
from benchmarks.kernel_providers import PROVIDERS, REFERENCE, Prepared

BENCHMARK = "kernels"
PACKAGES = ("quantkit", "torch", "triton", "numpy", "gemlite", "torchao", "hqq", "bitsandbytes")
CALLS = 32
"""In one graph at least: what starting a graph costs is shared by so many."""
WRONG = 0.02
"""Error over size of the result from which it is not a matter of precision."""
LARGEST_CHECK = 64
"""Rows of x up to which the result is compared; the float64 product of more takes longer than all timings."""
FAILURES = (AssertionError, AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError)


def record_of(
    case: Case,
    provider: str,
    prepared: Prepared,
    times: Sequence[float],
    reference: Sequence[float],
    error: float | None,
    limits: Ceilings,
    where: Environment,
) -> Record:
    """One line: seconds of one call in every round, of the contestant and of the product in half precision."""
    if error is not None and not error <= WRONG:
        return failure(case, provider, ValueError(f"its result is wrong by {error:.2g} of its size"), where)
    spent = statistics(times)
    moved = prepared.num_bytes + case.activation_bytes
    return Record(
        benchmark=BENCHMARK,
        model=case.model,
        provider=provider,
        setting=case.setting,
        environment=where,
        size_bytes=prepared.num_bytes,
        accuracy={} if error is None else {"error to float64": error},
        speed=(speed_of(f"M={case.M}", reference, times),),
        details={
            **{name: getattr(case, name) for name in ("M", "N", "K", "bits", "group_size", "dtype")},
            "computed in": str(prepared.dtype).removeprefix("torch."),
            "exact": prepared.exact,
            "copies": len(prepared.calls),
            "microseconds": 1e6 * spent.median,
            "microseconds p20": 1e6 * spent.p20,
            "microseconds p80": 1e6 * spent.p80,
            "bytes per second": moved / spent.median,
            "share of copy bandwidth": moved / spent.median / limits.copy_bandwidth,
            "flops": case.flops / spent.median,
            "copy bandwidth": limits.copy_bandwidth,
            "peak flops": limits.flops,
            "launch microseconds": 1e6 * limits.launch_seconds,
        },
    )


def repeats(copies: int) -> int:
    """How often a graph goes through all copies."""
    return -(-CALLS // copies)


def failure(case: Case, provider: str, error: BaseException, where: Environment) -> Record:
    text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    details = {name: getattr(case, name) for name in ("M", "N", "K", "bits", "group_size", "dtype")}
    return Record(BENCHMARK, case.model, provider, case.setting, where, error=text, details=details)


def measure_weight(
    batch: Sequence[Case], names: Sequence[str], rounds: int, limits: Ceilings, where: Environment
) -> list[Record]:
    """All providers on all numbers of rows of one weight."""
    weights = random_weights(batch[0], "cuda")
    ready: dict[str, Prepared] = {}
    rows: list[Record] = []
    for name in dict.fromkeys([REFERENCE, *names]):
        if PROVIDERS[name].installed and PROVIDERS[name].accepts(weights):
            try:
                ready[name] = PROVIDERS[name].prepare(weights, lambda size: num_copies(size, cache_bytes()))
            except FAILURES as error:
                rows += [failure(case, name, error, where) for case in batch]
    for case in batch:
        x = random_input(case, "cuda")
        wanted = exact(x, weights) if case.M <= LARGEST_CHECK else None
        graphs: dict[str, torch.cuda.CUDAGraph] = {}
        errors: dict[str, float | None] = {}
        inputs = {name: x.to(prepared.dtype) for name, prepared in ready.items()}  # the graphs go on reading them
        for name, prepared in ready.items():
            try:
                found = prepared.calls[0](inputs[name])
                errors[name] = relative_error(found, wanted) if wanted is not None and prepared.exact else None
                calls = [partial(call, inputs[name]) for call in prepared.calls] * repeats(len(prepared.calls))
                graphs[name] = captured(calls)
            except FAILURES as error:
                torch.cuda.synchronize()
                rows.append(failure(case, name, error, where))
        times = dict(zip(graphs, seconds_of([graph.replay for graph in graphs.values()], rounds), strict=True))
        counts = {name: len(item.calls) * repeats(len(item.calls)) for name, item in ready.items()}
        each = {name: [value / counts[name] for value in samples] for name, samples in times.items()}
        rows += [
            record_of(case, name, ready[name], samples, each[REFERENCE], errors[name], limits, where)
            for name, samples in each.items()
        ]
    return rows


def line_of(record: Record) -> str:
    """For watching."""
    if record.error:
        return f"{record.model} {record.setting} {record.provider}: failed: {record.error}"
    details: Mapping[str, float] = record.details
    error = record.accuracy.get("error to float64")
    return (
        f"{record.model} {record.setting} {record.provider}: {details['microseconds']:.2f} us, "
        f"{record.speed[0].median:.2f}x, {100 * details['share of copy bandwidth']:.0f} % of copy bandwidth"
        f"{'' if error is None else f', error {error:.1e}'}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSONL file that lines are added to")
    parser.add_argument("--shapes", default=",".join(f"{n}x{k}" for n, k in SHAPES), help="NxK,...")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="M,...")
    parser.add_argument("--bits", default=",".join(map(str, BITS)))
    parser.add_argument("--groups", default=",".join(map(str, GROUPS)), help="-1 = one scale per row")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--providers", default=",".join(PROVIDERS), help=f"of {', '.join(PROVIDERS)}")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args(arguments)
    names = args.providers.split(",")
    unknown = [name for name in names if name not in PROVIDERS]
    if unknown:
        parser.error(f"there is no provider {unknown[0]!r}; there are {', '.join(PROVIDERS)}")
    require_cuda("benchmarks.kernels")
    shapes = [(int(n), int(k)) for n, k in (item.split("x") for item in args.shapes.split(","))]
    found = cases(shapes, parsed(args.rows), parsed(args.bits), parsed(args.groups), args.dtypes.split(","))
    where = environment(1, PACKAGES, device_name())
    limits = {dtype: ceilings(getattr(torch, dtype)) for dtype in args.dtypes.split(",")}
    for dtype, limit in limits.items():
        print(f"{where.gpu}; {dtype}: {limit}", file=sys.stderr)
    for batch in by_weight(found):
        rows = measure_weight(batch, names, args.rounds, limits[batch[0].dtype], where)
        print("\n".join(map(line_of, rows)), flush=True)
        if args.out is not None:
            append_records(args.out, rows)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
