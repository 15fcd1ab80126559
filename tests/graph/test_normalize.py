"""Normalisation: what is folded, what must not be, and that outputs and the signature stay the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from quantkit.errors import InputError
from quantkit.graph.load import LoadedModel, load_model

Array = npt.NDArray[Any]
Build = Callable[..., onnx.ModelProto]
Run = Callable[..., list[Array]]

RNG = np.random.default_rng(0)


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def statistics(channels: int) -> dict[str, Array]:
    """scale, shift, mean and variance of a batch normalisation."""
    return {"g": normal(channels), "h": normal(channels), "m": normal(channels), "v": np.abs(normal(channels)) + 0.1}


def check(model: onnx.ModelProto, feeds: Mapping[str, Array], run: Run) -> LoadedModel:
    """The normalised model computes the same, and callers see no difference."""
    loaded = load_model(model)
    graph, original = loaded.model.graph, ir.from_proto(model).graph
    for old, new in zip((*original.inputs, *original.outputs), (*graph.inputs, *graph.outputs), strict=True):
        assert (old.name, old.dtype, old.shape) == (new.name, new.dtype, new.shape)
    for before, after in zip(run(model, feeds), run(loaded.model, feeds), strict=True):
        assert before.shape == after.shape and before.dtype == after.dtype
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5 * max(1.0, float(np.abs(before).max())))
    return loaded


def operators(loaded: LoadedModel) -> list[str]:
    return [node.op_type for node in loaded.model.graph.all_nodes()]


def constants(loaded: LoadedModel) -> dict[str, Array]:
    values = loaded.model.graph.initializers.values()
    return {str(value.name): value.const_value.numpy() for value in values if value.const_value is not None}


BN = "BatchNormalization<epsilon=0.01>"
NORM = "float[c] g, float[c] h, float[c] m, float[c] v"
# text of the graph with %s for the input of the normalisation, weights, input shape, channels, what is left
FOLDS: dict[str, tuple[str, dict[str, Array], tuple[int, ...], int, list[str]]] = {
    "conv": ("a = Conv(x, w)", {"w": normal(6, 3, 3, 3)}, (2, 3, 8, 8), 6, ["Conv"]),
    "conv bias": ("a = Conv(x, w, b)", {"w": normal(6, 3, 3, 3), "b": normal(6)}, (2, 3, 8, 8), 6, ["Conv"]),
    "conv grouped": ("a = Conv<group=3>(x, w)", {"w": normal(6, 1, 3, 3)}, (2, 3, 8, 8), 6, ["Conv"]),
    "conv 1d": ("a = Conv(x, w)", {"w": normal(6, 3, 3)}, (2, 3, 8), 6, ["Conv"]),
    "conv bias added": (
        "z = Conv(x, w) a = Add(b, z)",
        {"w": normal(6, 3, 3, 3), "b": normal(6, 1, 1)},
        (2, 3, 8, 8),
        6,
        ["Conv"],
    ),
    "transposed": (
        "a = ConvTranspose(x, w, b)",
        {"w": normal(3, 6, 2, 2), "b": normal(6)},
        (2, 3, 4, 4),
        6,
        ["ConvTranspose"],
    ),
    "transposed grouped": (
        "a = ConvTranspose<group=2, strides=[2,2]>(x, w)",
        {"w": normal(4, 3, 2, 2)},
        (2, 4, 4, 4),
        6,
        ["ConvTranspose"],
    ),
    "gemm": ("a = Gemm(x, w)", {"w": normal(5, 6)}, (4, 5), 6, ["Gemm"]),
    "gemm transposed": (
        "a = Gemm<transB=1, alpha=0.5, beta=3.0>(x, w, b)",
        {"w": normal(6, 5), "b": normal(1, 6)},
        (4, 5),
        6,
        ["Gemm"],
    ),
    "gemm scalar bias": ("a = Gemm(x, w, b)", {"w": normal(5, 6), "b": normal(1)}, (4, 5), 6, ["Gemm"]),
    "matmul": ("a = MatMul(x, w)", {"w": normal(5, 6)}, (4, 5), 6, ["MatMul", "Add"]),
    "matmul bias": (
        "z = MatMul(x, w) a = Add(b, z)",
        {"w": normal(5, 6), "b": normal(6)},
        (4, 5),
        6,
        ["MatMul", "Add"],
    ),
    "weight behind a transpose": (
        "t = Transpose<perm=[1,0]>(w) a = MatMul(x, t)",
        {"w": normal(6, 5)},
        (4, 5),
        6,
        ["MatMul", "Add"],
    ),
}


def with_norm(
    name: str, build: Build, tail: str = "", outputs: str = "float y"
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    body, weights, shape, channels, _ = FOLDS[name]
    declared = "".join(f", float[{','.join(map(str, array.shape))}] {key}" for key, array in weights.items())
    text = f"g (float[{','.join(map(str, shape))}] x{declared}, {NORM.replace('[c]', f'[{channels}]')}) => ({outputs})"
    return build(
        f"{text} {{ {body} [bn] y = {BN}(a, g, h, m, v) {tail} }}",
        {**weights, **statistics(channels)},
        opset=15,
        ir_version=8,
    ), {"x": normal(*shape)}


@pytest.mark.parametrize("name", FOLDS)
def test_batch_normalization_is_folded(name: str, build: Build, run: Run) -> None:
    model, feeds = with_norm(name, build)
    loaded = check(model, feeds, run)
    assert operators(loaded) == FOLDS[name][-1]
    assert "folded 1 BatchNormalization" in loaded.notes


@pytest.mark.parametrize("name", ["conv", "gemm", "matmul bias"])
def test_no_fold_when_something_else_reads_the_layer(name: str, build: Build, run: Run) -> None:
    model, feeds = with_norm(name, build, "u = Relu(a)", "float y, float u")
    assert "BatchNormalization" in operators(check(model, feeds, run))
    model, feeds = with_norm(name, build, "", "float y, float a")
    assert "BatchNormalization" in operators(check(model, feeds, run))


def test_no_fold_in_training_mode(build: Build) -> None:
    model, _ = with_norm("conv", build)
    model.graph.node[1].attribute.add(name="training_mode", type=onnx.AttributeProto.INT, i=1)
    assert operators(load_model(model)) == ["Conv", "BatchNormalization"]


def test_no_fold_along_another_axis(build: Build, run: Run) -> None:
    text = "g (float[2,6,5] x, float[5,6] w, float[6] g, float[6] h, float[6] m, float[6] v) => (float y)"
    model = build(f"{text} {{ a = MatMul(x, w) y = {BN}(a, g, h, m, v) }}", {"w": normal(5, 6), **statistics(6)})
    assert operators(check(model, {"x": normal(2, 6, 5)}, run)) == ["MatMul", "BatchNormalization"]
    text = "g (float[6,5] x, float[5,6] w, float[6,1] b, float[6] g, float[6] h, float[6] m, float[6] v) => (float y)"
    weights = {"w": normal(5, 6), "b": normal(6, 1), **statistics(6)}
    for layer in ("a = Gemm(x, w, b)", "z = MatMul(x, w) a = Add(z, b)"):
        model = build(f"{text} {{ {layer} y = {BN}(a, g, h, m, v) }}", weights)
        assert "BatchNormalization" in operators(check(model, {"x": normal(6, 5)}, run))


def test_no_fold_of_computed_statistics(build: Build, run: Run) -> None:
    text = "g (float[2,3,8,8] x, float[6] m, float[6,3,3,3] w, float[6] g, float[6] h, float[6] v) => (float y)"
    values = statistics(6)
    mean = values.pop("m")
    model = build(f"{text} {{ a = Conv(x, w) y = {BN}(a, g, h, m, v) }}", {"w": normal(6, 3, 3, 3), **values})
    assert "BatchNormalization" in operators(check(model, {"x": normal(2, 3, 8, 8), "m": mean}, run))


def test_shared_weights_are_copied_before_a_fold(build: Build, run: Run) -> None:
    text = (
        f"g (float[2,3,8,8] x, float[3,3,3,3] w, float[3] b, {NORM.replace('[c]', '[3]')}) => (float y, float u) "
        f"{{ a = Conv(x, w, b) y = {BN}(a, g, h, m, v) u = Conv(x, w, b) }}"
    )
    weight = normal(3, 3, 3, 3)
    model = build(text, {"w": weight, "b": normal(3), **statistics(3)})
    loaded = check(model, {"x": normal(2, 3, 8, 8)}, run)
    assert operators(loaded) == ["Conv", "Conv"]
    assert np.array_equal(constants(loaded)["w"], weight)


def test_norm_in_a_subgraph(build: Build, run: Run) -> None:
    text = (
        f"g (float[2,3,8,8] x, bool c, float[3,3,3,3] w, {NORM.replace('[c]', '[3]')}) => (float y) {{ y = If (c) <"
        f"then_branch = t () => (float[a,b,d,e] p) {{ a0 = Conv(x, w) p = {BN}(a0, g, h, m, v) }}, "
        "else_branch = e () => (float[a,b,d,e] q) { q = Conv(x, w) }> }"
    )
    model = build(text, {"w": normal(3, 3, 3, 3), **statistics(3)})
    for flag in (True, False):
        loaded = check(model, {"x": normal(2, 3, 8, 8), "c": np.array(flag)}, run)
    assert operators(loaded) == ["If", "Conv", "Conv"]


@pytest.mark.parametrize(
    ("shape", "merged"),
    [((6, 1, 1), True), ((1, 6, 1, 1), True), ((1,), True), ((), True), ((6,), False), ((1, 1, 6, 6), False)],
)
@pytest.mark.parametrize("layer", ["Conv(x, w)", "Conv(x, w, c)", "ConvTranspose(x, w, c)"])
def test_bias_add(shape: tuple[int, ...], merged: bool, layer: str, build: Build, run: Run) -> None:
    declared = f"float[{','.join(map(str, shape))}] b" if shape else "float b"
    text = f"g (float[2,6,6,6] x, float[6,6,1,1] w, {declared}, float[6] c) => (float y)"
    model = build(
        f"{text} {{ a = {layer} y = Add(a, b) }}", {"w": normal(6, 6, 1, 1), "b": normal(*shape), "c": normal(6)}
    )
    loaded = check(model, {"x": normal(2, 6, 6, 6)}, run)
    assert operators(loaded) == ([layer[: layer.index("(")]] if merged else [layer[: layer.index("(")], "Add"])
    assert ("merged 1 bias Add into a convolution" in loaded.notes) == merged


def test_residual_add_stays(build: Build, run: Run) -> None:
    text = "g (float[2,6,6,6] x, float[6,6,1,1] w, float[6] c) => (float y) { a = Conv(x, w) y = Add(a, a) }"
    model = build(text, {"w": normal(6, 6, 1, 1), "c": normal(6)})
    assert operators(check(model, {"x": normal(2, 6, 6, 6)}, run)) == ["Conv", "Add"]


@pytest.mark.parametrize(
    ("attributes", "left"),
    [("alpha=0.5", ["Gemm"]), ("beta=0.25, transB=1", ["Gemm"]), ("alpha=2.0, beta=0.0", ["Gemm"])],
)
def test_gemm_factors(attributes: str, left: list[str], build: Build, run: Run) -> None:
    shape = (6, 5) if "transB" in attributes else (5, 6)
    text = f"g (float[4,5] x, float[{shape[0]},{shape[1]}] w, float[6] b) => (float y)"
    model = build(f"{text} {{ y = Gemm<{attributes}>(x, w, b) }}", {"w": normal(*shape), "b": normal(6)})
    loaded = check(model, {"x": normal(4, 5)}, run)
    assert operators(loaded) == left
    assert not {"alpha", "beta"} & set(loaded.model.graph[0].attributes)
    assert "folded alpha/beta of 1 Gemm" in loaded.notes


def test_gemm_factors_of_activations(build: Build, run: Run) -> None:
    text = "g (float[4,5] x, float[5,6] w, float[4,6] c) => (float y) { y = Gemm<alpha=2.0, beta=0.5>(x, w, c) }"
    loaded = check(build(text, {"w": normal(5, 6)}), {"x": normal(4, 5), "c": normal(4, 6)}, run)
    assert operators(loaded) == ["Mul", "Gemm"]
    loaded = check(build(text), {"x": normal(4, 5), "c": normal(4, 6), "w": normal(5, 6)}, run)
    assert loaded.model.graph[-1].attributes["alpha"].as_float() == 2.0


def test_gemm_factors_leave_shared_weights_alone(build: Build, run: Run) -> None:
    text = "g (float[4,5] x, float[5,5] w) => (float y) { a = Gemm<alpha=2.0>(x, w) y = Gemm(a, w) }"
    check(build(text, {"w": normal(5, 5)}), {"x": normal(4, 5)}, run)


def test_identities_and_dropouts_go(build: Build, run: Run) -> None:
    text = (
        "g (float[2,4] x, bool f) => (float[2,4] y, float[2,4] z, float[2,4] same, float[2,4] u) "
        "{ a = Identity(x) b = Relu(a) c = Dropout(b) y = Identity(c) z = Identity(y) same = Identity(x) "
        "u = If (f) <then_branch = t () => (float[2,4] p) { p = Identity(b) }, "
        "else_branch = e () => (float[2,4] q) { r = Neg(b) q = Identity(r) }> }"
    )
    for flag in (True, False):
        loaded = check(build(text), {"x": normal(2, 4), "f": np.array(flag)}, run)
    assert operators(loaded).count("Dropout") == 0
    assert "removed 1 Dropout" in loaded.notes


def test_constants_become_initializers(build: Build, run: Run) -> None:
    text = (
        "g (float[2,4] x) => (float[2,4] y, float k) { c = Constant<value_float=2.0>() "
        "d = Constant<value_ints=[2,-1]>() e = Mul(c, c) a = Mul(x, e) b = Reshape(a, d) y = Relu(b) "
        "k = Constant<value=float{3}>() }"
    )
    loaded = check(build(text), {"x": normal(2, 4)}, run)
    assert "Constant" not in operators(loaded)[:-1]
    assert operators(loaded).count("Mul") == 1


def test_folding_does_not_blow_up(build: Build, run: Run) -> None:
    text = (
        "g (float[1] x, float[1,1] k) => (float y, float u) { s = Constant<value_ints=[200,200]>() "
        "a = Expand(k, s) y = Add(a, x) z = ConstantOfShape(s) u = Add(z, x) }"
    )
    loaded = check(build(text, {"k": normal(1, 1)}), {"x": normal(1)}, run)
    assert sum(array.nbytes for array in constants(loaded).values()) < 1000


def test_large_weights_are_not_copied_through_layout_operators(build: Build, run: Run) -> None:
    text = "g (float[2,512] x, float[600,512] w) => (float y) { t = Transpose<perm=[1,0]>(w) y = MatMul(x, t) }"
    loaded = check(build(text, {"w": normal(600, 512)}), {"x": normal(2, 512)}, run)
    assert operators(loaded) == ["Transpose", "MatMul"]
    text = text.replace("600", "60")
    loaded = check(build(text, {"w": normal(60, 512)}), {"x": normal(2, 512)}, run)
    assert operators(loaded) == ["MatMul"]


def test_equal_weights_are_merged(build: Build, run: Run) -> None:
    text = "g (float[2,5] x, float[5,5] w, float[5,5] w2) => (float y) { a = MatMul(x, w) y = MatMul(a, w2) }"
    weight = normal(5, 5)
    loaded = check(build(text, {"w": weight, "w2": weight}), {"x": normal(2, 5)}, run)
    assert list(loaded.model.graph.initializers) == ["w"]


def with_function(build: Build, opset: int = 21) -> onnx.ModelProto:
    model = build(
        "g (float[2,5] x, float[5,5] w) => (float[2,5] y) { a = local.twice(x, w) y = Relu(a) }",
        {"w": normal(5, 5)},
        domains=', "local": 1',
    )
    text = f'<domain: "local", opset_import: ["": {opset}]> twice (x, w) => (y) {{ a = MatMul(x, w) y = MatMul(a, w) }}'
    model.functions.append(onnx.parser.parse_function(text))
    return model


def test_functions_are_inlined(build: Build, run: Run) -> None:
    loaded = check(with_function(build), {"x": normal(2, 5)}, run)
    assert operators(loaded) == ["MatMul", "MatMul", "Relu"]
    assert "inlined 1 model-local function" in loaded.notes
    assert set(loaded.model.opset_imports) == {""}


def test_functions_of_another_opset(build: Build) -> None:
    with pytest.raises(InputError, match=r"a function of the model cannot be inlined: Opset mismatch .*local::twice"):
        load_model(with_function(build, opset=17))


def test_lifted_constants_of_subgraphs_do_not_clash(build: Build, run: Run) -> None:
    branch = "{{ k = Constant<value=float[4]{{{0},1,1,1}}>() {1} = Add(x, k) }}"
    text = (
        f"g (float[2,4] x, bool f) => (float[2,4] y) {{ y = If (f) <then_branch = t () => (float[2,4] p) "
        f"{branch.format(1, 'p')}, else_branch = e () => (float[2,4] q) {branch.format(2, 'q')}> }}"
    )
    for flag in (True, False):
        loaded = check(build(text), {"x": normal(2, 4), "f": np.array(flag)}, run)
    assert len(loaded.model.graph.initializers) == 2


@pytest.mark.parametrize(
    "dtype", [ir.DataType.BFLOAT16, ir.DataType.FLOAT8E4M3FN, ir.DataType.INT4, ir.DataType.FLOAT16]
)
def test_narrow_types_pass_through(dtype: ir.DataType, build: Build) -> None:
    model = ir.from_proto(build("g (float[2] x) => (float[2] y) { y = Relu(x) }"))
    for name in ("a", "b"):
        tensor = ir.tensor(np.arange(6).reshape(2, 3).astype(dtype.numpy()), dtype=dtype, name=name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape([2, 3]), const_value=tensor)
        model.graph.register_initializer(value)
        node = ir.node("Identity", [value])
        node.outputs[0].name = f"out_{name}"
        model.graph.append(node)
        model.graph.outputs.append(node.outputs[0])
    loaded = load_model(model)
    assert [value.name for value in loaded.model.graph.outputs] == ["y", "out_a", "out_b"]
