"""What every emitter found promises: valid files of the true size that compute with the oracle's weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx_ir as ir
import pytest

from quantkit.emitters._unpack import int8_codes
from quantkit.graph.emit import Assignment, Emission, Emitted, emit, emitter, simulate
from quantkit.graph.targets import find_targets
from quantkit.packing import packed_size
from quantkit.runtime.ort import make_session
from quantkit.types import Array, Feed, QuantizedWeight, QuantSpec, Target
from tests.emitters.conftest import (
    FEW_SPECS,
    FORMS,
    KINDS,
    RUNTIMES,
    SPECS,
    accepted,
    check_file,
    disagreeing,
    expose,
    feed_of,
    operators,
    plan,
    reference,
    stack,
)

# Least agreement with the float operators and with the simulation, both computed another way.
DECIBELS = {"dynamic": 110.0, "gather": 200.0, "matmulnbits": 105.0, "packed": 115.0, "qdq": 110.0}
OPERATORS_OF = {
    "dynamic": {"MatMul", "Gemm"},
    "gather": {"Gather"},
    "matmulnbits": {"MatMul", "Gemm"},
    "packed": {"MatMul", "Gemm", "Conv", "ConvTranspose", "LSTM", "GRU", "RNN"},
    "qdq": {"MatMul", "Gemm", "Conv"},
}
THOROUGH = ("matmul", "gather")
CASES = [
    (form, kind, runtime)
    for form in FORMS
    for kind in KINDS
    for runtime in RUNTIMES
    if KINDS[kind].op in OPERATORS_OF[form]
]


@dataclass(frozen=True)
class Case:
    model: ir.Model
    targets: dict[str, Target]
    layers: dict[str, Assignment]
    emission: Emission
    emitted: Emitted
    feed: Feed


@cache
def case_of(form: str, kind: str, runtime: str) -> Case:
    """One model with a layer for every way of storing it that the form takes."""
    specs = SPECS if kind in THOROUGH else FEW_SPECS
    model = stack(KINDS[kind], len(specs))
    targets, _ = find_targets(model)
    layers = accepted(form, runtime, targets, specs)
    feed = feed_of(KINDS[kind])
    emission = plan(model, layers, feed, runtime)
    return Case(model, targets, layers, emission, emit(model, emission), feed)


def test_every_emitter_is_tested() -> None:
    assert set(OPERATORS_OF) == set(DECIBELS) == set(FORMS)
    assert {kind.op for kind in KINDS.values()} == set().union(*OPERATORS_OF.values())


@pytest.mark.parametrize(("form", "kind", "runtime"), CASES)
def test_file_computes_what_the_form_promises(form: str, kind: str, runtime: str) -> None:
    case = case_of(form, kind, runtime)
    assert case.layers
    proto = check_file(case.emitted.model)
    if runtime == "portable":
        assert not proto.functions
        assert {item.domain for item in proto.opset_import} == {domain for domain, _ in operators(proto)} == {""}
    got = make_session(case.emitted.model).run(case.feed)
    simulated = make_session(simulate(case.model, case.emission), optimize="none").run(case.feed)
    assert disagreeing(reference(case.model, case.emission, case.feed), got, case.emission, DECIBELS[form]) == {}
    assert disagreeing(simulated, got, case.emission, DECIBELS[form]) == {}


@pytest.mark.parametrize("kind", ["matmul", "gemm transB bias"])
@pytest.mark.parametrize("form", ["dynamic", "matmulnbits", "packed"])
def test_matrix_products_in_double_precision(form: str, kind: str) -> None:
    """y = fake_quantize(x) W^T + b, written out in float64."""
    case = case_of(form, kind, "ort-cpu")
    got = make_session(case.emitted.model).run(case.feed)
    wanted = {}
    for name, item in case.layers.items():
        node, method = case.targets[name].node, emitter(form)
        rows = method.fake_quantize(case.feed["x"], item.weight, None).astype(np.float64)
        product = rows @ method.effective_weight(item.weight).astype(np.float64).T
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None and bias.const_value is not None:
            product += bias.const_value.numpy()
        wanted[str(node.outputs[0].name)] = product.astype(np.float32)
    assert disagreeing(wanted, got, case.emission, DECIBELS[form]) == {}


@pytest.mark.parametrize(("form", "kind", "runtime"), CASES)
def test_codes_take_their_true_size(form: str, kind: str, runtime: str) -> None:
    case = case_of(form, kind, runtime)
    sizes = stored_sizes(case.emitted.model)
    for name, item in case.layers.items():
        num_rows, num_inputs = item.weight.shape
        spec = item.weight.spec
        num_groups = spec.num_groups(num_inputs)
        padded = num_rows * num_groups * spec.group_width(num_inputs)
        assert sizes[f"{name}.codes"] == packed_size(padded, spec.bits), spec
        assert sizes.get(f"{name}.scales", 0) <= 4 * num_rows * num_groups
        if f"{name}.zero_points" in sizes and num_groups > 1:  # in bytes, each row is rounded up
            row_bytes = -(-num_groups * kernel_width(form, spec.bits) // 8)
            plain = packed_size(num_rows * num_groups, spec.bits)
            assert sizes[f"{name}.zero_points"] in (plain, num_rows * row_bytes), spec


def kernel_width(form: str, bits: int) -> int:
    return {1: 4, 3: 4, 5: 8, 6: 8, 7: 8}.get(bits, bits) if form == "matmulnbits" else bits


def stored_sizes(model: ir.Model) -> dict[str, int]:
    """`layer.codes` and the like -> bytes in the file, planes together."""
    sizes: dict[str, int] = {}
    for name, value in model.graph.initializers.items():
        for role in (".codes", ".scales", ".zero_points"):
            if role in name:
                key = name[: name.index(role)] + role
                assert value.const_value is not None
                sizes[key] = sizes.get(key, 0) + value.const_value.nbytes
    return sizes


LOADED = [
    (form, kind, runtime)
    for form, kind, runtime in CASES
    if form in ("packed", "qdq", "dynamic") and kind not in ("matmul one row", "gemm", "conv bias")
]


@pytest.mark.parametrize(("form", "kind", "runtime"), LOADED)
def test_rebuilt_weights_are_bit_exact(form: str, kind: str, runtime: str) -> None:
    """What onnxruntime makes of the packed bytes equals the oracle, or its int8 requantization, in every bit."""
    case = case_of(form, kind, runtime)
    wanted = {name: oracle(form, case.targets[name], item.weight) for name, item in case.layers.items()}
    places = {name: place(form, case, name) for name in case.layers}
    kinds = {} if form == "packed" else dict.fromkeys(places.values(), ir.DataType.INT8)
    seen = expose(case.emitted.model, places.values(), case.feed, "fold", kinds)
    constants = case.emitted.model.graph.initializers
    for name, value_name in places.items():
        stored = constants[value_name].const_value if value_name in constants else None
        rebuilt = seen[value_name] if stored is None else stored.numpy()
        assert rebuilt.dtype == wanted[name].dtype
        assert np.array_equal(rebuilt, wanted[name]), case.layers[name].weight.spec


def oracle(form: str, target: Target, weight: QuantizedWeight) -> Array:
    if form == "packed":
        return target.layout.to_operand(weight.dequantize())
    codes, _ = int8_codes(weight)
    return codes.T if form == "dynamic" else target.layout.to_operand(codes)


def place(form: str, case: Case, name: str) -> str:
    """Name of the value that holds the rebuilt weight."""
    graph = case.emitted.model.graph
    if form == "dynamic":
        output = str(case.targets[name].node.outputs[0].name)
        return name_of(next(node for node in upstream(graph, output) if node.op_type == "MatMulInteger"), 1)
    use = case.targets[name].uses[0]
    operand = next(node for node in graph if node.name == use.node.name).inputs[use.weight_index]
    assert operand is not None
    if form == "packed":
        return str(operand.name)
    pair = operand.producer()
    assert pair is not None and pair.op_type == "DequantizeLinear"
    return name_of(pair, 0)


def name_of(node: ir.Node, index: int) -> str:
    value = node.inputs[index]
    assert value is not None
    return str(value.name)


def upstream(graph: ir.Graph, output: str) -> Iterator[ir.Node]:
    """Nodes behind an output, nearest first."""
    waiting = [value for value in graph.outputs if value.name == output]
    assert waiting
    while waiting:
        node = waiting.pop(0).producer()
        if node is not None:
            yield node
            waiting += [value for value in node.inputs if value is not None]


@pytest.mark.parametrize("kind", ["matmul", "gemm transB"])
def test_matmulnbits_holds_the_oracle(kind: str) -> None:
    """The kernel's blob, widened where it must be, read by the definition of the operator."""
    case = case_of("matmulnbits", kind, "ort-cpu")
    nodes = {str(node.outputs[0].name): node for node in case.emitted.model.graph if node.op_type == "MatMulNBits"}
    assert len(nodes) == len(case.layers)
    operands = {name: nodes[str(case.targets[name].node.outputs[0].name)] for name in case.layers}
    names = [name_of(node, 1) for node in operands.values()]
    seen = expose(case.emitted.model, names, case.feed, "fold", dict.fromkeys(names, ir.DataType.UINT8))
    for name, node in operands.items():
        weight = case.layers[name].weight
        bits, width = node.attributes["bits"].as_int(), node.attributes["block_size"].as_int()
        codes = spread(constant(case, node.inputs[1], seen), bits).astype(np.float32)
        points: Array = np.array(1 << (bits - 1), np.float32)
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            packed = constant(case, node.inputs[3], seen).reshape(weight.shape[0], -1)
            points = spread(packed, bits)[:, : weight.scales.shape[1], None].astype(np.float32)
        scales = constant(case, node.inputs[2], seen).reshape(weight.shape[0], -1, 1)
        matrix = ((codes.reshape(*weight.scales.shape, width) - points) * scales).reshape(weight.shape[0], -1)
        assert np.array_equal(matrix[:, : weight.shape[1]], weight.dequantize()), weight.spec
        assert not matrix[:, weight.shape[1] :].any(), "padding must be worth 0"


