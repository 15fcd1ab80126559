"""Estimated bytes of a layer against what emission really adds to the file."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, islice

import numpy as np
import onnx_ir as ir
import pytest

from quantkit.calibration.accumulators import act_params
from quantkit.costs.size import NODE_OVERHEAD, PLACE_BYTES, WHOLE_BYTES, WIDTH_OVERHEAD, layer_bytes, stored_bits
from quantkit.graph.emit import Assignment, Emission, emit, emitter, serialized_size
from quantkit.graph.regions import find_regions
from quantkit.graph.targets import find_targets
from quantkit.methods import make
from quantkit.types import QuantSpec

OPERANDS = {"MatMul": (512, 512), "Conv": (256, 128, 3, 3), "Gather": (1500, 192)}
FORMS = [("packed", "MatMul"), ("packed", "Conv"), ("dynamic", "MatMul"), ("qdq", "Conv"), ("gather", "Gather")]
SPECS = [QuantSpec(bits, group, symmetric=group == -1) for bits in (1, 2, 3, 4, 5, 8) for group in (32, 64, -1)]
MIXES = ((2, 3, 4), (1, 2, 3), (4, 2, 8, 4), (3, 4, 5, 6, 7, 8))
RELATIVE = 0.04
# Function bodies and graph-wide scales, which one model holds once.
ABSOLUTE = 4000


def model(op: str) -> ir.Model:
    shape = OPERANDS[op]
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    operand = ir.val("w", const_value=ir.tensor(weight))
    dtype = ir.DataType.INT64 if op == "Gather" else ir.DataType.FLOAT
    data = ir.val("x", dtype=dtype, shape=["N", shape[1], 9, 9] if op == "Conv" else ["N", shape[0]])
    node = ir.node(op, [operand, data] if op == "Gather" else [data, operand], name="layer")
    node.outputs[0].name, node.outputs[0].dtype = "y", ir.DataType.FLOAT
    graph = ir.Graph([data], node.outputs, nodes=[node], initializers=[operand], opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


def stored(op: str, form: str, spec: QuantSpec) -> tuple[int, int, int]:
    """(bytes that the layer really adds, estimate, bytes of the function bodies that all layers share)."""
    graph = model(op)
    (name, target), *_ = find_targets(graph)[0].items()
    weight = make("quantizers", "rtn", {}).quantize(target.load(), spec, None)
    regions = find_regions(graph, ["layer"] if form == "qdq" else [])
    params = dict.fromkeys(regions.groups.values(), act_params(-1, 1))
    emitted = emit(graph, Emission({name: Assignment(form, weight)}, regions, params, "ort-cpu")).model
    without = serialized_size(graph) - 4 * int(np.prod(OPERANDS[op]))
    bodies = sum(len(ir.to_proto(function).SerializeToString()) for function in emitted.functions.values())
    return serialized_size(emitted) - without, layer_bytes(target, spec), bodies


@pytest.mark.parametrize(("form", "op"), FORMS)
def test_the_estimate_is_what_the_file_grows_by(form: str, op: str) -> None:
    target = next(iter(find_targets(model(op))[0].values()))
    specs = [spec for spec in SPECS if emitter(form).refuse(target, spec, "ort-cpu") is None]
    assert len(specs) >= 6
    wrong = {}
    for spec in specs:
        real, estimate, _ = stored(op, form, spec)
        if abs(real - estimate) > RELATIVE * real + ABSOLUTE:
            wrong[spec] = (real, estimate)
    assert wrong == {}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("form", "op"), FORMS)
def test_the_estimate_knows_groups_of_different_widths(form: str, op: str, symmetric: bool) -> None:
    target = next(iter(find_targets(model(op))[0].values()))
    wrong = {}
    for mix in MIXES:
        for group_size in (32, 64):
            spec = QuantSpec(3, group_size, symmetric)
            labels = tuple(islice(cycle(mix), spec.num_groups(target.shape[1])))
            real, estimate, bodies = stored(op, form, replace(spec, group_bits=labels))
            if abs(real - bodies - estimate) > 700:
                wrong[labels] = (real, estimate)
    assert wrong == {}


@pytest.mark.parametrize("symmetric", [False, True])
def test_balanced_widths_take_the_bytes_of_the_width_asked_for(symmetric: bool) -> None:
    """{2, 3, 4} in equal shares beside 3 bits everywhere: the same but for where the groups go."""
    target = next(iter(find_targets(model("MatMul"))[0].values()))
    plain = QuantSpec(3, 64, symmetric)
    labels = replace(plain, group_bits=(2, 3, 4, 4, 3, 2, 3, 3))
    places = 8 * PLACE_BYTES + (4 * 8 if symmetric else 0)
    assert stored_bits(target, labels) * 512 * 512 / 8 == pytest.approx(
        stored_bits(target, plain) * 512 * 512 / 8 + places, abs=1e-6
    )
    assert layer_bytes(target, labels) == layer_bytes(target, plain) + places + 2 * WIDTH_OVERHEAD * (
        1 if symmetric else 2
    )
    assert layer_bytes(target, replace(plain, group_bits=(3,) * 8)) == layer_bytes(target, plain)
    assert layer_bytes(target, replace(plain, group_bits=(2,) * 8)) == layer_bytes(target, replace(plain, bits=2))


def test_packed_products_store_at_most_two_more_bytes_a_group() -> None:
    target = next(iter(find_targets(model("MatMul"))[0].values()))
    for spec in (QuantSpec(4, 32), QuantSpec(4, 128), QuantSpec(3, 64), QuantSpec(8, 32), QuantSpec(2, 64)):
        if emitter("matmulnbits").refuse(target, spec, "ort-cpu") is None:
            real, estimate, _ = stored("MatMul", "matmulnbits", spec)
            wider_scales = 2 * target.shape[0] * spec.num_groups(target.shape[1])
            assert estimate - ABSOLUTE <= real <= (1 + RELATIVE) * estimate + wider_scales + ABSOLUTE, spec


def test_bits_per_weight_count_scales_and_zero_points() -> None:
    target = next(iter(find_targets(model("MatMul"))[0].values()))
    assert stored_bits(target, QuantSpec(4, 32, symmetric=True)) == pytest.approx(4 + 16 / 32, abs=1e-9)
    assert stored_bits(target, QuantSpec(4, 32)) == pytest.approx(4 + 16 / 32 + 4 / 32, abs=1e-9)
    assert stored_bits(target, QuantSpec(3, -1, symmetric=True)) == pytest.approx(3 + 16 / 512, abs=1e-9)
    assert layer_bytes(target, QuantSpec(8, -1, symmetric=True)) == 512 * 512 + 2 * 512 + NODE_OVERHEAD - WHOLE_BYTES
