"""Splicing layers into real graphs: shared weights, subgraphs, names that are taken, the order of things, the file."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from quantkit import metrics
from quantkit.graph.emit import Assignment, Emission, emit, emitter, file_size, save, serialized_size, simulate
from quantkit.graph.load import load_model
from quantkit.graph.normalize import name_nodes
from quantkit.graph.regions import Regions
from quantkit.graph.targets import find_targets
from quantkit.methods import find
from quantkit.quantizers.rtn import RTN
from quantkit.runtime.ort import make_session, optimized_nodes
from quantkit.types import QuantSpec

Array = npt.NDArray[Any]
Build = Callable[..., onnx.ModelProto]

NO_REGIONS = Regions({}, frozenset(), {}, frozenset(), frozenset())
RUNTIMES = ("ort-cpu", "portable")
DYNAMIC_FORMS = [form for form in find("emitters") if form != "qdq"]  # those that need no activation ranges
SPECS = (QuantSpec(3, 16), QuantSpec(4, 32), QuantSpec(8, -1, symmetric=True))
DECIBELS = 105.0
RNG = np.random.default_rng(0)

X = RNG.standard_normal((4, 64)).astype(np.float32)
W = RNG.standard_normal((64, 64)).astype(np.float32)
V = RNG.standard_normal((64, 64)).astype(np.float32)


def everywhere(
    model: ir.Model, form: str, spec: QuantSpec, runtime: str, order: Sequence[str] | None = None
) -> Emission:
    """The form for every target that it takes."""
    targets, _ = find_targets(model)
    names = [name for name in targets if emitter(form).refuse(targets[name], spec, runtime) is None]
    layers = {name: Assignment(form, RTN().quantize(targets[name].load(), spec, None)) for name in names}
    return Emission({name: layers[name] for name in order or names}, NO_REGIONS, {}, runtime)


def check(model: ir.Model, emission: Emission, feed: Mapping[str, Array]) -> ir.Model:
    """Valid, equal to its simulation, and different from the float model."""
    emitted = emit(model, emission).model
    onnx.checker.check_model(ir.to_proto(emitted), full_check=True)
    got = make_session(emitted).run(feed)
    simulated = make_session(simulate(model, emission), optimize="none").run(feed)
    float_outputs = make_session(model, optimize="none").run(feed)
    for name, value in simulated.items():
        assert metrics.sqnr(value, got[name]) >= DECIBELS, name
        assert emission.layers and metrics.sqnr(float_outputs[name], got[name]) < DECIBELS, "nothing was quantized"
    return emitted


def combinations() -> list[tuple[str, QuantSpec, str]]:
    return list(itertools.product(DYNAMIC_FORMS, SPECS, RUNTIMES))


def check_all(model: ir.Model, feed: Mapping[str, Array], forms: Sequence[str], *, num_targets: int) -> None:
    """Every form that takes one of the targets, at every width and for both runtimes."""
    targets, _ = find_targets(model)
    assert len(targets) == num_targets
    checked = set()
    for form, spec, runtime in combinations():
        emission = everywhere(model, form, spec, runtime)
        if emission.layers:
            check(model, emission, feed)
            checked.add(form)
    assert checked == set(forms)


PRODUCTS = ("dynamic", "matmulnbits", "packed")


def test_weight_of_two_layers(build: Build) -> None:
    text = "g (float[4,64] x) => (float[4,64] z) { y = MatMul(x, w) \n r = Relu(y) \n z = MatMul(r, w) }"
    model = load_model(build(text, {"w": W / 8})).model
    targets, _ = find_targets(model)
    (target,) = targets.values()
    assert len(target.uses) == 2
    blocked = emitter("matmulnbits").refuse(target, QuantSpec(4, 32), "portable")
    assert blocked == "onnxruntime does not fuse blocked DequantizeLinear for a weight that several layers read"
    check_all(model, {"x": X}, PRODUCTS, num_targets=1)


def test_tied_embedding(build: Build) -> None:
    """One table, looked up and multiplied: two targets of one initializer, and no float copy left."""
    text = """g (int64[4] ids) => (float[4,100] y) {
        e = Gather(table, ids) \n t = Transpose<perm=[1,0]>(table) \n y = MatMul(e, t) }"""
    model = ir.from_proto(build(text, {"table": RNG.standard_normal((100, 64)).astype(np.float32)}))
    name_nodes(model)
    targets, _ = find_targets(model)
    assert [target.op for target in targets.values()] == ["Gather", "MatMul"]
    both: dict[str, Assignment] = {}
    for name, target in targets.items():
        form = "gather" if target.op == "Gather" else "packed"
        both[name] = Assignment(form, RTN().quantize(target.load(), QuantSpec(4, 32), None))
    ids = np.array([3, 99, 0, 42])
    emitted = check(model, Emission(both, NO_REGIONS, {}, "ort-cpu"), {"ids": ids})
    assert "table" not in emitted.graph.initializers


@pytest.mark.parametrize("op", ["MatMul", "Gemm", "Conv"])
def test_weight_behind_layout_operators(build: Build, op: str) -> None:
    texts = {
        "MatMul": "t = Transpose<perm=[1,0]>(w) \n i = Identity(t) \n y = MatMul(x, i)",
        "Gemm": "r = Reshape(w, shape) \n t = Transpose<perm=[1,0]>(r) \n y = Gemm<transB=1>(x, t)",
        "Conv": "r = Reshape(w, kernel) \n u = Reshape(x, image) \n c = Conv(u, r) \n y = Reshape(c, rows)",
    }
    shapes = {"shape": [64, 64], "kernel": [64, 64, 1, 1], "image": [4, 64, 1, 1], "rows": [4, 64]}
    arrays: dict[str, Array] = {name: np.array(shape) for name, shape in shapes.items() if name in texts[op]}
    model = ir.from_proto(build(f"g (float[4,64] x) => (float[4,64] y) {{ {texts[op]} }}", {"w": W, **arrays}))
    name_nodes(model)
    check_all(model, {"x": X}, ("packed",) if op == "Conv" else PRODUCTS, num_targets=1)


BRANCHES = """g (float[4,64] x, bool c) => (float[4,64] y) {
    a = Relu(x)
    y = If (c) <
        then_branch = left () => (float[4,64] l) { p = MatMul(a, w) \n l = MatMul(p, v) },
        else_branch = right () => (float[4,64] r) { r = Gemm<transB=1>(a, w, b) }
    >
}"""


@pytest.mark.parametrize("taken", [False, True])
def test_layers_inside_if(build: Build, taken: bool) -> None:
    bias = np.linspace(-1, 1, 64, dtype=np.float32)
    model = load_model(build(BRANCHES, {"w": W / 8, "v": V, "b": bias})).model
    check_all(model, {"x": X, "c": np.array(taken)}, PRODUCTS, num_targets=3)


def test_layers_inside_if_run_the_kernel(build: Build) -> None:
    model = load_model(build(BRANCHES, {"w": W / 8, "v": V, "b": W[0]})).model
    integer = ("dynamic", "DynamicQuantizeMatMul")
    for runtime, form, kernel in (
        ("ort-cpu", *integer),
        ("portable", *integer),
        ("ort-cpu", "matmulnbits", "MatMulNBits"),
    ):
        emitted = emit(model, everywhere(model, form, QuantSpec(4, 32), runtime)).model
        assert [node.op_type for node in optimized_nodes(emitted)].count(kernel) == 3, (form, runtime)


def test_layers_inside_loop(build: Build) -> None:
    text = """g (float[4,64] x) => (float[4,64] y) {
        y = Loop (three, yes, x) <
            body = step (int64 i, bool going, float[4,64] s) => (bool still, float[4,64] n) {
                still = Identity(going) \n p = MatMul(s, w) \n n = Tanh(p)
            }
        >
    }"""
    arrays = {"w": W / 8, "three": np.array(3), "yes": np.array(True)}
    model = load_model(build(text, arrays)).model
    targets, _ = find_targets(model)
    (target,) = targets.values()
    blocked = emitter("matmulnbits").refuse(target, QuantSpec(4, 32), "portable")
    assert blocked == "onnxruntime does not fuse blocked DequantizeLinear inside a subgraph"
    assert emitter("qdq").refuse(target, SPECS[2], "ort-cpu") == "activations inside a subgraph stay float"
    emission = everywhere(model, "packed", QuantSpec(4, 32), "ort-cpu")
    check(model, emission, {"x": X})
    for form, runtime in [("dynamic", "ort-cpu"), ("dynamic", "portable"), ("matmulnbits", "ort-cpu")]:
        emission = everywhere(model, form, QuantSpec(4, 32), runtime)
        got, simulated = (
            make_session(graph).run({"x": X})["y"] for graph in (emit(model, emission).model, simulate(model, emission))
        )
        assert metrics.sqnr(simulated, got) >= 60, "three rounds carry a flipped code on"


def test_a_layer_that_is_read_and_returned(build: Build) -> None:
    text = "g (float[4,64] x) => (float[4,64] y, float[4,64] z) { y = MatMul(x, w) \n z = MatMul(y, v) }"
    model = load_model(build(text, {"w": W, "v": V})).model
    for form in PRODUCTS:
        emission = everywhere(model, form, QuantSpec(4, 32), "ort-cpu")
        emitted = check(model, emission, {"x": X})
        assert [value.name for value in emitted.graph.outputs] == ["y", "z"]
        assert [value.shape for value in emitted.graph.outputs] == [ir.Shape([4, 64])] * 2


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("form", PRODUCTS)
def test_any_order_of_layers(build: Build, form: str, reverse: bool) -> None:
    """`w` is read before and after `v`, both read the same values: what they share must come before all of them."""
    text = """g (float[4,64] x) => (float[4,64] a, float[4,64] b, float[4,64] c, float[4,64] d) {
        r = Relu(x) \n a = MatMul(r, w) \n b = MatMul(x, v) \n c = MatMul(x, w) \n d = MatMul(r, v) }"""
    model = load_model(build(text, {"w": W, "v": V})).model
    names = list(find_targets(model)[0])
    assert len(names) == 2
    for runtime in RUNTIMES if form != "matmulnbits" else RUNTIMES[:1]:  # shared weights are refused there
        order = list(reversed(names)) if reverse else names
        emitted = check(model, everywhere(model, form, QuantSpec(4, 32), runtime, order), {"x": X})
        rounded = [node for node in emitted.graph if node.op_type == "DynamicQuantizeLinear"]
        assert len(rounded) == (2 if form == "dynamic" else 0)


def test_weight_that_something_else_reads(build: Build) -> None:
    """The float weight stays for the operator that is no target."""
    text = "g (float[64,64] x) => (float[64,64] y, float[64,64] z) { y = MatMul(x, w) \n z = Add(x, w) }"
    model = load_model(build(text, {"w": W})).model
    square = RNG.standard_normal((64, 64)).astype(np.float32)
    for form, spec, runtime in combinations():
        emission = everywhere(model, form, spec, runtime)
        if emission.layers:
            got = make_session(emit(model, emission).model).run({"x": square})
            assert np.array_equal(got["z"], square + W)
            assert 5 < metrics.sqnr(square @ W, got["y"]) < DECIBELS


def test_a_target_without_an_assignment_stays(build: Build) -> None:
    text = "g (float[4,64] x) => (float[4,64] y, float[4,64] z) { y = MatMul(x, w) \n z = MatMul(x, v) }"
    model = load_model(build(text, {"w": W, "v": V})).model
    first, second = find_targets(model)[0]
    emission = everywhere(model, "packed", QuantSpec(2, 16), "ort-cpu", [first])
    emitted = emit(model, emission)
    got = make_session(emitted.model).run({"x": X})
    assert metrics.sqnr(X @ V, got["z"]) >= DECIBELS > metrics.sqnr(X @ W, got["y"])
    assert "v" in emitted.names[second] and "v" in emitted.model.graph.initializers
    assert "w" not in emitted.model.graph.initializers
    assert [edge.output for edge in emitted.edges[first]] == ["y"]


def test_names_that_are_taken(build: Build) -> None:
    """The model already calls its values what an emitter would."""
    made = [f"q{number}" for number in range(40)]
    chain = " \n ".join(f"{name} = Relu({before})" for before, name in itertools.pairwise(["x", *made]))
    text = f"""g (float[4,64] x) => (float[4,64] y, float[4,64] z) {{
        {chain} \n shape = Relu(x) \n zero = Relu(shape) \n c = Abs(zero)
        [layer] y = MatMul(c, w) \n [other] z = MatMul({made[-1]}, v) }}"""
    model = load_model(build(text, {"w": W, "v": V})).model
    model.graph.initializers["v"].name = "layer.codes"
    taken = {str(value.name) for node in model.graph for value in node.outputs}
    assert {"q1", "q39", "shape", "zero", "c"} <= taken
    check_all(model, {"x": X}, PRODUCTS, num_targets=2)
    for form, runtime in itertools.product(PRODUCTS, RUNTIMES):
        emitted = emit(model, everywhere(model, form, QuantSpec(3, 16), runtime)).model
        names = [str(value.name) for node in emitted.graph for value in node.outputs]
        names += [*emitted.graph.initializers, "x"]
        assert len(names) == len(set(names))


def test_a_function_domain_of_the_same_name(build: Build) -> None:
    """A model may bring functions of the domain `quantkit`, even one called as ours are."""
    body = """<domain: "quantkit", opset_import: ["": 21]>
        Unpack3 (a, s) => (o) { t = Identity(a) \n o = Relu(t) }"""
    proto = build(
        "g (float[4,64] x) => (float[4,64] y) { r = quantkit.Unpack3(x, x) \n y = MatMul(r, w) }",
        {"w": W},
        domains=', "quantkit": 1',
    )
    proto.functions.append(onnx.parser.parse_function(body))
    model = load_model(proto).model
    emitted = check(model, everywhere(model, "packed", QuantSpec(3, 16), "ort-cpu"), {"x": X})
    assert {function.name for function in emitted.functions.values()} == {"Unpack3", "Dequantize"}


def test_the_first_node_may_be_replaced(build: Build) -> None:
    """The place in front of which weights are unpacked goes away with the first layer."""
    text = "g (float[4,64] x) => (float[4,64] z) { y = Gemm(x, w, b) \n z = Gemm(y, v, b) }"
    model = load_model(build(text, {"w": W, "v": V, "b": W[0]})).model
    assert model.graph[0].op_type == "Gemm"
    check_all(model, {"x": X}, PRODUCTS, num_targets=2)


def test_equal_weights_are_stored_once(build: Build) -> None:
    """Also when one operator reads the transpose of what another does."""
    text = "g (float[4,64] x) => (float[4,64] y, float[4,64] z) { y = MatMul(x, w) \n z = Gemm<transB=1>(x, u) }"
    model = load_model(build(text, {"w": W, "u": np.ascontiguousarray(W.T)})).model
    assert len(find_targets(model)[0]) == 2
    emitted = emit(model, everywhere(model, "packed", QuantSpec(4, 32), "ort-cpu")).model
    codes = [value.const_value for name, value in emitted.graph.initializers.items() if ".codes" in name]
    assert [tensor.nbytes for tensor in codes if tensor is not None] == [64 * 64 // 2]


def small(build: Build) -> tuple[ir.Model, Emission]:
    model = load_model(build("g (float[4,64] x) => (float[4,64] y) { y = MatMul(x, w) }", {"w": W})).model
    return model, everywhere(model, "packed", QuantSpec(4, 32), "ort-cpu")


def test_saved_file(build: Build, tmp_path: Path) -> None:
    model, emission = small(build)
    emitted = emit(model, emission).model
    path = tmp_path / "model.onnx"
    path.write_bytes(b"an older file")
    save(emitted, path)
    assert [item.name for item in tmp_path.iterdir()] == ["model.onnx"]
    assert file_size(path) == path.stat().st_size == serialized_size(emitted)
    first, second = (make_session(source).run({"x": X})["y"] for source in (path, emitted))
    assert np.array_equal(first, second)


def test_saved_with_external_data(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit of a protobuf the weights go beside the file."""
    model, emission = small(build)
    emitted = emit(model, emission).model
    wanted = make_session(emitted).run({"x": X})["y"]
    monkeypatch.setattr("quantkit.graph.emit.PROTOBUF_LIMIT", 100)
    path = tmp_path / "model.onnx"
    save(emitted, path)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert file_size(path) == sum(item.stat().st_size for item in tmp_path.iterdir())
    assert 64 * 64 // 2 <= serialized_size(emitted) <= file_size(path)
    assert np.array_equal(make_session(path).run({"x": X})["y"], wanted)
    assert not any(isinstance(value.const_value, ir.ExternalTensor) for value in emitted.graph.initializers.values())


