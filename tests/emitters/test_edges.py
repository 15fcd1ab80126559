"""Weights and shapes at the edge of what a quantizer may deliver."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from quantkit.errors import InputError
from quantkit.graph.emit import Assignment, Emission, emit, emitter, simulate
from quantkit.graph.targets import find_targets
from quantkit.runtime.ort import make_session, optimized_nodes
from quantkit.types import Array, FloatArray, QuantizedWeight, QuantSpec, Target
from tests.emitters.conftest import (
    FORMS,
    KINDS,
    RUNTIMES,
    Kind,
    check_file,
    disagreeing,
    feed_of,
    plan,
    quantize,
    reference,
    stack,
)

DECIBELS = 105.0
KERNEL_DECIBELS = 85.0  # MatMulNBits subtracts zero points from sums, in float32: rows of zeros are zero but for that
KIND_OF = {"dynamic": "gemm bias", "gather": "gather", "matmulnbits": "gemm bias", "packed": "conv bias", "qdq": "gemm"}
FORM_AND_RUNTIME = [(form, runtime) for form in FORMS for runtime in RUNTIMES]


def only(model: ir.Model) -> Target:
    targets, _ = find_targets(model)
    assert len(targets) == 1
    return targets["L0"]


def check(model: ir.Model, kind: Kind, form: str, runtime: str, weight: QuantizedWeight) -> Emission:
    """Emitted, promised and simulated agree."""
    feed = feed_of(kind)
    emission = plan(model, {"L0": Assignment(form, weight)}, feed, runtime)
    emitted = emit(model, emission).model
    check_file(emitted)
    got = make_session(emitted).run(feed)
    simulated = make_session(simulate(model, emission), optimize="none").run(feed)
    decibels = KERNEL_DECIBELS if form == "matmulnbits" else DECIBELS
    assert disagreeing(reference(model, emission, feed), got, emission, decibels) == {}
    assert disagreeing(simulated, got, emission, decibels) == {}
    return emission


def set_weight(model: ir.Model, target: Target, matrix: FloatArray) -> None:
    target.weight.const_value = ir.tensor(np.ascontiguousarray(target.layout.to_operand(matrix)))
    assert target.weight in model.graph.initializers.values()


@pytest.mark.parametrize(("form", "runtime"), FORM_AND_RUNTIME)
@pytest.mark.parametrize("spec", [QuantSpec(4, 16), QuantSpec(8, 32, symmetric=True)])
def test_rows_of_zeros(form: str, runtime: str, spec: QuantSpec) -> None:
    kind = KINDS[KIND_OF[form]]
    model = stack(kind, 1)
    target = only(model)
    matrix = target.load()
    matrix[::2] = 0
    set_weight(model, target, matrix)
    check(model, kind, form, runtime, quantize(target, spec))


@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1e6, 1e25])
@pytest.mark.parametrize(("form", "runtime"), FORM_AND_RUNTIME)
def test_scales_beyond_half_precision(form: str, runtime: str, magnitude: float) -> None:
    """Scales that float16 cannot hold are stored in float32, without a word on the console."""
    kind = KINDS[KIND_OF[form]]
    kind = replace(kind, constants=kind.constants[:1])  # a bias would hide tiny weights, or overflow
    model = stack(kind, 1)
    target = only(model)
    set_weight(model, target, target.load() * np.float32(magnitude))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        emission = check(model, kind, form, runtime, quantize(target, QuantSpec(4, 16)))
    stored = emit(model, emission).model.graph.initializers
    scales = [value for name, value in stored.items() if name.startswith("L0.scales")]
    assert [value.const_value.dtype for value in scales] == [ir.DataType.FLOAT]  # type: ignore[union-attr]


def random_weight(target: Target, spec: QuantSpec, zero_points: Array | None) -> QuantizedWeight:
    """Any codes at all, not only those that a quantizer would choose."""
    rng = np.random.default_rng(5)
    num_rows, num_inputs = target.shape
    shape = (num_rows, spec.num_groups(num_inputs))
    codes = rng.integers(0, 2**spec.bits, target.shape).astype(np.uint8)
    scales = rng.uniform(0.5, 2, shape).astype(np.float32)
    if zero_points is None:
        zero_points = rng.integers(0, 2**spec.bits, shape)
    points = np.broadcast_to(zero_points, shape).astype(np.float32)
    return QuantizedWeight(spec, codes, scales, points, np.full(shape[1], spec.bits, np.uint8))


@pytest.mark.parametrize("zero_point", [None, 0, 5, 15])
@pytest.mark.parametrize("group_size", [-1, 16])
@pytest.mark.parametrize(("form", "runtime"), FORM_AND_RUNTIME)
def test_any_zero_points(form: str, runtime: str, group_size: int, zero_point: int | None) -> None:
    """All equal (at either end as well), or all different."""
    kind = (
        Kind("Gather", (4, 5), ((20, 128),), {}, 3) if form == "gather" else Kind("Gemm", (5, 128), ((128, 6),), {}, 2)
    )
    model = stack(kind, 1)
    points = None if zero_point is None else np.array(zero_point)
    weight = random_weight(only(model), QuantSpec(4, group_size), points)
    check(model, kind, form, runtime, weight)


@pytest.mark.parametrize("points", [-3.0, 0.5, 40.25], ids=str)
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("form", ["dynamic", "gather", "packed", "qdq"])
def test_zero_points_that_are_no_codes(form: str, runtime: str, points: float) -> None:
    """Below 0, between codes, or beyond them; different from group to group."""
    kind = KINDS[KIND_OF[form]]
    model = stack(kind, 1)
    target = only(model)
    spec = QuantSpec(4, 16)
    shape = (target.shape[0], spec.num_groups(target.shape[1]))
    steps = np.arange(np.prod(shape)).reshape(shape) % 3
    check(model, kind, form, runtime, random_weight(target, spec, points + steps))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("points", [-1.0, 2.5, 16.0])
def test_the_kernel_takes_whole_zero_points_only(runtime: str, points: float) -> None:
    kind = KINDS["gemm"]
    model = stack(kind, 1)
    weight = random_weight(only(model), QuantSpec(4, 32), np.array(points))
    with pytest.raises(InputError, match=re.compile("zero points|does not fit")):
        emit(model, plan(model, {"L0": Assignment("matmulnbits", weight)}, {}, runtime))


@pytest.mark.parametrize("spec", [QuantSpec(4, 32), QuantSpec(8, 32), QuantSpec(8, -1, symmetric=True)])
@pytest.mark.parametrize(("form", "runtime"), FORM_AND_RUNTIME)
def test_pre_scale(form: str, runtime: str, spec: QuantSpec) -> None:
    kind = KINDS[KIND_OF[form]]
    model = stack(kind, 1)
    target = only(model)
    if form == "matmulnbits" and emitter(form).refuse(target, spec, runtime) is not None:
        spec = QuantSpec(spec.bits, 16, spec.symmetric)
    factors = np.exp(np.random.default_rng(2).standard_normal(target.shape[1])).astype(np.float32)
    weight = replace(quantize(target, spec), pre_scale=factors)
    assert not np.array_equal(weight.dequantize(), replace(weight, pre_scale=None).dequantize())
    check(model, kind, form, runtime, weight)


SHAPES = {
    "one output": Kind("MatMul", (3, 288), ((288, 1),), {}, 2),
    "one input": Kind("MatMul", (3, 1), ((1, 288),), {}, 2),
    "a vector as input": Kind("MatMul", (96,), ((96, 5),), {}, 1),
    "conv of one channel": Kind("Conv", (1, 1, 5, 5), ((32, 1, 3, 3),), {}, 4),
    "conv to one channel": Kind("Conv", (2, 32, 5, 5), ((1, 32, 3, 3), (1,)), {}, 4),
    "1x1 conv of one channel": Kind("Conv", (1, 1, 4, 4), ((256, 1, 1, 1),), {}, 4),
    "a single id": Kind("Gather", (), ((20, 24),), {}, 1),
    "bias for all columns": Kind("Gemm", (3, 64), ((64, 5), (1,)), {}, 2),
    "bias of one row": Kind("Gemm", (3, 64), ((64, 5), (1, 5)), {}, 2),
    "bias of every element": Kind("Gemm", (3, 64), ((64, 5), (3, 5)), {}, 2),
}


@pytest.mark.parametrize("spec", [QuantSpec(3, 32), QuantSpec(8, 16, symmetric=True), QuantSpec(1, -1)], ids=repr)
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", SHAPES)
def test_small_and_odd_shapes(name: str, runtime: str, spec: QuantSpec) -> None:
    kind = SHAPES[name]
    model = stack(kind, 1)
    target = only(model)
    forms = [form for form in FORMS if emitter(form).refuse(target, spec, runtime) is None]
    assert forms
    for form in forms:
        check(model, kind, form, runtime, quantize(target, spec))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("spec", [QuantSpec(8, -1, symmetric=True), QuantSpec(3, -1), QuantSpec(4, 16)], ids=repr)
@pytest.mark.parametrize(("kind", "kernel"), [("gemm transB bias", "QGemm"), ("conv bias", "QLinearConv")])
def test_bias_beyond_int32(kind: str, kernel: str, spec: QuantSpec, runtime: str) -> None:
    """A channel of all but zero weights keeps its bias, and the kernel stays an integer one."""
    model = stack(KINDS[kind], 1)
    target = only(model)
    matrix = target.load()
    matrix[2] *= 1e-13
    set_weight(model, target, matrix)
    feed = feed_of(KINDS[kind])
    weight = quantize(target, spec)
    emission = plan(model, {"L0": Assignment("qdq", weight)}, feed, runtime)
    emitted = emit(model, emission).model
    got = make_session(emitted).run(feed)
    simulated = make_session(simulate(model, emission), optimize="none").run(feed)
    assert disagreeing(simulated, got, emission, DECIBELS) == {}
    bias = target.node.inputs[2]
    assert bias is not None and bias.const_value is not None
    channel = got["y0"][:, 2]
    step = emission.activations["y0"].scale if "y0" in emission.activations else 1e-5
    assert np.abs(channel - bias.const_value.numpy()[2]).max() <= 0.51 * step
    assert kernel in [node.op_type for node in optimized_nodes(emitted)]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_bias_of_two_layers_gets_the_steps_of_each(runtime: str) -> None:
    kind = KINDS["gemm bias"]
    model = stack(kind, 2)
    targets, _ = find_targets(model)
    first, second = (targets[name].node for name in ("L0", "L1"))
    second.replace_input_with(2, first.inputs[2])
    feed = feed_of(kind)
    layers = {name: Assignment("qdq", quantize(target, QuantSpec(8, -1, True))) for name, target in targets.items()}
    emission = plan(model, layers, feed, runtime)
    emitted = emit(model, emission).model
    got = make_session(emitted).run(feed)
    assert disagreeing(reference(model, emission, feed), got, emission, DECIBELS) == {}
    assert [node.op_type for node in optimized_nodes(emitted)].count("QGemm") == 2


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_rounding_zero_inputs(runtime: str) -> None:
    """An input of zeros has no range to measure."""
    for form in ("dynamic", "matmulnbits"):
        model = stack(KINDS["gemm transB"], 1)
        emission = plan(model, {"L0": Assignment(form, quantize(only(model), QuantSpec(4, 32)))}, {}, runtime)
        feed = {"x": np.zeros((5, 160), np.float32)}
        for graph in (emit(model, emission).model, simulate(model, emission)):
            assert not make_session(graph).run(feed)["y0"].any()
        rows = emitter(form).fake_quantize(feed["x"], emission.layers["L0"].weight, None)
        assert rows.shape == feed["x"].shape and not rows.any()
