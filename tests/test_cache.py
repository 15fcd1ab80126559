"""Entries are there whole or not at all, and nothing stale is found under a name."""

from __future__ import annotations

import gc
import pickle
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest

from quantkit import cache
from quantkit.cache import Entry, Scratch, Store, content_key
from quantkit.files import umask
from quantkit.kept import Kept, kept
from quantkit.quantizers.gptq import GPTQ
from quantkit.quantizers.mse import MSE
from quantkit.quantizers.rtn import RTN
from quantkit.quantizers.slim import Slim
from quantkit.types import Array, LayerStats, QuantizedWeight, QuantSpec, WeightQuantizer

ARRAYS = {
    "large": np.arange(600_000, dtype=np.float64).reshape(300, 2000),
    "small": np.arange(7, dtype=np.uint8),
    "empty": np.zeros((0, 3), np.float32),
    "one": np.array(2.5, np.float32),
}
FACTS = {"name": "ä", "infinite": float("inf"), "list": [1, None, True]}
KEY = content_key("test", {"part": 1})


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != cache.LOCK)


def same(first: Entry, second: Entry) -> None:
    assert first.facts == second.facts and list(first.arrays) == list(second.arrays)
    for name, array in first.arrays.items():
        other = second.arrays[name]
        assert (array.dtype, array.shape) == (other.dtype, other.shape)
        np.testing.assert_array_equal(array, other)


def test_what_is_put_is_found(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.get(KEY) is None
    entry = Entry(ARRAYS, FACTS)
    used = store.put(KEY, entry)
    found = Store(tmp_path).get(KEY)
    assert found is not None
    same(entry, used)
    same(entry, found)
    assert isinstance(used.arrays["large"], np.memmap) and not isinstance(used.arrays["small"], np.memmap)
    assert len(files(tmp_path)) == 1


def test_nothing_is_written_where_nothing_is_remembered() -> None:
    entry = Entry(ARRAYS, FACTS)
    assert Store().put(KEY, entry) is entry and Store().get(KEY) is None
    assert not Store().remembers and Store().spill(ARRAYS["large"]) is ARRAYS["large"]


@pytest.mark.parametrize("place", [0, 20, 60, 5000, -1, -40])
def test_a_changed_byte_is_noticed(tmp_path: Path, place: int) -> None:
    store = Store(tmp_path)
    store.put(KEY, Entry(ARRAYS, FACTS))
    (path,) = files(tmp_path)
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert store.get(KEY) is None
    assert files(tmp_path) == []  # so that it is made again
    store.put(KEY, Entry(ARRAYS, FACTS))
    assert store.get(KEY) is not None


@pytest.mark.parametrize("length", [0, 10, 4096, 100_000])
def test_a_torn_file_is_noticed(tmp_path: Path, length: int) -> None:
    store = Store(tmp_path)
    store.put(KEY, Entry(ARRAYS, FACTS))
    (path,) = files(tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    assert store.get(KEY) is None


def test_another_kind_of_file_with_a_right_checksum_is_no_entry(tmp_path: Path) -> None:
    import hashlib

    store = Store(tmp_path)
    store.put(KEY, Entry())
    (path,) = files(tmp_path)
    for content in (b"something else", cache.MAGIC + (4).to_bytes(8, "little") + b"null"):
        path.write_bytes(content + hashlib.sha256(content).digest())
        assert store.get(KEY) is None
        store.put(KEY, Entry())


def test_what_may_not_be_read_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.put(KEY, Entry(ARRAYS, FACTS))
    (path,) = files(tmp_path)
    assert path.stat().st_mode & 0o444 == 0o444 & ~umask()  # whoever shares the folder may read it

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_check", refused)
        assert store.get(KEY) is None
    assert store.get(KEY) is not None


def test_a_full_disk_costs_only_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(cache, "_put", full)
    entry = Entry(ARRAYS, FACTS)
    assert Store(tmp_path).put(KEY, entry) is entry
    assert files(tmp_path) == []


@dataclass(frozen=True)
class Settings:
    damp: float = 0.1


@dataclass(frozen=True)
class Others:
    damp: float = 0.1


def test_every_part_counts() -> None:
    base: dict[str, object] = {
        "array": np.arange(4.0),
        "settings": Settings(),
        "list": [1, 2],
        "none": None,
        "text": "a",
    }
    changes: list[dict[str, object]] = [
        {"array": np.arange(4.0) + 1e-12},
        {"array": np.arange(4.0).reshape(2, 2)},
        {"array": np.arange(4, dtype=np.int64)},
        {"array": np.arange(4.0).astype(np.float32)},
        {"settings": Settings(0.2)},
        {"settings": Others()},
        {"list": [1, [2]]},
        {"list": [12]},
        {"list": ["1", 2]},
        {"none": False},
        {"text": "b"},
        {"more": 1},
    ]
    keys = [content_key("kind", base | change) for change in changes]
    keys += [content_key("kind", base), content_key("other", base)]
    assert len(set(keys)) == len(keys)
    assert content_key("kind", dict(base)) == content_key("kind", base)
    strided = np.arange(8.0)[::2].copy()
    assert content_key("k", {"a": np.arange(8.0)[::2]}) == content_key("k", {"a": strided})


def test_unknown_kinds_of_parts_are_refused() -> None:
    with pytest.raises(TypeError, match="object cannot be part of a key"):
        content_key("kind", {"part": object()})


def test_a_changed_program_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = content_key("kind", {})
    monkeypatch.setattr(cache, "program", lambda: "another version")
    assert content_key("kind", {}) != before


def test_the_source_is_part_of_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module.py").write_text("a = 1\n")
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "cache.py"))
    found = []
    for text in ("a = 1\n", "a = 2\n"):
        (tmp_path / "module.py").write_text(text)
        found.append(cache.program.__wrapped__())
    assert found[0] != found[1] and "numpy=" in found[0]


