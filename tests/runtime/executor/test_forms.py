"""Every emitted form x bits x operator: what the executor makes of it, and which kernel it goes to."""

from __future__ import annotations

from itertools import cycle, islice

import numpy as np
import onnx_ir as ir
import pytest
import torch

from quantkit.graph.emit import emit
from quantkit.graph.targets import find_targets
from quantkit.runtime.executor import Executor
from quantkit.types import QuantSpec
from tests.emitters.conftest import FEW_SPECS, KINDS, RUNTIMES, SPECS, accepted, feed_of, plan, stack
from tests.emitters.test_mixed import layers_of
from tests.emitters.test_mutations import next_byte
from tests.runtime.executor.files import CPU, decibels, expected, file_of, run
from tests.runtime.torch_backend.test_compressed import CASES, emitted

# Of a layer in the compute type, to onnxruntime in float32. In half precision, a value that is rounded to 8 bits may
# fall on the other side of a half: as much as one of the two roundings, whatever the precision of the rest.
DECIBELS = {
    torch.float32: {"dynamic": 110.0, "gather": 200.0, "matmulnbits": 110.0, "packed": 110.0, "qdq": 110.0},
    torch.float16: {"dynamic": 40.0, "gather": 70.0, "matmulnbits": 60.0, "packed": 50.0, "qdq": 38.0},
    torch.bfloat16: {"dynamic": 34.0, "gather": 50.0, "matmulnbits": 42.0, "packed": 34.0, "qdq": 33.0},
}
WIDTH = {1: 2, 2: 2, 3: 3, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
HALF = [(name, "ort-cpu") for name in ("matmul", "gemm bias", "gather", "conv", "gru")]
PRODUCTS = ("matmul", "gemm transB bias")
ALL = [QuantSpec(bits, size, symmetric) for bits in range(1, 9) for size in (-1, 32, 48) for symmetric in (False, True)]


@pytest.mark.parametrize(("form", "name", "runtime"), CASES)
def test_all_forms_compute_the_same(form: str, name: str, runtime: str) -> None:
    model, feed = emitted(form, name, runtime), feed_of(KINDS[name])
    wanted = expected(model, feed)
    executor = Executor(model, CPU, torch.float32, "file")
    assert decibels(wanted, run(executor, feed)) >= DECIBELS[torch.float32][form]
    assert {layer.kernel for layer in executor.layers} <= {
        *(("nbits_linear", "torch") if KINDS[name].op in ("MatMul", "Gemm") else ()),
        *(("gather_nbits",) if KINDS[name].op == "Gather" else ()),
        *(("dequantized",) if KINDS[name].op not in ("MatMul", "Gemm", "Gather") else ()),
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("form", "name", "runtime"), [case for case in CASES if case[1:] in HALF])
def test_half_precision(form: str, name: str, runtime: str, dtype: torch.dtype) -> None:
    model, feed = emitted(form, name, runtime), feed_of(KINDS[name])
    executor = Executor(model, CPU, dtype, "file")
    assert decibels(expected(model, feed), run(executor, feed)) >= DECIBELS[dtype][form]


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", [*PRODUCTS, "gather"])
def test_every_width_stays_packed(name: str, runtime: str) -> None:
    """1 to 8 bits in any group: the narrowest width of the kernels that holds the codes."""
    form = "gather" if name == "gather" else "packed"
    model = file_of(form, name, runtime, ALL)
    executor = Executor(model, CPU, torch.float16)
    kernel = "gather_nbits" if name == "gather" else "nbits_linear"
    layers = {layer.name: layer for layer in executor.layers}
    for index, spec in enumerate(ALL):
        layer = layers.get(f"L{index}", layers.get(f"y{index}"))
        assert layer is not None and (layer.kernel, layer.bits) == (kernel, (WIDTH[spec.bits],)), spec


@pytest.mark.parametrize("name", PRODUCTS)
def test_widened_codes_are_narrowed_again(name: str) -> None:
    """MatMulNBits has 3 bits in a blob of 4, and 5 to 7 in one of 8; int8 columns hold whatever was put into them."""
    specs = [QuantSpec(bits, 32) for bits in range(2, 9)]
    for layer in Executor(file_of("matmulnbits", name, "ort-cpu", specs), CPU, torch.float16).layers:
        assert layer.kernel == "nbits_linear" and layer.bits == (WIDTH[int(layer.name[1:]) + 2],)
    columns = [QuantSpec(bits, -1, True) for bits in (2, 3, 4, 8)]
    for form in ("qdq", "dynamic"):
        model = file_of(form, name, "ort-cpu", columns)
        found = sorted(layer.bits[0] for layer in Executor(model, CPU, torch.float16, "file").layers)
        assert found == [2, 3, 4, 8]


def test_groups_that_the_kernels_lack() -> None:
    model = file_of("packed", "matmul", "ort-cpu", [QuantSpec(4, 48), QuantSpec(4, 40), QuantSpec(4, 128)])
    executor = Executor(model, CPU, torch.float32)
    feed = feed_of(KINDS["matmul"])
    assert decibels(expected(model, feed), run(executor, feed)) >= 110
    split, odd, ragged = executor.layers
    assert (split.kernel, odd.kernel, ragged.kernel) == ("nbits_linear", "dequantized", "nbits_linear")
    assert odd.note == "the kernels have no groups of 40"
    assert split.num_bytes == 6 * 160 // 2 + 4 * 6 * 10  # 16 of 48: three words of scale and zero point each


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(("form", "name"), [("packed", "matmul"), ("packed", "gemm bias"), ("gather", "gather")])
def test_groups_of_different_widths(form: str, name: str, runtime: str) -> None:
    model = stack(KINDS[name], 9)
    layers = layers_of(form, runtime, find_targets(model)[0])
    feed = feed_of(KINDS[name])
    file = emit(model, plan(model, layers, feed, runtime)).model
    executor = Executor(file, CPU, torch.float32)
    assert decibels(expected(file, feed), run(executor, feed)) >= DECIBELS[torch.float32][form]
    found = {layer.bits for layer in executor.layers if layer.kernel == "mixed_linear"}
    assert found == ({(2, 3, 4, 8), (2, 3, 4), (2, 4, 8), (2, 3), (3, 8)} if form == "packed" else set())


def test_mixed_groups_in_matmulnbits() -> None:
    model = stack(KINDS["matmul"], 2)
    specs = [QuantSpec(3, 32, group_bits=tuple(islice(cycle(widths), 5))) for widths in ((2, 3, 4), (8, 4))]
    feed = feed_of(KINDS["matmul"])
    file = emit(model, plan(model, accepted("matmulnbits", "ort-cpu", find_targets(model)[0], specs), feed, "ort-cpu"))
    executor = Executor(file.model, CPU, torch.float32)
    assert decibels(expected(file.model, feed), run(executor, feed)) >= 110
    assert [layer.bits for layer in executor.layers] == [(2, 3, 4), (4, 8)]


@pytest.mark.parametrize("name", PRODUCTS)
def test_activations_left_as_they_are(name: str) -> None:
    """The form `dynamic` without its rounding: the float input times the codes that the file holds."""
    model, feed = stack(KINDS[name], 8), feed_of(KINDS[name])
    targets, _ = find_targets(model)
    layers = accepted("dynamic", "ort-cpu", targets, [QuantSpec(bits, 32) for bits in range(1, 9)])
    executor = Executor(emit(model, plan(model, layers, feed, "ort-cpu")).model, CPU, torch.float32, "float")
    found = run(executor, feed)
    for key, item in layers.items():
        node = targets[key].node
        wanted = feed["x"].astype(np.float64) @ item.weight.dequantize().astype(np.float64).T
        if len(node.inputs) > 2:
            wanted = wanted + node.inputs[2].const_value.numpy()  # type: ignore[union-attr]
        np.testing.assert_allclose(found[str(node.outputs[0].name)], wanted, rtol=1e-4, atol=1e-4)
    assert [layer.bits for layer in executor.layers] == [(WIDTH[bits],) for bits in range(1, 9)]


def test_activations_in_integers() -> None:
    model = file_of("dynamic", "gemm bias", "ort-cpu", [QuantSpec(4, 32), QuantSpec(8, -1)])
    feed = feed_of(KINDS["gemm bias"])
    executor = Executor(model, CPU, torch.float32, "int8")
    assert {layer.kernel for layer in executor.layers} == {"int8_linear"}
    assert 35 <= decibels(expected(model, feed), run(executor, feed)) <= 60  # another rounding of the activations


@pytest.mark.parametrize(
    ("form", "name"),
    [("packed", "matmul"), ("matmulnbits", "gemm bias"), ("dynamic", "gemm bias"), ("gather", "gather")],
)
def test_every_stored_byte_counts(form: str, name: str) -> None:
    """A changed code, scale or zero point changes the result, to what onnxruntime makes of it."""
    model = file_of(form, name, "ort-cpu", [QuantSpec(3, 32)])
    feed = {"x": np.array([[0, 1, 2], [-1, 10, 5]])} if name == "gather" else feed_of(KINDS[name])
    before = run(Executor(model, CPU, torch.float32, "file"), feed)
    names = [key for key in model.graph.initializers if key.startswith("L0.")]
    assert {key.split(".")[1] for key in names} == {"codes", "scales", "zero_points"}
    for key in names:
        copy = model.clone()
        value = copy.graph.initializers[key]
        assert value.const_value is not None
        value.const_value = ir.tensor(next_byte(np.array(value.const_value.numpy())), name=key)
        found = run(Executor(copy, CPU, torch.float32, "file"), feed)
        assert decibels(before, found) < 80, key
        assert decibels(expected(copy, feed), found) >= 110, key


def test_ids_beyond_the_table_read_nothing() -> None:
    """onnxruntime refuses them; on a device nobody can, so their rows are 0 and memory is left alone."""
    model = file_of("gather", "gather", "ort-cpu", [QuantSpec(4, 32), QuantSpec(3, 48)])
    executor = Executor(model, CPU, torch.float32)
    right = run(executor, {"x": np.array([[0, 19, 1], [-20, -1, 2]])})
    found = run(executor, {"x": np.array([[0, 19, 20], [-20, -1, -21]])})
    for name, rows in found.items():
        np.testing.assert_array_equal(rows[:, :2], right[name][:, :2])
        assert rows[:, :2].any() and not rows[:, 2].any()


def test_all_specs_of_a_product_at_once() -> None:
    """The thorough list of the emitters: all group sizes, a shorter last group, symmetric and not."""
    model = file_of("packed", "matmul", "ort-cpu", SPECS)
    feed = feed_of(KINDS["matmul"])
    executor = Executor(model, CPU, torch.float32)
    assert decibels(expected(model, feed), run(executor, feed)) >= 110
    assert {layer.kernel for layer in executor.layers} == {"nbits_linear"}
    assert len(executor.layers) == len(SPECS)


@pytest.mark.parametrize(("form", "name"), [("packed", "gemm bias"), ("gather", "gather"), ("dynamic", "matmul")])
def test_nothing_waits_for_a_device(form: str, name: str) -> None:
    """Tensors without data: shapes and types come out, and nothing is read back."""
    model, feed = file_of(form, name, "ort-cpu", FEW_SPECS[:4]), feed_of(KINDS[name])
    executor = Executor(model, torch.device("meta"), torch.float16)
    found = executor.run(executor.placed({key: torch.from_numpy(item) for key, item in feed.items()}))
    for key, value in expected(model, feed).items():
        assert (found[key].device.type, tuple(found[key].shape)) == ("meta", value.shape)
        assert found[key].dtype == torch.float32
