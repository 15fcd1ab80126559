"""Calibration data: open it from whatever the user has, check it, split it, and stream it batch by batch.

A path may end in a slice over its samples: `images@::5` is every fifth image, `text.txt@:256` the first 256 lines.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from quantkit.calibration.feeds import FeedStream
from quantkit.calibration.inputs import InputSpec, Samples, Source, conform, fixed_batch
from quantkit.calibration.preprocess import Preprocess, load_preprocess
from quantkit.calibration.sources import KEYS, open_source
from quantkit.errors import InputError
from quantkit.types import Array, Feed

__all__ = ["CalibrationData", "InputSpec", "Preprocess", "open_calibration", "random_calibration"]

DEFAULT_BATCH = 8
DEFAULT_AXIS = 64
MOST_SAMPLES = 1 << 24
"""More are a mistake, or a file that pretends to be long; a slice takes a part of them."""
MOST_RANDOM = 1 << 28
"""Numbers of one made-up sample."""
_SLICE = re.compile(r"(.+)@([^@/\\]*:[^@/\\]*)")


class CalibrationData:
    """A sized, re-iterable stream of feeds {input: array [batch, ...]}; one batch is in memory at a time.

    Every batch is checked: names, shapes, dtypes (safe casts are done), finite values. `len()` counts batches.

    Attributes:
        samples: entries along the first axis of all batches; for feeds that cannot be taken apart, the feeds.
        batch_size: most samples in one batch; exactly that many in each when the model's batch is fixed.
        description: what this is, for the report.
    """

    def __init__(
        self, source: Source, inputs: Sequence[InputSpec], chosen: Sequence[int], batch_size: int, origin: str
    ) -> None:
        """
        Args:
            source: numbered samples.
            inputs: of the model.
            chosen: numbers of the samples that belong to this data, ascending.
            batch_size: most samples in a batch.
            origin: what the description says beside the number of samples.
        """
        self._source = source
        self._inputs = tuple(inputs)
        self._origin = origin
        # A fixed batch comes in whole batches only. A stream's feeds have the right batch already.
        self._multiple = 1 if isinstance(source, FeedStream) else fixed_batch(inputs) or 1
        if len(chosen) < self._multiple:
            raise InputError(
                f"{origin} holds {_count(len(chosen))}, but the model's batch is fixed at {self._multiple}; "
                f"give at least {_count(self._multiple)}"
            )
        self._chosen = chosen[: len(chosen) // self._multiple * self._multiple]
        self.samples = len(self._chosen)
        self.batch_size = batch_size
        self._groups = source.group(self._chosen, batch_size)

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Feed]:
        for group, feed in zip(self._groups, self._source.read(self._groups), strict=True):
            yield conform(feed, self._inputs, self._source.name, group)

    @property
    def description(self) -> str:
        return f"{_count(self.samples)} of {self._origin}"

    @cached_property
    def digest(self) -> str:
        """sha256 over names, dtypes, shapes and bytes of every batch; reads all the data once."""
        digest = hashlib.sha256()
        for feed in self:
            for name in sorted(feed):
                array = feed[name]
                digest.update(repr((name, array.dtype.name, array.shape)).encode())
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def split(self, holdout: float | int = 0.25) -> tuple[CalibrationData, CalibrationData]:
        """(calibration part, held-out part), neither empty; the held-out samples are spread evenly.

        With a single sample (a single batch, where the model's batch is fixed) both are the same data: `split_note`.

        Args:
            holdout: share of the samples below 1, or their number.
        """
        count = holdout if isinstance(holdout, int) else round(holdout * self.samples)
        if holdout <= 0 or (isinstance(holdout, float) and not holdout < 1):
            raise InputError(f"hold-out must be a share between 0 and 1 or a number of samples, got {holdout}")
        step = self._multiple
        if self.split_note is not None:
            return self, self
        if isinstance(holdout, int) and holdout > self.samples - step:
            raise InputError(
                f"a hold-out of {_count(holdout)} leaves nothing to calibrate on: {self.description}; ask for fewer"
            )
        count = min(max(round(count / step) * step, step), self.samples - step)
        held = set(_spread(count, self.samples))
        parts = [place for place in range(self.samples) if place not in held], sorted(held)
        return self._pick(parts[0]), self._pick(parts[1])

    @property
    def split_note(self) -> str | None:
        """What the user should know of the two parts of a split; None where they differ."""
        step = self._multiple
        if self.samples != step:
            return None
        does = "both calibrates and measures" if step == 1 else "both calibrate and measure"
        return f"{self.description} {does}, so that the figures mean little; give at least {_count(2 * step)}"

    def subset(self, count: int) -> CalibrationData:
        """At most `count` samples, spread evenly; whole batches, and at least one, where the model's batch is fixed."""
        if count < 1:
            raise InputError(f"a subset needs at least 1 sample, got {count}")
        whole = max(count // self._multiple, 1) * self._multiple
        return self if whole >= self.samples else self._pick(_spread(whole, self.samples))

    def _pick(self, places: Sequence[int]) -> CalibrationData:
        chosen = [self._chosen[place] for place in places]
        return CalibrationData(self._source, self._inputs, chosen, self.batch_size, self._origin)


def open_calibration(
    source: object,
    inputs: Sequence[InputSpec],
    *,
    preprocess: str | Path | Preprocess | None = None,
    tokenizer: str | Path | None = None,
    batch_size: int | None = None,
    max_samples: int | None = None,
    labels: bool = False,
) -> CalibrationData:
    """Calibration data from a path, a `module:function` or a Python object.

    Args:
        source: `.npz` (also `file.npz:KEY`, `file.npz:input=KEY,input=KEY`), `.npy`, a folder of ONNX test data, a
            folder of images, a `.txt` file, `module:function`; each may end in a slice, `@START:STOP:STEP`. Or an
            array, a mapping {input: array}, an iterable of feeds, a function that returns one, a CalibrationDataReader.
        inputs: of the model.
        preprocess: for images: a preset, a .json/.yaml file or a Preprocess.
        tokenizer: for text: a tokenizer.json, a folder that holds one, or `byte`.
        batch_size: 8 unless given; feeds that come ready-made are split when they are larger, never merged.
        max_samples: keep only so many, spread evenly; data of unknown length is read no further than that.
        labels: where the data hold `labels` beside the inputs, of whatever shape [samples, ...], feeds hold them too.
    """
    _check_request(inputs, batch_size, max_samples)
    if isinstance(source, CalibrationData):
        return source if max_samples is None else source.subset(max_samples)
    path, window = _split_window(source)
    prepared = preprocess if preprocess is None or isinstance(preprocess, Preprocess) else load_preprocess(preprocess)
    opened, inputs = open_source(path, inputs, prepared, tokenizer, _limit(window, max_samples), labels)
    chosen = range(len(opened))[window] if window else range(len(opened))
    if not chosen:
        what = (
            f"the slice @{_show(window)} leaves none of its {_count(len(opened))}" if window and len(opened) else None
        )
        raise InputError(f"{opened.name}: {what or 'it holds no samples'}; calibration needs at least one")
    if len(chosen) > MOST_SAMPLES:
        raise InputError(
            f"{opened.name} holds {_count(len(chosen))}, more than {MOST_SAMPLES}; take a part with @START:STOP:STEP"
        )
    fixed = fixed_batch(inputs) if isinstance(opened, Samples) else None
    if fixed and batch_size not in (None, fixed):
        raise InputError(f"the model's batch is fixed at {fixed}, got batch size {batch_size}; leave it out")
    size = fixed or batch_size or (opened.longest if isinstance(opened, FeedStream) else DEFAULT_BATCH)
    keyed = KEYS.fullmatch(opened.name)
    origin = f"{Path(keyed[1]).name}:{keyed[2]}" if keyed else Path(opened.name).name or opened.name
    origin += f"@{_show(window)}" if window else ""
    origin += f", preprocess {_label(preprocess)}" if preprocess else ""
    origin += f", tokenizer {_label(tokenizer)}" if tokenizer else ""
    data = CalibrationData(opened, inputs, chosen, size, origin)
    if isinstance(opened, Samples):
        next(iter(data))  # wrong shapes, dtypes and broken files show now, not in the middle of the work
    return data.subset(max_samples) if max_samples else data


def random_calibration(
    inputs: Sequence[InputSpec],
    *,
    samples: int = 16,
    seed: int = 0,
    dynamic: Mapping[str, int] | None = None,
    max_id: int = 99,
) -> CalibrationData:
    """Made-up data, for trying things out: ranges and accuracies found with it say little about real data.

    Floats are standard normal, integers 0 to max_id, masks 1, token types 0, positions 0, 1, 2, ...

    Args:
        inputs: of the model.
        samples: how many, rounded down to whole batches where the model's batch is fixed.
        seed: of the numbers.
        dynamic: lengths of named dynamic axes; 64 for the others.
        max_id: the largest integer.
    """
    lengths = dict(dynamic or {})
    known = sorted({dim for spec in inputs for dim in spec.shape[1:] if isinstance(dim, str)})
    unknown = sorted(set(lengths) - set(known))
    if unknown:
        raise InputError(f"unknown dynamic axis {', '.join(unknown)}; the model's are: {', '.join(known) or 'none'}")
    if samples < 1:
        raise InputError(f"random calibration needs at least 1 sample, got {samples}")

    def load(indices: Sequence[int]) -> Feed:
        return {spec.name: _random_batch(spec, place, indices) for place, spec in enumerate(inputs)}

    def _random_batch(spec: InputSpec, place: int, indices: Sequence[int]) -> Array:
        dims = _lengths(spec, lengths)
        # One generator for each sample, so that a sample is the same in whichever batch it is.
        rows = [_random_sample(spec, dims, np.random.default_rng([seed, place, index]), max_id) for index in indices]
        return np.stack(rows) if spec.shape else rows[0]

    count = max(samples, fixed_batch(inputs) or 1)
    source = Samples("random data", count, load)
    origin = f"random data, seed {seed}"
    return CalibrationData(source, inputs, range(count), fixed_batch(inputs) or DEFAULT_BATCH, origin)


def _lengths(spec: InputSpec, dynamic: Mapping[str, int]) -> list[int]:
    """Of a made-up sample's axes."""
    dims = [dim if isinstance(dim, int) else dynamic.get(dim or "", DEFAULT_AXIS) for dim in spec.shape[1:]]
    if math.prod(dims) > MOST_RANDOM or min(dims, default=0) < 0:
        raise InputError(
            f"input {spec.name!r} wants {spec.wants}: a sample of {dims} cannot be made up, the most are {MOST_RANDOM} "
            "numbers; give calibration data"
        )
    return dims


def _random_sample(spec: InputSpec, dims: Sequence[int], random: np.random.Generator, max_id: int) -> Array:
    name = spec.name.lower()
    if "mask" in name:
        return np.ones(dims, spec.dtype)
    if spec.dtype.kind in "iu" and "type" in name:
        return np.zeros(dims, spec.dtype)
    if spec.dtype.kind in "iu" and "position" in name and dims:
        return np.broadcast_to(np.arange(dims[-1]), dims).astype(spec.dtype)
    if spec.dtype.kind == "b":
        return random.integers(0, 2, dims).astype(np.bool_)
    if spec.dtype.kind in "iu":
        return random.integers(0, min(max_id, np.iinfo(spec.dtype).max) + 1, dims).astype(spec.dtype)
    if spec.dtype.kind in "UO":
        raise InputError(f"input {spec.name!r} wants text, which cannot be made up; give calibration data")
    return random.standard_normal(dims).astype(spec.dtype)


def _check_request(inputs: Sequence[InputSpec], batch_size: int | None, max_samples: int | None) -> None:
    if not inputs:
        raise InputError("the model has no inputs, so there is nothing to calibrate it with")
    for name, value in (("batch size", batch_size), ("max samples", max_samples)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")


def _split_window(source: object) -> tuple[object, slice | None]:
    """`SRC@START:STOP:STEP` -> SRC and the slice; a file that really has such a name is taken as it is."""
    if not isinstance(source, (str, Path)) or Path(source).exists():
        return source, None
    found = _SLICE.fullmatch(str(source))
    if not found:
        return str(source), None
    try:
        parts = [int(part) if part.strip() else None for part in found[2].split(":")]
        window = slice(*parts)
    except (TypeError, ValueError):
        window = slice(None, None, 0)
    if window.step is not None and window.step < 1:
        raise InputError(
            f"{source}: @{found[2]} is no slice; write @START:STOP:STEP with a step of at least 1, as @::5 or @:256"
        )
    return found[1], window


def _limit(window: slice | None, max_samples: int | None) -> int | None:
    """Samples after which a stream need not be read on."""
    if window is None:
        return max_samples
    from_end = (window.start or 0) < 0 or window.stop is None or window.stop < 0
    return None if from_end else int(window.stop)


def _spread(count: int, total: int) -> list[int]:
    """`count` different numbers below `total`, evenly spread: each is the middle of its share."""
    return [(2 * index + 1) * total // (2 * count) for index in range(count)]


def _show(window: slice) -> str:
    parts = [window.start, window.stop] + ([window.step] if window.step is not None else [])
    return ":".join("" if part is None else str(part) for part in parts)


def _count(samples: int) -> str:
    return f"{samples} sample{'' if samples == 1 else 's'}"


def _label(value: object) -> str:
    return value.__class__.__name__ if isinstance(value, Preprocess) else Path(str(value)).name
