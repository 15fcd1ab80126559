"""Several ways to compress one model, each in a process of its own, then judged together."""

from __future__ import annotations

import json
import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.data import Labelled
from benchmarks.harness import (
    Environment,
    Record,
    append_records,
    count_kernels,
    environment,
    evaluate_classifier,
    file_size,
    run_isolated,
    time_against_float,
)
from quantkit.types import Array, Feed

PYTHON = (sys.executable, "-m")
OUT = "{out}"  # stands for the file to write, in a contestant's command
MEMORY_LIMIT = 16 << 30


@dataclass(frozen=True)
class Contestant:
    """One way to make a file.

    Attributes:
        provider, setting: as in Record.
        command: arguments of `python -m`, with OUT where the file to write belongs; empty = the float model itself.
    """

    provider: str
    setting: str
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class Contest:
    """What all contestants share.

    Attributes:
        evaluate: file -> accuracy figures; it is called with the float model first.
        feeds: name of the shape -> feed to time.
        results: JSONL file to append to.
        seconds: of timing for each feed.
        keep: folder for the compressed files (None = they are thrown away).
    """

    benchmark: str
    model: Path
    evaluate: Callable[[Path], Mapping[str, float]]
    feeds: Mapping[str, Feed]
    results: Path
    threads: int = 1
    seconds: float = 30.0
    keep: Path | None = None


def float_model() -> Contestant:
    return Contestant("float", "float32")


def with_quantkit(setting: str, model: Path, *arguments: str) -> Contestant:
    """`quantkit compress` with these arguments; latencies are measured anew, not taken from a cache."""
    files = ("-o", OUT, "--report", f"{OUT}.json", "--cache", f"{OUT}.cache", "--quiet")
    return Contestant("quantkit", setting, ("quantkit", "compress", str(model), *files, *arguments))


def with_onnxruntime(setting: str, method: str, model: Path, *arguments: str) -> Contestant:
    """A method of benchmarks.peers."""
    return Contestant("onnxruntime", setting, ("benchmarks.peers", method, str(model), OUT, *arguments))


def rounded(model: Path, calib: Sequence[str]) -> list[Contestant]:
    """One width everywhere, rounded to nearest: what error-compensated rounding and allocation are compared with."""
    plain = ("--allocator", "uniform", "--quantizer", "rtn", "--inputs", "float")
    return [
        with_quantkit(
            f"{bits} bits, {kind}rtn uniform", model, *calib, "--avg-bits", bits, "--activations", act, *plain
        )
        for kind, act in (("", "auto"), ("weights only, ", "none"))
        for bits in ("4", "3", "2")
    ]


def run_contest(contest: Contest, contestants: Sequence[Contestant]) -> list[Record]:
    """Compress, evaluate, time, write; a contestant that fails is recorded with its error."""
    if contest.keep is not None:
        contest.keep.mkdir(parents=True, exist_ok=True)
        return _run(contest, contestants, contest.keep)
    with TemporaryDirectory(prefix="quantkit-benchmark-") as folder:
        return _run(contest, contestants, Path(folder))


def _run(contest: Contest, contestants: Sequence[Contestant], folder: Path) -> list[Record]:
    where = environment(contest.threads)
    entries = []
    for index, contestant in enumerate(contestants):
        path = folder / f"{contest.benchmark}-{index}.onnx" if contestant.command else contest.model
        record = _judge(contest, contestant, path, where)
        entries.append((path, record))
        say(f"{contest.benchmark}: {record.provider} {record.setting}: {record.error or _summary(record)}")
    runnable = [(path, record) for path, record in entries if not record.error]
    say(f"{contest.benchmark}: timing {len(runnable)} files")
    speeds = time_against_float(
        contest.model,
        [path for path, _ in runnable],
        contest.feeds,
        threads=contest.threads,
        seconds=contest.seconds,
    )
    timed = [replace(record, speed=speed) for (_, record), speed in zip(runnable, speeds, strict=True)]
    records = timed + [record for _, record in entries if record.error]
    append_records(contest.results, records)
    return records


