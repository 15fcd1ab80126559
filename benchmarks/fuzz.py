"""Coverage-guided fuzzing of everything that quantkit reads: models, plans, preprocessing and calibration data.

python -m benchmarks.fuzz --minutes 30 --findings fuzz-findings

Needs atheris (pip install quantkit[fuzz]). Only InputError may come out of a damaged file, within a few seconds and a
few hundred megabytes; whatever else happens is a finding: the input is kept beside a text that tells what it did. A
crash of native code ends the process that fuzzes, which then starts again. Exits with 1 when there are findings.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

KINDS = (".onnx", ".json", ".yaml", ".npy", ".npz", ".pb")
"""The first byte of an input chooses what it is."""
SECONDS = 5.0
"""More than this of processor time for one input of at most 64 kB is a finding; waiting is one after 30 s."""
GROWTH = 256 << 10
"""KiB by which one input may raise the peak of memory in use."""
LIMITS = ("-rss_limit_mb=3072", "-malloc_limit_mb=2048", "-timeout=30")


class Harness:
    """One input after the other through the reader of its kind."""

    def __init__(self, folder: Path, findings: Path, run: Callable[[Path], str | None]) -> None:
        """
        Args:
            folder: where the inputs are written.
            findings: where those that did wrong are kept.
            run: reads a file and returns the sentence with which it was refused.
        """
        self._folder, self._findings, self._run = folder, findings, run
        self._peak = peak_memory()
        for kind in KINDS:
            (folder / kind[1:]).mkdir(exist_ok=True)

    def __call__(self, data: bytes) -> None:
        kind = KINDS[data[0] % len(KINDS)] if data else KINDS[0]
        path = self._folder / kind[1:] / f"input_0{kind}"
        path.write_bytes(data[1:])
        start = time.process_time()
        try:
            self._run(path)
        except Exception as error:  # noqa: BLE001  (that is what is looked for)
            self._keep(kind, data, _place(error), "".join(traceback.format_exception(error)))
        seconds, peak = time.process_time() - start, peak_memory()
        if seconds > SECONDS:
            self._keep(kind, data, f"slow-{int(seconds)}", f"{seconds:.1f} s")
        if peak - self._peak > GROWTH:
            self._keep(kind, data, f"memory-{peak >> 18}", f"{peak >> 10} MB, {self._peak >> 10} MB before")
        self._peak = peak

    def _keep(self, kind: str, data: bytes, label: str, text: str) -> None:
        name = self._findings / f"{kind[1:]}-{label}"
        if not name.with_suffix(".txt").exists():
            name.with_suffix(kind).write_bytes(data[1:])
            name.with_suffix(".txt").write_text(text)


def peak_memory() -> int:
    """KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _place(error: BaseException) -> str:
    """Kind of the error and where in quantkit it came through last: one finding for each."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "quantkit" in Path(frame.filename).parts]
    last = f"{Path(frames[-1].filename).stem}-{frames[-1].name}-{frames[-1].lineno}" if frames else "outside"
    return f"{type(error).__name__}-{last}"


def fuzz(findings: Path, corpus: Path, seconds: int, seed: int) -> None:
    """Until the time is over, or the process dies."""
    import atheris

    faulthandler.enable()
    with atheris.instrument_imports(include=["quantkit", "onnx_ir", "onnxscript.optimizer"]):
        from tests.helpers.hostile import LARGEST, mutate, refused

    def change(data: bytes, most: int, seed: int) -> bytes:
        if seed % 4 == 0 or len(data) < 2:
            return bytes(atheris.Mutate(data, most))
        kind = KINDS[data[0] % len(KINDS)]
        return (data[:1] + mutate(kind, data[1:], seed))[:most]

    with TemporaryDirectory(prefix="quantkit-fuzz-") as folder:
        harness = Harness(Path(folder), findings, refused)
        options = [f"-max_len={LARGEST}", f"-max_total_time={seconds}", f"-seed={seed}", *LIMITS]
        options += [f"-artifact_prefix={findings}/", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *options, str(corpus)], harness, custom_mutator=change)
        atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="how long to fuzz")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"), help="folder of what went wrong")
    parser.add_argument("--seed", type=int, default=1, help="of the first process; each later one counts on")
    parser.add_argument("--corpus", type=Path, help="folder that keeps the inputs that reached new code")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.findings.mkdir(parents=True, exist_ok=True)
    if args.child:
        fuzz(args.findings, args.child, round(args.minutes * 60), args.seed)
        return
    end, seed = time.monotonic() + args.minutes * 60, args.seed
    with TemporaryDirectory(prefix="quantkit-corpus-") as scratch:
        folder = args.corpus or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted((Path(__file__).parents[1] / "tests" / "corpus").iterdir()):
            (folder / path.name).write_bytes(bytes([KINDS.index(path.suffix)]) + path.read_bytes())
        while (left := end - time.monotonic()) > 1:
            command = [sys.executable, "-m", "benchmarks.fuzz", "--child", str(folder), "--minutes", str(left / 60)]
            done = subprocess.run([*command, "--findings", str(args.findings), "--seed", str(seed)], check=False)
            seed += 1
            print(f"fuzz: a process ended with {done.returncode}", file=sys.stderr)
    found = sorted(path.name for path in args.findings.iterdir())
    print(f"fuzz: {len(found)} findings in {args.findings}: {', '.join(found) or 'none'}", file=sys.stderr)
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