def test_failed_save_leaves_the_old_file(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, emission = small(build)
    path = tmp_path / "model.onnx"
    path.write_bytes(b"an older file")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "the disk is full")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="the disk is full"):
        save(emit(model, emission).model, path)
    assert [item.name for item in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == b"an older file"


def test_notes_are_dropped(build: Build) -> None:
    """Shapes that runtimes infer, and names of nodes that nobody gave."""
    model, emission = small(build)
    emitted = emit(model, emission).model
    assert all(value.shape is None for node in emitted.graph for value in node.outputs if value.name != "y")
    assert [str(value.shape) for value in emitted.graph.outputs] == [str(value.shape) for value in model.graph.outputs]
    assert [node.name for node in emitted.graph if node.name] == ["MatMul/y"]


def test_bias_shifts_reach_file_and_simulation(build: Build) -> None:
    model = load_model(build("g (float[4,64] x) => (float[4,64] y) { y = Gemm(x, w) }", {"w": W})).model
    for form in PRODUCTS:
        emission = everywhere(model, form, QuantSpec(4, 32), "ort-cpu")
        shifts = dict.fromkeys(emission.layers, np.arange(64, dtype=np.float32))
        emitted = check(model, replace(emission, bias_shifts=shifts), {"x": X})
        plain = make_session(emit(model, emission).model).run({"x": X})["y"]
        difference = make_session(emitted).run({"x": X})["y"] - plain
        np.testing.assert_allclose(difference, np.broadcast_to(np.arange(64), (4, 64)), atol=1e-4)
