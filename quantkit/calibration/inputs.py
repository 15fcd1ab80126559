"""What a model reads, and the checks that every feed passes before it may calibrate anything."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike

from quantkit.errors import InputError
from quantkit.types import Array, Feed

LABELS = "labels"
"""What evaluation data calls its labels, beside the model's inputs."""
PREPROCESS_HINT = "raw images need --preprocess (imagenet, caffe, cifar10, tf, unit, raw or a file)"


@dataclass(frozen=True)
class InputSpec:
    """One input of a model.

    Attributes:
        name: as in the model.
        dtype: that the model wants.
        shape: an int is fixed; a name or None is dynamic. The first axis is the batch.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", np.dtype(self.dtype))  # np.float32 is as good as np.dtype("float32")
        object.__setattr__(self, "shape", tuple(self.shape))

    @property
    def wants(self) -> str:
        """`float32 [batch, 3, 32, 32]`"""
        return f"{self.dtype} [{', '.join('?' if dim is None else str(dim) for dim in self.shape)}]"


class Source(Protocol):
    """Numbered samples. `group` decides which samples make up each batch, `read` gives the batches one by one."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def group(self, chosen: Sequence[int], batch_size: int) -> list[Sequence[int]]: ...

    def read(self, groups: Sequence[Sequence[int]]) -> Iterator[Feed]: ...


@dataclass(frozen=True)
class Samples:
    """A source that can load any samples, in any order, as one batch: arrays, images, text."""

    name: str
    count: int
    load: Callable[[Sequence[int]], Feed]

    def __len__(self) -> int:
        return self.count

    def group(self, chosen: Sequence[int], batch_size: int) -> list[Sequence[int]]:
        return chunks(chosen, batch_size)

    def read(self, groups: Sequence[Sequence[int]]) -> Iterator[Feed]:
        return map(self.load, groups)


def chunks(chosen: Sequence[int], size: int) -> list[Sequence[int]]:
    return [chosen[start : start + size] for start in range(0, len(chosen), size)]


def fixed_batch(inputs: Sequence[InputSpec]) -> int | None:
    """The batch that the model is built for, or None when it takes any."""
    sizes = sorted({spec.shape[0] for spec in inputs if spec.shape and isinstance(spec.shape[0], int)})
    if len(sizes) > 1:
        raise InputError(
            f"the model's inputs have different fixed first axes {sizes}, so there is no common batch; "
            "give whole feeds instead: a folder of test_data_set_* or an iterable of {input: array}"
        )
    return sizes[0] if sizes else None


def list_inputs(inputs: Iterable[InputSpec]) -> str:
    return ", ".join(f"{spec.name} {spec.wants}" for spec in inputs)


def label_spec(inputs: Sequence[InputSpec], dtype: DTypeLike = np.int64, rank: int = 1) -> InputSpec:
    """What labels [samples, ...] are beside the model's inputs, which count the samples as these do."""
    axes = [spec.shape[0] for spec in inputs if spec.shape]
    batch = next((axis for axis in axes if isinstance(axis, int)), axes[0] if axes else "batch")
    return InputSpec(LABELS, np.dtype(dtype), (batch, *[None] * (rank - 1)))


def with_labels(inputs: Sequence[InputSpec], like: object | None) -> Sequence[InputSpec]:
    """The inputs, and the labels as these are: their dtype and number of axes; the inputs alone for None."""
    if like is None:
        return inputs
    array = as_array(like, LABELS)
    return [*inputs, label_spec(inputs, array.dtype, max(array.ndim, 1))]


def check_names(names: Iterable[str], inputs: Sequence[InputSpec], where: str, remedy: str = "") -> None:
    """Every input is there, and nothing else is."""
    found, wanted = list(names), [spec.name for spec in inputs]
    missing = [name for name in wanted if name not in found]
    problems = [f"there is no array for input {', '.join(map(repr, missing))}"] if missing else []
    unknown = []
    for name in found:
        if name not in wanted:
            near = difflib.get_close_matches(name, wanted, n=1)
            unknown.append(repr(name) + (f" (did you mean {near[0]!r}?)" if near else ""))
    if unknown:
        problems.append(f"no input of the model is called {', '.join(unknown)}")
    if problems:
        raise InputError(f"{where}: {'; '.join(problems)}; the model's inputs are {list_inputs(inputs)}{remedy}")


