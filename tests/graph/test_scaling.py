"""Scale groups: where scales go in a graph, that the graph still computes the same, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from quantkit.errors import InputError
from quantkit.graph.load import load_model
from quantkit.graph.rescale import apply_scales
from quantkit.graph.scaling import Found, find_groups
from quantkit.graph.targets import find_targets
from quantkit.runtime.ort import make_session
from quantkit.types import Array
from tests.helpers.models import block, build, cnn, images, random, tokens

TOLERANCE = 1e-5


def load(text: str, weights: Mapping[str, Array], **options: Any) -> ir.Model:
    return load_model(build(text, weights, **options)).model


def run(model: ir.Model, feed: Mapping[str, Array]) -> Array:
    return np.asarray(next(iter(make_session(model, threads=1).run(dict(feed)).values())))


def random_scales(found: Found, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {group.name: np.exp(rng.standard_normal(group.size)) for group in found.groups}


def weight_bytes(model: ir.Model) -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)


def check_same(model: ir.Model, feed: Mapping[str, Array], found: Found | None = None) -> ir.Model:
    """Random scales in every group: the outputs stay, every reader's weight changes, nothing else does."""
    found = found or find_groups(model)
    assert found.groups
    before = {str(value.name): value.const_value.tobytes() for value in initializers(model)}
    scaled = apply_scales(model, found.groups, random_scales(found))
    assert {str(value.name): value.const_value.tobytes() for value in initializers(model)} == before
    assert scaled.opset_imports == model.opset_imports
    assert {value.dtype for value in initializers(scaled)} == {value.dtype for value in initializers(model)}
    wanted, got = run(model, feed), run(scaled, feed)
    assert np.abs(got - wanted).max() <= TOLERANCE * np.abs(wanted).max()
    old, new = find_targets(model)[0], find_targets(scaled)[0]
    assert list(old) == list(new)
    for group in found.groups:
        for name in set(group.readers) & set(old):
            assert not np.allclose(old[name].load(), new[name].load(), rtol=0.05)
    return scaled


def initializers(model: ir.Model) -> list[Any]:
    return list(model.graph.initializers.values())


def readers(found: Found) -> list[tuple[str, list[str]]]:
    return [(group.kind, list(group.readers)) for group in found.groups]


NORM = """g (float[B,S,32] x, float[32] gain, float[32] shift, float[32,32] q, float[32,32] k, float[32,32] v)
    => (float[B,S,32] y) {
    n = LayerNormalization<axis=-1>(x, gain, shift)
    a = MatMul(n, q)
    b = MatMul(n, k)
    c = MatMul(n, v)
    s = Add(a, b)
    y = Add(s, c)
}"""


def norm_weights(size: int = 32) -> dict[str, Array]:
    vectors = {"gain": random(size, 1)[:, 0] + 2, "shift": random(size, 1, seed=1)[:, 0]}
    return {**vectors, **{name: random(size, size, seed=place) for place, name in enumerate("qkv")}}


def floats(*shape: int) -> Array:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


def test_layer_normalization_to_all_of_its_readers() -> None:
    model = load(NORM, norm_weights())
    found = find_groups(model)
    assert [(group.kind, len(group.readers), group.size) for group in found.groups] == [("norm", 3, 32)]
    check_same(model, {"x": floats(2, 3, 32)})


def test_the_arithmetic_of_one_group() -> None:
    model = load(NORM, norm_weights())
    found = find_groups(model)
    scales = random_scales(found)
    (factors,) = scales.values()
    scaled = apply_scales(model, found.groups, scales)
    for old, new in zip(find_targets(model)[0].values(), find_targets(scaled)[0].values(), strict=True):
        np.testing.assert_allclose(new.load(), old.load() * factors, rtol=1e-6)
    node = next(node for node in scaled.graph if node.op_type == "LayerNormalization")
    for index, name in ((1, "gain"), (2, "shift")):
        value = node.inputs[index]
        assert value is not None and value.const_value is not None
        np.testing.assert_allclose(value.const_value.numpy(), norm_weights()[name] / factors, rtol=1e-6)


