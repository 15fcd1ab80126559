"""Make onnxruntime CPU sessions from in-memory graphs, run them, and time several of them against each other."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from quantkit.errors import InputError
from quantkit.types import Array, Feed

# A protobuf cannot pass 2 GiB, and while one is written or read its weights are in memory two or three times: those of
# larger graphs lie in a file beside it.
PROTOBUF_LIMIT = 256 << 20
OPTIMIZED_LIMIT = 2 * PROTOBUF_LIMIT
"""Bytes of weights up to which the optimised graph is asked for: it is written with all of them."""
FATAL_ONLY = 4
Optimize = Literal["all", "fold", "none"]


class Session:
    """An onnxruntime session that knows its inputs and outputs.

    Attributes:
        input_names, output_names: in the model's order.
    """

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self.input_names = tuple(item.name for item in session.get_inputs())
        self.output_names = tuple(item.name for item in session.get_outputs())

    def run(self, feed: Feed) -> dict[str, Array]:
        """All outputs for one batch."""
        try:
            values = self._session.run(None, dict(feed))
        except Exception as error:  # onnxruntime raises many unrelated types; all of them mean "this feed"
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in feed.items())
            raise InputError(f"onnxruntime cannot run the model on the inputs {shapes}: {first_line(error)}") from error
        return dict(zip(self.output_names, values, strict=True))


class DeferredSession(Session):
    """A session that is made when it is first asked something: a float model of many gigabytes may never be."""

    def __init__(self, make: Callable[[], Session]) -> None:
        self._make = make

    @cached_property
    def _opened(self) -> Session:
        return self._make()

    def __getattr__(self, name: str) -> object:
        if name in ("_session", "input_names", "output_names"):
            value: object = getattr(self._opened, name)
            self.__dict__[name] = value  # found without asking again: small models run in microseconds
            return value
        raise AttributeError(name)


def first_line(error: BaseException) -> str:
    """The telling part of a runtime's message, short enough for one sentence."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ", "", " ".join(str(error).split()))
    return text if len(text) <= 300 else text[:297] + "..."


def session_options(
    threads: int, optimize: Optimize = "all", arena: bool = True, lean: bool = False
) -> onnxruntime.SessionOptions:
    """Quiet, on so many threads (0 = onnxruntime's choice)."""
    options = onnxruntime.SessionOptions()
    if lean:
        options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_cpu_mem_arena = arena
    options.enable_mem_pattern = arena
    options.intra_op_num_threads = threads
    options.log_severity_level = FATAL_ONLY
    level = onnxruntime.GraphOptimizationLevel
    levels = {"all": level.ORT_ENABLE_ALL, "fold": level.ORT_ENABLE_BASIC, "none": level.ORT_DISABLE_ALL}
    options.graph_optimization_level = levels[optimize]
    return options


@contextmanager
def _saved(model: ir.Model) -> Iterator[Path]:
    """The model as a temporary file with its weights beside it."""
    with tempfile.TemporaryDirectory(prefix="quantkit-") as folder:
        path = Path(folder) / "model.onnx"
        # ir.save points the values at the new file; a clone keeps the caller's graph on the original one.
        ir.save(model.clone(), path, external_data="weights.bin")
        yield path


def inline_bytes(model: ir.Model, *, external: bool = True) -> int:
    """Bytes of initializers that serialising would put into the protobuf.

    Args:
        external: count those that lie in external data files, too.
    """
    return sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None and (external or not isinstance(value.const_value, ir.ExternalTensor))
    )


def make_session(
    model: ir.Model | Path,
    *,
    threads: int = 1,
    optimize: Optimize = "all",
    optimized: Path | None = None,
    arena: bool = True,
    lean: bool = False,
) -> Session:
    """A CPU session; weights that are memory-mapped from the model's folder stay there.

    Args:
        model: graph, or a file.
        threads: of one operator (0 = onnxruntime's choice).
        optimize: `all` as users run it; `fold` folds constants (packed weights are unpacked once) and fuses nothing;
            `none` runs the graph literally (even `fold` may quantize float weights that stand between pairs).
        optimized: where onnxruntime writes the graph that it really runs.
        arena: keep freed memory for the next run (faster); without it, a run's memory is given back at once.
        lean: leave weights as they lie in their file, mapped, where kernels would re-arrange a copy of them: slower,
            in next to no memory.

    Raises:
        InputError: onnxruntime cannot load the model (unknown operator, bad graph).
    """
    options = session_options(threads, optimize, arena and not lean, lean)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    try:
        if isinstance(model, Path):
            return Session(onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"]))
        if inline_bytes(model, external=False) > PROTOBUF_LIMIT:
            with _saved(model) as path:
                return Session(onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]))
        folder = _external_folder(model)
        if folder is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        content = ir.to_proto(model).SerializeToString()
        return Session(onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"]))
    except InputError:
        raise
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise InputError(f"onnxruntime cannot load the model: {first_line(error)}") from error


def _external_folder(model: ir.Model) -> Path | None:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                return Path(value.const_value.base_dir or ".").resolve()
    return None


def optimized_nodes(model: ir.Model | Path, *, threads: int = 1) -> list[onnx.NodeProto]:
    """The nodes that onnxruntime really runs, subgraphs included, in the order of the optimised graph.

    Of a model too large to be written again they are its own nodes: its layers are kernels already.
    """
    if isinstance(model, ir.Model) and inline_bytes(model) > OPTIMIZED_LIMIT:
        return [ir.to_proto(node) for node in model.graph.all_nodes()]
    with tempfile.TemporaryDirectory(prefix="quantkit-") as folder:
        path = Path(folder) / "optimized.onnx"
        make_session(model, threads=threads, optimized=path)
        graph = onnx.load(str(path), load_external_data=False).graph
    found: list[onnx.NodeProto] = []

    def walk(nodes: Sequence[onnx.NodeProto]) -> None:
        for node in nodes:
            found.append(node)
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    walk(attribute.g.node)

    walk(graph.node)
    return found


def time_sessions(
    sessions: Sequence[Session],
    feed: Feed,
    *,
    seconds: float = 1.0,
    rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Median milliseconds of each session on one feed, alternating so that all share the machine's moods.

    Each is warmed up twice, then at least `rounds` rounds run, and more until `seconds` have gone by.

    Args:
        clock: in seconds; see `undisturbed_clock`.
    """
    for session in sessions:
        session.run(feed)
        session.run(feed)
    times: list[list[float]] = [[] for _ in sessions]
    start = time.perf_counter()
    while len(times[0]) < rounds or time.perf_counter() - start < seconds:
        for session, samples in zip(sessions, times, strict=True):
            before = clock()
            session.run(feed)
            samples.append(clock() - before)
    return [float(np.median(samples)) * 1000 for samples in times]


def undisturbed_clock(threads: int) -> Callable[[], float]:
    """For figures that are compared with those of other minutes: what else the machine does should not be in them.

    A session of one thread runs in the caller's, whose processor time is told; for more threads, only the wall clock is
    right.
    """
    return time.thread_time if threads == 1 else time.perf_counter


def input_specs(session: Session) -> Mapping[str, tuple[str, tuple[int | str | None, ...]]]:
    """Input name -> (onnxruntime type such as `tensor(float)`, shape with names for dynamic sizes)."""
    return {item.name: (item.type, tuple(item.shape)) for item in session._session.get_inputs()}


def output_specs(session: Session) -> Mapping[str, tuple[str, tuple[int | str | None, ...]]]:
    """Output name -> (onnxruntime type, shape), as `input_specs`."""
    return {item.name: (item.type, tuple(item.shape)) for item in session._session.get_outputs()}