def check_shapes(feed: Feed, inputs: Sequence[InputSpec], where: str, any_batch: bool = False) -> None:
    """Ranks and fixed axes; with any_batch the first axis may have any length."""
    problems = []
    for spec in inputs:
        array = feed[spec.name]
        first = 1 if any_batch else 0
        same = array.ndim == len(spec.shape) and all(
            not isinstance(wanted, int) or wanted == got
            for wanted, got in zip(spec.shape[first:], array.shape[first:], strict=True)
        )
        if not same:
            raw = array.dtype == np.uint8 and array.ndim in (3, 4) and len(spec.shape) == 4
            short = array.ndim == len(spec.shape) - 1 and not raw
            hint = f"; {PREPROCESS_HINT}" if raw else "; the first axis must be the samples" if short else ""
            problems.append(f"input {spec.name!r} wants {spec.wants}, got {array.dtype} {list(array.shape)}{hint}")
    if problems:
        raise InputError(f"{where}: {'; '.join(problems)}")


def conform(feed: Feed, inputs: Sequence[InputSpec], where: str, samples: Sequence[int]) -> dict[str, Array]:
    """The feed in the model's order and dtypes; wrong names, shapes, dtypes and values are errors.

    Args:
        feed: one batch.
        inputs: of the model.
        where: the data's name, for errors.
        samples: numbers of the batch's samples, for errors.
    """
    check_names(feed, inputs, where)
    check_shapes(feed, inputs, where)
    result = {}
    for spec in inputs:
        array = _cast(feed[spec.name], spec, where, samples)
        bad = ~np.isfinite(array) if _kind(array.dtype) == "float" else np.zeros(0, np.bool_)
        if bad.any():
            raise InputError(
                f"{where}: input {spec.name!r} has NaN or Inf (as {array.dtype}) in {_first(bad, samples)}; "
                "calibration data must be finite"
            )
        result[spec.name] = array
    return result


def as_array(value: object, where: str) -> Array:
    """Anything array-like; object arrays are refused because they hold Python objects, not numbers."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{where}: {type(value).__name__} cannot be read as an array: {error}") from error
    if array.dtype.hasobject:
        raise InputError(f"{where}: holds Python objects, not numbers; store a numeric array of one regular shape")
    return array


def _kind(dtype: np.dtype[Any]) -> str:
    if dtype.kind in "biu":
        return "bool" if dtype.kind == "b" else "int"
    if dtype.kind == "f" or dtype.name.startswith(("bfloat", "float")):  # ml_dtypes' own types have the kind V
        return "float"
    return "text" if dtype.kind in "UO" else dtype.name


def _cast(array: Array, spec: InputSpec, where: str, samples: Sequence[int]) -> Array:
    """To the model's dtype where no value changes (float to a narrower float may round)."""
    source, target = _kind(array.dtype), _kind(spec.dtype)
    if array.dtype == spec.dtype or source == target == "text":
        return array
    wrong = f"{where}: input {spec.name!r} wants {spec.wants}, got {array.dtype} {list(array.shape)}"
    if array.dtype == np.uint8 and target == "float" and array.ndim >= 3:
        raise InputError(f"{wrong}; {PREPROCESS_HINT}")
    if not {source, target} <= {"bool", "int", "float"}:
        raise InputError(f"{wrong}, which cannot be converted")
    with np.errstate(all="ignore"):
        cast = array.astype(spec.dtype)
        if source == target == "float":
            return cast
        # Back and forth must give the same number, and the sign must survive: -1 as uint64 comes back as -1.
        changed = (cast.astype(array.dtype) != array) | ((cast < 0) != (array < 0))
    if changed.any():
        value = array[np.unravel_index(int(np.argmax(changed)), array.shape)]
        raise InputError(f"{wrong}, and {value} in {_first(changed, samples)} is no {spec.dtype}")
    return cast


def _first(bad: Array, samples: Sequence[int]) -> str:
    """The sample with the first bad value."""
    by_row = bad.ndim > 0 and bad.shape[0] == len(samples)
    row = int(np.argmax(bad.reshape(bad.shape[0], -1).any(axis=1))) if by_row else 0
    return f"sample {samples[row]}"
