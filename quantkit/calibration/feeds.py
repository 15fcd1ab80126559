"""Calibration data in ready-made feeds: iterables, functions, CalibrationDataReaders, folders of .pb tensors.

Every pass over the data reads it anew, so only one feed is in memory. What can be read only once (a generator) is
spooled to a temporary folder, one .npz per feed.
"""

from __future__ import annotations

import difflib
import importlib
import itertools
import re
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.calibration.inputs import (
    LABELS,
    InputSpec,
    as_array,
    check_names,
    chunks,
    conform,
    label_spec,
    list_inputs,
    with_labels,
)
from quantkit.errors import InputError
from quantkit.types import Array, Feed

MOST_BYTES = (1 << 31) - 1
"""Of the largest protobuf."""
Passes = Callable[[], Iterator[Any]]
"""Starts one pass over the data."""


class FeedStream:
    """Feeds in the order they come. Feeds are taken apart into samples where that is possible, and never merged.

    A feed can be taken apart when the model's inputs with a dynamic first axis call it the same, do not call it a
    sequence, and all have as many entries there; other inputs go whole into every part. Otherwise a feed is one sample.

    Attributes:
        inputs: what every feed holds.
    """

    def __init__(
        self, name: str, passes: Passes, inputs: Sequence[InputSpec], limit: int | None = None, whole: bool = False
    ) -> None:
        """Reads everything once to check and count it.

        Args:
            name: of the data, for errors.
            passes: starts a pass.
            inputs: of the model.
            limit: samples after which no more is read; for data without end.
            whole: never take feeds apart.
        """
        self.name = name
        self._passes = passes
        self.inputs = inputs
        self._batched = [] if whole else _batched_inputs(inputs)
        self._ends = np.cumsum(self._count(limit), dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def longest(self) -> int:
        """Samples of the largest feed."""
        return int(np.diff(self._ends, prepend=0).max(initial=1))

    def group(self, chosen: Sequence[int], batch_size: int) -> list[Sequence[int]]:
        by_feed = itertools.groupby(chosen, key=self._feed_of)
        return [batch for _, part in by_feed for batch in chunks(list(part), batch_size)]

    def read(self, groups: Sequence[Sequence[int]]) -> Iterator[Feed]:
        feeds = enumerate(self._passes())
        number, feed = -1, None
        for group in groups:
            wanted = self._feed_of(group[0])
            while number < wanted:
                number, item = next(feeds, (wanted, None))
                feed = None if item is None else name_feed(item, self.inputs, f"{self.name}, feed {number}")
            yield self._part(feed, wanted, group)

    def _part(self, feed: Feed | None, number: int, group: Sequence[int]) -> Feed:
        first = int(self._ends[number - 1]) if number else 0
        count = int(self._ends[number]) - first
        if feed is None or self._rows(feed) != count:
            raise InputError(
                f"{self.name} gave other data in a later pass (feed {number} differs in size or is gone); "
                "it must give the same feeds every time"
            )
        if not self._batched or len(group) == count:
            return feed
        rows = np.array(group) - first
        return {key: array[rows] if key in self._batched else array for key, array in feed.items()}

    def _feed_of(self, sample: int) -> int:
        return int(np.searchsorted(self._ends, sample, side="right"))

    def _count(self, limit: int | None) -> list[int]:
        """Samples of each feed; all feeds are checked on the way."""
        counts: list[int] = []
        divisible = bool(self._batched)
        for number, item in enumerate(self._passes()):
            where = f"{self.name}, feed {number}"
            feed = name_feed(item, self.inputs, where)
            checked = conform(feed, self.inputs, where, _numbers(sum(counts), feed, self._batched))
            divisible = divisible and len({checked[key].shape[0] for key in self._batched}) == 1
            counts.append(self._rows(checked) if divisible else 1)
            if limit is not None and sum(counts) >= limit:
                break
        if not divisible:
            self._batched = []
            return [1] * len(counts)
        return counts

    def _rows(self, feed: Feed) -> int:
        return len(_numbers(0, feed, self._batched))


def open_stream(
    source: object, inputs: Sequence[InputSpec], name: str, limit: int | None, labels: bool = False
) -> FeedStream:
    """Feeds from an iterable, a reader, or a function that returns one of them; `labels` where the first has them."""
    passes = _repeatable(source)
    if passes is None:
        items = iter(_items(source))
        first = list(itertools.islice(items, 1))
        inputs = _labelled(first, inputs) if labels else inputs
        passes = _Spool(itertools.chain(first, items), inputs, name, limit).read
    elif labels:
        inputs = _labelled(passes(), inputs)
    return FeedStream(name, passes, inputs, limit)


def open_function(text: str, inputs: Sequence[InputSpec], limit: int | None, labels: bool = False) -> FeedStream:
    """`module:function`; what the user's code raises is reported in one sentence."""
    passes = _Guard(text, _call_again(_import_function(text)))
    return FeedStream(text, passes, _labelled(passes(), inputs) if labels else inputs, limit)


def open_tensors(folder: Path, inputs: Sequence[InputSpec], labels: bool = False) -> FeedStream:
    """ONNX test data: one feed per test_data_set_*, or one feed in the folder itself."""
    sets = [path for path in folder.glob("test_data_set_*") if path.is_dir()]
    sets = sorted(sets, key=_natural) if sets else [folder]
    if labels:
        with suppress(InputError):  # no such tensor: whatever else is wrong shows when all of them are read
            wanted = [*inputs, label_spec(inputs)]
            inputs = with_labels(inputs, _read_set(sets[0], wanted)[LABELS])
    return FeedStream(str(folder), lambda: (_read_set(path, inputs) for path in sets), inputs, whole=True)


def _labelled(items: Iterable[object], inputs: Sequence[InputSpec]) -> Sequence[InputSpec]:
    """The inputs, and labels where the first feed has them: by name, or behind the inputs in a tuple."""
    for item in items:
        with suppress(InputError):  # a feed that is wrong is told of when all of them are read
            return with_labels(inputs, name_feed(item, [*inputs, label_spec(inputs)], LABELS).get(LABELS))
        break
    return inputs


def holds_tensors(folder: Path) -> bool:
    return any(folder.glob("test_data_set_*")) or any(folder.glob("input_*.pb"))


def name_feed(item: object, inputs: Sequence[InputSpec], where: str) -> dict[str, Array]:
    """{name: array}, one array per input in a tuple or list, or the array of the sole input."""
    if isinstance(item, Mapping):
        return {str(key): as_array(value, f"{where}, input {key!r}") for key, value in item.items()}
    values = list(item) if isinstance(item, (tuple, list)) else [item]
    if len(values) != len(inputs):
        raise InputError(
            f"{where} gives {len(values)} arrays, but the model has {len(inputs)} inputs ({list_inputs(inputs)}); "
            "give {input: array}"
        )
    pairs = zip(inputs, values, strict=True)
    return {spec.name: as_array(value, f"{where}, input {spec.name!r}") for spec, value in pairs}


class _Spool:
    """Feeds on disk, so that they can be read again; the folder goes when the object does."""

    def __init__(self, items: Iterable[object], inputs: Sequence[InputSpec], name: str, limit: int | None) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="quantkit-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._inputs = inputs
        self._count, samples = 0, 0
        batched = _batched_inputs(inputs)
        for item in items:
            where = f"{name}, feed {self._count}"
            named = name_feed(item, inputs, where)
            numbers = _numbers(samples, named, batched)
            feed = conform(named, inputs, where, numbers)
            np.savez(self._path(self._count), *(feed[spec.name] for spec in inputs))
            self._count += 1
            samples += len(numbers)
            if limit is not None and samples >= limit:
                break

    def read(self) -> Iterator[Feed]:
        for number in range(self._count):
            with np.load(self._path(number), allow_pickle=False) as archive:
                arrays = [archive[f"arr_{index}"] for index in range(len(self._inputs))]
            # .npy stores bfloat16 and its like as bytes without a type
            pairs = zip(self._inputs, arrays, strict=True)
            yield {spec.name: array.view(spec.dtype) if array.dtype.kind == "V" else array for spec, array in pairs}

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08d}.npz"


