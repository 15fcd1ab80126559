"""One streaming pass per wave of values: run the float model, read intermediate values, add them up, forget them.

A wave holds as many values as the memory limit allows for one batch plus their accumulators, and batches are cut where
that makes fewer waves, so neither the number of samples nor the depth of the model changes the peak. Layers that read
one value in one way share their accumulators.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from quantkit.calibration.accumulators import Distribution, Gram, Histogram, Moments, RowSample
from quantkit.calibration.data import CalibrationData
from quantkit.calibration.rows import to_rows
from quantkit.errors import InputError
from quantkit.report.progress import Progress
from quantkit.runtime.ort import make_session
from quantkit.types import Array, Feed, LayerStats, Target, Use

ROW_LIMIT = 256
# Convolution positions read per batch: neighbours share most of their inputs, a part tells as much as all.
POSITIONS = 1024
ROW_OPERATORS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "LSTM", "GRU"})
UNKNOWN_AXIS = 128


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
    """

    memory_limit: int
    threads: int
    seed: int


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
    """Run the model over the data, once per wave.

    Raises:
        InputError: the data has no samples, or an activation is NaN or infinite.
    """
    watched = _watch(model, request, settings)
    waves, size = _waves(model, data, watched, settings.memory_limit)
    with progress.task("calibrating", total=len(waves) * data.samples) as advance:
        for wave in waves:
            names = [item.name for item in wave]
            session = make_session(_instrumented(model, names), threads=settings.threads, arena=False)
            batches = 0
            parts = (part for feed in data for part in _cut(feed, size))
            for number, feed in enumerate(parts):
                values = {**feed, **session.run(feed)}
                masks = padding_masks(feed)
                for item in wave:
                    _add(item, values[item.name], masks, settings.seed + number)
                del values  # before the next batch: two sets of activations are never held
                batches += 1
                advance(_samples(feed))
            if batches == 0:
                raise InputError(f"the calibration data holds no samples: {data.description}")
    return _result(watched, request)


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


def _main_graph_values(model: ir.Model) -> dict[str, ir.Value]:
    values = {str(value.name): value for value in model.graph.inputs}
    return values | {str(value.name): value for node in model.graph for value in node.outputs}


def _watch(model: ir.Model, request: Request, settings: Settings) -> list[_Watched]:
    """Everything to look at, in graph order; values inside subgraphs cannot be reached from outside."""
    available = _main_graph_values(model)
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
    sizes = _dimension_sizes(model, feed)
    available = _main_graph_values(model)
    waves: list[list[_Watched]] = []
    used = 0
    for item in watched:
        # onnxruntime hands its outputs over as copies: for a moment each exists twice.
        cost = 2 * 4 * _elements(available[item.name], sizes) + sum(_reader_bytes(reader) for reader, _ in item.readers)
        if not waves or used + cost > memory_limit:
            waves.append([])
            used = 0
        waves[-1].append(item)
        used += cost
    return waves


def _dimension_sizes(model: ir.Model, feed: Mapping[str, Array]) -> dict[str, int]:
    """What the feed says about the model's symbolic dimensions."""
    sizes: dict[str, int] = {}
    for value in model.graph.inputs:
        array = feed.get(str(value.name))
        if value.shape is None or array is None or len(value.shape) != array.ndim:
            continue
        for dimension, size in zip(value.shape, array.shape, strict=True):
            if not isinstance(dimension, int) and dimension.value is not None:
                sizes[dimension.value] = int(size)
    return sizes


def _elements(value: ir.Value, sizes: Mapping[str, int]) -> int:
    if value.shape is None:
        return UNKNOWN_AXIS**3
    total = 1
    for dimension in value.shape:
        if isinstance(dimension, int):
            total *= dimension
        else:
            total *= sizes.get(dimension.value or "", UNKNOWN_AXIS)
    return total


def _instrumented(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """A copy that also returns these values."""
    copy = model.clone()
    present = {str(value.name) for value in copy.graph.outputs}
    inputs = {str(value.name) for value in copy.graph.inputs}
    values = _main_graph_values(copy)
    for name in names:
        if name not in present and name not in inputs:
            value = values[name]
            if value.type is None:
                value.type = ir.TensorType(ir.DataType.FLOAT)
            copy.graph.outputs.append(value)
    return copy


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


def _result(watched: Sequence[_Watched], request: Request) -> Collected:
    merged = {request.histograms[item.name]: item.histogram for item in watched if item.histogram is not None}
    histograms = {group: histogram.result() for group, histogram in merged.items()}
    stats: dict[str, LayerStats] = {}
    for item in watched:
        for reader, _ in item.readers:
            if reader.targets[0].name not in stats:  # a weight that is used twice has its reader at two values
                layer = _statistics(reader, request.stats)
                stats.update({target.name: layer for target in reader.targets})
    return Collected(stats, histograms)


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