def constant(case: Case, value: ir.Value | None, seen: dict[str, Array]) -> Array:
    assert value is not None
    return seen[str(value.name)] if value.const_value is None else value.const_value.numpy()


def spread(packed: Array, bits: int) -> Array:
    """[..., bytes] -> [..., codes], lowest bits first."""
    fields = packed[..., None] >> np.arange(0, 8, bits, dtype=np.uint8) & np.uint8((1 << bits) - 1)
    return fields.reshape(*packed.shape[:-1], -1)


@pytest.mark.parametrize(
    ("form", "kind", "runtime"), [case for case in CASES if case[1] in ("gemm bias", "conv", "gather")]
)
def test_inputs_are_left_alone(form: str, kind: str, runtime: str) -> None:
    case = case_of(form, kind, runtime)
    before = ir.to_proto(case.model).SerializeToString(deterministic=True)
    copies = [(item.weight.codes.copy(), item.weight.scales.copy()) for item in case.layers.values()]
    first = ir.to_proto(emit(case.model, case.emission).model).SerializeToString(deterministic=True)
    simulate(case.model, case.emission)
    assert ir.to_proto(case.model).SerializeToString(deterministic=True) == before
    assert ir.to_proto(case.emitted.model).SerializeToString(deterministic=True) == first
    for item, (codes, scales) in zip(case.layers.values(), copies, strict=True):
        assert np.array_equal(item.weight.codes, codes) and np.array_equal(item.weight.scales, scales)


