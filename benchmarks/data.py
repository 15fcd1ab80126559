"""The data of the benchmarks: which samples calibrate, which ones test, and how a model reads them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantkit.calibration.preprocess import load_preprocess
from quantkit.calibration.text import load_tokenizer
from quantkit.types import Array, Feed

CALIBRATION_IMAGES = 512
CALIBRATION_STEP = 5
CALIBRATION_SENTENCES = 256
TEST_SENTENCES = 1000
MIN_WORDS, MAX_WORDS = 8, 64
HEADING = re.compile(r"=.*=")


@dataclass(frozen=True)
class Labelled:
    """Test images as the model reads them, [samples, 3, height, width] float32, and their classes, [samples] int64."""

    images: Array
    labels: Array


def cifar10_calibration(data: Path) -> str:
    """The first of the training images that the data set keeps for calibration."""
    return f"{data / 'data/cifar10.npz'}:calib_images@:{CALIBRATION_IMAGES}"


def cifar10_test(data: Path) -> Labelled:
    """All 10 000 test images."""
    prepare = load_preprocess("cifar10")
    with np.load(data / "data/cifar10.npz") as arrays:
        images, labels = arrays["test_images"], arrays["test_labels"]
    return Labelled(np.stack([prepare.apply(image) for image in images]), labels.astype(np.int64))


def imagenet_calibration(data: Path) -> str:
    """Every fifth of the 1000 images."""
    return f"{data / 'data/imagenet_samples'}@::{CALIBRATION_STEP}"


def imagenet_test(data: Path, count: int | None = None) -> Labelled:
    """The other 800, or the first of them; the class of an image is its place among the sorted file names."""
    from PIL import Image

    prepare = load_preprocess("caffe")
    images: list[Array] = []
    labels: list[int] = []
    for label, path in enumerate(sorted((data / "data/imagenet_samples").glob("*.jpg"))):
        if len(labels) == count:
            break
        if label % CALIBRATION_STEP:
            with Image.open(path) as image:
                images.append(prepare.apply(np.asarray(image.convert("RGB"))))
            labels.append(label)
    return Labelled(np.stack(images), np.array(labels))


def sentences(data: Path, part: str, count: int) -> list[str]:
    """The first sentences of MIN_WORDS to MAX_WORDS words of `valid` or `test`, headings left out."""
    found: list[str] = []
    for line in (data / f"data/wikitext2/wt2_{part}.txt").read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text and not HEADING.fullmatch(text):
            parts = [f"{item.strip()} ." for item in text.removesuffix(".").split(" . ")]
            found += [item for item in parts if MIN_WORDS <= len(item.split()) <= MAX_WORDS]
    return found[:count]


def write_calibration_text(data: Path, folder: Path) -> Path:
    """A text file with one calibration sentence per line."""
    path = folder / "calibration.txt"
    path.write_text("\n".join(sentences(data, "valid", CALIBRATION_SENTENCES)) + "\n", encoding="utf-8")
    return path


def sentence_feeds(lines: Sequence[str], tokenizer: Path) -> list[Feed]:
    """One feed per sentence: nothing is padded, so every attention mask is all ones."""
    encoded = load_tokenizer(tokenizer).encode(list(lines), 512)
    return [token_feed(np.array([ids], np.int64)) for ids, _ in encoded]


def token_feed(ids: Array) -> Feed:
    """Ids [batch, length] without padding, as a feed."""
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def token_block(feeds: Sequence[Feed], batch: int, length: int) -> Feed:
    """[batch, length] real tokens, cut from the sentences one after the other."""
    ids = np.concatenate([feed["input_ids"].reshape(-1) for feed in feeds])
    return token_feed(ids[: batch * length].reshape(batch, length))
