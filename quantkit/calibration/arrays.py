"""Calibration data in arrays: .npz, .npy and arrays in memory; the first axis counts the samples.

Files are memory-mapped, so only the batches in use are read. A compressed member of a .npz cannot be mapped and is read
into memory whole (`numpy.savez` writes members that can be mapped, `numpy.savez_compressed` writes ones that cannot).
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from quantkit.calibration.inputs import InputSpec, Samples, as_array, check_names, check_shapes, list_inputs
from quantkit.calibration.preprocess import Preprocess, fit_preprocess
from quantkit.errors import InputError
from quantkit.types import Array, Feed

_BROKEN = (ValueError, EOFError, OSError, MemoryError, RuntimeError, struct.error, zlib.error, zipfile.BadZipFile)


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
            return {name: _read_member(path, archive, members[key]) for name, key in wanted.items()}
    except InputError:
        raise
    except _BROKEN as error:
        raise InputError(f"{path} is no readable .npz file (truncated or corrupt): {error}") from error


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

    return Samples(name, next(iter(counts.values()), 1), load)


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
    return len(spec.shape) == 4 and array.dtype == np.uint8 and images


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
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:  # bit 0: encrypted
        with archive.open(member) as packed:
            if _read_header(packed)[2].hasobject:
                raise InputError(f"{where} holds Python objects, not numbers; save it with a numeric dtype")
        with archive.open(member) as packed:
            return np.asarray(np.lib.format.read_array(packed, allow_pickle=False))
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)  # of the local header, 30 bytes long: lengths of name and extra field
        name_length, extra_length = struct.unpack("<HH", file.read(4))
    return _map_array(path, member.header_offset + 30 + name_length + extra_length, where)


def _map_array(path: Path, offset: int, where: str) -> Array:
    with path.open("rb") as file:
        file.seek(offset)
        shape, fortran, dtype = _read_header(file)
        start = file.tell()
    if dtype.hasobject:
        raise InputError(f"{where} holds Python objects, not numbers; save it with a numeric dtype")
    if 0 in shape:  # nothing to map
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=shape, order="F" if fortran else "C")


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"unknown .npy version {version}")
