"""Models of many gigabytes: memory and time of ours and of the peers on the same generated file.

python -m benchmarks.large --size 6GB --width 4096 --folder /data
python -m benchmarks.large --size 3GB --width 2048 --folder /data --quantizer gptq --set gptq.rounds=0
python -m benchmarks.large --size 6GB --width 4096 --folder /data --nncf /path/to/python
python -m benchmarks.large --size 6GB --width 4096 --folder /data --cgroup /sys/fs/cgroup/memory/two-gigabytes

Memory is what the page cache is not: anonymous and shared pages of all processes of a contestant together, looked at
twenty times a second. Writing is measured where the result is written, and the disk right before, in the same folder.
With --cgroup contestants run in a control group whose limit somebody has set: it counts the page cache too, so that a
model larger than the limit is a model larger than memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from benchmarks.contest import say
from benchmarks.harness import Record, append_records, environment, file_size
from benchmarks.transformer import shape_of, write
from quantkit.budget import parse_bytes

INTERVAL = 0.05
BLOCK = 4 << 20
PROBE = 1 << 30
"""Bytes that tell how fast the disk writes."""
SENTENCES, TOKENS = 40, 64
GROUP = 32

OURS = """
import json, sys, time
import quantkit
from quantkit import pipeline
seconds = 0.0

def timed(save):
    def run(*args, **options):
        global seconds
        start = time.perf_counter()
        save(*args, **options)
        seconds += time.perf_counter() - start
    return run

