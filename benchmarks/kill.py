"""Kill a compressing process at random moments, start it again, and compare what comes out in the end.

python -m benchmarks.kill --model ../shared/models/resnet20_cifar10.onnx --calib cifar96.npz --kills 200

One run is left alone. The others share nothing with it but the latencies that it measured (no two measurements are the
same, and forms are chosen by them); each has a cache of its own and is killed with SIGKILL, wherever it is, until it
gets to its end. After a kill there is no file under the final name or a whole one, and in the end the same bytes as
without kills.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import quantkit.cli
import quantkit.pipeline
from benchmarks.harness import Record, append_records, environment

MARGIN = 1.2
"""Kills come within so many times the seconds of the run that was left alone: a busy machine slows the others."""
SETTINGS = ("--avg-bits", "4", "--quantizer", "mse", "--allocator", "linearity", "--workers", "1", "--quiet")


def begin(args: argparse.Namespace, cache: Path, output: Path) -> int:
    """The number of a process that compresses: a fork, which has everything imported and shares nothing else."""
    given = ["compress", str(args.model), "--calib", str(args.calib), *SETTINGS]
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        code = 70
        try:
            code = quantkit.cli.main([*given, "--cache", str(cache), "--output", str(output)])
        finally:
            os._exit(code)
    return child


def ended(child: int, seconds: float = math.inf) -> int | None:
    """Its exit code, or None while it still runs after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.005)


def alone(args: argparse.Namespace, folder: Path) -> tuple[str, float, Path]:
    """(digest of the file, seconds, the latencies) of a run that nobody disturbs: the second, which measures none."""
    for number in range(2):
        cache, output = folder / f"alone{number}", folder / f"alone{number}.onnx"
        if number:
            cache.mkdir()
            shutil.copy(folder / "alone0" / "latency.json", cache)
        start = time.monotonic()
        if ended(begin(args, cache, output)) != 0:
            raise SystemExit("a run that nobody disturbed failed")
        seconds = time.monotonic() - start
    first, second = (digest(folder / f"alone{number}.onnx") for number in range(2))
    if first != second:
        raise SystemExit("two runs that nobody disturbed differ")
    return second, seconds, folder / "alone0" / "latency.json"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def killed_until_done(
    args: argparse.Namespace, folder: Path, latencies: Path, longest: float, rng: random.Random, wanted: str
) -> tuple[str, int, list[str]]:
    """(digest of the file, kills, what was wrong) of one run that is killed again and again."""
    cache, output = folder / "cache", folder / "out.onnx"
    cache.mkdir(parents=True)
    shutil.copy(latencies, cache)
    kills, wrong = 0, []
    while True:
        child = begin(args, cache, output)
        code = ended(child, rng.uniform(0, longest))
        if code is None:
            os.kill(child, signal.SIGKILL)
            ended(child)
            kills += 1
            if output.exists() and digest(output) != wanted:
                wrong.append("a part of a file, or another one, under the final name")
            output.unlink(missing_ok=True)  # it had come to its end, and was killed on the way out
            continue
        if code != 0:
            wrong.append(f"exit code {code}")
        return digest(output) if output.exists() else "", kills, wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    rng = random.Random(args.seed)
    kills, different, ends, wrong = 0, 0, 0, list[str]()
    with TemporaryDirectory(prefix="quantkit-kill-") as name:
        wanted, seconds, latencies = alone(args, Path(name))
        print(f"alone: {seconds:.1f} s", flush=True)
        while kills < args.kills:
            folder = Path(name) / f"run{ends}"
            found, more, odd = killed_until_done(args, folder, latencies, MARGIN * seconds, rng, wanted)
            kills, ends, wrong = kills + more, ends + 1, wrong + odd
            different += found != wanted
            left = [path.name for path in folder.iterdir() if path.name not in ("cache", "out.onnx")]
            wrong += [f"left behind: {name}" for name in left]
            shutil.rmtree(folder)
            print(f"{kills} kills, {ends} files, {different} differ, {len(wrong)} faults", flush=True)
    figures = {"kills": kills, "files": ends, "files that differ": different, "faults": len(wrong)}
    record = Record(
        "kill", args.model.name, "quantkit", " ".join(SETTINGS), environment(1), details={**figures, "faults": wrong}
    )
    if args.out:
        append_records(args.out, [record])
    return 1 if different or wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