class _Guard:
    """Calls the user's function; errors of the call and of the iteration become InputErrors."""

    def __init__(self, text: str, passes: Passes) -> None:
        self._text = text
        self._passes = passes

    def __call__(self) -> Iterator[Any]:
        iterator = self._attempt(self._passes)
        nothing = object()
        while (item := self._attempt(lambda: next(iterator, nothing))) is not nothing:
            yield item

    def _attempt(self, step: Callable[[], Any]) -> Any:
        try:
            return step()
        except Exception as error:  # whatever the user's code raises
            raise InputError(f"{self._text} failed: {type(error).__name__}: {error}") from error


def _numbers(first: int, feed: Feed, batched: Sequence[str]) -> range:
    """The numbers of a feed's samples, `first` and those after it."""
    shapes = [feed[key].shape[:1] for key in batched[:1] if key in feed]
    return range(first, first + (shapes[0][0] if shapes and shapes[0] else 1))


def _batched_inputs(inputs: Sequence[InputSpec]) -> list[str]:
    """Inputs whose first axis counts samples; none when that is not clear."""
    dynamic = [spec for spec in inputs if spec.shape and not isinstance(spec.shape[0], int)]
    axes = {str(spec.shape[0]) for spec in dynamic if spec.shape[0] is not None}
    sequence = any(re.search("seq|len|time|step", axis, re.IGNORECASE) for axis in axes)
    return [] if len(axes) > 1 or sequence else [spec.name for spec in dynamic]


