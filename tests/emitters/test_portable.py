"""The portable files run elsewhere: in onnx's reference implementation and in OpenVINO, with the same results."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import openvino
import pytest
from onnx.reference import ReferenceEvaluator

from quantkit.graph.emit import Emission, emit
from quantkit.graph.targets import find_targets
from quantkit.runtime.ort import make_session
from quantkit.types import Array, Feed, QuantSpec
from tests.emitters.conftest import (
    FEW_SPECS,
    KINDS,
    Kind,
    accepted,
    check_file,
    disagreeing,
    feed_of,
    plan,
    reference,
    stack,
)

# OpenVINO 2026.4 itself mixes up several LSTM (or RNN) that read one input, float or not: those come one by one.
RECURRENT = ("lstm", "gru", "rnn")
CASES = [
    *(("dynamic", kind) for kind in ("matmul", "gemm transB bias")),
    *(("packed", kind) for kind in ("matmul", "gemm bias", "conv bias", "conv grouped", "conv 1d", "conv transpose")),
    *(("qdq", kind) for kind in ("matmul", "gemm transB bias", "conv bias", "conv depthwise", "conv 3d")),
    ("gather", "gather"),
]
DECIBELS = 105.0


@cache
def core() -> Any:
    return openvino.Core()


def openvino_run(proto: onnx.ModelProto, feed: Feed) -> dict[str, Array]:
    """On the CPU, without the shortcuts in precision that it takes by itself."""
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "INFERENCE_NUM_THREADS": 1,
    }
    model = core().compile_model(core().read_model(proto.SerializeToString()), "CPU", settings)
    outputs = model(dict(feed))
    return {output.get_any_name(): np.asarray(outputs[output]) for output in model.outputs}


def reference_run(proto: onnx.ModelProto, feed: Feed) -> dict[str, Array]:
    names = [output.name for output in proto.graph.output]
    return dict(zip(names, ReferenceEvaluator(proto).run(None, dict(feed)), strict=True))


@dataclass(frozen=True)
class Written:
    """A portable file, an input, and what the forms promise for it."""

    proto: onnx.ModelProto
    emission: Emission
    feed: Feed
    wanted: dict[str, Array]

    def disagreeing(self, got: dict[str, Array]) -> dict[str, float]:
        return disagreeing(self.wanted, got, self.emission, DECIBELS)


def written(form: str, kind: Kind, specs: tuple[QuantSpec, ...]) -> Written:
    """A layer for every spec that the form takes."""
    model = stack(kind, len(specs))
    targets, _ = find_targets(model)
    layers = accepted(form, "portable", targets, specs)
    assert layers
    feed = feed_of(kind)
    emission = plan(model, layers, feed, "portable")
    used = {str(targets[name].node.outputs[0].name) for name in layers}
    wanted = {name: value for name, value in reference(model, emission, feed).items() if name in used}
    return Written(check_file(emit(model, emission).model), emission, feed, wanted)


@pytest.mark.parametrize(("form", "kind"), CASES)
def test_openvino(form: str, kind: str) -> None:
    case = written(form, KINDS[kind], FEW_SPECS)
    assert case.disagreeing(openvino_run(case.proto, case.feed)) == {}


@pytest.mark.parametrize("spec", [QuantSpec(3, 16), QuantSpec(8, -1, symmetric=True)])
@pytest.mark.parametrize("kind", RECURRENT)
def test_openvino_recurrent(kind: str, spec: QuantSpec) -> None:
    case = written("packed", KINDS[kind], (spec,))
    assert case.disagreeing(openvino_run(case.proto, case.feed)) == {}


def test_matmulnbits_is_exact_elsewhere() -> None:
    """Only onnxruntime rounds the activations of a blocked DequantizeLinear; others compute what stands there."""
    specs = (QuantSpec(4, 32), QuantSpec(8, 16), QuantSpec(4, 16, symmetric=True), QuantSpec(8, 32, symmetric=True))
    model = stack(KINDS["gemm bias"], len(specs))
    targets, _ = find_targets(model)
    layers = accepted("matmulnbits", "portable", targets, specs)
    assert len(layers) == len(specs)
    feed = feed_of(KINDS["gemm bias"])
    emission = plan(model, layers, feed, "portable")
    wanted = {}
    for name, item in layers.items():
        bias = targets[name].node.inputs[2]
        assert bias is not None and bias.const_value is not None
        exact = feed["x"].astype(np.float64) @ item.weight.dequantize().astype(np.float64).T + bias.const_value.numpy()
        wanted[str(targets[name].node.outputs[0].name)] = exact.astype(np.float32)
    case = Written(check_file(emit(model, emission).model), emission, feed, wanted)
    assert case.disagreeing(openvino_run(case.proto, feed)) == {}
    assert case.disagreeing(reference_run(case.proto, feed)) == {}


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        ("dynamic", Kind("Gemm", (3, 40), ((40, 8), (8,)), {}, 2)),
        ("packed", Kind("MatMul", (3, 40), ((40, 8),), {}, 2)),
        ("packed", Kind("Conv", (1, 8, 4, 4), ((5, 8, 3, 3),), {}, 4)),
        ("qdq", Kind("Gemm", (3, 40), ((8, 40), (8,)), {"transB": 1}, 2)),
        ("qdq", Kind("Conv", (1, 8, 4, 4), ((5, 8, 3, 3), (5,)), {}, 4)),
        ("gather", Kind("Gather", (2, 3), ((20, 40),), {}, 3)),
    ],
)
def test_reference_implementation(form: str, kind: Kind) -> None:
    case = written(form, kind, FEW_SPECS)
    assert case.disagreeing(reference_run(case.proto, case.feed)) == {}


def test_reference_implementation_runs_the_functions() -> None:
    """The functions of `ort-cpu` are plain ONNX as well."""
    model = stack(KINDS["matmul"], len(FEW_SPECS))
    targets, _ = find_targets(model)
    feed = feed_of(KINDS["matmul"])
    emission = plan(model, accepted("packed", "ort-cpu", targets, FEW_SPECS), feed, "ort-cpu")
    case = Written(check_file(emit(model, emission).model), emission, feed, reference(model, emission, feed))
    assert case.proto.functions
    assert case.disagreeing(reference_run(case.proto, feed)) == {}


def test_both_runtimes_store_the_same() -> None:
    """Only the spelling differs: equal packed initializers, equal results."""
    model = stack(KINDS["conv bias"], len(FEW_SPECS))
    targets, _ = find_targets(model)
    feed = feed_of(KINDS["conv bias"])
    layers = accepted("packed", "ort-cpu", targets, FEW_SPECS)
    files = [emit(model, plan(model, layers, feed, runtime)).model for runtime in ("ort-cpu", "portable")]
    stored = [codes(model) for model in files]
    assert stored[0] and stored[0] == stored[1]
    first, second = (make_session(model).run(feed) for model in files)
    assert all(np.array_equal(first[name], second[name]) for name in first)


def codes(model: ir.Model) -> dict[str, bytes]:
    initializers = model.graph.initializers
    return {name: value.const_value.tobytes() for name, value in initializers.items() if ".codes" in name}  # type: ignore[union-attr]
