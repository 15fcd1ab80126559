"""What the runtime really runs for each layer, and how its time is divided among the layers."""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from quantkit.errors import InputError
from quantkit.runtime.ort import first_line, make_session, session_options
from quantkit.types import Feed

# Operators that carry data to and from a kernel; a layer's kernel is the other node that bears its names.
CARRIERS = frozenset(
    {"Cast", "Transpose", "Reshape", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Add", "Mul"}
    | {"Concat", "Relu", "Slice", "Sub", "Unsqueeze", "Squeeze", "ReorderInput", "ReorderOutput", "Shape"}
)
# The runtime fuses these into the layer before them, which then bears their output's name; convolutions on blocks of
# channels bear a suffix, too.
FUSED = frozenset({"Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh"})
BLOCKED = "_nchwc"
WARM_UP = 1
FEWEST_RUNS = 3
MOST_RUNS = 20
SECONDS = 0.5
EVENT = "_kernel_time"
PROVIDERS = ("CPUExecutionProvider",)


def with_fused(model: ir.Model, names: Mapping[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    """The names that carry each layer, and those of the activation functions right behind it."""
    made = {str(value.name): value for node in model.graph for value in node.outputs}
    found = {}
    for key, carried in names.items():
        more = set(carried)
        for name in carried & made.keys():
            value = made[name]
            while len(uses := list(value.uses())) == 1 and uses[0].node.op_type in FUSED:
                value = uses[0].node.outputs[0]
                more.add(str(value.name))
        found[key] = frozenset(more)
    return found


def layer_nodes(nodes: Sequence[onnx.NodeProto], names: Mapping[str, frozenset[str]]) -> dict[str, onnx.NodeProto]:
    """Target name -> the node that computes it in the optimised graph; of several, the first."""
    found: dict[str, onnx.NodeProto] = {}
    for node in nodes:
        if node.op_type in CARRIERS:
            continue
        own = {node.name.removesuffix(BLOCKED), *node.input, *node.output}
        for key, carried in names.items():
            if key not in found and own & carried:
                found[key] = node
    return found


def time_shares(model: ir.Model, names: Mapping[str, frozenset[str]], feed: Feed, *, threads: int) -> dict[str, float]:
    """Target name -> its kernel's share of the time that all operators take, 0 to 1; medians over a few runs.

    The runtime's own profiler says it of the graph that it has optimised; conversions around a kernel are not counted
    as the layer's. Layers whose kernel is not found are absent.

    Args:
        model: of less than 2 GiB.
        names: target name -> names of the nodes and values that carry it.
        feed: the samples of one run.

    Raises:
        InputError: the runtime does not run what it has optimised.
    """
    with tempfile.TemporaryDirectory(prefix="quantkit-") as folder:
        path = Path(folder) / "optimized.onnx"
        make_session(model, threads=threads, optimized=path)
        proto = onnx.load(str(path))
        kernels = layer_nodes(list(_nodes(proto.graph)), names)
        for index, node in enumerate(_nodes(proto.graph)):  # the profiler's events bear the nodes' names
            node.name = f"node{index}"
        top = {node.name for node in proto.graph.node}
        proto.ClearField("metadata_props")
        path.unlink()
        options = session_options(threads, "none")
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        try:
            session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=list(PROVIDERS))
            runs = _run(session, feed)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise InputError(f"onnxruntime cannot run its own optimised graph: {first_line(error)}") from error
    spent = _medians(events, runs)
    total = sum(value for name, value in spent.items() if name in top)  # a loop's time has its body's in it
    return {key: spent[node.name] / total for key, node in kernels.items() if node.name in spent and total > 0}


def _run(session: onnxruntime.InferenceSession, feed: Feed) -> int:
    """Runs done, the first of them to warm up."""
    start, done = time.perf_counter(), 0
    while done < WARM_UP + FEWEST_RUNS or (time.perf_counter() - start < SECONDS and done < WARM_UP + MOST_RUNS):
        session.run(None, dict(feed))
        done += 1
    return done


def _medians(events: Sequence[Mapping[str, object]], runs: int) -> dict[str, float]:
    """Node name -> median microseconds; nodes of a loop's body, which run several times, are summed up."""
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        name = str(event["name"])
        if event.get("cat") == "Node" and name.endswith(EVENT):
            times[name.removesuffix(EVENT)].append(float(str(event["dur"])))
    return {name: float(np.median(values[WARM_UP * len(values) // runs :])) for name, values in times.items()}


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """In order, subgraphs behind the node that has them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)
