"""Files that appear whole or not at all: written beside their final place, flushed to the disk, renamed."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from quantkit.errors import InputError

LOCK = ".lock"


def final_path(path: Path) -> Path:
    """Where a file really goes: through symbolic links, and only where a plain file can lie.

    Raises:
        InputError: something that is no plain file has that name.
        OSError: there is no such folder.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is {'a folder' if path.is_dir() else 'a device'}; give a file name")
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(path.parent))
    return path


def write_text(path: Path, text: str) -> None:
    """Write a small text file; on any failure nothing is left behind."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file; on any failure nothing is left behind."""
    path = final_path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:80]}.", suffix=".tmp")
    scratch = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.chmod(0o666 & ~umask())
        scratch.replace(path)
    except BaseException as error:
        scratch.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk does not say where
            error.filename = str(path)
        raise


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside a file to be; gone afterwards, with those that killed runs left for the same file."""
    prefix = f".{path.name[:80]}."
    for old in path.parent.glob(f"{_literal(prefix)}*/{LOCK}"):
        remove_abandoned(old)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))
    try:
        with (folder / LOCK).open("wb") as lock:
            hold_lock(lock.fileno())
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_abandoned(lock: Path) -> None:
    """The folder of a run that no longer lives: nobody holds its lock."""
    with suppress(OSError), lock.open("rb") as file:
        if hold_lock(file.fileno()):
            shutil.rmtree(lock.parent, ignore_errors=True)


def hold_lock(handle: int) -> bool:
    """Take the lock, which ends with the process; False when another holds it or locks do not exist here."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def _literal(text: str) -> str:
    """Text that a glob pattern takes as it stands."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in text)


def umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