def test_scratch_ends_with_its_last_user_and_others_do_not_touch_it(tmp_path: Path) -> None:
    first = Scratch(tmp_path)
    second = Scratch(tmp_path)
    assert first.folder.is_dir() and second.folder.is_dir()
    store = Store(None, first)
    spilled = store.spill(ARRAYS["large"])
    assert isinstance(spilled, np.memmap) and store.spill(ARRAYS["small"]) is ARRAYS["small"]
    assert store.spill(spilled) is spilled
    entry = store.put(KEY, Entry(ARRAYS, FACTS))
    same(entry, Entry(ARRAYS, FACTS))
    folder = first.folder
    borrowed = pickle.loads(pickle.dumps(store))
    assert borrowed.scratch.folder == folder
    del borrowed
    gc.collect()
    assert folder.is_dir()
    del first, store
    gc.collect()
    assert not folder.exists() and second.folder.is_dir()
    np.testing.assert_array_equal(spilled, ARRAYS["large"])  # what is mapped stays


def test_scratch_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from quantkit.cache import Scratch; "
        "kept = Scratch(Path(sys.argv[1])); print(kept.folder, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    left = Path(done.stdout.strip())
    assert left.is_dir() and left.parent == tmp_path
    made = Scratch(tmp_path)
    assert not left.exists() and made.folder.is_dir()


