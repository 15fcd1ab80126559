"""Layer by layer: does the written file compute what the plan promises?

Each layer of the emitted graph, run without fusion, gets the inputs that it really has there; the simulation of that
layer gets the same inputs, and the two outputs must agree. Comparing only the ends of two networks would not do: one
activation code rounded differently travels through a deep network and hides, or fakes, a defect.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from quantkit import metrics
from quantkit.errors import VerificationError
from quantkit.graph.emit import Edge
from quantkit.runtime.ort import make_session
from quantkit.types import Array, Feed

# Integer layers agree to float rounding (100 dB and more); MatMulNBits rounds activations in its own way (45 dB).
LAYER_DB = 38.0


def check_layers(
    written: Path, simulated: ir.Model, edges: Mapping[str, tuple[Edge, ...]], feed: Feed, *, threads: int
) -> dict[str, float]:
    """Target name -> dB between the emitted layer and its simulation, on one feed.

    Args:
        written: the emitted file.
        simulated: the planner's simulation of the whole graph.
        edges: where each layer begins and ends.
        feed: a few samples.

    Raises:
        VerificationError: a layer differs; the sentence names it.
    """
    values = _expose(written, edges, feed, threads)
    found: dict[str, float] = {}
    for name, uses in edges.items():
        for edge in uses:
            wanted = _simulate_layer(simulated, edge, values[edge.data], threads)
            if wanted is None:
                continue
            agreement = metrics.sqnr(wanted, values[edge.output])
            found[name] = min(found.get(name, agreement), agreement)
            if agreement < LAYER_DB:
                raise VerificationError(
                    f"layer {name} of the emitted model differs from its simulation: {agreement:.1f} dB, needed "
                    f"{LAYER_DB:.0f} dB; no file was written. This is a defect of quantkit: please report it"
                )
    return found


def _expose(written: Path, edges: Mapping[str, tuple[Edge, ...]], feed: Feed, threads: int) -> dict[str, Array]:
    """Inputs and outputs of all layers, as the file computes them with constants folded and nothing fused."""
    model = ir.load(written)
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    outputs = {str(value.name) for value in model.graph.outputs}
    for uses in edges.values():
        for edge in uses:
            for name, dtype in ((edge.data, edge.dtype), (edge.output, ir.DataType.FLOAT)):
                if name in values and name not in outputs:
                    values[name].type = ir.TensorType(dtype)
                    model.graph.outputs.append(values[name])
                    outputs.add(name)
    session = make_session(model, threads=threads, optimize="fold")
    return {**feed, **session.run(feed)}


def _simulate_layer(simulated: ir.Model, edge: Edge, data: Array, threads: int) -> Array | None:
    """The layer's output for this input; None when it also depends on something else (an initial LSTM state)."""
    try:
        graph = ir.convenience.extract(simulated.graph, [edge.data], [edge.output])
    except ValueError:
        return None
    layer = ir.Model(graph, ir_version=simulated.ir_version)
    source, result = graph.inputs[0], graph.outputs[0]
    source.type, source.shape = ir.TensorType(ir.DataType.from_numpy(data.dtype)), ir.Shape([None] * data.ndim)
    result.type = ir.TensorType(ir.DataType.FLOAT)
    output = make_session(layer, threads=threads, optimize="none").run({edge.data: data})
    return np.asarray(next(iter(output.values())))
