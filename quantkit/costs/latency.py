"""What a layer costs in each form on this machine: measured beside its float version, in one process, and remembered.

A rule of thumb is wrong somewhere on every machine, and a measurement is never twice the same; so each figure is
measured once per machine, onnxruntime version, layer shape, form and number of rows, and kept in a file. The same
cache gives the same plan, and with it the same bytes.

Matrix products are timed as whole runs on x[rows, K]. Other layers, and those of integer regions, are timed as kernels
of a one-layer model with the layer's own attributes: a convolution alone changes the memory layout at both ends and a
static integer layer converts its input and output, which neither does among its like. Their sum over a float model
comes to within 5 % of what its profile says of the same layers (ResNet-20, SqueezeNet).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime

from quantkit.cache import default_folder, processor
from quantkit.emitters.matmulnbits import kernel_bits
from quantkit.graph.emit import Assignment, Emission, emit
from quantkit.graph.regions import Regions, find_regions
from quantkit.graph.single import NAME, codes_at_borders, single_layer
from quantkit.graph.targets import find_targets
from quantkit.methods import make
from quantkit.runtime.kernels import time_kernels
from quantkit.runtime.ort import make_session, time_sessions, undisturbed_clock
from quantkit.types import ActParams, Feed, LayerStats, QuantSpec, Target, WeightQuantizer

NO_REGIONS = Regions({}, frozenset(), {}, frozenset(), frozenset())
SECONDS = 0.15
STATIC_FORM = "qdq"
# Forms whose codes become one constant when the model is loaded: the width makes no difference to the kernel.
INTEGER = QuantSpec(8, -1, symmetric=True, act_bits=8)
WIDENED = {"packed": QuantSpec(8, -1), "dynamic": INTEGER, STATIC_FORM: INTEGER}
RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
PRODUCTS = frozenset({"MatMul", "Gemm"})


@dataclass(frozen=True)
class Cost:
    """Milliseconds of one layer alone: in float, and in the form asked for."""

    float_ms: float
    form_ms: float

    @property
    def ratio(self) -> float:
        return self.form_ms / self.float_ms


@dataclass(frozen=True)
class LatencyCache:
    """Figures by content: a small JSON file, rewritten atomically; of two measurements of one thing the first stays.

    Attributes:
        folder: where `latency.json` lies; created on the first write.
        entries: what was read and measured so far.
    """

    folder: Path
    entries: dict[str, list[float]] = field(default_factory=dict)

    def get(self, parts: Mapping[str, object]) -> list[float] | None:
        return self.entries.get(_key(parts))

    def put(self, parts: Mapping[str, object], values: list[float], *, replace: bool = False) -> list[float]:
        """The figures to use from now on: these, rounded, or those that another process stored in the meantime.

        Args:
            replace: these in any case, because those stored are in doubt.
        """
        rounded = [float(f"{value:.4g}") for value in values]
        self.entries.update({_key(parts): rounded} | _read(self.folder))
        if replace:
            self.entries[_key(parts)] = rounded
        temporary = self.folder / f"latency.{os.getpid()}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self.entries, indent=0, sort_keys=True))
            temporary.replace(self.folder / "latency.json")
        except OSError:  # a cache that cannot be written only costs time
            with suppress(OSError):
                temporary.unlink()
        return self.entries[_key(parts)]


def open_cache(folder: Path | None) -> LatencyCache:
    """The cache in `folder` (None = the user's cache folder); unreadable content counts as empty."""
    folder = folder or default_folder()
    return LatencyCache(folder, _read(folder))


def _read(folder: Path) -> dict[str, list[float]]:
    try:
        stored = json.loads((folder / "latency.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return {key: value for key, value in stored.items() if _are_times(value)} if isinstance(stored, dict) else {}


def _are_times(values: object) -> bool:
    return (
        isinstance(values, list)
        and len(values) > 0
        and all(isinstance(value, float | int) and 0 < value < math.inf for value in values)
    )


def _key(parts: Mapping[str, object]) -> str:
    content = {"cpu": processor(), "onnxruntime": onnxruntime.__version__, **parts}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def layer_cost(
    target: Target, spec: QuantSpec, form: str, rows: int, *, cache: LatencyCache, runtime: str, threads: int
) -> Cost:
    """Float and quantized milliseconds of x[rows, K] @ W^T for a MatMul or Gemm target."""
    stored = as_run(spec, form)
    parts = {
        "shape": list(target.shape),
        "spec": [stored.bits, stored.group_width(target.shape[1]), stored.symmetric],
        "form": form,
        "rows": rows,
        "runtime": runtime,
        "threads": threads,
    }
    known = cache.get(parts)
    if known is None:
        known = cache.put(parts, list(_measure(target.shape, stored, form, rows, runtime, threads)))
    return Cost(known[0], known[1])


def as_run(spec: QuantSpec, form: str) -> QuantSpec:
    """What the kernel computes with: what comes to the same is measured once, so that noise does not tell it apart."""
    if form == "matmulnbits":
        return replace(spec, bits=kernel_bits(spec.bits))
    return WIDENED.get(form, spec)


def is_product(target: Target, form: str) -> bool:
    """Whether `layer_cost` knows the layer: a plain matrix product outside integer regions."""
    return target.op in PRODUCTS and form != STATIC_FORM and len(target.layout.operand_shape) == 2


def node_cost(
    target: Target,
    spec: QuantSpec,
    form: str,
    data_shape: tuple[int, ...],
    *,
    cache: LatencyCache,
    runtime: str,
    threads: int,
) -> Cost:
    """Float and quantized milliseconds of one layer's kernels, for any operator in any form.

    A static integer layer (form `qdq`) is timed from codes to codes.

    Args:
        data_shape: of the layer's data input.
    """
    node = target.node
    stored = as_run(replace(spec, act_bits=None), form)
    parts = {
        "op": target.op,
        "operand": list(target.layout.operand_shape),
        "weight": target.uses[0].weight_index,
        "inputs": [value is not None for value in node.inputs],
        "attributes": sorted((name, str(attribute.value)) for name, attribute in node.attributes.items()),
        "data": list(data_shape),
        "spec": [stored.bits, stored.group_width(target.shape[1]), stored.symmetric],
        "form": form,
        "runtime": runtime,
        "threads": threads,
    }
    known = cache.get(parts)
    if known is None:
        known = cache.put(parts, list(_measure_node(target, stored, form, data_shape, runtime, threads)))
    return Cost(known[0], known[1])


def typical_shape(target: Target, stats: LayerStats | None, scale: float = 1.0) -> tuple[int, ...] | None:
    """The data shape of median size that calibration saw; None when it saw none.

    Args:
        scale: samples of a run over those of a calibration run, which may have been cut.
    """
    if stats is None or not any(stats.data_shapes):
        return None
    seen = sorted((shape for shape, count in stats.data_shapes.items() for _ in range(count)), key=math.prod)
    shape = list(seen[len(seen) // 2])
    batch = 1 if target.op in RECURRENT and len(shape) > 1 else 0
    shape[batch] = max(round(shape[batch] * scale), 1)
    return tuple(shape)


def predicted_ms(model_ms: float, costs: Iterable[Cost]) -> float:
    """Time of a model with each of these layers in its form.

    Everything that no layer's form changes is taken to last as long as in the float model.

    Args:
        model_ms: time of the float model.
        costs: one for every layer that is quantized.
    """
    return model_ms + sum(cost.form_ms - cost.float_ms for cost in costs)


def _measure(
    shape: tuple[int, int], spec: QuantSpec, form: str, rows: int, runtime: str, threads: int
) -> tuple[float, float]:
    num_rows, num_inputs = shape
    rng = np.random.Generator(np.random.PCG64(0))
    weight = rng.standard_normal((num_rows, num_inputs), dtype=np.float32)
    model = _one_layer(weight)
    quantizer: WeightQuantizer = make("quantizers", "rtn", {})
    layers = {"layer": Assignment(form, quantizer.quantize(weight, spec, None))}
    emitted = emit(model, Emission(layers, NO_REGIONS, {}, runtime)).model
    sessions = [make_session(item, threads=threads) for item in (model, emitted)]
    feed = {"x": rng.standard_normal((rows, num_inputs), dtype=np.float32)}
    clock = undisturbed_clock(threads)
    reference, measured = time_sessions(sessions, feed, seconds=SECONDS, rounds=7, clock=clock)
    return reference, measured


def _measure_node(
    target: Target, spec: QuantSpec, form: str, data_shape: tuple[int, ...], runtime: str, threads: int
) -> tuple[float, float]:
    rng = np.random.Generator(np.random.PCG64(0))
    operand = rng.standard_normal(target.layout.operand_shape, dtype=np.float32)
    model = single_layer(target, data_shape, operand)
    index = target.uses[0].weight_index
    alone = next(item for item in find_targets(model)[0].values() if item.uses[0].weight_index == index)
    quantizer: WeightQuantizer = make("quantizers", "rtn", {})
    layers = {alone.name: Assignment(form, quantizer.quantize(alone.load(), spec, None))}
    regions = find_regions(model, [NAME]) if form == STATIC_FORM else NO_REGIONS
    # Ranges of standard normal inputs, and of their products with standard normal weights.
    grids = {
        group: ActParams(8 / 255 if group == "x" else alone.shape[1] ** 0.5 * 8 / 255, 128)
        for group in regions.groups.values()
    }
    emitted = emit(model, Emission(layers, regions, grids, runtime)).model
    if form == STATIC_FORM:
        codes_at_borders(emitted)
    models = [model, emitted]
    feeds = [_feed(item, alone, rng) for item in models]
    reference, measured = time_kernels(models, feeds, threads=threads, seconds=SECONDS, rounds=7)
    return reference, measured


def _feed(model: ir.Model, target: Target, rng: np.random.Generator) -> Feed:
    """Random input of the type and shape that a one-layer model wants."""
    (data,) = model.graph.inputs
    assert data.shape is not None and data.dtype is not None
    shape = data.shape.numpy()
    if data.dtype == ir.DataType.FLOAT:
        return {str(data.name): rng.standard_normal(shape, dtype=np.float32)}
    high = 256 if data.dtype == ir.DataType.UINT8 else target.shape[0]
    return {str(data.name): rng.integers(0, high, shape).astype(data.dtype.numpy())}


def _one_layer(weight: np.ndarray) -> ir.Model:
    """x[rows, K] @ W^T as a model of one MatMul."""
    data = ir.val("x", dtype=ir.DataType.FLOAT, shape=["rows", weight.shape[1]])
    operand = ir.val("w", const_value=ir.tensor(np.ascontiguousarray(weight.T)))
    node = ir.node("MatMul", [data, operand], name="layer")
    node.outputs[0].name = "y"
    node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(["rows", weight.shape[0]])
    graph = ir.Graph([data], node.outputs, nodes=[node], initializers=[operand], opset_imports={"": 21}, name="layer")
    return ir.Model(graph, ir_version=10)