pipeline.save = timed(pipeline.save)
model, output, calibration, settings = json.loads(sys.argv[1])
budget = quantkit.Budget(avg_bits=4)
result = quantkit.compress(model, calibration=calibration, budget=budget, **settings)
result.save(output)
print(json.dumps({"seconds writing": seconds}))
"""
ONNXRUNTIME = """
import json, sys
import onnx
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
model, output, _, settings = json.loads(sys.argv[1])
config = DefaultWeightOnlyQuantConfig(block_size=settings["group_size"], bits=4)
quantizer = MatMulNBitsQuantizer(onnx.load(model), algo_config=config)
quantizer.process()
quantizer.model.save_model_to_file(output, True)
print("{}")
"""
NNCF = """
import json, sys
import nncf, onnx
model, output, _, settings = json.loads(sys.argv[1])
mode = nncf.CompressWeightsMode.INT4_ASYM
made = nncf.compress_weights(onnx.load(model), mode=mode, ratio=1.0, group_size=settings["group_size"])
onnx.save(made, output, save_as_external_data=True)
print("{}")
"""


@dataclass(frozen=True)
class Use:
    """What a command took.

    Attributes:
        peak_mb: anonymous and shared memory of all its processes, in 10^6 bytes.
        mapped_mb: pages of files, the most.
        told: the last line that it printed, as JSON.
        error: the last line of what it complained about ("" = it did what it should).
    """

    seconds: float
    peak_mb: float
    mapped_mb: float
    told: dict[str, float]
    error: str


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="6GB", help="of the float weights")
    parser.add_argument("--width", type=int, default=4096, help="of the residual stream")
    parser.add_argument("--folder", type=Path, required=True, help="on the disk that is to be written to")
    parser.add_argument("--quantizer", default="rtn")
    parser.add_argument("--set", action="append", default=[], help="METHOD.SETTING=VALUE of ours")
    parser.add_argument("--most", default="18GB", help="address space of a peer: what it may take of this machine")
    parser.add_argument("--cgroup", type=Path, help="folder of a memory control group to run in")
    parser.add_argument("--nncf", help="an interpreter that has NNCF installed")
    parser.add_argument("--only", action="append", help="contestants whose name contains this")
    parser.add_argument("--out", type=Path, help="file to append results to")
    args = parser.parse_args(arguments)
    model = args.folder / f"decoder-{args.size}-{args.width}.onnx"
    if not model.exists():
        say(f"large: writing {model}")
        write(shape_of(parse_bytes(args.size, "--size"), args.width), model)
    calibration = None
    if args.quantizer != "rtn":
        calibration = str(args.folder / "ids.npz")
        np.savez(calibration, ids=np.random.default_rng(0).integers(0, 32000, (SENTENCES, TOKENS)))
    for name, interpreter, code in contestants(args):
        settings: dict[str, object] = {"group_size": GROUP}
        if name == "quantkit":
            settings |= {"quantizer": args.quantizer, "settings": dict(item.split("=", 1) for item in args.set)}
        append_record(args, name, model, measure(args, interpreter, code, [str(model), calibration, settings]))
    return 0


def contestants(args: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """(name, interpreter, code)."""
    found = [("quantkit", sys.executable, OURS), ("onnxruntime", sys.executable, ONNXRUNTIME)]
    found += [("nncf", args.nncf, NNCF)] if args.nncf else []
    for name, interpreter, code in found:
        if not args.only or any(text in name for text in args.only):
            yield name, interpreter, code


def measure(
    args: argparse.Namespace, interpreter: str, code: str, given: list[object]
) -> tuple[Use, float, int | None]:
    """(what it took, the disk's bytes a second right before, size of the file or None)."""
    output = args.folder / "made.onnx"
    for file in args.folder.glob("made.onnx*"):
        file.unlink()
    rate = disk_rate(args.folder)
    model, calibration, settings = given
    if args.cgroup:
        forget(Path(str(model)))
    most = None if code is OURS else parse_bytes(args.most, "--most")
    command = [interpreter, "-c", code, json.dumps([model, str(output), calibration, settings])]
    used = watch(command, most, args.cgroup)
    return used, rate, file_size(output) if output.exists() and not used.error else None


def disk_rate(folder: Path) -> float:
    """Bytes a second of a sequential write, until they are on the disk."""
    path, block = folder / "rate.bin", os.urandom(BLOCK)
    start = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(PROBE // BLOCK):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return PROBE / seconds


def forget(model: Path) -> None:
    """Drop a model's pages from the cache: a control group is not charged for what others have read."""
    for path in model.parent.glob(f"{model.name}*"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def watch(command: Sequence[str], most: int | None = None, cgroup: Path | None = None) -> Use:
    """Run a command and look at the memory of its processes.

    Args:
        most: bytes of address space that it may take; None = as much as it wants.
        cgroup: control group to run in.
    """
    start, own, mapped = time.perf_counter(), 0, 0
    limit = partial(_enter, most, cgroup)
    with TemporaryFile("w+") as out, TemporaryFile("w+") as complaint:  # a pipe would fill, and nobody reads it
        process = subprocess.Popen(command, stdout=out, stderr=complaint, preexec_fn=limit)
        while process.poll() is None:
            rows = [_memory(pid) for pid in _tree(process.pid)]
            own, mapped = max(own, sum(row[0] for row in rows)), max(mapped, sum(row[1] for row in rows))
            time.sleep(INTERVAL)
        seconds = time.perf_counter() - start
        texts = [(file.seek(0), file.read())[1] for file in (out, complaint)]
    lines = [line for line in texts[1].splitlines() if line.strip()]
    failed = process.returncode != 0
    error = (lines[-1] if lines else f"exit code {process.returncode}") if failed else ""
    told = {} if failed else json.loads(texts[0].splitlines()[-1])
    return Use(seconds, own * 1024 / 1e6, mapped * 1024 / 1e6, told, error)


def _enter(most: int | None, cgroup: Path | None) -> None:
    """In the process that is about to become the command."""
    if most is not None:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    if cgroup is not None:
        (cgroup / "cgroup.procs").write_text(str(os.getpid()))


def cgroup_limit(cgroup: Path) -> int:
    """Bytes that a control group allows, page cache included; of version 1 or 2."""
    files = [file for file in (cgroup / "memory.max", cgroup / "memory.limit_in_bytes") if file.exists()]
    return int(files[0].read_text())


def _tree(pid: int) -> list[int]:
    found = [pid]
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += _tree(int(child))
    except OSError:
        pass  # it has just ended
    return found


def _memory(pid: int) -> tuple[int, int]:
    """(kB of anonymous and shared pages, kB of pages of files)."""
    own = mapped = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(("RssAnon", "RssShmem")):
                own += int(line.split()[1])
            elif line.startswith("RssFile"):
                mapped += int(line.split()[1])
    except OSError:
        pass  # it has just ended
    return own, mapped


def append_record(args: argparse.Namespace, name: str, model: Path, measured: tuple[Use, float, int | None]) -> None:
    used, rate, size = measured
    details: dict[str, object] = {"mapped_mb": used.mapped_mb, "disk MB/s": rate / 1e6, "float bytes": file_size(model)}
    details |= {"memory limit": cgroup_limit(args.cgroup)} if args.cgroup else {}
    writing = used.told.get("seconds writing")
    if writing and size:
        details |= {"written MB/s": size / writing / 1e6, "share of the disk's rate": size / writing / rate}
    setting = f"{args.quantizer} {' '.join(args.set)}".strip() if name == "quantkit" else "rtn"
    record = Record(
        "large",
        f"decoder of {args.size}, width {args.width}",
        name,
        f"{setting}, 4 bits g{GROUP}",
        environment(1),
        size_bytes=size,
        peak_rss_mb=used.peak_mb,
        seconds=used.seconds,
        details=details,
        error=used.error,
    )
    say(f"large: {name}: {used.peak_mb:.0f} MB, {used.seconds:.0f} s, {size} bytes, {details} {used.error}")
    if args.out:
        append_records(args.out, [record])


if __name__ == "__main__":
    raise SystemExit(main())
