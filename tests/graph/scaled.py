"""Models to rescale, and the check that nothing changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from quantkit.graph.load import load_model
from quantkit.graph.rescale import apply_scales
from quantkit.graph.scaling import Found, find_groups
from quantkit.graph.targets import find_targets
from quantkit.runtime.ort import make_session
from quantkit.types import Array
from tests.helpers.models import build, random

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
