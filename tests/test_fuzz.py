"""Damaged files, deterministic: the corpus, and some of what the fuzzer's mutations make of it.

`python -m benchmarks.fuzz` is the same with a memory of what reached new code, for as long as one likes.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.fuzz import KINDS, Harness
from tests.helpers.hostile import CORPUS, mutate, refused

SEEDS = sorted(CORPUS.iterdir())
MUTANTS = 3000
"""Of each kind of file; a model takes 8 ms."""
SECONDS = 20.0
"""For one file, on a machine that does much else."""


def place(folder: Path, suffix: str) -> Path:
    """Where a file of a kind is read from; a tensor belongs into a folder of its own."""
    (folder / suffix[1:]).mkdir(exist_ok=True)
    return folder / suffix[1:] / f"input_0{suffix}"


def test_corpus_is_small() -> None:
    assert len(SEEDS) > 20 and sum(path.stat().st_size for path in SEEDS) < 200_000


@pytest.mark.parametrize("seed", SEEDS, ids=lambda path: path.name)
def test_corpus(seed: Path, tmp_path: Path) -> None:
    path = place(tmp_path, seed.suffix)
    shutil.copy(seed, path)
    told = refused(path)
    assert told is None or ("\n" not in told.strip() and len(told) < 1000)


@pytest.mark.parametrize("suffix", sorted({path.suffix for path in SEEDS}))
def test_mutations(suffix: str, tmp_path: Path) -> None:
    """Only InputError comes out, soon, and both outcomes are there."""
    path, outcomes = place(tmp_path, suffix), Counter[bool]()
    seeds = [path for path in SEEDS if path.suffix == suffix]
    for turn in range(MUTANTS):
        seed = seeds[turn % len(seeds)]
        path.write_bytes(mutate(suffix, seed.read_bytes(), turn))
        start = time.monotonic()
        outcomes[refused(path) is None] += 1
        assert time.monotonic() - start < SECONDS, f"{seed.name}, mutation {turn}"
    assert min(outcomes[True], outcomes[False]) > 0


def test_the_harness_keeps_what_goes_wrong(tmp_path: Path) -> None:
    """One input and one text for each place where an error comes from; a refusal is none."""
    kept = tmp_path / "kept"
    kept.mkdir()

    def read(path: Path) -> str | None:
        content = path.read_bytes()
        return "refused" if content == b"fine" else str({}[content])

    harness = Harness(tmp_path, kept, read)
    assert {path.suffix for path in SEEDS} == set(KINDS)
    for content in (b"\0fine", b"\0bad", b"\0worse", b"\x03bad"):
        harness(content)
    assert sorted(path.suffix for path in kept.iterdir()) == [".npy", ".onnx", ".txt", ".txt"]
    assert {path.read_bytes() for path in kept.iterdir() if path.suffix != ".txt"} == {b"bad"}
    assert all("KeyError" in path.read_text() for path in kept.glob("*.txt"))


def test_mutations_are_the_same_every_time() -> None:
    for seed in SEEDS:
        content = seed.read_bytes()
        assert mutate(seed.suffix, content, 7) == mutate(seed.suffix, content, 7)
