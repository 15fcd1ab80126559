"""Calibration data in arrays: .npz, .npy and arrays in memory; the first axis counts the samples.

Files are memory-mapped, so only the batches in use are read. A compressed member of a .npz cannot be mapped and is read
into memory whole (`numpy.savez` writes members that can be mapped, `numpy.savez_compressed` writes ones that cannot).
"""

from __future__ import annotations

import io
import math
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from quantkit.calibration.inputs import LABELS, InputSpec, Samples, as_array, check_names, check_shapes, list_inputs
from quantkit.calibration.preprocess import Preprocess, fit_preprocess
from quantkit.errors import InputError
from quantkit.types import Array, Feed
from quantkit.wording import shown

MOST_PACKED = 1 << 30
"""Bytes of compressed arrays that are read into memory; a few kilobytes can stand for any number of them."""
HEADER_BYTES = 12 + 10_000
"""Of the longest .npy header that numpy reads, with what stands before it."""
_BROKEN = (
    *(ArithmeticError, EOFError, LookupError, MemoryError, OSError, RuntimeError, SyntaxError, TypeError, ValueError),
    *(struct.error, tokenize.TokenError, zlib.error, zipfile.BadZipFile),
)


def read_npy(path: Path) -> Array:
    try:
        return _map_array(path, 0, str(path))
    except InputError:
        raise
    except _BROKEN as error:
        raise InputError(f"{path} is no readable .npy file (truncated or corrupt): {error}") from error


def read_npz(path: Path, inputs: Sequence[InputSpec], keys: Mapping[str, str]) -> dict[str, Array]:
    """Input name -> array. `keys` says which array serves which input; "" stands for the model's sole input."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {item.filename.removesuffix(".npy"): item for item in archive.infolist()}
            wanted = _choose(list(members), inputs, keys, path)
            packed = sum(members[key].file_size for key in wanted.values() if _is_packed(members[key]))
            if packed > MOST_PACKED:
                raise InputError(
                    f"{path} holds {packed} bytes of compressed arrays, more than {MOST_PACKED}; "
                    "save it with numpy.savez, whose arrays stay on the disk"
                )
            return {name: _read_member(path, archive, members[key]) for name, key in wanted.items()}
    except InputError:
        raise
    except _BROKEN as error:
        raise InputError(f"{path} is no readable .npz file (truncated or corrupt): {error}") from error


def npz_like(path: Path, key: str) -> Array | None:
    """An empty array of the same dtype and number of axes as one in the file; None where there is none to be read.

    Raises:
        InputError: the array holds Python objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            found = [item for item in archive.infolist() if item.filename.removesuffix(".npy") == key]
            if not found:
                return None
            with archive.open(found[0]) as member:
                shape, _, dtype, _ = _read_header(member, f"{path}, array {key!r}")
            return np.zeros([0] * len(shape), dtype)
    except InputError:
        raise
    except _BROKEN:
        return None


def array_samples(
    arrays: Mapping[str, object], inputs: Sequence[InputSpec], name: str, preprocess: Preprocess | None
) -> Samples:
    """Samples from one array per input; inputs of rank 0 are the same in every batch.

    Raw uint8 images [samples, H, W, 3] (or grey ones [samples, H, W]) go through the preprocessing batch by batch.
    """
    check_names(arrays, inputs, name)
    loaded = {spec.name: as_array(arrays[spec.name], f"{name}, input {spec.name!r}") for spec in inputs}
    raw = {spec.name: fit_preprocess(preprocess, spec) for spec in inputs if preprocess and _is_raw(loaded, spec)}
    if preprocess and not raw:
        found = ", ".join(f"{array.dtype} {list(array.shape)}" for array in loaded.values())
        raise InputError(f"{name}: preprocess wants raw images, uint8 [samples, H, W, 3], got {found}")
    check_shapes(loaded, [spec for spec in inputs if spec.name not in raw], name, any_batch=True)
    counts = {spec.name: loaded[spec.name].shape[0] for spec in inputs if spec.shape}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{count} for {key!r}" for key, count in counts.items())
        raise InputError(f"{name}: the inputs have different numbers of samples: {told}; every array needs as many")

    def load(indices: Sequence[int]) -> Feed:
        feed = {}
        for key, array in loaded.items():
            batch = np.asarray(array[np.asarray(indices)] if key in counts else array)
            feed[key] = _preprocessed(batch, raw[key]) if key in raw else batch
        return feed

    count = next(iter(counts.values()), 1)
    hollow = [key for key in counts if count and not loaded[key].size]
    if hollow:
        raise InputError(f"{name}: input {hollow[0]!r} has the shape {list(loaded[hollow[0]].shape)}, without a number")
    return Samples(name, count, load)


