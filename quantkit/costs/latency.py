"""What a layer costs in each form on this machine: measured beside its float version, in one process, and remembered.

A rule of thumb is wrong somewhere on every machine, and a measurement is never twice the same; so each figure is
measured once per machine, onnxruntime version, layer shape, form and number of rows, and kept in a file. The same
cache gives the same plan, and with it the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime

from quantkit.graph.emit import Assignment, Emission, emit
from quantkit.graph.regions import Regions
from quantkit.methods import make
from quantkit.runtime.ort import make_session, time_sessions
from quantkit.types import QuantSpec, Target, WeightQuantizer

NO_REGIONS = Regions({}, frozenset(), {}, frozenset(), frozenset())
SECONDS = 0.15


@dataclass(frozen=True)
class Cost:
    """Milliseconds of one layer alone: in float, and in the form asked for."""

    float_ms: float
    form_ms: float

    @property
    def ratio(self) -> float:
        return self.form_ms / self.float_ms


def default_folder() -> Path:
    return Path.home() / ".cache" / "quantkit"


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
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self.folder / f"latency.{os.getpid()}.tmp"
            temporary.write_text(json.dumps(self.entries, indent=0, sort_keys=True))
            temporary.replace(self.folder / "latency.json")
        except OSError:
            pass  # a cache that cannot be written only costs time
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
    content = {"cpu": _processor(), "onnxruntime": onnxruntime.__version__, **parts}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def _processor() -> str:
    """The processor's model name: figures do not carry over to another one."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def layer_cost(
    target: Target, spec: QuantSpec, form: str, rows: int, *, cache: LatencyCache, runtime: str, threads: int
) -> Cost:
    """Float and quantized milliseconds of x[rows, K] @ W^T for a MatMul or Gemm target."""
    parts = {
        "shape": list(target.shape),
        "spec": [spec.bits, spec.group_width(target.shape[1]), spec.symmetric],
        "form": form,
        "rows": rows,
        "runtime": runtime,
        "threads": threads,
    }
    known = cache.get(parts)
    if known is None:
        known = cache.put(parts, list(_measure(target.shape, spec, form, rows, runtime, threads)))
    return Cost(known[0], known[1])


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
    reference, measured = time_sessions(sessions, feed, seconds=SECONDS, rounds=7)
    return reference, measured


def _one_layer(weight: np.ndarray) -> ir.Model:
    """x[rows, K] @ W^T as a model of one MatMul."""
    data = ir.val("x", dtype=ir.DataType.FLOAT, shape=["rows", weight.shape[1]])
    operand = ir.val("w", const_value=ir.tensor(np.ascontiguousarray(weight.T)))
    node = ir.node("MatMul", [data, operand], name="layer")
    node.outputs[0].name = "y"
    node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(["rows", weight.shape[0]])
    graph = ir.Graph([data], node.outputs, nodes=[node], initializers=[operand], opset_imports={"": 21}, name="layer")
    return ir.Model(graph, ir_version=10)
