"""Every recipe of a space of the size of Quantune's (arXiv 2202.05048), emitted and measured once on one network.

python -m benchmarks.recipes --network resnet20 --data ../shared --out benchmarks/results

3 calibration sizes x 4 schemes x clipping by range or entropy x one scale per layer or per channel x all layers at 8
bits or the first and last one float: 96 recipes, rounded to nearest. Top-1 and nats per sample are of the test images.
The first line of the file describes the network and the space; a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks.contest import say
from benchmarks.data import Labelled, cifar10_calibration, cifar10_test, imagenet_calibration, imagenet_test
from quantkit.calibration.request import CalibrationRequest
from quantkit.candidate import Context, Recipe, build
from quantkit.demo import load_digits, to_onnx, train
from quantkit.divergence import Divergence
from quantkit.options import make_options
from quantkit.pipeline import Run, prepare
from quantkit.quantizers.rtn import RTN
from quantkit.report.progress import SilentProgress
from quantkit.runtime.ort import Session, make_session
from quantkit.tuning.features import STRUCTURE, structure
from quantkit.tuning.space import Dimension, Space
from quantkit.types import Array, QuantSpec

BATCH = 100
SPACE = Space(
    (
        Dimension("samples", (1, 32, 400), ordered=True),
        Dimension("scheme", ("asymmetric", "symmetric", "unsigned", "power")),
        Dimension("calibrator", ("minmax", "entropy")),
        Dimension("granularity", ("tensor", "channel")),
        Dimension("precision", ("8", "mixed")),
    )
)


@dataclass(frozen=True)
class Network:
    """A model, how to open its calibration data, and what it is tested on."""

    name: str
    model: Path
    calibration: object
    test: Labelled


def network(args: Namespace, folder: Path) -> Network:
    if args.network == "resnet20":
        request = CalibrationRequest(cifar10_calibration(args.data), preprocess="cifar10")
        return Network("resnet20", args.data / "models/resnet20_cifar10.onnx", request, cifar10_test(args.data))
    if args.network == "squeezenet":
        request = CalibrationRequest(imagenet_calibration(args.data), preprocess="caffe")
        model = args.data / "models/squeezenet11_imagenet.onnx"
        return Network("squeezenet", model, request, imagenet_test(args.data))
    digits = load_digits()
    path = folder / "digits.onnx"
    ir.save(to_onnx(train(digits, progress=SilentProgress())), path)
    feeds = [{"image": digits.train_images[at : at + 32]} for at in range(0, 512, 32)]
    return Network("digits", path, feeds, Labelled(digits.test_images, digits.test_labels))


def outputs(session: Session, images: Array) -> Array:
    """[samples, classes] of the first output."""
    name = session.input_names[0]
    found = [session.run({name: images[at : at + BATCH]}) for at in range(0, len(images), BATCH)]
    return np.concatenate([next(iter(item.values())).reshape(len(next(iter(item.values()))), -1) for item in found])


def contexts(run: Run, sizes: Sequence[Any]) -> dict[Any, Context]:
    """Calibration size -> everything collected from so many samples."""
    assert run.data.calibration is not None
    parts = {size: run.data.calibration.subset(size) for size in sizes}
    return {
        size: replace(run, data=replace(run.data, calibration=part)).context(run.original)
        for size, part in parts.items()
    }


def measure(context: Context, recipe: Mapping[str, Any], test: Labelled, reference: Array) -> dict[str, Any]:
    """One row: what the recipe's model makes of the test images."""
    quantizer = RTN(per_tensor=recipe["granularity"] == "tensor", power_of_two=recipe["scheme"] == "power")
    names = list(context.targets)
    kept = names if recipe["precision"] == "8" else names[1:-1]
    specs = dict.fromkeys(kept, QuantSpec(8))
    made = build(
        replace(context, quantizer=quantizer, weights={}),
        specs,
        Recipe(str(recipe["calibrator"]), scheme=str(recipe["scheme"])),
        name="recipe",
    )
    got = outputs(make_session(made.emitted.model), test.images)
    divergence = Divergence.of([{"y": reference}])
    return {
        "recipe": dict(recipe),
        "top1": float(np.mean(got.argmax(axis=1) == test.labels)),
        "agreement": float(np.mean(got.argmax(axis=1) == reference.argmax(axis=1))),
        "loss": divergence.mean([{"y": reference}], [{"y": got}]),
        "size": made.size,
    }


def main() -> None:
    made = ArgumentParser(description="a full table of recipes")
    made.add_argument("--network", choices=("resnet20", "squeezenet", "digits"), required=True)
    made.add_argument("--data", type=Path, default=Path("../shared"))
    made.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder")
    args = made.parse_args()
    with TemporaryDirectory(prefix="quantkit-benchmark-") as folder:
        fill(network(args, Path(folder)), args.out / f"recipes-{args.network}.jsonl")


def fill(chosen: Network, path: Path) -> None:
    """Write the head, then every recipe that is missing."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = [SPACE.point(row["recipe"]) for row in lines[1:]]
    missing = [point for point in SPACE if point not in done]
    options = make_options({"quantizer": "rtn", "activations": "8", "threads": 1, "inputs": "float"})
    run = prepare(chosen.model, chosen.calibration, None, options, frozenset(), SilentProgress())
    reference = outputs(run.reference, chosen.test.images)
    known = contexts(run, SPACE.dimensions[0].values)
    with path.open("a", encoding="utf-8") as file:
        if not lines:
            print(json.dumps(head(chosen, run, reference)), file=file, flush=True)
        for number, point in enumerate(missing, len(done) + 1):
            recipe = SPACE.configuration(point)
            row = measure(known[recipe["samples"]], recipe, chosen.test, reference)
            print(json.dumps(row), file=file, flush=True)
            say(f"{chosen.name} {number}/{len(SPACE)}: {recipe} top-1 {row['top1']:.4f}, {row['loss']:.4g} nats")


def head(chosen: Network, run: Run, reference: Array) -> dict[str, Any]:
    loaded = run.original.loaded
    return {
        "network": chosen.name,
        "images": len(chosen.test.labels),
        "float_top1": float(np.mean(reference.argmax(axis=1) == chosen.test.labels)),
        "dimensions": [
            {"name": item.name, "values": list(item.values), "ordered": item.ordered} for item in SPACE.dimensions
        ],
        "columns": list(STRUCTURE),
        "structure": [float(value) for value in structure(loaded.model, run.original.targets)],
    }


if __name__ == "__main__":
    main()
