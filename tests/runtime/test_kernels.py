"""Times of kernels by onnxruntime's profiler. No time itself is judged, only what is counted."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from quantkit.errors import InputError
from quantkit.graph.load import load_model
from quantkit.runtime import kernels
from quantkit.runtime.kernels import time_kernels
from tests.helpers.models import build, cnn, images, matmul


def test_each_model_has_its_time() -> None:
    models = [load_model(matmul()).model, load_model(cnn()).model]
    feeds = [{"x": np.ones((3, 64), np.float32)}, {"x": images(2)["x"]}]
    found = time_kernels(models, feeds, seconds=0, rounds=3)
    assert len(found) == 2 and all(0 < figure < 1000 for figure in found)


def test_profiles_are_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    time_kernels([load_model(matmul()).model], [{"x": np.ones((3, 64), np.float32)}], seconds=0, rounds=1)
    assert list(tmp_path.iterdir()) == []


def event(name: str, operator: str, microseconds: int, category: str = "Node") -> dict[str, Any]:
    return {"cat": category, "name": name, "dur": microseconds, "args": {"op_name": operator}}


def test_kernels_are_added_up_and_changes_of_layout_are_not(tmp_path: Path) -> None:
    events = [
        *(event("conv_kernel_time", "Conv", time) for time in (100, 100, 100, 900)),
        *(event("add_kernel_time", "Add", time) for time in (7, 7, 7, 7)),
        event("conv_fence_before", "Conv", 5000),
        event("reorder_kernel_time", "ReorderInput", 5000),
        event("back_kernel_time", "ReorderOutput", 5000),
        event("turn_kernel_time", "Transpose", 5000),
        {"cat": "Session", "name": "model_run", "dur": 9000},
    ]
    (tmp_path / "profile.json").write_text(json.dumps(events))
    assert kernels._kernel_ms(tmp_path / "profile.json") == pytest.approx(0.107)


def test_a_model_that_does_nothing_takes_half_a_tick(tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text("[]")
    assert kernels._kernel_ms(tmp_path / "profile.json") == 0.0005


def test_a_model_that_does_not_run_is_told() -> None:
    model = load_model(matmul()).model
    with pytest.raises(InputError, match="onnxruntime cannot time the layer: "):
        time_kernels([model], [{"x": np.ones((3, 63), np.float32)}], seconds=0, rounds=1)
    text = "g (float[N,64] x) => (float[N,64] y) { y = other.Strange(x) }"
    broken = ir.from_proto(build(text, {}, domains=', "other": 1'))
    with pytest.raises(InputError, match="onnxruntime cannot time the layer: "):
        time_kernels([broken], [{"x": np.ones((3, 64), np.float32)}], seconds=0, rounds=1)