def product(shape: tuple[int, ...], op: str = "MatMul", bias: ir.Value | None = None, **attributes: float) -> Target:
    """The target of a graph of one node."""
    data, weight = ir.val("x"), ir.val("w", const_value=ir.tensor(np.ones(shape, np.float32)))
    node = ir.node(op, [weight, data] if op == "Gather" else [data, weight, bias], attributes, name="L0")
    node.outputs[0].name = "y"
    graph = ir.Graph([data], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 21})
    return find_targets(ir.Model(graph, ir_version=10))[0]["L0"]


KERNEL_BLOCKS = "the kernel has 16, 32, 64, 128, 256"
WHOLE_GROUPS = "blocked DequantizeLinear holds 4 and 8 bits in whole groups"


@pytest.mark.parametrize(
    ("form", "target", "spec", "runtime", "reason"),
    [
        ("dynamic", product((8, 8, 3, 3), "Conv"), QuantSpec(8), "ort-cpu", "Conv is no matrix product"),
        ("dynamic", product((2, 32, 8)), QuantSpec(8), "ort-cpu", "batched weights"),
        ("dynamic", product((32, 8), "Gemm", transA=1), QuantSpec(8), "ort-cpu", "Gemm with transA, alpha or beta"),
        ("dynamic", product((32, 8), "Gemm", alpha=0.5), QuantSpec(8), "portable", "Gemm with transA, alpha or beta"),
        (
            "matmulnbits",
            product((32, 8), "Gemm", beta=2.0),
            QuantSpec(4),
            "portable",
            "Gemm with transA, alpha or beta",
        ),
        ("gather", product((32, 8)), QuantSpec(8), "ort-cpu", "MatMul is no table lookup"),
        ("packed", product((32, 8), "Gather"), QuantSpec(8), "ort-cpu", "a table of rows is looked up, not multiplied"),
        ("matmulnbits", product((32, 8), "Gather"), QuantSpec(8), "ort-cpu", "Gather is no matrix product"),
        ("matmulnbits", product((96, 8)), QuantSpec(4, -1), "ort-cpu", f"groups of 96 ({KERNEL_BLOCKS})"),
        ("matmulnbits", product((96, 8)), QuantSpec(4, 24), "portable", f"groups of 24 ({KERNEL_BLOCKS})"),
        ("matmulnbits", product((96, 8)), QuantSpec(1, 32), "ort-cpu", "mid-rise grid"),
        ("matmulnbits", product((96, 8)), QuantSpec(2, 32), "portable", WHOLE_GROUPS),
        ("matmulnbits", product((40, 8)), QuantSpec(4, 32), "portable", WHOLE_GROUPS),
        (
            "matmulnbits",
            product((96, 8), "Gemm", bias=ir.val("b", shape=[1, 8])),
            QuantSpec(4, 32),
            "portable",
            "onnxruntime fuses blocked DequantizeLinear only with a bias of one dimension",
        ),
        (
            "matmulnbits",
            product((96, 8)),
            QuantSpec(2, 16),
            "ort-cpu",
            "2 bits in groups of 16: onnxruntime has no fast kernel",
        ),
        (
            "qdq",
            product((16, 8, 3, 3), "ConvTranspose"),
            QuantSpec(8, -1),
            "ort-cpu",
            "onnxruntime has no integer kernel for ConvTranspose",
        ),
        ("qdq", product((2, 32, 8)), QuantSpec(8, -1), "portable", "batched weights have no integer kernel"),
        (
            "qdq",
            product((32, 8), "Gemm", alpha=2.0),
            QuantSpec(8, -1),
            "ort-cpu",
            "Gemm with transA, alpha or beta has no integer kernel",
        ),
    ],
)
def test_refusals(form: str, target: Target, spec: QuantSpec, runtime: str, reason: str) -> None:
    assert emitter(form).refuse(target, spec, runtime) == reason
