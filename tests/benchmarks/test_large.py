"""Memory, failures and results of commands are told as they are; rows of results become the right lines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import kill, large
from benchmarks.harness import Environment, Record
from benchmarks.picture import OURS, PANELS, draw, lines

HERE = Environment({}, "", 1, "", "")
BIG = "import time; kept = bytearray(200 << 20); time.sleep(0.4); print('{\"a\": 1.5}')"
CHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BIG!r}], check=True)"


@pytest.mark.parametrize("code", [BIG, CHILD])
def test_memory_of_all_processes_counts(code: str) -> None:
    used = large.watch([sys.executable, "-c", code])
    assert used.error == "" and used.told == {"a": 1.5}
    assert 200 < used.peak_mb < 300 and used.seconds > 0.4


def test_a_limit_and_a_failure_are_told() -> None:
    used = large.watch([sys.executable, "-c", BIG], 150 << 20)
    assert used.error == "MemoryError" and used.told == {}
    assert large.watch([sys.executable, "-c", "import os; os._exit(3)"]).error == "exit code 3"


def test_much_output_does_not_stop_a_command() -> None:
    used = large.watch([sys.executable, "-c", "import sys; sys.stderr.write('x' * 300_000); print('{}')"])
    assert used.error == "" and used.told == {}


def test_a_fork_that_ends_and_one_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import signal
    import time

    def fork(seconds: float, code: int) -> int:
        child = os.fork()
        if child == 0:
            time.sleep(seconds)
            os._exit(code)
        return child

    assert kill.ended(fork(0, 3)) == 3
    child = fork(30, 0)
    assert kill.ended(child, 0.05) is None
    os.kill(child, signal.SIGKILL)
    assert kill.ended(child) == -signal.SIGKILL


def row(provider: str, setting: str, size: int, figure: str, value: float) -> Record:
    return Record("b", "m", provider, setting, HERE, size_bytes=size, accuracy={figure: value})


def test_lines_are_the_newest_rows_by_size() -> None:
    rows = [
        row("quantkit", "8 bits", 3_000_000, "top-1", 0.8),
        row("quantkit", "4 bits", 2_000_000, "top-1", 0.6),
        row("quantkit", "4 bits", 1_000_000, "top-1", 0.7),
        row("quantkit", "4 bits, weights only", 1, "top-1", 0.1),
        row("quantkit", "4 bits, rtn uniform", 5_000_000, "top-1", 0.5),
        row("onnxruntime", "static", 4_000_000, "top-1", 0.9),
        row("onnxruntime", "other figure", 4_000_000, "cosine", 0.9),
    ]
    assert lines(rows, PANELS[0]) == {
        OURS: [(1.0, 0.7), (3.0, 0.8)],
        "round-to-nearest, one width": [(5.0, 0.5)],
        "onnxruntime": [(4.0, 0.9)],
    }
    low = [
        row("quantkit", "2 bits g32", 1_000_000, "cosine", 0.9),
        row("quantkit", "2 bits g128", 1_000_000, "cosine", 0.8),
        row("quantkit", "5 bits g32, embeddings too", 1_000_000, "cosine", 0.8),
        row("onnxruntime", "hqq 2 bits g32, float32", 2_000_000, "cosine", 0.7),
        row("onnxruntime", "gptq 4 bits g32", 2_000_000, "cosine", 0.7),
    ]
    assert lines(low, PANELS[2]) == {OURS: [(1.0, 0.9)], "onnxruntime HQQ": [(2.0, 0.7)]}


def test_the_picture_is_drawn_from_the_committed_rows(tmp_path: Path) -> None:
    draw(tmp_path / "front.png")
    content = (tmp_path / "front.png").read_bytes()
    draw(tmp_path / "again.png")
    assert content[:4] == b"\x89PNG" and (tmp_path / "again.png").read_bytes() == content
