"""`--max-drop`: does a model that kept an accuracy on the user's data keep it on data that the run did not see?

python -m benchmarks.max_drop --data ../shared --out max_drop.jsonl

Test images are divided: one part is given to `compress` as evaluation data, the other measures the drop that is left.
Its standard error is that of the difference, image by image. Beside it, 8 bits everywhere.
"""

from __future__ import annotations

import math
import os
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.contest import say
from benchmarks.data import Labelled, cifar10_calibration, cifar10_test, imagenet_calibration, imagenet_test
from benchmarks.harness import Environment, Record, append_records, environment, evaluate_classifier
from quantkit.budget import Budget
from quantkit.calibration.request import CalibrationRequest, EvaluationRequest
from quantkit.pipeline import compress
from quantkit.result import Result

MODELS = ("resnet20", "squeezenet")
DROP = 0.01
CIFAR10_SEEN = 2000


@dataclass(frozen=True)
class Task:
    """One network.

    Attributes:
        seen, unseen: test images that the run is given as evaluation data, and those it is not.
        input_name: of the model.
    """

    name: str
    model: Path
    calibration: CalibrationRequest
    input_name: str
    seen: Labelled
    unseen: Labelled


def task_of(name: str, data: Path) -> Task:
    if name == "resnet20":
        test = cifar10_test(data)
        parts = part(test, slice(None, CIFAR10_SEEN)), part(test, slice(CIFAR10_SEEN, None))
        request = CalibrationRequest(cifar10_calibration(data), preprocess="cifar10")
        return Task(name, data / "models/resnet20_cifar10.onnx", request, "image", *parts)
    test = imagenet_test(data)
    request = CalibrationRequest(imagenet_calibration(data), preprocess="caffe")
    halves = part(test, slice(0, None, 2)), part(test, slice(1, None, 2))
    return Task(name, data / "models/squeezenet11_imagenet.onnx", request, "data_0", *halves)


def part(test: Labelled, which: slice) -> Labelled:
    return Labelled(test.images[which], test.labels[which])


def paired_drop(reference: np.ndarray, measured: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Loss of top-1 from one model's classes to another's, and its standard error; [samples] each."""
    changes = (reference == labels).astype(np.float64) - (measured == labels)
    return float(changes.mean()), float(changes.std(ddof=1)) / math.sqrt(len(changes))


def compressed(task: Task, folder: Path, drop: float, **settings: Any) -> dict[str, tuple[Result, float]]:
    """Setting -> result and seconds: the accuracy budget, and 8 bits everywhere."""
    file = folder / f"{task.name}.npz"
    np.savez(file, images=task.seen.images, classes=task.seen.labels)
    request = CalibrationRequest(f"{file}:{task.input_name}=images,labels=classes", batch_size=50)
    budgets = {
        f"max drop {drop:.0%}": (Budget(max_drop=drop), EvaluationRequest(request, "top1"), settings),
        "8 bits": (Budget(), None, {**settings, "allocator": "uniform"}),
    }
    found = {}
    for name, (budget, evaluation, chosen) in budgets.items():
        start = time.perf_counter()
        made = compress(task.model, calibration=task.calibration, evaluation=evaluation, budget=budget, **chosen)
        found[name] = (made, time.perf_counter() - start)
    return found


def records_of(
    task: Task, found: dict[str, tuple[Result, float]], folder: Path, where: Environment, quantizer: str
) -> list[Record]:
    sides = {"seen": task.seen, "unseen": task.unseen}
    floats = {side: evaluate_classifier(task.model, item.images, item.labels) for side, item in sides.items()}
    records = []
    for name, (made, seconds) in found.items():
        path = folder / f"{task.name}.onnx"
        made.save(path)
        accuracy: dict[str, float] = {}
        for side, item in sides.items():
            ours = evaluate_classifier(path, item.images, item.labels)
            drop, error = paired_drop(floats[side].predictions, ours.predictions, item.labels)
            accuracy |= {f"{side} top-1": ours.top1, f"{side} drop": drop, f"{side} drop s.e.": error}
        details = {
            "quantizer": quantizer,
            "average_bits": made.report.average_bits,
            "float bytes": made.report.size_before,
            "samples": {side: len(item.labels) for side, item in sides.items()},
            "measured": len(made.report.contenders),
            "load": os.getloadavg()[0],
            "notes": list(made.report.notes),
            "unmet": list(made.report.unmet),
        }
        size = path.stat().st_size
        records.append(
            Record(
                f"max-drop-{task.name}",
                task.model.name,
                "quantkit",
                name,
                where,
                size_bytes=size,
                accuracy=accuracy,
                seconds=seconds,
                details=details,
            )
        )
    return records


def verdict(records: Sequence[Record], drop: float) -> str:
    """Whether the bound holds within one standard error, and what it saves against 8 bits."""
    ours, plain = records
    lost, error = ours.accuracy["unseen drop"], ours.accuracy["unseen drop s.e."]
    assert ours.size_bytes is not None and plain.size_bytes is not None
    kept = "kept" if lost <= drop + error else "not kept"
    share = 1 - ours.size_bytes / plain.size_bytes
    return (
        f"{ours.benchmark}: {kept} ({lost:.2%} +- {error:.2%} on unseen images, bound {drop:.0%}), {share:.1%} smaller "
        f"than 8 bits ({ours.size_bytes} and {plain.size_bytes} B)"
    )


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared"), help="folder with models/ and data/")
    parser.add_argument("--models", default=",".join(MODELS), help="networks, separated by commas")
    parser.add_argument("--drop", type=float, default=DROP, help="of top-1, 0.01 = one point")
    parser.add_argument("--quantizer", default="auto")
    parser.add_argument("--out", type=Path, default=Path("results.jsonl"), help="file to append results to")
    args = parser.parse_args()
    where = environment(1)
    for name in args.models.split(","):
        task = task_of(name, args.data)
        with TemporaryDirectory(prefix="quantkit-benchmark-") as folder:
            found = compressed(task, Path(folder), args.drop, quantizer=args.quantizer)
            records = records_of(task, found, Path(folder), where, args.quantizer)
        append_records(args.out, records)
        say(verdict(records, args.drop))


if __name__ == "__main__":
    main()
