"""One streaming pass per wave of values: run the float model, read intermediate values, add them up, forget them.

A wave holds as many values as the memory limit allows for one batch plus their accumulators, and batches are cut where
that makes fewer waves, so neither the number of samples nor the depth of the model changes the peak. Layers that read
one value in one way share their accumulators.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from quantkit.cache import Entry, Store, content_key
from quantkit.calibration.accumulators import Distribution, Gram, Histogram, Moments, RowSample
from quantkit.calibration.data import CalibrationData
from quantkit.calibration.finished import distributions_entry, distributions_of, statistics_entry, statistics_of
from quantkit.calibration.pieces import Pieces, dimension_sizes, elements, main_graph_values
from quantkit.calibration.rows import to_rows
from quantkit.errors import InputError
from quantkit.graph._checks import measure
from quantkit.report.progress import Progress
from quantkit.types import Array, Feed, LayerStats, Target, Use

ROW_LIMIT = 256
# Convolution positions read per batch: neighbours share most of their inputs, a part tells as much as all.
POSITIONS = 1024
ROW_OPERATORS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "LSTM", "GRU"})


@dataclass(frozen=True)
class Request:
    """What to collect.

    Attributes:
        targets: layers whose inputs matter.
        stats: LayerStats fields to fill.
        histograms: value name -> the group whose distribution it adds to.
    """

    targets: Mapping[str, Target]
    stats: frozenset[str]
    histograms: Mapping[str, str]


@dataclass(frozen=True)
class Settings:
    """How to collect.

    Attributes:
        memory_limit: bytes of one batch's values and their accumulators.
        threads: for onnxruntime.
        seed: of row sampling.
        store: where finished statistics go.
        lean: run on weights that stay in their file.
    """

    memory_limit: int
    threads: int
    seed: int
    store: Store = field(default_factory=Store)
    lean: bool = False


@dataclass(frozen=True)
class Collected:
    """Statistics by target name, and distributions by group of values."""

    stats: Mapping[str, LayerStats]
    histograms: Mapping[str, Distribution]


@dataclass
class _Reader:
    """Accumulators of one (values, way of reading them); a weight that is used twice reads two values."""

    targets: list[Target]
    moments: Moments
    gram: Gram | None
    sample: RowSample | None
    tokens: int = 0
    low: float = math.inf
    high: float = -math.inf
    shapes: dict[tuple[int, ...], int] = field(default_factory=dict)


@dataclass
class _Watched:
    """One value: its histogram, its shapes, and everybody who reads it as rows."""

    name: str
    histogram: Histogram | None
    readers: list[tuple[_Reader, Use]] = field(default_factory=list)


def collect(
    model: ir.Model, data: CalibrationData, request: Request, settings: Settings, progress: Progress
) -> Collected:
    """Run the model over the data: once, or piece by piece where memory does not hold all accumulators together.

    Raises:
        InputError: the data has no samples, or an activation is NaN or infinite.
    """
    watched = _watch(model, request, settings)
    waves, size = _waves(model, data, watched, settings.memory_limit)
    ends, keys = _ends(waves), _keys(model, data, request, settings, waves, size)
    counted = None if keys.histograms is None else settings.store.get(keys.histograms)
    stats: dict[str, LayerStats] = {}
    names = [[item.name for item in wave] for wave in waves]
    folder, lean = settings.store.scratch_folder, settings.lean
    pieces = Pieces(model, lambda: _parts(data, size), names, threads=settings.threads, lean=lean, folder=folder)
    with progress.task("calibrating", total=len(waves) * data.samples) as advance, pieces:
        for number, (wave, readers, key) in enumerate(zip(waves, ends, keys.waves, strict=True)):
            done = None if key is None else settings.store.get(key)
            if done is None or (counted is None and any(item.histogram is not None for item in wave)):
                for batch, (feed, values) in enumerate(pieces.run(number)):
                    masks = padding_masks(feed)
                    for item in wave:
                        _add(item, values.pop(item.name), masks, settings.seed + batch)
                    advance(_samples(feed))
            if done is None:
                made = statistics_entry([_statistics(reader, request.stats) for reader in readers])
                done = settings.store.put(key or secrets.token_hex(16), made)
            for reader, layer in zip(readers, statistics_of(done), strict=True):
                stats.update({target.name: layer for target in reader.targets})
                reader.gram = None  # what was added up lives on in the statistics
    return Collected(stats, _distributions(watched, request, settings.store, keys.histograms, counted))


def _parts(data: CalibrationData, size: int | None) -> Iterator[Feed]:
    """The batches as they are run.

    Raises:
        InputError: there are none.
    """
    empty = True
    for feed in data:
        yield from _cut(feed, size)
        empty = False
    if empty:
        raise InputError(f"the calibration data holds no samples: {data.description}")


def _ends(waves: Sequence[Sequence[_Watched]]) -> list[list[_Reader]]:
    """For each wave the readers that have seen everything behind it."""
    last: dict[int, tuple[int, _Reader]] = {}
    for number, wave in enumerate(waves):
        for item in wave:
            last |= {id(reader): (number, reader) for reader, _ in item.readers}
    return [[reader for place, reader in last.values() if place == number] for number in range(len(waves))]


@dataclass(frozen=True)
class _Keys:
    """Names under which results are kept; None = not at all.

    Attributes:
        waves: of each wave's statistics; None also where a reader needs two waves.
        histograms: of all distributions together.
    """

    waves: Sequence[str | None]
    histograms: str | None


def _keys(
    model: ir.Model,
    data: CalibrationData,
    request: Request,
    settings: Settings,
    waves: Sequence[Sequence[_Watched]],
    size: int | None,
) -> _Keys:
    if not settings.store.remembers:
        return _Keys([None] * len(waves), None)
    origin = {"model": measure(model)[1], "data": data.digest, "size": size, "samples": data.samples}
    origin |= {"seed": settings.seed, "threads": settings.threads, "lean": settings.lean}
    pieces = [[item.name for item in wave] for wave in waves]
    found: list[str | None] = []
    homes = [{id(reader) for item in wave for reader, _ in item.readers} for wave in waves]
    for number, wave in enumerate(waves):
        spread = any(homes[number] & other for place, other in enumerate(homes) if place != number)
        layers = [[target.name for target in reader.targets] for item in wave for reader, _ in item.readers]
        parts = {**origin, "pieces": pieces, "number": number, "layers": layers, "stats": sorted(request.stats)}
        found.append(None if spread else content_key("statistics", parts))
    histograms = content_key("histograms", {**origin, "pieces": pieces, "groups": dict(request.histograms)})
    return _Keys(found, histograms if request.histograms else None)


def _distributions(
    watched: Sequence[_Watched], request: Request, store: Store, key: str | None, counted: Entry | None
) -> dict[str, Distribution]:
    if counted is not None:
        return distributions_of(counted)
    merged = {request.histograms[item.name]: item.histogram for item in watched if item.histogram is not None}
    histograms = {group: histogram.result() for group, histogram in merged.items()}
    if key is not None:
        store.put(key, distributions_entry(histograms))
    return histograms


def padding_masks(feed: Feed) -> tuple[Array, ...]:
    """Inputs [batch, sequence] that are 0 at padding: whole numbers or truths with `mask` in their name.

    A `padding_mask` may as well be 1 there, so it is left alone.
    """
    names = [name for name in feed if "mask" in name.lower() and "pad" not in name.lower()]
    found = [feed[name] for name in names if feed[name].ndim == 2]
    return tuple(mask for mask in found if mask.dtype == bool or np.issubdtype(mask.dtype, np.integer))


def real_rows(op: str, shape: tuple[int, ...], masks: Sequence[Array]) -> npt.NDArray[np.bool_] | None:
    """[T] which rows of a value [batch, sequence, ..., K] are real tokens; None: all, or no mask knows."""
    if op not in ("MatMul", "Gemm") or len(shape) < 3:
        return None
    fitting = [mask for mask in masks if mask.shape == shape[:2]]
    if not fitting or fitting[0].all() or not fitting[0].any():
        return None
    return np.repeat(fitting[0].reshape(-1) != 0, math.prod(shape[2:-1]))


def _samples(feed: Feed) -> int:
    """Length of the first axis; a feed of scalars is one sample."""
    return max((len(array) for array in feed.values() if array.ndim), default=1)


def _watch(model: ir.Model, request: Request, settings: Settings) -> list[_Watched]:
    """Everything to look at, in graph order; values inside subgraphs cannot be reached from outside."""
    available = main_graph_values(model)
    groups = {group: Histogram() for group in request.histograms.values()}
    watched = {name: _Watched(name, groups[group]) for name, group in request.histograms.items()}
    readers: dict[tuple[object, ...], _Reader] = {}
    for target in request.targets.values():
        uses = [use for use in target.uses if str(use.data.name) in available]
        if not uses or target.name.endswith(".R"):  # a recurrent weight reads the hidden state
            continue
        names = tuple(str(use.data.name) for use in uses)
        key = (names, *row_key(target, uses))
        if key in readers:
            readers[key].targets.append(target)
            continue
        readers[key] = _reader(target, request.stats, settings)
        for name, use in zip(names, uses, strict=True):
            watched.setdefault(name, _Watched(name, None)).readers.append((readers[key], use))
    order = {name: index for index, name in enumerate(available)}
    return sorted(watched.values(), key=lambda item: order.get(item.name, 0))


def _reader(target: Target, stats: frozenset[str], settings: Settings) -> _Reader:
    reads_rows = target.op in ROW_OPERATORS
    gram = Gram() if "gram" in stats and reads_rows else None
    sample = RowSample(ROW_LIMIT, settings.seed) if "rows" in stats and reads_rows else None
    return _Reader([target], Moments(), gram, sample)


def row_attributes(node: ir.Node) -> dict[str, object]:
    """Attributes that decide how rows are read, as plain values."""
    names = ("pads", "auto_pad", "strides", "dilations", "transA")
    return {name: node.attributes[name].value for name in names if name in node.attributes}


def row_key(target: Target, uses: Sequence[Use]) -> tuple[object, ...]:
    """Equal for layers that make the same rows of the same values."""
    attributes = str([row_attributes(use.node) for use in uses])
    if target.op == "Gather":
        return (target.op,)
    if target.op not in ("Conv", "ConvTranspose"):
        return (target.op == "Gemm", attributes)
    return (target.op, target.groups, target.layout.operand_shape[2:], attributes)


def _reader_bytes(reader: _Reader) -> int:
    target = reader.targets[0]
    num_inputs = target.shape[1] if target.op in ROW_OPERATORS else 0
    gram = 2 * 8 * target.groups * num_inputs**2 if reader.gram is not None else 0
    return gram + 4 * target.groups * num_inputs * (ROW_LIMIT + POSITIONS)


def _waves(
    model: ir.Model, data: CalibrationData, watched: Sequence[_Watched], memory_limit: int
) -> tuple[list[list[_Watched]], int | None]:
    """(waves, samples per run): consecutive values that fit the limit together; one that alone exceeds it runs alone.

    Batches are halved as long as that saves waves; None leaves them as they come.
    """
    feed = next(iter(data), None)
    if feed is None:
        raise InputError(f"the calibration data holds no samples: {data.description}")
    size = _batch_of(model, feed)
    waves = _fill_waves(model, feed, watched, memory_limit)
    part = size or 1
    while part > 1 and len(waves) > 1:
        part //= 2
        fewer = _fill_waves(model, next(_cut(feed, part)), watched, memory_limit)
        if len(fewer) < len(waves):
            waves, size = fewer, part
    return waves, size


def _batch_of(model: ir.Model, feed: Feed) -> int | None:
    """Samples in the feed, when every input's first axis is a free batch axis of that size; else None."""
    sizes = {array.shape[0] if array.ndim else -1 for array in feed.values()}
    firsts = [value.shape[0] for value in model.graph.inputs if value.shape is not None and len(value.shape)]
    free = len(firsts) == len(model.graph.inputs) and not any(isinstance(first, int) for first in firsts)
    return sizes.pop() if free and len(sizes) == 1 else None