def _repeatable(source: object) -> Passes | None:
    """A way to start a pass again and again, or None for what can be read once."""
    if _is_reader(source):
        rewind = getattr(source, "rewind", None)
        if not callable(rewind):
            return None

        def again() -> Iterator[Any]:
            rewind()
            return iter(_items(source))

        return again
    if isinstance(source, Iterator):
        return None
    if isinstance(source, Iterable):
        return lambda: iter(source)
    if callable(source):
        return _call_again(source)
    raise InputError(
        f"calibration data of type {type(source).__name__} cannot be read; give a path, module:function, "
        "an iterable of {input: array}, a function that returns one, or a CalibrationDataReader"
    )


def _is_reader(source: object) -> bool:
    """An onnxruntime CalibrationDataReader, or what looks like one; its class is a function that returns one."""
    return callable(getattr(source, "get_next", None)) and not isinstance(source, type)


def _call_again(function: Callable[[], object]) -> Passes:
    """A call for each pass, or one call alone when it returns something that can be read again, such as a list."""
    kept: list[object] = []

    def again() -> Iterator[Any]:
        made = kept[0] if kept else function()
        if not kept and isinstance(made, Iterable) and not isinstance(made, Iterator) and not _is_reader(made):
            kept.append(made)
        return iter(_items(made))

    return again


def _items(source: Any) -> Iterable[Any]:
    if _is_reader(source):
        return iter(source.get_next, None)
    if not isinstance(source, Iterable):
        raise InputError(f"expected an iterable of {{input: array}}, got {type(source).__name__}")
    return source


def _import_function(text: str) -> Callable[[], object]:
    module_name, _, name = text.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        importlib.invalidate_caches()
        module = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's and may raise anything
        raise InputError(
            f"{text}: importing {module_name} failed: {type(error).__name__}: {error}; "
            "write module:function, the module as in an import statement"
        ) from error
    finally:
        sys.path.remove(here)
    function = getattr(module, name, None)
    if not callable(function):
        near = difflib.get_close_matches(name, dir(module), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"{text}: module {module_name} has no function {name}{hint}")
    checked: Callable[[], object] = function
    return checked


def _natural(path: Path) -> tuple[int, str]:
    """test_data_set_10 after test_data_set_2."""
    number = re.search(r"(\d+)$", path.stem)
    return (int(number[1]) if number else 0, path.name)


def _read_set(folder: Path, inputs: Sequence[InputSpec]) -> dict[str, Array]:
    """A tensor serves the input that has its name, else the one whose place its file name gives."""
    files = sorted(folder.glob("input_*.pb"), key=_natural)
    names = [spec.name for spec in inputs]
    feed: dict[str, Array] = {}
    for place, path in enumerate(files):
        label, array = _read_tensor(path)
        number = re.search(r"(\d+)$", path.stem)
        index = int(number[1]) if number else place
        name = label if label in names else names[index] if index < len(names) else label or path.name
        if name in feed:
            raise InputError(f"{path}: a second tensor for input {name!r}; each input needs one")
        feed[name] = array
    check_names(feed, inputs, str(folder))
    return feed


def _read_tensor(path: Path) -> tuple[str, Array]:
    import onnx
    from onnx import numpy_helper

    if not path.is_file():
        raise InputError(f"{path} is no regular file; give ONNX tensors")
    if path.stat().st_size > MOST_BYTES:
        raise InputError(f"{path} has {path.stat().st_size} bytes, more than a tensor's {MOST_BYTES}; save it as .npz")
    try:
        tensor = onnx.TensorProto.FromString(path.read_bytes())
        if any(dim < 0 for dim in tensor.dims):
            raise InputError(f"{path} holds a tensor of shape {list(tensor.dims)}; save it again")
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise InputError(f"{path} keeps its data in another file; save the tensor with its data inside")
        return tensor.name, as_array(numpy_helper.to_array(tensor), str(path))
    except InputError:
        raise
    except Exception as error:  # protobuf and onnx raise half a dozen kinds on broken files
        raise InputError(f"{path} is no readable ONNX tensor (truncated or corrupt): {error}") from error
