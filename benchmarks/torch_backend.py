"""The torch backend against the same networks written directly in torch, and against onnxruntime's results.

python -m benchmarks.torch_backend --data ../shared --minilm minilm.onnx --out results.jsonl

Speed: time of the hand-written network / time of the converted one, alternating in one process. Memory: peak of one
process each that loads the weights and runs a few batches. Parity: largest error relative to the largest output.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.eager import MiniLM, ResNet20
from benchmarks.harness import MIN_ROUNDS, Record, append_records, environment, run_isolated, speed_of
from quantkit.runtime.ort import make_session
from quantkit.runtime.torch_backend import to_torch

SEED = 0
RUNS = 5
VOCABULARY = 30_000
CLASSES = 10
SHARPNESS = 5.0
STEPS = (1e-7, 1e-9)
FEW = 4


@dataclass(frozen=True)
class Case:
    """One network at one shape.

    Attributes:
        eager: the network written directly in torch; None = only parity is measured.
        inputs: in the model's order.
    """

    name: str
    path: Path
    shape: str
    eager: Callable[[Path], torch.nn.Module] | None
    inputs: tuple[torch.Tensor, ...]


def cases(data: Path, minilm: Path | None) -> list[Case]:
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn(64, 3, 32, 32, generator=generator)
    found = [Case("resnet20", data / "models/resnet20_cifar10.onnx", "64x3x32x32", ResNet20, (images,))]
    photos = 255 * torch.rand(4, 3, 224, 224, generator=generator) - 120
    squeezenet = data / "models/squeezenet11_imagenet.onnx"
    found.append(Case("squeezenet", squeezenet, "4x3x224x224", None, (photos,)))
    if minilm is not None:
        tokens = torch.randint(0, VOCABULARY, (8, 64), generator=generator)
        mask = torch.ones(8, 64, dtype=torch.int64)
        mask[::2, 48:] = 0
        found.append(Case("minilm", minilm, "8x64", MiniLM, (tokens, mask)))
    return found


def relative_error(found: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.abs(found.numpy() - expected).max() / np.abs(expected).max())


def loss_of(output: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Cross-entropy to the undisturbed model's answers: classes, or for embeddings the most similar other sample."""
    if output.shape[1] == CLASSES:
        return torch.nn.functional.cross_entropy(output, reference.argmax(dim=1))
    scores = SHARPNESS * output @ reference.T
    neighbour = (reference @ reference.T).fill_diagonal_(-1).argmax(dim=1)
    return torch.nn.functional.cross_entropy(scores, neighbour)


def hessian_error(case: Case) -> float:
    """Largest relative difference, over the weight matrices, of H v to central differences of the gradient.

    The better of two steps counts: a difference that steps over the kink of a Relu sees its jump, and H v does not.
    """
    module = to_torch(case.path, dtype=torch.float64)
    parameters = [item.requires_grad_(True) for item in module.parameters() if item.ndim > 1]
    inputs = tuple(item[:FEW].double() if item.is_floating_point() else item[:FEW] for item in case.inputs)
    reference = module(*inputs).detach()
    generator = torch.Generator().manual_seed(SEED)
    directions = [torch.randn(item.shape, dtype=item.dtype, generator=generator) for item in parameters]

    def gradients(step: float) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            torch._foreach_add_(parameters, directions, alpha=step)
        found = torch.autograd.grad(loss_of(module(*inputs), reference), parameters, allow_unused=True)
        with torch.no_grad():
            torch._foreach_add_(parameters, directions, alpha=-step)
        return found

    first = torch.autograd.grad(loss_of(module(*inputs), reference), parameters, create_graph=True, allow_unused=True)
    used = [index for index, gradient in enumerate(first) if gradient is not None]
    along = torch.stack([(first[index] * directions[index]).sum() for index in used]).sum()
    products = torch.autograd.grad(along, [parameters[index] for index in used])
    worst = []
    for step in STEPS:
        ahead, behind = gradients(step), gradients(-step)
        errors = []
        for index, product in zip(used, products, strict=True):
            difference = (ahead[index] - behind[index]) / (2 * step)
            errors.append(float((product - difference).norm() / difference.norm()))
        worst.append(max(errors))
    return min(worst)