def _cut(feed: Feed, size: int | None) -> Iterator[Feed]:
    """The feed in parts of at most `size` samples."""
    total = len(next(iter(feed.values()))) if size is not None else 1
    for start in range(0, total, size or 1):
        yield feed if size is None else {name: array[start : start + size] for name, array in feed.items()}


def _fill_waves(model: ir.Model, feed: Feed, watched: Sequence[_Watched], memory_limit: int) -> list[list[_Watched]]:
    sizes = dimension_sizes(model, feed)
    available = main_graph_values(model)
    waves: list[list[_Watched]] = []
    used = 0
    for item in watched:
        # onnxruntime hands its outputs over as copies: for a moment each exists twice.
        cost = 2 * 4 * elements(available[item.name], sizes) + sum(_reader_bytes(reader) for reader, _ in item.readers)
        if not waves or used + cost > memory_limit:
            waves.append([])
            used = 0
        waves[-1].append(item)
        used += cost
    return waves


def _add(item: _Watched, value: Array, masks: Sequence[Array], seed: int) -> None:
    """Padding counts for ranges and histograms, because the quantized model computes it too; not for what tells how
    much an error costs, because nobody reads the result."""
    low, high = math.inf, -math.inf
    if value.size and np.issubdtype(value.dtype, np.floating):
        low, high = float(value.min()), float(value.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError(
                f"the activation {item.name!r} is NaN or infinite on the calibration data; "
                "check the data's preprocessing and the model's weights"
            )
    if item.histogram is not None:
        item.histogram.add(value)
    for reader, use in item.readers:
        reader.shapes[value.shape] = reader.shapes.get(value.shape, 0) + 1
        reader.low, reader.high = min(reader.low, low), max(reader.high, high)
        if value.size and reader.targets[0].op in ROW_OPERATORS:
            _add_rows(reader, use, value, masks, seed)


def _add_rows(reader: _Reader, use: Use, value: Array, masks: Sequence[Array], seed: int) -> None:
    target = reader.targets[0]
    rows = to_rows(
        target.op,
        value,
        operand_shape=target.layout.operand_shape,
        groups=target.groups,
        attributes=row_attributes(use.node),
        limit=POSITIONS,
        seed=seed,
    )
    real = real_rows(target.op, value.shape, masks)
    if real is not None:
        rows = rows[:, real]
    reader.tokens += rows.shape[1]
    reader.moments.add(rows)
    if reader.gram is not None:
        reader.gram.add(rows)
    if reader.sample is not None:
        reader.sample.add(rows)


def _statistics(reader: _Reader, wanted: frozenset[str]) -> LayerStats:
    shapes = dict(reader.shapes)
    if reader.targets[0].op not in ROW_OPERATORS:  # looked-up ids
        return LayerStats(
            sum(math.prod(shape) * count for shape, count in shapes.items()), 0.0, 0.0, data_shapes=shapes
        )
    return LayerStats(
        num_tokens=reader.tokens,
        low=reader.low,
        high=reader.high,
        abs_mean=reader.moments.abs_mean if "abs_mean" in wanted else None,
        mean=reader.moments.mean if "mean" in wanted else None,
        square_mean=reader.moments.square_mean if "square_mean" in wanted else None,
        abs_max=reader.moments.abs_max if "abs_max" in wanted else None,
        gram=None if reader.gram is None else reader.gram.result(),
        rows=None if reader.sample is None else reader.sample.result(),
        data_shapes=shapes,
    )
