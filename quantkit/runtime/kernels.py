"""How long onnxruntime's kernels themselves run, told by its profiler: without the run's overhead, and without the
changes of memory layout that a layer alone needs at its borders and a layer among its like does not."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from quantkit.errors import InputError
from quantkit.runtime.ort import first_line
from quantkit.types import Feed

FATAL_ONLY = 4
LAYOUT_OPERATORS = frozenset({"ReorderInput", "ReorderOutput", "Transpose"})
SUFFIX = "_kernel_time"
QUARTILE = 0.25


def time_kernels(
    models: Sequence[ir.Model], feeds: Sequence[Feed], *, threads: int = 1, seconds: float = 1.0, rounds: int = 5
) -> list[float]:
    """Milliseconds of each model's kernels: lower quartiles over alternating runs, added up.

    A kernel runs so shortly that most of its runs are undisturbed; on a busy machine, the median would not be.

    Args:
        feeds: one for each model.
        threads: of one operator (0 = onnxruntime's choice).
        seconds: runs go on for so long.
        rounds: at least so many runs of each.

    Raises:
        InputError: onnxruntime cannot load or run a model.
    """
    with tempfile.TemporaryDirectory(prefix="quantkit-") as folder:
        try:
            sessions = [_profiled(model, threads, Path(folder) / str(place)) for place, model in enumerate(models)]
            _alternate(sessions, feeds, seconds, rounds)
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise InputError(f"onnxruntime cannot time the layer: {first_line(error)}") from error
        return [_kernel_ms(Path(session.end_profiling())) for session in sessions]


def _profiled(model: ir.Model, threads: int, prefix: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = FATAL_ONLY
    options.enable_profiling = True
    options.profile_file_prefix = str(prefix)
    content = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _alternate(sessions: Sequence[Any], feeds: Sequence[Feed], seconds: float, rounds: int) -> None:
    start, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() - start < seconds:
        for session, feed in zip(sessions, feeds, strict=True):
            session.run(None, dict(feed))
        done += 1


def _kernel_ms(profile: Path) -> float:
    """Lower quartile of each node's microseconds, added up, as milliseconds; at least half of the clock's tick."""
    times: dict[str, list[int]] = {}
    for event in json.loads(profile.read_text()):
        name = str(event.get("name", ""))
        ran = event.get("cat") == "Node" and name.endswith(SUFFIX)
        if ran and event["args"]["op_name"] not in LAYOUT_OPERATORS:
            times.setdefault(name, []).append(event["dur"])
    return max(sum(float(np.quantile(durations, QUARTILE)) for durations in times.values()), 0.5) / 1000
