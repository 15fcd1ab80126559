"""Measuring for all benchmarks: records, isolated compressions, accuracy, speed against float, kernels.

A benchmark file declares its contestants and its data; everything that decides how a figure is taken is here.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

import quantkit
from quantkit import metrics
from quantkit.runtime.ort import make_session, optimized_nodes
from quantkit.types import Array, Feed

PACKAGES = ("quantkit", "onnx", "onnxruntime", "numpy")
BATCH = 50
MIN_ROUNDS = 11
# A process inherits the high-water mark of the one that started it, so a small one stands between: the mark that it
# reads is that of the command. Its last line on standard error is ours.
LAUNCHER = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
sys.stderr.write(f"\\npeak {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}\\n")
sys.exit(status if status >= 0 else 128 - status)
"""


@dataclass(frozen=True)
class Environment:
    """Where a figure was measured.

    Attributes:
        versions: package -> version.
        cpu: model and the vector instructions that decide which kernels run.
        threads: of one onnxruntime operator while timing.
        date: UTC, to the second.
        commit: of this repository, with `+` when files differ from it.
        gpu: name, processors, driver; "" = none was used.
    """

    versions: Mapping[str, str]
    cpu: str
    threads: int
    date: str
    commit: str
    gpu: str = ""


@dataclass(frozen=True)
class Speed:
    """Float time / contestant time, round by round: both ran in the same process moments apart.

    Attributes:
        shape: of the feed, as the tables name it (`1x32`).
        median, p20, p80: of the ratios of all rounds; above 1 = faster than float.
        milliseconds: median of the contestant alone.
        rounds: how many.
    """

    shape: str
    median: float
    p20: float
    p80: float
    milliseconds: float
    rounds: int


@dataclass(frozen=True)
class Record:
    """One line of results: one contestant on one benchmark.

    Attributes:
        provider: what made the file (`float`, `onnxruntime`, `quantkit`).
        setting: how, in words.
        size_bytes: of the file with its external data (None = there is no file).
        accuracy: figure -> value; shares from 0 to 1.
        speed: one entry per timed shape.
        kernels: operator -> how many the runtime runs, read from its optimised graph.
        peak_rss_mb: most memory that the compressing process held, interpreter and libraries included, in 10^6 bytes.
        seconds: the compressing process took, start of the interpreter included.
        details: what else the contestant tells about itself.
        error: why there is no file ("" = there is one).
    """

    benchmark: str
    model: str
    provider: str
    setting: str
    environment: Environment
    size_bytes: int | None = None
    accuracy: Mapping[str, float] = field(default_factory=dict)
    speed: tuple[Speed, ...] = ()
    kernels: Mapping[str, int] = field(default_factory=dict)
    peak_rss_mb: float | None = None
    seconds: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Record:
        values = json.loads(line)
        values["environment"] = Environment(**values["environment"])
        values["speed"] = tuple(Speed(**item) for item in values["speed"])
        return cls(**values)


