"""The benchmark of single layers: errors by row, comparisons with round-to-nearest, processor time and memory."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import quantizers
from benchmarks.harness import read_records
from benchmarks.quantizers import Layer, Tally, Usage, cpu_seconds, family, row_errors
from quantkit.types import LayerStats

BUSY = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass\ntime.sleep(30)"


def layer_of(groups: int = 2) -> tuple[Layer, np.ndarray]:
    """A grouped layer [6, 5] and the rows [groups, 50, 5] that it reads."""
    random = np.random.default_rng(0)
    inputs = random.standard_normal((groups, 50, 5))
    gram = np.einsum("gtk,gtj->gkj", inputs, inputs) / 50
    weight = random.standard_normal((6, 5)).astype(np.float32)
    return Layer("layer", weight, LayerStats(50, -1.0, 1.0, gram=gram)), inputs


def test_errors_of_rows_are_mean_squares_of_outputs() -> None:
    layer, inputs = layer_of()
    values = np.round(layer.weight)
    delta = (values.astype(np.float64) - layer.weight).reshape(2, 3, 5)
    expected = np.square(np.einsum("gnk,gtk->gtn", delta, inputs)).mean(axis=1).reshape(-1)
    np.testing.assert_allclose(row_errors(layer, values), expected, rtol=1e-12)


def test_a_tally_counts_layers_and_rows_that_are_worse() -> None:
    tally = Tally([], [])
    tally.add(np.array([1.0, 2.0]), np.array([2.0, 2.0]), 8.0)
    tally.add(np.array([3.0, 2.0]), np.array([2.0, 2.0]), 4.0)
    assert tally.accuracy() == pytest.approx(
        {
            "relative error": (3 / 8 + 5 / 4) / 2,
            "rtn's": (4 / 8 + 4 / 4) / 2,
            "share of rtn's": (3 / 4 + 5 / 4) / 2,
            "worst share": 5 / 4,
            "layers worse": 1.0,
            "rows worse": 1.0,
        }
    )


def test_rows_are_taken_from_every_convolution_group() -> None:
    layer, _ = layer_of()

    class Target:
        def load(self) -> np.ndarray:
            return np.arange(6, dtype=np.float32).repeat(5).reshape(6, 5)

    context = Namespace(targets={"layer": Target()}, stats={"layer": layer.stats})
    (few,) = quantizers.layers_of(context, 2)
    np.testing.assert_array_equal(few.weight[:, 0], [0, 2, 3, 5])
    (all_rows,) = quantizers.layers_of(context, None)
    assert all_rows.weight.shape == (6, 5)


def test_usage_counts_processes_that_were_started() -> None:
    before = cpu_seconds()
    with Usage(memory=True) as usage:
        child = subprocess.Popen([sys.executable, "-c", BUSY])
        try:
            while cpu_seconds() - before < 0.25:
                assert child.poll() is None
            assert child.pid in family()
        finally:
            usage._stop.wait(2 * quantizers.POLL_SECONDS)
            found = usage.peak_mb
            child.kill()
            child.wait()
    assert usage.cpu >= 0.25
    assert usage.seconds >= 0.25
    assert found > 5


def test_a_narrow_width_is_measured_and_written(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    quantizers.main(["width", "--inputs", "96", "--rows", "8", "--bits", "3", "--out", str(out)])
    (record,) = read_records(out)
    assert record.setting == "gptq, 3 bits g32, 8 of 96 rows"
    assert record.model == "random 96 x 96"
    assert 0 < record.accuracy["relative error"] < record.details["rtn"] < 0.1
    assert record.seconds is not None and record.seconds > 0
