"""Files for the target `portable`, run by several runtimes: do all of them compute the same?

    python -m benchmarks.portable --data ../shared --minilm minilm.onnx --tokenizer folder --out results.jsonl

OpenVINO takes part when it is installed (`pip install openvino`).
"""

from __future__ import annotations

import importlib.util
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx

from benchmarks.contest import OUT, Contestant, parser, say, with_quantkit
from benchmarks.data import (
    cifar10_calibration,
    cifar10_test,
    imagenet_calibration,
    imagenet_test,
    sentence_feeds,
    sentences,
    write_calibration_text,
)
from benchmarks.harness import Record, append_records, environment, file_size, run_isolated
from quantkit import metrics
from quantkit.runtime.ort import make_session
from quantkit.types import Array, Feed

SAMPLES = 16
REFERENCE_SAMPLES = 2  # the evaluator of the onnx package is written in Python

Run = Callable[[Feed], Array]


@dataclass(frozen=True)
class Case:
    """One file to make, and feeds to run it on, one sample each."""

    model: Path
    contestant: Contestant
    feeds: Sequence[Feed]


def first_output(values: Any) -> Array:
    """The evaluator's return type admits a mapping, which it gives for no call of ours."""
    return np.asarray(values[0])


def open_onnxruntime(path: Path) -> Run:
    session = make_session(path)
    return lambda feed: next(iter(session.run(feed).values()))


def open_reference(path: Path) -> Run:
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(onnx.load(path))
    return lambda feed: first_output(evaluator.run(None, dict(feed)))


def open_openvino(path: Path) -> Run:
    if importlib.util.find_spec("openvino") is None:
        raise ModuleNotFoundError("OpenVINO is not installed; pip install openvino and run this again")
    import openvino

    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda feed: np.asarray(compiled(dict(feed))[0])


RUNTIMES = (
    ("onnxruntime", open_onnxruntime, SAMPLES),
    ("onnx ReferenceEvaluator", open_reference, REFERENCE_SAMPLES),
    ("OpenVINO", open_openvino, SAMPLES),
)


def compare(case: Case, path: Path, record: Record) -> list[Record]:
    """One record per runtime."""
    wanted = [open_onnxruntime(path)(feed) for feed in case.feeds]
    original = [open_onnxruntime(case.model)(feed) for feed in case.feeds]
    records = []
    for name, opener, samples in RUNTIMES:
        made = replace(record, provider=name)
        try:
            run = opener(path)
            got = [run(feed) for feed in case.feeds[:samples]]
        except Exception as error:  # noqa: BLE001  runtimes share no base class, and what they say is the result
            records.append(replace(made, error=_explained(error, opener, case)))
            continue
        accuracy = {"SQNR to float, dB": _sqnr(original, got)}
        if opener is not open_onnxruntime:
            accuracy["SQNR to onnxruntime, dB"] = _sqnr(wanted, got)
        records.append(replace(made, accuracy=accuracy, details={"samples": len(got)}))
    return records


def _explained(error: Exception, opener: Callable[[Path], Run], case: Case) -> str:
    """What the runtime said, and whether it says so of the float model too."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:400]
    try:
        opener(case.model)(case.feeds[0])
    except Exception:  # noqa: BLE001  (runtimes share no base class)
        return f"the float model does not run either: {text}"
    return text


def _sqnr(wanted: Sequence[Array], got: Sequence[Array]) -> float:
    pairs = list(zip(wanted, got, strict=False))
    return metrics.sqnr(
        np.concatenate([first.reshape(-1) for first, _ in pairs]),
        np.concatenate([second.reshape(-1) for _, second in pairs]),
    )


def cases(args: Namespace, folder: Path) -> list[Case]:
    """8 and 4 bits of each model."""
    found = []

    def add(model: Path, feeds: Sequence[Feed], *calib: str) -> None:
        for bits in ("8", "4"):
            arguments = (*calib, "--target", "portable", "--avg-bits", bits)
            found.append(Case(model, with_quantkit(f"{model.stem}, {bits} bits", model, *arguments), feeds))

    models = args.data / "models"
    feeds: list[Feed] = [{"image": image[None]} for image in cifar10_test(args.data).images[:SAMPLES]]
    add(models / "resnet20_cifar10.onnx", feeds, "--calib", cifar10_calibration(args.data), "--preprocess", "cifar10")
    feeds = [{"data_0": image[None]} for image in imagenet_test(args.data, SAMPLES).images]
    add(
        models / "squeezenet11_imagenet.onnx",
        feeds,
        *("--calib", imagenet_calibration(args.data), "--preprocess", "caffe"),
    )
    if args.minilm is not None:
        text = write_calibration_text(args.data, folder)
        feeds = sentence_feeds(sentences(args.data, "test", SAMPLES), args.tokenizer)
        add(args.minilm, feeds, "--calib", str(text), "--tokenizer", str(args.tokenizer))
    return found


def main() -> None:
    arguments = parser("files of the target `portable` in several runtimes")
    arguments.add_argument("--minilm", type=Path, help="the exported sentence encoder (needs --tokenizer)")
    arguments.add_argument("--tokenizer", type=Path, help="tokenizer.json, or the folder that holds it")
    args = arguments.parse_args()
    if (args.minilm is None) != (args.tokenizer is None):
        arguments.error("--minilm and --tokenizer go together")
    where = environment(args.threads)
    with TemporaryDirectory(prefix="quantkit-benchmark-") as name:
        folder = args.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        for index, case in enumerate(cases(args, Path(name))):
            path = folder / f"portable-{index}.onnx"
            path.unlink(missing_ok=True)
            command = [item.replace(OUT, str(path)) for item in case.contestant.command]
            done = run_isolated([sys.executable, "-m", *command])
            record = Record("portable", case.model.name, "quantkit", case.contestant.setting, where)
            if path.exists():
                records = compare(case, path, replace(record, size_bytes=file_size(path)))
            else:
                records = [replace(record, error=done.last_line)]
            for row in records:
                say(f"portable: {row.setting}: {row.provider}: {row.error or row.accuracy}")
            append_records(args.out, records)


if __name__ == "__main__":
    main()
