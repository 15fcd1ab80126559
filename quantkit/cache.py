"""Finished work, kept by content: a run that was killed finds what it had done, a large one keeps it out of memory.

An entry is one file: a line that says what it is, a JSON header, arrays one after the other, and the sha256 of all that
before it. It is written beside its place and renamed, so that it is there whole or not at all; what does not match its
checksum counts as absent. The name is the hash of everything that decides the content, the program's own source
included, so that nothing stale is ever found.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.files import LOCK, hold_lock, remove_abandoned, umask
from quantkit.types import Array

MAGIC = b"quantkit entry 1\n"
ALIGNMENT = 4096
MAPPED = 1 << 17
"""Bytes from which an array stays in its file and is mapped: the system drops its pages when memory is short."""
CHUNK = 1 << 24
SUFFIX = ".entry"
SCRATCH = "scratch"
PACKAGES = ("numpy", "onnx", "onnx-ir", "onnxruntime", "scipy", "torch")


def default_folder() -> Path:
    """Where remembered things lie when the user names no folder."""
    return Path.home() / ".cache" / "quantkit"


@dataclass(frozen=True)
class Entry:
    """One unit of finished work.

    Attributes:
        arrays: large ones are mapped from their file, and nobody writes to them.
        facts: plain JSON values.
    """

    arrays: Mapping[str, Array] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


class Scratch:
    """A folder for files that end with the process; what killed processes left is removed by the next one."""

    def __init__(self, parent: Path) -> None:
        """
        Raises:
            OSError: the folder cannot be made.
        """
        parent.mkdir(parents=True, exist_ok=True)
        for lock in parent.glob(f"{SCRATCH}.*/{LOCK}"):
            remove_abandoned(lock)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{SCRATCH}.", dir=parent))
        self._lock = (self.folder / LOCK).open("wb")
        hold_lock(self._lock.fileno())
        self._end = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def __reduce__(self) -> tuple[type[_Borrowed], tuple[Path]]:
        return _Borrowed, (self.folder,)


@dataclass(frozen=True)
class _Borrowed:
    """The same folder in another process, which does not remove it."""

    folder: Path


@dataclass(frozen=True)
class Store:
    """Where finished work goes.

    Attributes:
        folder: entries that stay, found again by later runs; None = nothing is remembered.
        scratch: where large arrays go when nothing is remembered; None = they stay in memory.
    """

    folder: Path | None = None
    scratch: Scratch | _Borrowed | None = None

    @property
    def remembers(self) -> bool:
        return self.folder is not None

    @property
    def scratch_folder(self) -> Path | None:
        """For files of one's own; None = among the system's temporary files, which may be in memory."""
        return None if self.scratch is None else self.scratch.folder

    def get(self, key: str) -> Entry | None:
        """The entry, or None: absent, damaged, or of another format. A damaged one is removed."""
        if self.folder is None:
            return None
        path = self._path(self.folder, key)
        try:
            return _read(path)
        except OSError:  # absent, or not for us to read: that is no damage
            return None
        except (ValueError, KeyError, TypeError, RecursionError):
            with suppress(OSError):
                path.unlink()
            return None

    def put(self, key: str, entry: Entry) -> Entry:
        """Keep it; the entry to use from now on, with its large arrays mapped. A full disk only costs the memory of it.

        Args:
            key: as `content_key` makes it.
        """
        target = self._path(self.folder, key) if self.folder is not None else None
        large = any(array.nbytes >= MAPPED for array in entry.arrays.values())
        if target is None and (self.scratch is None or not large):
            return entry
        if target is None:
            assert self.scratch is not None
            target = self.scratch.folder / f"{key}{SUFFIX}"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _write(target, entry)
            return _read(target, check=False) if large else entry
        except (OSError, ValueError):
            return entry

    def spill(self, array: Array) -> Array:
        """The array, in a file when it is large and there is a place for such files."""
        if self.scratch is None or array.nbytes < MAPPED or isinstance(array, np.memmap):
            return array
        path = self.scratch.folder / f"{secrets.token_hex(16)}.array"
        try:
            with path.open("wb") as file:
                np.ascontiguousarray(array).tofile(file)
            return np.memmap(path, dtype=array.dtype, mode="r", shape=array.shape)
        except OSError:  # a full disk, or a folder that somebody has removed
            with suppress(OSError):
                path.unlink()
            return array

    @staticmethod
    def _path(folder: Path, key: str) -> Path:
        return folder / "work" / key[:2] / f"{key}{SUFFIX}"


def content_key(kind: str, parts: Mapping[str, object]) -> str:
    """The name of an entry, in hexadecimal.

    Args:
        kind: of work.
        parts: everything that decides the result: plain values, arrays, dataclasses, and mappings and sequences of
            them. An array counts by its bytes.

    Raises:
        TypeError: a part of another kind, of which nobody knows when it is the same.
    """
    digest = hashlib.sha256(f"{kind}\n{program()}\n".encode())
    _feed(digest, parts)
    return digest.hexdigest()


@cache
def program() -> str:
    """What may change a result beside its inputs: this package's source, the libraries, the processor."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    libraries = " ".join(f"{name}={_version(name)}" for name in PACKAGES)
    return f"{digest.hexdigest()} python={platform.python_version()} {libraries} {processor()}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # torch is an extra
        return "-"


