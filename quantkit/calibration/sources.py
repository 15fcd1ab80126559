"""Which reader opens what the user gave: a file, a folder, a function or a Python object."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

from quantkit.calibration.arrays import array_samples, npz_like, read_npy, read_npz
from quantkit.calibration.feeds import FeedStream, holds_tensors, open_function, open_stream, open_tensors
from quantkit.calibration.images import class_labels, find_images, image_samples
from quantkit.calibration.inputs import LABELS, InputSpec, Samples, list_inputs, with_labels
from quantkit.calibration.preprocess import Preprocess
from quantkit.calibration.text import text_samples
from quantkit.errors import InputError
from quantkit.types import Array

KEYS = re.compile(r"(.+\.npz):(.+)", re.IGNORECASE)
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_KINDS = (
    ".npz, .npy, .txt, a folder of test_data_set_*/input_*.pb, a folder of images, or module:function for anything else"
)


def open_source(
    source: object,
    inputs: Sequence[InputSpec],
    preprocess: Preprocess | None,
    tokenizer: str | Path | None,
    limit: int | None,
    labels: bool = False,
) -> tuple[Samples | FeedStream, Sequence[InputSpec]]:
    """The samples, and what their feeds hold: the model's inputs, and where the data have them, `labels`.

    Args:
        source: as `quantkit.calibration.data.open_calibration` takes it, without the slice.
        inputs: of the model; one that is called `labels` itself is no label.
        preprocess: for images.
        tokenizer: for text.
        limit: samples after which a stream is not read on.
        labels: whether to look for labels.

    Raises:
        InputError: there is no such source, or it does not serve these inputs.
    """
    labels = labels and all(spec.name != LABELS for spec in inputs)
    is_text = isinstance(source, (str, Path)) and Path(source).suffix.lower() == ".txt"
    if tokenizer is not None and not is_text:
        raise InputError(f"a tokenizer goes with a .txt file, got {_name(source)}; leave it out or give text")
    is_function = _FUNCTION.fullmatch(str(source)) and not KEYS.fullmatch(str(source))
    if isinstance(source, (str, Path)) and not is_function:
        return _open_path(str(source), inputs, preprocess, tokenizer, labels)
    if isinstance(source, Mapping):
        arrays = {str(key): value for key, value in source.items()}
        inputs = with_labels(inputs, arrays.get(LABELS) if labels else None)
        return array_samples(arrays, inputs, "the arrays", preprocess), inputs
    if hasattr(source, "__array__"):
        return array_samples({_sole(inputs, "an array").name: source}, inputs, "the array", preprocess), inputs
    if preprocess:
        raise InputError(f"preprocess goes with images, got {_name(source)}; feeds must be preprocessed already")
    if isinstance(source, (str, Path)):
        stream = open_function(str(source), inputs, limit, labels)
    else:
        sized = isinstance(source, Sized) and not hasattr(source, "get_next")
        stream = open_stream(source, inputs, _name(source), None if sized else limit, labels)
    return stream, stream.inputs


def _open_path(
    text: str,
    inputs: Sequence[InputSpec],
    preprocess: Preprocess | None,
    tokenizer: str | Path | None,
    labels: bool,
) -> tuple[Samples | FeedStream, Sequence[InputSpec]]:
    keyed = None if Path(text).exists() else KEYS.fullmatch(text)
    path = Path(keyed[1] if keyed else text)
    suffix = path.suffix.lower()
    if not path.exists():
        raise InputError(f"calibration data {path} does not exist; give {_KINDS}")
    if not path.is_file() and not path.is_dir():
        raise InputError(f"calibration data {path} is a device or a pipe; give {_KINDS}")
    if suffix == ".npz" and path.is_file():
        keys = _parse_keys(keyed[2] if keyed else "")
        key = keys.get(LABELS) if keys else LABELS
        inputs = with_labels(inputs, npz_like(path, key) if labels and key else None)
        return array_samples(read_npz(path, inputs, keys), inputs, text, preprocess), inputs
    if suffix == ".npy" and path.is_file():
        return array_samples({_sole(inputs, text).name: read_npy(path)}, inputs, text, preprocess), inputs
    if path.is_dir() and not holds_tensors(path):
        inputs = with_labels(inputs, _classes(path) if labels else None)
        return image_samples(path, inputs, preprocess), inputs
    if preprocess:
        raise InputError(f"preprocess goes with images, got {path}; leave it out")
    if path.is_dir():
        stream = open_tensors(path, inputs, labels)
        return stream, stream.inputs
    if suffix == ".txt":
        return text_samples(path, inputs, tokenizer), inputs
    raise InputError(f"calibration data {path}: unknown kind of file {suffix or '(no suffix)'}; give {_KINDS}")


def _classes(folder: Path) -> Array | None:
    """Labels of a folder of images, None where its sub-folders are no classes."""
    try:
        return class_labels(folder, find_images(folder))
    except InputError:
        return None


def _parse_keys(text: str) -> dict[str, str]:
    """`ids=KEY1,mask=KEY2` -> {input: key}; a lone KEY is for the sole input, written ""."""
    if "=" not in text:
        return {"": text} if text else {}
    pairs = [part.partition("=") for part in text.split(",")]
    wrong = ["".join(pair) for pair in pairs if not (pair[0] and pair[2])]
    if wrong:
        raise InputError(f"{text!r}: {', '.join(map(repr, wrong))} is not of the form input=KEY")
    return {name: key for name, _, key in pairs}


def _sole(inputs: Sequence[InputSpec], what: str) -> InputSpec:
    if len(inputs) != 1:
        raise InputError(
            f"{what} can serve a model with one input only; the model's inputs are {list_inputs(inputs)}; "
            "give an .npz file or {input: array}"
        )
    return inputs[0]


def _name(source: Any) -> str:
    return str(source) if isinstance(source, (str, Path)) else getattr(source, "__name__", type(source).__name__)