def test_a_spill_that_fails_leaves_the_array_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = Scratch(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(np, "ascontiguousarray", full)
    assert Store(None, scratch).spill(ARRAYS["large"]) is ARRAYS["large"]
    assert files(tmp_path) == []


def test_a_spill_without_its_folder_leaves_the_array_in_memory(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    shutil.rmtree(scratch.folder)
    store = Store(None, scratch)
    assert store.spill(ARRAYS["large"]) is ARRAYS["large"]
    assert store.scratch_folder == scratch.folder and Store().scratch_folder is None


def test_an_extra_that_is_not_installed_is_part_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "torch":
            raise PackageNotFoundError(name)
        return "1.0"

    with_torch = cache.program.__wrapped__()
    monkeypatch.setattr(cache, "version", version)
    without = cache.program.__wrapped__()
    assert " torch=- " in without and " torch=- " not in with_torch and "python=3." in without


# ---- quantizers whose results are kept


class Counting:
    """RTN that counts."""

    stats = frozenset({"gram"})
    calls = 0

    def quantize(self, weight: Array, spec: QuantSpec, stats: LayerStats | None) -> QuantizedWeight:
        type(self).calls += 1
        return RTN().quantize(weight, spec, stats)


@dataclass(frozen=True)
class CountingRTN(Counting):
    shift: int = 0


def statistics(columns: int, seed: int = 0) -> LayerStats:
    rows = np.random.default_rng(seed).standard_normal((200, columns))
    gram = (rows.T @ rows / 200)[None]
    return LayerStats(
        200, -1.0, 1.0, gram=gram, square_mean=gram[:, *[np.arange(columns)] * 2], data_shapes={(2, 100): 1}
    )


def equal(first: QuantizedWeight, second: QuantizedWeight) -> None:
    assert first.spec == second.spec
    for name in ("codes", "scales", "zero_points", "group_bits", "pre_scale"):
        one, other = getattr(first, name), getattr(second, name)
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("quantizer", [RTN(), MSE(), GPTQ(rounds=1), Slim()])
def test_kept_weights_are_those_that_were_made(quantizer: WeightQuantizer, tmp_path: Path) -> None:
    weight = np.random.default_rng(1).standard_normal((24, 96)).astype(np.float32)
    spec = QuantSpec(3, 32)
    wanted = quantizer.quantize(weight, spec, statistics(96))
    for store in (Store(tmp_path), Store(tmp_path), Store(None, Scratch(tmp_path))):
        made = kept(quantizer, store)
        assert isinstance(made, Kept) and made.stats == quantizer.stats
        equal(made.quantize(weight, spec, statistics(96)), wanted)


def test_work_is_done_once_and_again_for_anything_else(tmp_path: Path) -> None:
    Counting.calls = 0
    weight = np.random.default_rng(1).standard_normal((8, 32)).astype(np.float32)
    stats, spec = statistics(32), QuantSpec(4, 16)
    quantizer = kept(CountingRTN(), Store(tmp_path))
    for _ in range(2):
        quantizer.quantize(weight, spec, stats)
    assert CountingRTN.calls == 1
    others = [
        (quantizer, weight + np.float32(1e-3), spec, stats),
        (quantizer, weight, replace(spec, symmetric=True), stats),
        (quantizer, weight, spec, statistics(32, seed=1)),
        (quantizer, weight, spec, replace(stats, data_shapes={(1, 100): 2})),
        (quantizer, weight, spec, None),
        (kept(CountingRTN(1), Store(tmp_path)), weight, spec, stats),
        (kept(CountingRTN(), Store(tmp_path / "another")), weight, spec, stats),
    ]
    for number, (other, *arguments) in enumerate(others):
        other.quantize(*arguments)
        assert CountingRTN.calls == 2 + number


def test_a_damaged_weight_is_made_again(tmp_path: Path) -> None:
    weight = np.random.default_rng(1).standard_normal((8, 32)).astype(np.float32)
    quantizer = kept(MSE(), Store(tmp_path))
    wanted = quantizer.quantize(weight, QuantSpec(4, 16), None)
    (path,) = files(tmp_path)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size - 40)
        file.write(b"\xff" * 8)
    equal(quantizer.quantize(weight, QuantSpec(4, 16), None), wanted)


def test_without_a_place_the_quantizer_is_itself() -> None:
    quantizer = RTN()
    assert kept(quantizer, Store()) is quantizer