RMS = {
    "fused": ("n = RMSNormalization<axis=-1>(x, gain)", 23),
    "parts, gain last": (
        "p = Mul(x, x) m = ReduceMean(p, axes) d = Sqrt(m) r = Reciprocal(d) h = Mul(x, r) n = Mul(h, gain)",
        22,
    ),
    "parts, gain first": ("p = Mul(x, x) m = ReduceMean(p, axes) d = Sqrt(m) h = Div(x, d) n = Mul(gain, h)", 24),
    "parts, Pow": ("p = Pow(x, two) m = ReduceMean(p, axes) d = Sqrt(m) h = Div(x, d) n = Mul(h, gain)", 18),
}


@pytest.mark.parametrize("spelling", RMS)
def test_rms_normalization_in_every_spelling(spelling: str) -> None:
    body, opset = RMS[spelling]
    text = f"""g (float[B,S,32] x, float[32] gain, float[32,32] q, float[32,32] k, int64[1] axes, float two)
        => (float[B,S,32] y) {{ {body} a = MatMul(n, q) b = MatMul(n, k) y = Add(a, b) }}"""
    weights = {name: norm_weights()[name] for name in ("gain", "q", "k")}
    constants = {"axes": np.array([-1]), "two": np.array(2.0, np.float32)}
    model = load(text, {**weights, **constants}, opset=opset)
    found = find_groups(model)
    assert [(group.kind, len(group.readers)) for group in found.groups] == [("norm" if opset == 23 else "factor", 2)]
    check_same(model, {"x": floats(2, 3, 32)})


ATTENTION = """g (float[B,S,32] x, float[32,32] q, float[32,16] k, float[32,16] v, float[16] bias, float[32,32] o,
    int64[4] heads, int64[4] kv, int64[1] two, int64[5] wide, int64[4] all, int64[3] flat) => (float[B,S,32] y) {
    q0 = MatMul(x, q)
    q1 = Reshape<allowzero=0>(q0, heads)
    q2 = Transpose<perm=[0,2,1,3]>(q1)
    k0 = MatMul(x, k)
    k1 = Reshape(k0, kv)
    k2 = Transpose<perm=[0,2,1,3]>(k1)
    k3 = Unsqueeze(k2, two)
    k4 = Expand(k3, wide)
    k5 = Reshape(k4, all)
    k6 = Transpose<perm=[0,1,3,2]>(k5)
    v0 = MatMul(x, v)
    v00 = Add(v0, bias)
    v1 = Reshape(v00, kv)
    v2 = Transpose<perm=[0,2,1,3]>(v1)
    v3 = Unsqueeze(v2, two)
    v4 = Expand(v3, wide)
    v5 = Reshape(v4, all)
    s = MatMul(q2, k6)
    p = Softmax<axis=-1>(s)
    c = MatMul(p, v5)
    c1 = Transpose<perm=[0,2,1,3]>(c)
    c2 = Reshape(c1, flat)
    y = MatMul(c2, o)
}"""


