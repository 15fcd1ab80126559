"""Scale groups: where scales go in a graph, that the graph still computes the same, and what is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest

from quantkit.graph.load import load_model
from quantkit.graph.rescale import apply_scales
from quantkit.graph.scaling import find_groups
from quantkit.graph.targets import find_targets
from tests.graph.scaled import (
    NORM,
    attention,
    check_same,
    floats,
    load,
    norm_weights,
    random_scales,
)
from tests.helpers.models import block, cnn, images, random, tokens


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