def processor() -> str:
    """The processor's model name: figures do not carry over to another one."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _feed(digest: Any, part: object) -> None:
    """Type and length go before the content: no two parts read alike."""
    if isinstance(part, np.ndarray):
        digest.update(f"array {part.dtype.str} {part.shape}\n".encode())
        digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    elif part is None or isinstance(part, bool | int | float | str | np.number):
        text = repr(part).encode()
        digest.update(f"{type(part).__name__} {len(text)}\n".encode() + text)
    elif isinstance(part, Mapping):
        digest.update(f"mapping {len(part)}\n".encode())
        for name, value in part.items():
            _feed(digest, name)
            _feed(digest, value)
    elif isinstance(part, list | tuple):
        digest.update(f"sequence {len(part)}\n".encode())
        for value in part:
            _feed(digest, value)
    elif is_dataclass(part) and not isinstance(part, type):
        digest.update(f"{type(part).__module__}.{type(part).__qualname__}\n".encode())
        _feed(digest, {item.name: getattr(part, item.name) for item in fields(part)})
    else:
        raise TypeError(f"{type(part).__name__} cannot be part of a key")


def _write(path: Path, entry: Entry) -> None:
    """Beside its place, then renamed. Nobody waits for the disk: what a power cut tears has no right checksum."""
    places, offset = {}, 0
    for name, array in entry.arrays.items():
        places[name] = {"dtype": array.dtype.str, "shape": list(array.shape), "offset": offset}
        offset += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    header = json.dumps({"arrays": places, "facts": dict(entry.facts)}).encode()
    head = MAGIC + len(header).to_bytes(8, "little") + header
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:16]}.", suffix=".tmp")
    digest = hashlib.sha256()
    try:
        with os.fdopen(handle, "wb") as file:
            _put(file, digest, head + bytes(-len(head) % ALIGNMENT))
            for array in entry.arrays.values():
                flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                for start in range(0, flat.size, CHUNK):
                    _put(file, digest, flat[start : start + CHUNK])
                _put(file, digest, bytes(-flat.size % ALIGNMENT))
            file.write(digest.digest())
        Path(name).chmod(0o666 & ~umask())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _put(file: Any, digest: Any, content: Any) -> None:
    digest.update(content)
    file.write(content)


def _read(path: Path, *, check: bool = True) -> Entry:
    """Raises: ValueError or KeyError where the file is not what it should be."""
    with path.open("rb") as file:
        if check:
            _check(file, path)
        file.seek(0)
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{path} is no entry")
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = -(-file.tell() // ALIGNMENT) * ALIGNMENT
        arrays = {}
        for name, place in header["arrays"].items():
            dtype, shape = np.dtype(place["dtype"]), tuple(place["shape"])
            arrays[name] = _array(file, path, dtype, shape, start + place["offset"])
    return Entry(arrays, header["facts"])


def _array(file: Any, path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int) -> Array:
    count = int(np.prod(shape, dtype=np.int64))
    if count * dtype.itemsize >= MAPPED:
        return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)
    file.seek(offset)
    return np.frombuffer(file.read(count * dtype.itemsize), dtype=dtype).reshape(shape)


def _check(file: Any, path: Path) -> None:
    """Raises: ValueError where the content is not what its checksum says."""
    size = path.stat().st_size - hashlib.sha256().digest_size
    digest = hashlib.sha256()
    while size > 0:
        block = file.read(min(CHUNK, size))
        if not block:
            break
        digest.update(block)
        size -= len(block)
    if file.read() != digest.digest():
        raise ValueError(f"{path} is damaged")