def parity(case: Case, module: torch.nn.Module, threads: int) -> float:
    """Largest error to onnxruntime's result."""
    session = make_session(case.path, threads=threads)
    feed = dict(zip(session.input_names, (item.numpy() for item in case.inputs), strict=True))
    reference = next(iter(session.run(feed).values()))
    with torch.inference_mode():
        return relative_error(module(*case.inputs), reference)


def parity_record(case: Case, threads: int) -> Record:
    return Record(
        benchmark="torch backend",
        model=case.path.name,
        provider="quantkit",
        setting=f"{case.name} {case.shape}, float32, inference mode",
        environment=environment(threads),
        accuracy={"error to onnxruntime": parity(case, to_torch(case.path), threads)},
    )


def measure(case: Case, make: Callable[[Path], torch.nn.Module], seconds: float, threads: int) -> Record:
    module, eager = to_torch(case.path), make(case.path)
    errors = [parity(case, network, threads) for network in (module, eager)]
    times: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        start = time.perf_counter()
        while len(times[0]) < MIN_ROUNDS or time.perf_counter() - start < seconds:
            order = (0, 1) if len(times[0]) % 2 else (1, 0)
            for place in order:
                before = time.perf_counter()
                (eager, module)[place](*case.inputs)
                times[place].append(time.perf_counter() - before)
    return Record(
        benchmark="torch backend",
        model=case.path.name,
        provider="quantkit",
        setting=f"{case.name} {case.shape}, float32, inference mode",
        environment=environment(threads),
        accuracy={
            "error to onnxruntime": errors[0],
            "eager's error": errors[1],
            "Hessian products to differences": hessian_error(case),
        },
        speed=(speed_of(case.shape, *times),),
    )


def peak(arguments: list[str], side: str, name: str) -> float | None:
    command = [sys.executable, "-m", "benchmarks.torch_backend", *arguments, "--side", side, "--only", name]
    done = run_isolated(command)
    if done.status:
        raise SystemExit(done.last_line)
    return done.peak_rss_mb


def run_side(case: Case, side: str) -> None:
    """Load one side alone and run it: what the memory of a process is measured on."""
    assert case.eager is not None
    network = to_torch(case.path) if side == "ours" else case.eager(case.path)
    with torch.inference_mode():
        for _ in range(RUNS):
            network(*case.inputs)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minilm", type=Path, help="the exported sentence encoder")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--only", default="")
    parser.add_argument("--side", choices=("ours", "eager"), help="only load and run one side (for its memory)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    chosen = [case for case in cases(args.data, args.minilm) if args.only in case.name]
    if args.side:
        for case in chosen:
            run_side(case, args.side)
        return
    passed = ["--data", str(args.data), "--threads", str(args.threads)]
    passed += ["--minilm", str(args.minilm)] if args.minilm else []
    for case in chosen:
        if case.eager is None:
            record = parity_record(case, args.threads)
            print(record.setting, dict(record.accuracy))
            if args.out is not None:
                append_records(args.out, [record])
            continue
        record = measure(case, case.eager, args.seconds, args.threads)
        peaks = {side: peak(passed, side, case.name) for side in ("ours", "eager")}
        details = {**{f"peak MB, {side}": value for side, value in peaks.items()}, "torch": torch.__version__}
        record = Record(**{**record.__dict__, "details": details, "peak_rss_mb": peaks["ours"]})
        print(record.setting, dict(record.accuracy), record.speed, details)
        if args.out is not None:
            append_records(args.out, [record])


if __name__ == "__main__":
    main()
