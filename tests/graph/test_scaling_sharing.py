"""Weights that several layers read when they are rescaled: copied, kept, or refused."""

from __future__ import annotations

import numpy as np
import pytest

from quantkit.errors import InputError
from quantkit.graph.load import load_model
from quantkit.graph.rescale import apply_scales
from quantkit.graph.scaling import find_groups
from quantkit.graph.targets import find_targets
from quantkit.types import Array
from tests.graph.scaled import (
    NORM,
    attention,
    check_same,
    floats,
    load,
    norm_weights,
    random_scales,
    readers,
    weight_bytes,
)
from tests.helpers.models import cnn, random


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