def _judge(contest: Contest, contestant: Contestant, path: Path, where: Environment) -> Record:
    record = Record(contest.benchmark, contest.model.name, contestant.provider, contestant.setting, where)
    if contestant.command:
        for left in (path, Path(f"{path}.json")):  # of an earlier run with --keep
            left.unlink(missing_ok=True)
        shutil.rmtree(f"{path}.cache", ignore_errors=True)
        arguments = [item.replace(OUT, str(path)) for item in contestant.command]
        done = run_isolated([*PYTHON, *arguments], memory_limit=MEMORY_LIMIT)
        record = replace(record, peak_rss_mb=done.peak_rss_mb, seconds=done.seconds)
        if not path.exists():
            return replace(record, error=done.last_line)
    return replace(
        record,
        size_bytes=file_size(path),
        accuracy=dict(contest.evaluate(path)),
        kernels=count_kernels(path, threads=contest.threads),
        details=_details(Path(f"{path}.json")),
    )


def _details(report: Path) -> dict[str, Any]:
    """What quantkit's report says about bits, and which candidate it kept."""
    if not report.exists():
        return {}
    data = json.loads(report.read_text(encoding="utf-8"))
    weights = sum(row["shape"][0] * row["shape"][1] for row in data["layers"])
    return {
        "average_bits": data["average_bits"],
        "stored_bits": data["stored_bits"],
        "weights": weights,
        "code_bytes": round(data["average_bits"] * weights / 8),
        "forms": sorted({str(row["form"]) for row in data["layers"]}),
        "contenders": [{key: row[key] for key in ("name", "sqnr", "latency", "chosen")} for row in data["contenders"]],
        "unmet": data["unmet"],
    }


def _summary(record: Record) -> str:
    figures = ", ".join(f"{name} {value:.4f}" for name, value in record.accuracy.items())
    seconds = "" if record.seconds is None else f", {record.seconds:.0f} s, peak {record.peak_rss_mb or 0:.0f} MB"
    return f"{figures}, {record.size_bytes} B{seconds}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Classifier:
    """Top-1 on labelled images, and how often the answer is the float model's (which is evaluated first)."""

    def __init__(self, data: Labelled) -> None:
        self._data = data
        self._reference: Array | None = None

    def __call__(self, path: Path) -> dict[str, float]:
        found = evaluate_classifier(path, self._data.images, self._data.labels)
        if self._reference is None:
            self._reference = found.predictions
        return {"top-1": found.top1, "agreement": float((found.predictions == self._reference).mean())}


def parser(description: str) -> ArgumentParser:
    """The arguments that every benchmark takes."""
    made = ArgumentParser(description=description)
    made.add_argument("--data", type=Path, default=Path("../shared"), help="folder with models/ and data/")
    made.add_argument("--out", type=Path, default=Path("results.jsonl"), help="file to append results to")
    made.add_argument("--threads", type=int, default=1, help="onnxruntime threads while timing")
    made.add_argument("--seconds", type=float, default=30.0, help="timing of each shape")
    made.add_argument("--keep", type=Path, help="folder for the compressed files")
    made.add_argument(
        "--only",
        metavar="TEXT",
        action="append",
        help="only contestants whose provider and setting contain one of these",
    )
    return made


def selected(contestants: Sequence[Contestant], args: Namespace) -> list[Contestant]:
    """The float model and what --only asks for."""
    asked = args.only or [""]
    wanted = [
        item
        for item in contestants
        if not item.command or any(text in f"{item.provider} {item.setting}" for text in asked)
    ]
    if len(wanted) < 2:
        known = ", ".join(f"{item.provider} {item.setting}" for item in contestants)
        raise SystemExit(f"--only {' '.join(asked)}: no contestant is called so; there are {known}")
    return wanted
