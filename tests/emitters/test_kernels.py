"""The graph that onnxruntime really runs holds the kernel that the form is for, and nothing is unpacked in each run."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from quantkit.graph.emit import Emission, emit
from quantkit.graph.targets import find_targets
from quantkit.runtime.ort import optimized_nodes
from quantkit.types import QuantSpec
from tests.emitters.conftest import KINDS, RUNTIMES, Kind, accepted, feed_of, plan, stack

# Layout changes that onnxruntime wraps around a convolution, and the ends of the integer part.
LAYOUT = {"ReorderInput", "ReorderOutput", "Transpose", "Reshape", "Squeeze", "Unsqueeze"}
ENDS = {"QuantizeLinear", "DequantizeLinear"}
BYTES = QuantSpec(8, -1, symmetric=True)
SPECS = [BYTES, *(QuantSpec(bits, 32) for bits in range(1, 9)), QuantSpec(3, 128, symmetric=True)]
TAILED = Kind("MatMul", (4, 40), ((40, 7),), {}, 2)


def kernels(kind: Kind, form: str, spec: QuantSpec, runtime: str) -> list[str] | None:
    """Operators of the optimised graph of one layer; None when the form refuses."""
    model = stack(kind, 1)
    targets, _ = find_targets(model)
    layers = accepted(form, runtime, targets, [spec])
    if not layers:
        return None
    emission = plan(model, layers, feed_of(kind), runtime)
    return [node.op_type for node in optimized_nodes(emit(model, emission).model)]


def found_by(form: str, kind: str, specs: list[QuantSpec], runtime: str) -> dict[QuantSpec, list[str]]:
    found = {spec: kernels(KINDS[kind], form, spec, runtime) for spec in specs}
    return {spec: names for spec, names in found.items() if names is not None}


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("kind", ["matmul", "gemm transB", "gemm bias"])
def test_dynamic_is_one_integer_product(kind: str, runtime: str) -> None:
    found = found_by("dynamic", kind, SPECS, runtime)
    assert found == {spec: ["DynamicQuantizeMatMul"] for spec in SPECS}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_dynamic_layers_of_one_input_round_it_once(runtime: str) -> None:
    model = stack(KINDS["matmul"], 3)
    targets, _ = find_targets(model)
    layers = accepted("dynamic", runtime, targets, [QuantSpec(4, 32)])
    nodes = optimized_nodes(emit(model, plan(model, layers, {}, runtime)).model)
    names = [node.op_type for node in nodes]
    assert sorted(names) == ["DynamicQuantizeLinear", *["MatMulIntegerToFloat"] * 3]


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("kind", ["conv", "conv bias", "conv grouped", "conv depthwise", "conv 1d", "conv 3d"])
def test_static_convolutions_are_integer(kind: str, runtime: str) -> None:
    found = found_by("qdq", kind, SPECS, runtime)
    assert set(found) == set(SPECS)
    for spec, names in found.items():
        assert "QLinearConv" in names, spec
        assert set(names) <= {"QLinearConv"} | LAYOUT | ENDS, spec
        assert names.count("DequantizeLinear") == 1, "that of the output"


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    ("kind", "kernel"),
    [
        ("matmul", "MatMulIntegerToFloat"),
        ("gemm", "QGemm"),
        ("gemm bias", "QGemm"),
        ("gemm transB", "QGemm"),
        ("gemm transB bias", "QGemm"),
    ],
)
def test_static_products_are_integer(kind: str, kernel: str, runtime: str) -> None:
    found = found_by("qdq", kind, SPECS, runtime)
    assert found == {spec: ["QuantizeLinear", kernel] for spec in SPECS}


@pytest.mark.parametrize(("rank", "swapped"), [(2, False), (2, True), (3, False)])
def test_static_product_with_a_bias_added_is_integer(rank: int, swapped: bool) -> None:
    """onnxruntime makes a Gemm of MatMul and Add before it looks for integers: the bias must be one, too."""
    kind = KINDS["matmul one row" if rank == 2 else "matmul"]
    model = stack(kind, 1)
    product = model.graph.outputs[0]
    bias = ir.val("bias", const_value=ir.tensor(np.linspace(-1, 1, 6, dtype=np.float32)))
    model.graph.register_initializer(bias)
    node = ir.node("Add", [bias, product] if swapped else [product, bias], name="add")
    model.graph.append(node)
    result = node.outputs[0]
    result.name, result.type, result.shape = "sum", product.type, product.shape
    model.graph.outputs[0] = result
    targets, _ = find_targets(model)
    emission = plan(model, accepted("qdq", "ort-cpu", targets, [BYTES]), feed_of(kind), "ort-cpu")
    names = [node.op_type for node in optimized_nodes(emit(model, emission).model)]
    assert set(names) <= {"QuantizeLinear", "QGemm", "Reshape"} and names.count("QGemm") == 1


@pytest.mark.parametrize("kind", ["matmul", "gemm transB", "gemm bias"])
def test_matmulnbits_is_one_kernel(kind: str) -> None:
    found = found_by("matmulnbits", kind, SPECS, "ort-cpu")
    assert found == {spec: ["MatMulNBits"] for spec in SPECS if spec.bits > 1 and spec.group_size > 0}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_matmulnbits_with_a_shorter_last_group(bits: int) -> None:
    assert kernels(TAILED, "matmulnbits", QuantSpec(bits, 32), "ort-cpu") == ["MatMulNBits"]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["matmul", "gemm transB", "gemm bias"])
def test_portable_blocks_become_matmulnbits(kind: str, bits: int, symmetric: bool) -> None:
    assert kernels(KINDS[kind], "matmulnbits", QuantSpec(bits, 32, symmetric), "portable") == ["MatMulNBits"]


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    "kind",
    ["matmul", "gemm transB bias", "conv bias", "conv grouped", "conv 3d", "conv transpose", "lstm", "gru", "rnn"],
)
def test_packed_leaves_the_float_kernel_alone(kind: str, runtime: str) -> None:
    found = found_by("packed", kind, SPECS, runtime)
    assert set(found) == set(SPECS)
    for spec, names in found.items():
        assert set(names) - LAYOUT == {KINDS[kind].op}, spec


def test_tables_of_4_and_8_bits_stay_packed() -> None:
    for bits in range(1, 9):
        names = kernels(KINDS["gather"], "gather", QuantSpec(bits, 32), "ort-cpu")
        assert names is not None
        assert (names == ["GatherBlockQuantized"]) == (bits in (4, 8)), bits


@pytest.mark.parametrize("bits", range(1, 9))
def test_other_tables_hold_bytes_and_unpack_rows_only(bits: int) -> None:
    names = kernels(KINDS["gather"], "gather", QuantSpec(bits, 32), "portable")
    assert names is not None and set(names) <= {"Gather", "Cast", "Sub", "Mul", "Reshape"}


def test_a_layer_left_alone_stays_float() -> None:
    """The checks above can fail: without an emitter none of these kernels appears."""
    model = stack(KINDS["matmul"], 1)
    nodes = optimized_nodes(emit(model, Emission({}, plan(model, {}, {}, "ort-cpu").regions, {}, "ort-cpu")).model)
    assert [node.op_type for node in nodes] == ["MatMul"]
