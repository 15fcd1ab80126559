"""Whole networks on a GPU: half precision in torch against quantkit's session on the quantized file.

python -m benchmarks.e2e --out results.jsonl --minilm minilm.onnx

Both run from CUDA graphs on tensors that are on the device already, in turns; tokens per second, memory while running,
and how far the two results are apart.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from benchmarks.e2e_block import Block, block_model
from benchmarks.gpu import ROUNDS, device_name, parsed, require_cuda, seconds_of, statistics
from benchmarks.harness import Environment, Record, append_records, environment, speed_of
from quantkit.runtime.session import InferenceSession

BENCHMARK = "e2e"
PACKAGES = ("quantkit", "torch", "triton", "onnx", "onnx-ir", "numpy")
VOCABULARY = 30_000
BLOCK_SHAPES = ((1, 1), (8, 1), (1, 16), (1, 64), (4, 128))
MINILM_SHAPES = ((1, 32), (8, 64), (64, 128))
Feed = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Network:
    """One network in both forms.

    Attributes:
        plain: makes the network in half precision, on the device; called with the inputs in order.
        model: the quantized file.
        feed: (batch, tokens) -> inputs on the CPU.
        setting: how it is quantized.
    """

    name: str
    plain: Callable[[], torch.nn.Module]
    model: ir.Model
    feed: Callable[[int, int], dict[str, torch.Tensor]]
    setting: str


def minilm(path: Path, bits: int, group_size: int) -> Network:
    """The sentence encoder, every matrix in codes of `bits` bits (rounded to nearest, no data)."""
    from benchmarks.eager import MiniLM
    from quantkit.graph.emit import Assignment, Emission, emit, emitter
    from quantkit.graph.load import load_model
    from quantkit.graph.regions import Regions
    from quantkit.graph.targets import find_targets
    from quantkit.quantizers.rtn import RTN
    from quantkit.types import QuantSpec

    model = load_model(path).model
    layers = {}
    for name, target in find_targets(model)[0].items():
        spec = QuantSpec(bits, group_size)
        forms = (form for form in ("matmulnbits", "gather", "packed"))
        form = next(form for form in forms if emitter(form).refuse(target, spec, "ort-cpu") is None)
        layers[name] = Assignment(form, RTN().quantize(target.load(), spec, None))
    empty = Regions({}, frozenset(), {}, frozenset(), frozenset())
    emitted = emit(model, Emission(layers, empty, {}, "ort-cpu")).model

    def feed(batch: int, tokens: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(batch * tokens)
        ids = torch.randint(0, VOCABULARY, (batch, tokens), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return Network("minilm", lambda: MiniLM(path).half().cuda(), emitted, feed, f"W{bits} g{group_size}")


def block(width: int, inner: int, bits: int, group_size: int) -> Network:
    """A transformer block of a language model, random weights."""
    made = block_model(width, inner, bits, group_size)

    def feed(batch: int, tokens: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(batch * tokens)
        return {"x": torch.randn(batch, tokens, width, generator=generator)}

    name = f"block {width}/{inner}"
    return Network(name, lambda: Block(made).half().cuda(), made.model, feed, f"W{bits} g{group_size}")


@dataclass(frozen=True)
class Side:
    """How one form of a network ran.

    Attributes:
        seconds: of one run, in every round.
        peak_bytes: most memory on the device while running, weights included.
        weight_bytes: on the device before the first run.
        result: what it computed.
    """

    seconds: Sequence[float]
    peak_bytes: int
    weight_bytes: int
    result: Any


def agreement(found: Any, wanted: Any) -> float:
    """Signal to noise in dB."""
    noise = float(np.square(np.float64(found) - np.float64(wanted)).sum())
    signal = float(np.square(np.float64(wanted)).sum())
    return 200.0 if noise == 0 else float(min(10 * np.log10(signal / noise), 200.0))


def records_of(
    network: Network, shape: tuple[int, int], sides: tuple[Side, Side], kernels: Mapping[str, int], where: Environment
) -> list[Record]:
    """A line for each side, half precision first; `shape` is (batch, tokens)."""
    named, (plain, quantized) = f"{shape[0]}x{shape[1]}", sides
    rows = []
    for provider, side, setting in (("torch", plain, "float16"), ("quantkit", quantized, network.setting)):
        spent = statistics(side.seconds)
        rows.append(
            Record(
                benchmark=BENCHMARK,
                model=network.name,
                provider=provider,
                setting=f"{setting}, {named}",
                environment=where,
                size_bytes=side.weight_bytes,
                accuracy={} if side is plain else {"to float16 dB": agreement(side.result, plain.result)},
                speed=(speed_of(named, plain.seconds, side.seconds),),
                details={
                    "tokens per second": shape[0] * shape[1] / spent.median,
                    "tokens per second p20": shape[0] * shape[1] / spent.p80,
                    "tokens per second p80": shape[0] * shape[1] / spent.p20,
                    "peak MB on the device": side.peak_bytes / 1e6,
                    "layers": dict(kernels) if side is quantized else {},
                },
            )
        )
    return rows


def measure(network: Network, shapes: Sequence[tuple[int, int]], rounds: int, where: Environment) -> list[Record]:
    """Both sides at every shape."""
    before = torch.cuda.memory_allocated()
    plain = network.plain()
    plain_bytes = torch.cuda.memory_allocated() - before
    before = torch.cuda.memory_allocated()
    session = InferenceSession(network.model, "cuda", graphs=len(shapes))
    session_bytes = torch.cuda.memory_allocated() - before
    counts: dict[str, int] = {}
    for layer in session.layers:
        counts[layer.kernel] = counts.get(layer.kernel, 0) + 1
    rows = []
    for batch, tokens in shapes:
        feed = {name: item.cuda() for name, item in network.feed(batch, tokens).items()}
        with torch.no_grad():
            run, output, first_peak = _captured(plain, feed)
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated() - session_bytes
        for _ in range(2):  # the second time with these shapes captures them
            found = session.run_torch(feed)
        second_peak = torch.cuda.max_memory_allocated() - base
        times = seconds_of([run, partial(session.run_torch, feed)], rounds)
        run()
        result = next(iter(found.values())).float().cpu().numpy()
        sides = (
            Side(times[0], plain_bytes + first_peak, plain_bytes, output.float().cpu().numpy()),
            Side(times[1], second_peak, session_bytes, result),
        )
        rows += records_of(network, (batch, tokens), sides, counts, where)
    return rows


def _captured(plain: torch.nn.Module, feed: Feed) -> tuple[Callable[[], None], torch.Tensor, int]:
    """(replays the network, its output, bytes that running took beside the weights)."""
    inputs = [item.half() if item.is_floating_point() else item.clone() for item in feed.values()]
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    with torch.cuda.stream(stream):
        for _ in range(3):
            plain(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - base
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = plain(*inputs)

    def run() -> None:
        for static, item in zip(inputs, feed.values(), strict=True):
            static.copy_(item)
        graph.replay()

    return run, output, peak


def line_of(record: Record) -> str:
    details = record.details
    return (
        f"{record.model} {record.setting} {record.provider}: {details['tokens per second']:.0f} tokens per second, "
        f"{record.speed[0].median:.2f}x, {details['peak MB on the device']:.0f} MB {dict(record.accuracy)}"
    )


def _shapes(text: str) -> list[tuple[int, int]]:
    pairs = [parsed(item.replace("x", ",")) for item in text.split(",")]
    return [(batch, tokens) for batch, tokens in pairs]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSONL file that lines are added to")
    parser.add_argument("--minilm", type=Path, help="the exported sentence encoder")
    parser.add_argument("--width", type=int, default=4096, help="of the block")
    parser.add_argument("--inner", type=int, default=14336, help="of the block's feed-forward layers")
    parser.add_argument("--bits", default="4,8")
    parser.add_argument("--group", type=int, default=128, help="of the block; the sentence encoder has 32")
    parser.add_argument("--shapes", default="", help="BATCHxTOKENS,...")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args(arguments)
    require_cuda("benchmarks.e2e")
    where = environment(1, PACKAGES, device_name())
    for bits in parsed(args.bits):
        networks: list[tuple[Network, Sequence[tuple[int, int]]]] = []
        networks.append((block(args.width, args.inner, bits, args.group), BLOCK_SHAPES))
        if args.minilm is not None:
            networks.append((minilm(args.minilm, bits, 32), MINILM_SHAPES))
        for network, usual in networks:
            rows = measure(network, _shapes(args.shapes) if args.shapes else usual, args.rounds, where)
            print("\n".join(map(line_of, rows)), flush=True)
            if args.out is not None:
                append_records(args.out, rows)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