def stack_images(images: Sequence[Array], name: str) -> Array:
    """Preprocessed images as one batch."""
    shapes = sorted({image.shape for image in images})
    if len(shapes) > 1:
        raise InputError(
            f"{name}: the images have different sizes, {shapes[0]} and {shapes[-1]}, and the model's input fixes none; "
            "give a preprocess file with `size: [height, width]`"
        )
    return np.stack(images)


def _preprocessed(batch: Array, preprocess: Preprocess) -> Array:
    images = batch[..., None] if batch.ndim == 3 else batch
    return np.stack([preprocess.apply(np.broadcast_to(image, (*image.shape[:2], 3))) for image in images])


def _is_raw(arrays: Mapping[str, Array], spec: InputSpec) -> bool:
    array = arrays[spec.name]
    images = array.ndim == 3 or (array.ndim == 4 and array.shape[3] in (1, 3))
    return spec.name != LABELS and len(spec.shape) == 4 and array.dtype == np.uint8 and images


def _choose(found: list[str], inputs: Sequence[InputSpec], keys: Mapping[str, str], path: Path) -> dict[str, str]:
    """Which member serves which input."""
    if "" in keys and len(inputs) != 1:
        raise InputError(
            f"{path}: key {keys['']!r} can serve a model with one input only; the model's inputs are "
            f"{list_inputs(inputs)}; write {path.name}:input=KEY,input=KEY"
        )
    keys = {name or inputs[0].name: key for name, key in keys.items()}
    absent = sorted(set(keys.values()) - set(found))
    if absent:
        raise InputError(f"{path} holds no array {', '.join(absent)}; it holds {', '.join(found) or 'none'}")
    if not keys and len(found) == 1 and len(inputs) == 1:
        return {inputs[0].name: found[0]}
    wanted = dict(keys) or {name: name for name in found}
    check_names(wanted, inputs, str(path), f"; pick arrays by {path.name}:KEY or {path.name}:input=KEY,input=KEY")
    return wanted


def _read_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Array:
    where = f"{path}, array {member.filename.removesuffix('.npy')!r}"
    if _is_packed(member):
        with archive.open(member) as packed:
            shape, fortran, dtype, start = _read_header(packed, where)
        size = math.prod(shape) * dtype.itemsize
        if start + size > member.file_size:  # before reading: what a member really expands to may be endless
            raise ValueError(f"array {member.filename!r} needs {start + size} bytes and holds {member.file_size}")
        with archive.open(member) as packed:
            packed.read(start)
            values = np.frombuffer(packed.read(size), dtype)
        return values.reshape(shape, order="F" if fortran else "C")
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)  # of the local header, 30 bytes long: lengths of name and extra field
        name_length, extra_length = struct.unpack("<HH", file.read(4))
    return _map_array(path, member.header_offset + 30 + name_length + extra_length, where)


def _is_packed(member: zipfile.ZipInfo) -> bool:
    return member.compress_type != zipfile.ZIP_STORED or bool(member.flag_bits & 1)  # bit 0: encrypted


def _map_array(path: Path, offset: int, where: str) -> Array:
    with path.open("rb") as file:
        file.seek(offset)
        shape, fortran, dtype, length = _read_header(file, where)
    if 0 in shape:  # nothing to map
        return np.zeros(shape, dtype)
    size = path.stat().st_size
    if offset + length + math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"its header promises {dtype} {shown(list(shape))}, more than the {size} bytes of the file")
    return np.memmap(path, dtype=dtype, mode="r", offset=offset + length, shape=shape, order="F" if fortran else "C")


def _read_header(file: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, whether in Fortran's order, type, and the header's bytes; nothing beyond the longest header is read."""
    head = io.BytesIO(file.read(HEADER_BYTES))
    version = np.lib.format.read_magic(head)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"unknown .npy version {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of headers that Python 2 wrote
        shape, fortran, dtype = read(head)
    if dtype.hasobject:
        raise InputError(f"{where} holds Python objects, not numbers; save it with a numeric dtype")
    if any(isinstance(dim, bool) or dim < 0 for dim in shape) or not dtype.itemsize:
        raise ValueError(f"there is no array of shape {shown(shape)} and type {shown(str(dtype))}")
    return shape, fortran, dtype, head.tell()