def attention(kv_heads: int = 2) -> ir.Model:
    """4 query heads of 8, `kv_heads` heads of keys and values."""
    width = 8 * kv_heads
    sizes = (32, width, width, 32)
    text = ATTENTION.replace("float[32,16]", f"float[32,{width}]").replace("float[16]", f"float[{width}]")
    weights = {name: random(32, size, seed=place) for place, (name, size) in enumerate(zip("qkvo", sizes, strict=True))}
    shapes = {
        "heads": [0, 0, 4, 8],
        "kv": [0, 0, kv_heads, 8],
        "two": [2],
        "wide": [1, 1, 4 // kv_heads, 1, 1],
        "all": [0, 4, -1, 8],
        "flat": [0, 0, 32],
    }
    integers = {name: np.array(numbers, np.int64) for name, numbers in shapes.items()}
    return load(text, {**weights, **integers, "bias": random(width, 1)[:, 0]})


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_from_v_to_o_with_tied_heads(kv_heads: int) -> None:
    model = attention(kv_heads)
    found = find_groups(model)
    (group,) = found.groups
    assert (group.kind, group.size) == ("layer", 8 * kv_heads)
    (channels,) = group.readers.values()
    # Head h reads the values of head h // repeats.
    by_head = channels.reshape(4, 8)
    for head in range(4):
        assert by_head[head].tolist() == list(range(8 * (head * kv_heads // 4), 8 * (head * kv_heads // 4) + 8))
    check_same(model, {"x": floats(2, 5, 32)})
    reasons = [reason for reason in found.refused.values() if "sums over the channels" in reason]
    assert len(reasons) == 2  # q and k


@pytest.mark.parametrize("rank", [3, 4])
def test_the_operator_attention(rank: int) -> None:
    weights = {
        name: random(32, size, seed=place)
        for place, (name, size) in enumerate(zip("qkvo", (32, 16, 16, 32), strict=True))
    }
    if rank == 3:
        body = "c = Attention<q_num_heads=4, kv_num_heads=2>(a, b, d) y = MatMul(c, o)"
    else:
        body = """a1 = Reshape(a, heads) a2 = Transpose<perm=[0,2,1,3]>(a1) b1 = Reshape(b, kv)
            b2 = Transpose<perm=[0,2,1,3]>(b1) d1 = Reshape(d, kv) d2 = Transpose<perm=[0,2,1,3]>(d1)
            c = Attention(a2, b2, d2) c1 = Transpose<perm=[0,2,1,3]>(c) c2 = Reshape(c1, flat) y = MatMul(c2, o)"""
    shapes = {"heads": [0, 0, 4, 8], "kv": [0, 0, 2, 8], "flat": [0, 0, 32]} if rank == 4 else {}
    declared = "".join(f", int64[{len(numbers)}] {name}" for name, numbers in shapes.items())
    text = f"""g (float[2,5,32] x, float[32,32] q, float[32,16] k, float[32,16] v, float[32,32] o{declared})
        => (float[2,5,32] y) {{ a = MatMul(x, q) b = MatMul(x, k) d = MatMul(x, v) {body} }}"""
    model = load(text, {**weights, **{name: np.array(numbers) for name, numbers in shapes.items()}}, opset=23)
    found = find_groups(model)
    assert [(group.kind, group.size, len(group.readers)) for group in found.groups] == [("layer", 16, 1)]
    check_same(model, {"x": floats(2, 5, 32)})


def test_gated_mlp_scales_the_linear_factor() -> None:
    text = """g (float[B,S,32] x, float[32] gain, float[32,48] gate, float[32,48] up, float[48,32] down)
        => (float[B,S,32] y) {
        n = RMSNormalization<axis=-1>(x, gain)
        a = MatMul(n, gate)
        s = Sigmoid(a)
        t = Mul(a, s)
        b = MatMul(n, up)
        h = Mul(t, b)
        y = MatMul(h, down)
    }"""
    weights = {
        "gate": random(32, 48),
        "up": random(32, 48, seed=1),
        "down": random(48, 32),
        "gain": norm_weights()["gain"],
    }
    model = load(text, weights, opset=23)
    found = find_groups(model)
    assert [(group.kind, len(group.readers)) for group in found.groups] == [("norm", 2), ("layer", 1)]
    names = {value.name: str(node.name) for node in model.graph for value in node.outputs}
    assert found.groups[1].name == names["b"]
    assert found.refused[names["a"]].startswith(("Sigmoid", "Mul"))
    check_same(model, {"x": floats(2, 3, 32)})


def test_convolutions_with_depthwise_and_pooling() -> None:
    text = """g (float[N,4,12,12] x, float[16,4,3,3] w1, float[16] b1, float[16,1,3,3] w2, float[8,4,3,3] w3,
                  float[128,10] w4)
        => (float[N,10] y) {
        c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
        r1 = Relu(c1)
        c2 = Conv<group=16, pads=[1,1,1,1]>(r1, w2)
        r2 = LeakyRelu<alpha=0.1>(c2)
        p2 = MaxPool<kernel_shape=[3,3], strides=[3,3]>(r2)
        c3 = Conv<group=4, pads=[1,1,1,1]>(p2, w3)
        r3 = Relu(c3)
        f = Flatten<axis=1>(r3)
        y = MatMul(f, w4)
    }"""
    shapes = {"w1": (16, 4, 3, 3), "w2": (16, 1, 3, 3), "w3": (8, 4, 3, 3), "w4": (128, 10)}
    weights = {name: random(*shape, seed=place) for place, (name, shape) in enumerate(shapes.items())}
    model = load(text, {**weights, "b1": random(16, 1)[:, 0]})
    found = find_groups(model)
    assert [group.size for group in found.groups] == [16, 16, 8]
    assert next(iter(found.groups[2].readers.values())).tolist() == np.repeat(np.arange(8), 16).tolist()
    check_same(model, {"x": floats(2, 4, 12, 12)})


def test_transposed_convolution_on_both_sides() -> None:
    text = """g (float[N,8,6,6] x, float[8,8,2,2] w1, float[16] b1, float[16,8,2,2] w2, float[16,16,1,1] w3)
        => (float[N,16,24,24] y) {
        c1 = ConvTranspose<group=2, strides=[2,2]>(x, w1, b1)
        r1 = Relu(c1)
        c2 = ConvTranspose<group=2, strides=[2,2]>(r1, w2)
        y = Conv(c2, w3)
    }"""
    shapes = {"w1": (8, 8, 2, 2), "w2": (16, 8, 2, 2), "w3": (16, 16, 1, 1)}
    weights = {name: random(*shape, seed=place) for place, (name, shape) in enumerate(shapes.items())}
    model = load(text, {**weights, "b1": random(16, 1)[:, 0]})
    assert [group.size for group in find_groups(model).groups] == [16, 16]
    check_same(model, {"x": floats(2, 8, 6, 6)})


@pytest.mark.parametrize("trans", [0, 1])
def test_gemm_with_bias_and_prelu(trans: int) -> None:
    text = f"""g (float[N,24] x, float[24,40] w1, float[40] b1, float[40] slope, float[40,16] w2, float[16] b2)
        => (float[N,16] y) {{
        h = Gemm<transB={trans}>(x, w1, b1)
        r = PRelu(h, slope)
        y = Gemm<transB={trans}>(r, w2, b2)
    }}"""
    pairs = {"w1": random(24, 40), "w2": random(40, 16)}
    if trans:
        text = text.replace("float[24,40] w1", "float[40,24] w1").replace("float[40,16] w2", "float[16,40] w2")
        pairs = {name: np.ascontiguousarray(array.T) for name, array in pairs.items()}
    vectors = {"b1": random(40, 1)[:, 0], "slope": np.abs(random(40, 1, seed=2)[:, 0]), "b2": random(16, 1)[:, 0]}
    model = load(text, {**pairs, **vectors})
    check_same(model, {"x": floats(5, 24)})


def test_fused_qkv_is_split_and_reshaped() -> None:
    text = """g (float[B,S,32] x, float[32,96] w, float[96] b, float[32,32] o, int64[3] parts) => (float[B,S,32] y) {
        h = MatMul(x, w)
        a = Add(b, h)
        q, k, v = Split<axis=-1>(a, parts)
        kt = Transpose<perm=[0,2,1]>(k)
        s = MatMul(q, kt)
        p = Softmax<axis=-1>(s)
        c = MatMul(p, v)
        y = MatMul(c, o)
    }"""
    weights = {"w": random(32, 96), "b": random(96, 1)[:, 0], "o": random(32, 32), "parts": np.array([32, 32, 32])}
    found = find_groups(load(text, weights))
    assert found.groups == ()
    assert "MatMul 'MatMul/s' sums over the channels" in found.refused.values()


def test_models_of_the_other_tests() -> None:
    assert [group.kind for group in find_groups(load_model(cnn()).model).groups] == ["layer", "layer"]
    check_same(load_model(cnn()).model, images(2))
    model = load_model(block()).model
    found = find_groups(model)
    assert [group.kind for group in found.groups] == ["layer"]  # w1 -> Relu -> w2; v and the norm are also added
    assert any("Add" in reason and "also reads it" in reason for reason in found.refused.values())
    check_same(model, tokens(2))


REFUSED = {
    "Gelu": ("h = MatMul(x, w) r = Gelu(h) y = MatMul(r, v)", "Gelu .* lets no scale through"),
    "Sigmoid": ("h = MatMul(x, w) r = Sigmoid(h) y = MatMul(r, v)", "Sigmoid .* lets no scale through"),
    "Tanh": ("h = MatMul(x, w) r = Tanh(h) y = MatMul(r, v)", "Tanh .* lets no scale through"),
    "Softmax": ("h = MatMul(x, w) r = Softmax(h) y = MatMul(r, v)", "Softmax .* lets no scale through"),
    "SiLU": ("h = MatMul(x, w) s = Sigmoid(h) r = Mul(h, s) y = MatMul(r, v)", "lets no scale through|reads it twice"),
    "Relu6": ("h = MatMul(x, w) r = Clip(h, zero, six) y = MatMul(r, v)", "Clip .* has one bound for all channels"),
    "square": ("h = MatMul(x, w) r = Mul(h, h) y = MatMul(r, v)", "Mul .* reads it twice"),
    "residual": ("h = MatMul(x, w) r = MatMul(h, v) y = Add(r, h)", "Add .* also reads it"),
    "Concat": ("h = MatMul(x, w) c = Concat<axis=1>(h, h) y = MatMul(c, wide)", "Concat .* lets no scale through"),
    "mean over channels": (
        "h = MatMul(x, w) m = ReduceMean(h, axes) r = Sub(h, m) y = MatMul(r, v)",
        "mixes channels|also reads",
    ),
    "gemm bias": ("h = MatMul(x, w) y = Gemm(x, v, h)", "Gemm .* adds it to its result"),
    "transposed": ("h = MatMul(x, w) y = Gemm<transA=1>(h, left)", "reads it transposed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason(case: str) -> None:
    body, reason = REFUSED[case]
    text = f"""g (float[32,32] x, float[32,32] w, float[32,32] v, float[64,32] wide, float[32,32] left, float zero,
        float six, int64[1] axes) => (float[32,32] y) {{ {body} }}"""
    arrays = {
        "w": random(32, 32),
        "v": random(32, 32, seed=1),
        "wide": random(64, 32),
        "left": random(32, 32, seed=2),
        "zero": np.array(0, np.float32),
        "six": np.array(6, np.float32),
        "axes": np.array([-1]),
    }
    model = load(text, arrays)
    found = find_groups(model)
    assert found.groups == ()
    (said,) = {reason for name, reason in found.refused.items() if name == str(model.graph[0].name)}
    assert re.search(reason, said), said


def test_an_output_of_the_model_is_refused() -> None:
    text = """g (float[N,32] x, float[32,32] w, float[32,32] v) => (float[N,32] h, float[N,32] y) {
        h = MatMul(x, w) y = MatMul(h, v) }"""
    found = find_groups(load(text, {"w": random(32, 32), "v": random(32, 32, seed=1)}))
    assert found.groups == ()
    assert "its result 'h' is an output of the model" in found.refused.values()


def test_reasons_seen_from_the_layers() -> None:
    model = load_model(block()).model
    found = find_groups(model)
    reasons = {name.rpartition("/")[2]: found.reason(target) for name, target in find_targets(model)[0].items()}
    assert reasons["q"] == "nothing before Gather 'Gather/e' can take a scale"
    assert "also reads it" in reasons["h"]
    assert reasons["e"] == "it reads an input of the model"


def test_shared_vectors_are_copied_and_small_ones_only() -> None:
    """One zero vector is the shift of a normalisation and the bias of a layer, as exporters merge them."""
    text = """g (float[N,32] x, float[32] gain, float[32] zero, float[32,32] w, float[32,32] v) => (float[N,32] y) {
        n = LayerNormalization<axis=-1>(x, gain, zero)
        a = MatMul(n, w)
        b = Add(a, gain)
        m = LayerNormalization<axis=-1>(b, gain, zero)
        c = MatMul(m, v)
        y = Add(c, gain)
    }"""
    weights = {
        "gain": norm_weights()["gain"],
        "zero": random(32, 1)[:, 0],
        "w": random(32, 32),
        "v": random(32, 32, seed=1),
    }
    model = load(text, weights)
    scaled = check_same(model, {"x": floats(4, 32)})
    assert len(find_groups(model).groups) == 2
    # gain is still read by the Adds: two copies of it; shift is read by the norms alone: two instead of one.
    assert weight_bytes(scaled) - weight_bytes(model) == 3 * 32 * 4


def test_nothing_grows_when_nothing_is_shared() -> None:
    for model in (load(NORM, norm_weights()), load_model(cnn()).model, attention()):
        found = find_groups(model)
        assert weight_bytes(apply_scales(model, found.groups, random_scales(found))) == weight_bytes(model)


def test_a_weight_that_readers_of_one_value_share_stays_one() -> None:
    text = """g (float[N,32] x, float[32] gain, float[32,32] w) => (float[N,32] y) {
        n = RMSNormalization<axis=-1>(x, gain) a = MatMul(n, w) r = Neg(n) b = MatMul(r, w) y = Sub(a, b) }"""
    model = load(text, {"gain": norm_weights()["gain"], "w": random(32, 32)}, opset=23)
    scaled = check_same(model, {"x": floats(4, 32)})
    assert weight_bytes(scaled) == weight_bytes(model)


def test_a_large_weight_that_others_read_is_not_stored_twice() -> None:
    text = """g (float[N,32] x, float[32] gain, float[32,32] w) => (float[N,32] y) {
        n = RMSNormalization<axis=-1>(x, gain) a = MatMul(n, w) t = Tanh(a) y = MatMul(t, w) }"""
    found = find_groups(load(text, {"gain": norm_weights()["gain"], "w": random(32, 32)}, opset=23))
    assert found.groups == ()
    assert any("reads the weight 'w' too, so it would be stored twice" in reason for reason in found.refused.values())


def test_a_weight_behind_a_transpose_keeps_its_layout() -> None:
    """From a million bytes on, transposes of weights are not folded: the scaled weight replaces both."""
    text = """g (float[N,512] x, float[512] gain, float[520,512] w) => (float[N,520] y) {
        n = RMSNormalization<axis=-1>(x, gain) t = Transpose<perm=[1,0]>(w) y = MatMul(n, t) }"""
    model = load(text, {"gain": np.ones(512, np.float32), "w": random(520, 512)}, opset=23)
    assert [node.op_type for node in model.graph] == ["RMSNormalization", "Transpose", "MatMul"]
    scaled = check_same(model, {"x": floats(4, 512)})
    assert weight_bytes(scaled) == weight_bytes(model)


def test_inserted_mul_serves_all_readers_of_a_value() -> None:
    text = """g (float[N,32] x, float[32,32] a, float[32,32] w, float[32,32] v) => (float[N,32] y) {
        h = MatMul(x, a) g0 = Gelu(h) p = MatMul(g0, w) q = MatMul(g0, v) s = Add(p, q) y = Add(s, g0) }"""
    model = load(text, {name: random(32, 32, seed=place) for place, name in enumerate("awv")})
    assert find_groups(model).groups == ()
    nodes = [str(node.name) for node in model.graph if node.op_type == "MatMul"]
    found = find_groups(model, nodes)
    assert [(group.kind, group.value, len(group.readers)) for group in found.groups] == [
        ("insert", "x", 1),
        ("insert", "g0", 2),
    ]
    scaled = check_same(model, {"x": floats(4, 32)}, found)
    assert sum(node.op_type == "Mul" for node in scaled.graph) == 2


def test_nothing_is_inserted_where_a_group_reaches() -> None:
    model = load(NORM, norm_weights())
    nodes = [str(node.name) for node in model.graph if node.op_type == "MatMul"]
    assert readers(find_groups(model, nodes)) == readers(find_groups(model))


@pytest.mark.parametrize("bad", [np.ones(31), np.zeros(32), -np.ones(32), np.full(32, np.nan), np.full(32, np.inf)])
def test_bad_scales_are_refused(bad: Array) -> None:
    model = load(NORM, norm_weights())
    found = find_groups(model)
    with pytest.raises(InputError, match=r"the scales of .* must be 32 positive numbers, got shape \(3[12],\)"):
        apply_scales(model, found.groups, {found.groups[0].name: bad})


def test_groups_left_out_stay() -> None:
    model = load_model(cnn()).model
    found = find_groups(model)
    scaled = apply_scales(model, found.groups, {})
    for old, new in zip(find_targets(model)[0].values(), find_targets(scaled)[0].values(), strict=True):
        assert old.load().tobytes() == new.load().tobytes()


def test_float16_weights_are_refused() -> None:
    text = """g (float16[N,32] x, float16[32,32] w, float16[32,32] v) => (float16[N,32] y) {
        h = MatMul(x, w) y = MatMul(h, v) }"""
    found = find_groups(load(text, {name: random(32, 32).astype(np.float16) for name in "wv"}))
    assert found.groups == ()
    assert any("is float16" in reason for reason in found.refused.values())
