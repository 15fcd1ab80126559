"""Files that the emitters write: every operator they use, run by torch as by onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

import quantkit
from quantkit import metrics
from quantkit.graph.emit import emit
from quantkit.graph.targets import find_targets
from quantkit.runtime.ort import make_session
from quantkit.runtime.torch_backend import to_torch
from tests.emitters.conftest import FEW_SPECS, FORMS, KINDS, RUNTIMES, accepted, feed_of, plan, stack
from tests.helpers import models

DECIBELS = 110.0
BIT_EXACT = ("dynamic", "gather")
"""Integer sums and lookups: nothing is left to the order of additions."""
LAYERS = 6
QUICK: dict[str, Any] = {"quantizer": "rtn", "calibrator": "minmax"}
PRODUCTS = ("matmulnbits", "packed", "qdq", "dynamic")
TAKES = {
    "MatMul": PRODUCTS,
    "Gemm": PRODUCTS,
    "Conv": ("packed", "qdq"),
    "ConvTranspose": ("packed",),
    "Gather": ("gather",),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), ("packed",)),
}
CASES = [(form, name, runtime) for name, kind in KINDS.items() for form in TAKES[kind.op] for runtime in RUNTIMES]


def emitted(form: str, name: str, runtime: str) -> ir.Model:
    """Layers of different widths; with all operators of one form, every width appears."""
    kind = KINDS[name]
    few = (form, runtime) != ("matmulnbits", "portable")  # which takes one width in four
    model = stack(kind, LAYERS if few else len(FEW_SPECS))
    targets, _ = find_targets(model)
    start = list(KINDS).index(name) % 3
    layers = accepted(form, runtime, targets, FEW_SPECS[start::3] if few else FEW_SPECS)
    assert layers, "the form takes no layer"
    return emit(model, plan(model, layers, feed_of(kind), runtime)).model


def exact(model: ir.Model) -> ir.Model:
    """MatMulNBits without the rounding of its input, which only onnxruntime's fast kernel does."""
    copy = model.clone()
    for node in copy.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
    return copy


def in_torch(model: Any, feed: Mapping[str, Any]) -> dict[str, Any]:
    with torch.no_grad():
        found = to_torch(model).run({name: torch.from_numpy(item) for name, item in feed.items()})
    return {name: item.numpy() for name, item in found.items()}


def check(found: Mapping[str, Any], expected: Mapping[str, Any], form: str) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        if form in BIT_EXACT:
            np.testing.assert_array_equal(found[name], value, err_msg=name)
        else:
            assert metrics.sqnr(value, found[name]) >= DECIBELS, name


def test_all_forms_and_operators_are_here() -> None:
    assert {form for forms in TAKES.values() for form in forms} == set(FORMS)
    assert {kind.op for kind in KINDS.values()} == set(TAKES)


@pytest.mark.parametrize(("form", "name", "runtime"), CASES)
def test_emitted_files_compute_the_same(form: str, name: str, runtime: str) -> None:
    model, feed = emitted(form, name, runtime), feed_of(KINDS[name])
    check(in_torch(model, feed), make_session(exact(model), threads=1, optimize="none").run(feed), form)
    # On a device without data: nothing is read back, so that a CUDA graph can capture it, nothing is made on the CPU.
    with torch.no_grad():
        found = to_torch(model).to("meta").run({key: torch.from_numpy(item).to("meta") for key, item in feed.items()})
    assert all(item.device.type == "meta" for item in found.values())


@pytest.mark.parametrize(
    ("form", "name", "fused"),
    [
        ("dynamic", "matmul one row", {"MatMulIntegerToFloat"}),
        ("qdq", "gemm transB bias", {"QGemm"}),
        ("qdq", "matmul", {"MatMulIntegerToFloat"}),
        ("qdq", "conv bias", {"QLinearConv"}),
    ],
)
def test_files_that_onnxruntime_optimized_compute_the_same(
    form: str, name: str, fused: set[str], tmp_path: Path
) -> None:
    model, feed = emitted(form, name, "ort-cpu"), feed_of(KINDS[name])
    path = tmp_path / "optimized.onnx"
    expected = make_session(model, threads=1, optimized=path).run(feed)
    assert fused <= {node.op_type for node in onnx.load(path).graph.node}
    check(in_torch(path, feed), expected, form)


NETWORKS = {"cnn": (models.cnn, models.images), "transformer block": (models.block, models.tokens)}


@pytest.mark.parametrize("activations", ["none", "auto"])
@pytest.mark.parametrize("name", NETWORKS)
def test_compressed_networks_compute_the_same(name: str, activations: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build: Callable[[], onnx.ModelProto]
    build, data = NETWORKS[name]
    models.quick(monkeypatch)
    budget = quantkit.Budget(avg_bits=4 if activations == "none" else 8)
    result = quantkit.compress(build(), calibration=data(), budget=budget, activations=activations, **QUICK)
    feed = {key: item[:4] for key, item in data().items()}
    expected = make_session(exact(result.model), threads=1, optimize="none").run(feed)
    found = in_torch(result.model, feed)
    for key, value in expected.items():
        assert metrics.sqnr(value, found[key]) >= 40