def append_records(path: Path, records: Sequence[Record]) -> None:
    """Add lines; older ones stay, and the report shows the newest of each contestant."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(record.to_json() + "\n" for record in records)


def read_records(path: Path) -> list[Record]:
    """All lines, oldest first."""
    return [Record.from_json(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def environment(threads: int, packages: Sequence[str] = PACKAGES, gpu: str = "") -> Environment:
    """This machine, now; packages that are not installed are left out."""
    return Environment(
        versions=_versions(packages),
        cpu=_cpu(),
        threads=threads,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=_commit(),
        gpu=gpu,
    )


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {"quantkit": quantkit.__version__} if "quantkit" in packages else {}
    for name in packages:
        with suppress(PackageNotFoundError):  # quantkit itself may run from its folder
            found[name] = version(name)
    return found


def _cpu() -> str:
    """`AMD EPYC (avx2, avx512f, avx512_vnni), 2 cores`."""
    name, flags = platform.processor() or platform.machine(), ""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        lines = dict(line.partition(":")[::2] for line in listing.read_text(encoding="utf-8").splitlines())
        values = {key.strip(): value.strip() for key, value in lines.items()}
        known = set(values.get("flags", values.get("Features", "")).split())
        wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
        name, flags = values.get("model name", name), ", ".join(flag for flag in wanted if flag in known)
    return f"{name}{f' ({flags})' if flags else ''}, {os.cpu_count()} cores"


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        except FileNotFoundError:
            return ""

    head = git("rev-parse", "--short=12", "HEAD")
    return f"{head}+" if head and git("status", "--porcelain") else head or "unknown"


@dataclass(frozen=True)
class Isolated:
    """How a command ran in a process of its own.

    Attributes:
        status: exit code; 128 + signal when it was killed.
        messages: standard error.
        peak_rss_mb: most memory of the command and its children, in 10^6 bytes (None = the launcher was killed too).
    """

    status: int
    messages: str
    peak_rss_mb: float | None
    seconds: float

    @property
    def last_line(self) -> str:
        lines = [line.strip() for line in self.messages.splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {self.status}"


def run_isolated(command: Sequence[str], *, memory_limit: int | None = None) -> Isolated:
    """Run a command line and watch its memory.

    Args:
        command: program and arguments.
        memory_limit: bytes of address space after which allocations fail (None = no limit).
    """

    def limit() -> None:
        if memory_limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, (memory_limit, memory_limit))

    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-S", "-c", LAUNCHER, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
        check=False,
    )
    seconds = time.perf_counter() - start
    messages, found, peak = done.stderr.rpartition("\npeak ")
    if not found:
        return Isolated(done.returncode, done.stderr, None, seconds)
    unit = 1 if sys.platform == "darwin" else 1024
    return Isolated(done.returncode, messages, int(peak) * unit / 1e6, seconds)


def file_size(path: Path) -> int:
    """The file with the external data files that it names."""
    names = {
        value.const_value.path
        for graph in ir.load(path).graphs()
        for value in graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    return path.stat().st_size + sum(Path(name).stat().st_size for name in names)


def count_kernels(path: Path, *, threads: int = 1) -> dict[str, int]:
    """Operator -> nodes of that type in the graph that onnxruntime really runs, most frequent first."""
    return dict(Counter(node.op_type for node in optimized_nodes(path, threads=threads)).most_common())


@dataclass(frozen=True)
class Classified:
    """A classifier on labelled images.

    Attributes:
        top1: share of right answers.
        predictions: best class of each image, [samples].
    """

    top1: float
    predictions: Array


def evaluate_classifier(path: Path, images: Array, labels: Array) -> Classified:
    """Run all images ([samples, ...], as the model reads them) through a model with one input and one output."""
    session = make_session(path, threads=os.cpu_count() or 1)
    name = session.input_names[0]
    scores = [
        next(iter(session.run({name: images[first : first + BATCH]}).values())).reshape(-1)
        for first in range(0, len(images), BATCH)
    ]
    table = np.concatenate(scores).reshape(len(images), -1)
    return Classified(metrics.top1(table, labels), table.argmax(axis=1))


def time_against_float(
    float_path: Path, paths: Sequence[Path], feeds: Mapping[str, Feed], *, threads: int = 1, seconds: float = 30.0
) -> list[tuple[Speed, ...]]:
    """Speed of every file on every feed, all alternating with the float model in this one process.

    Args:
        feeds: name of the shape -> feed.
        seconds: for each feed; at least MIN_ROUNDS rounds are run.

    Returns:
        For each path, one Speed per feed.
    """
    sessions = [make_session(path, threads=threads) for path in (float_path, *paths)]
    rows: list[list[Speed]] = [[] for _ in paths]
    for shape, feed in feeds.items():
        for session in sessions * 2:
            session.run(feed)
        times: list[list[float]] = [[] for _ in sessions]
        start = time.perf_counter()
        while len(times[0]) < MIN_ROUNDS or time.perf_counter() - start < seconds:
            # The first of a round differs each time, so that a break between rounds hits everyone alike.
            first = len(times[0])
            for place in [(first + step) % len(sessions) for step in range(len(sessions))]:
                before = time.perf_counter()
                sessions[place].run(feed)
                times[place].append(time.perf_counter() - before)
        for row, samples in zip(rows, times[1:], strict=True):
            row.append(speed_of(shape, times[0], samples))
    return [tuple(row) for row in rows]


def speed_of(shape: str, reference: Sequence[float], measured: Sequence[float]) -> Speed:
    """From the seconds of each round."""
    ratios = np.asarray(reference) / np.asarray(measured)
    low, middle, high = (float(value) for value in np.percentile(ratios, (20, 50, 80)))
    return Speed(shape, middle, low, high, float(np.median(measured)) * 1000, len(ratios))
