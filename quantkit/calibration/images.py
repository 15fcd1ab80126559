"""Calibration data in a folder of images, decoded batch by batch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from quantkit.calibration.arrays import stack_images
from quantkit.calibration.inputs import LABELS, PREPROCESS_HINT, InputSpec, Samples, list_inputs
from quantkit.calibration.preprocess import Preprocess, fit_preprocess
from quantkit.errors import InputError
from quantkit.types import Array, Feed

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".gif")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "GIF")
"""Whatever a file is called, no other decoder opens it: some of Pillow's start other programs."""

MOST_DIGITS = 9
"""Longer names of folders are no classes' numbers."""


def find_images(folder: Path) -> list[Path]:
    """The images of a folder and of its sub-folders (one level, as for classes), sorted by path."""
    files = [*folder.glob("*"), *folder.glob("*/*")]
    images = [file for file in files if file.suffix.lower() in SUFFIXES and file.is_file()]
    visible = [file for file in images if not any(part[0] == "." for part in file.relative_to(folder).parts)]
    return sorted(visible, key=lambda file: file.relative_to(folder).parts)


def class_labels(folder: Path, files: Sequence[Path]) -> Array:
    """int64 [files]: the class that each image's sub-folder stands for.

    Sub-folders called by whole numbers are those classes; else classes are the sub-folders in the order of their names,
    empty ones too.

    Raises:
        InputError: an image is in no sub-folder, or two sub-folders are the same number.
    """
    loose = [file for file in files if file.parent == folder]
    if loose:
        raise InputError(
            f"{folder}: the metric needs labels, and {loose[0].name} is in no class's sub-folder: give a folder with "
            "one sub-folder for each class, an .npz file with 'labels' and the images, uint8 [samples, H, W, 3], or "
            "MODULE:FUNCTION"
        )
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
    if all(name.isascii() and name.isdigit() and len(name) <= MOST_DIGITS for name in names):
        numbers = {name: int(name) for name in names}
        if len(set(numbers.values())) < len(names):
            raise InputError(f"{folder}: two sub-folders are the same class's number, among {', '.join(names[:8])}")
    else:
        numbers = {name: place for place, name in enumerate(names)}
    return np.array([numbers[file.parent.name] for file in files], np.int64)


def image_samples(folder: Path, inputs: Sequence[InputSpec], preprocess: Preprocess | None) -> Samples:
    files = find_images(folder)
    if not files:
        raise InputError(
            f"{folder} holds no images ({', '.join(SUFFIXES)}) and no test_data_set_*/input_*.pb, "
            "neither itself nor one level below"
        )
    labels = class_labels(folder, files) if any(spec.name == LABELS for spec in inputs) else None
    inputs = [spec for spec in inputs if spec.name != LABELS]
    if len(inputs) != 1:
        raise InputError(
            f"{folder}: images can serve a model with one input only; the model's inputs are {list_inputs(inputs)}"
        )
    if preprocess is None:
        raise InputError(f"{folder} holds images, but how the model wants them is not said: {PREPROCESS_HINT}")
    fitted = fit_preprocess(preprocess, inputs[0])

    def load(indices: Sequence[int]) -> Feed:
        images = [fitted.apply(read_image(files[index])) for index in indices]
        feed = {inputs[0].name: stack_images(images, str(folder))}
        return feed if labels is None else {**feed, LABELS: labels[list(indices)]}

    return Samples(str(folder), len(files), load)


def read_image(path: Path) -> Array:
    """uint8 [H, W, 3], RGB; the first frame of an animation; transparency is dropped, orientation tags are ignored."""
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError(f"reading {path} needs Pillow: pip install quantkit[images]") from error
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path, formats=FORMATS) as image:
                if image.mode[0] in "IF":  # more than 8 bits: converting would clip, not scale
                    raise InputError(f"{path} has more than 8 bits per channel (mode {image.mode}); save it with 8")
                return np.asarray(image.convert("RGB"))
        except InputError:
            raise
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise InputError(f"{path} is too large to be a calibration image: {error}") from error
        except Exception as error:  # decoders raise nearly anything on broken files
            raise InputError(f"{path} is no readable image: {error}") from error
