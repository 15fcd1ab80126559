"""Graphs that quantkit did not write: what is joined to a product, what is left alone, and constants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch

from quantkit.errors import InputError
from quantkit.packing import blob
from quantkit.runtime.executor import Executor
from quantkit.types import Array
from tests.helpers.models import build, random
from tests.runtime.executor.files import CPU, decibels, expected, run

CONTRIB = ', "com.microsoft": 1'
HEAD = "g (float[M,64] x, uint8[32,2,16] w, float[64] s{more}) => (float[M,{out}] y{outputs}) {{ {body} }}"
PRODUCT = "p = com.microsoft.MatMulNBits<K=64, N=32, bits=4, block_size=32>(x, w, s)"


def product(body: str, extra: Mapping[str, Array] = {}, outputs: str = "", out: int = 32, **more: Array) -> Any:
    """x W^T = p, and what follows."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (32, 64)).astype(np.uint8)
    weights = {"w": blob(codes, 4, 32, 0), "s": random(64, 1)[:, 0], **extra, **more}
    kinds = {np.dtype(np.float32): "float", np.dtype(np.int32): "int32", np.dtype(np.uint8): "uint8"}
    named = "".join(
        f", {kinds[item.dtype]}[{','.join(map(str, item.shape))}] {name}" for name, item in {**extra, **more}.items()
    )
    text = HEAD.format(more=named, out=out, outputs=outputs, body=f"{PRODUCT} {body}")
    return build(text, weights, domains=CONTRIB)


def feed(rows: int = 3) -> dict[str, Array]:
    return {"x": np.random.default_rng(1).standard_normal((rows, 64)).astype(np.float32)}


def run_and_check(model: onnx.ModelProto, limit: float = 105) -> Executor:
    executor = Executor(model, CPU, torch.float32)
    assert decibels(expected_of(model), run(executor, feed())) >= limit
    return executor


def expected_of(model: onnx.ModelProto) -> dict[str, Any]:
    import onnx_ir as ir

    return expected(ir.from_proto(model), feed())


HALF, ROOT, ONE = np.array(0.5, np.float32), np.array(np.sqrt(2), np.float32), np.array(1, np.float32)
BIAS = random(32, 1)[:, 0]
SCALARS = {"h": HALF, "r": ROOT, "o": ONE}
ERF = "d = Div(p, r) e = Erf(d) a = Add(e, o)"
FOLLOWING = {
    "": ("y = Identity(p)", {}, ""),
    "with relu": ("y = Relu(p)", {}, ""),
    "with bias": ("y = Add(p, b)", {"b": BIAS}, ""),
    "with bias and relu": ("q = Add(b, p) y = Relu(q)", {"b": BIAS}, ""),
    "with silu": ("q = Sigmoid(p) y = Mul(p, q)", {}, ""),
    "with gelu": ("y = Gelu(p)", {}, ""),
    "with  gelu": (f"{ERF} m = Mul(p, a) y = Mul(m, h)", SCALARS, ""),
    "with gelu ": (f"{ERF} m = Mul(a, h) y = Mul(p, m)", SCALARS, ""),
    "with gelu  ": (f"{ERF} m = Mul(h, p) y = Mul(m, a)", SCALARS, ""),
    "with bias and gelu": ("q = Add(p, b) y = com.microsoft.Gelu(q)", {"b": BIAS}, ""),
}
APART = {
    "the product is an output": ("y = Relu(p)", {}, ", float[M,32] p"),
    "the product is read twice": ("q = Relu(p) y = Add(q, p)", {}, ""),
    "the gelu of tanh": ('y = Gelu<approximate="tanh">(p)', {}, ""),
    "a sigmoid of something else": ("q = Sigmoid(x2) y = Mul(p, q)", {"x2": BIAS}, ""),
    "another slope of erf": (f"{ERF} m = Mul(p, a) y = Mul(m, h)", {**SCALARS, "r": ONE}, ""),
    "another number than one": (f"{ERF} m = Mul(p, a) y = Mul(m, h)", {**SCALARS, "o": HALF}, ""),
    "another number than a half": (f"{ERF} m = Mul(p, a) y = Mul(m, h)", {**SCALARS, "h": ROOT}, ""),
    "1 + erf is read twice": (f"{ERF} m = Mul(p, a) k = Mul(m, h) y = Add(k, a)", SCALARS, ""),
    "one number for all rows": ("y = Add(p, b)", {"b": BIAS[:1]}, ""),
    "the product twice": ("y = Add(p, p)", {}, ""),
}


@pytest.mark.parametrize("note", FOLLOWING)
def test_bias_and_activation_are_joined(note: str) -> None:
    body, extra, outputs = FOLLOWING[note]
    (layer,) = run_and_check(product(body, extra, outputs)).layers
    assert (layer.kernel, layer.note) == ("nbits_linear", " ".join(note.split()))


@pytest.mark.parametrize("name", APART)
def test_anything_else_stays_apart(name: str) -> None:
    body, extra, outputs = APART[name]
    (layer,) = run_and_check(product(body, extra, outputs)).layers
    assert (layer.kernel, layer.note) == ("nbits_linear", "")


def test_a_matrix_bias_stays_apart() -> None:
    (layer,) = run_and_check(product("y = Add(p, b)", {"b": random(3, 32)})).layers
    assert layer.note == ""


def test_zero_points_between_codes_are_rebuilt_once() -> None:
    body = PRODUCT.replace("p =", "y =").replace("(x, w, s)", "(x, w, s, z)")
    text = HEAD.format(more=", float[32,2] z", out=32, outputs="", body=body)
    codes = np.random.default_rng(0).integers(0, 16, (32, 64)).astype(np.uint8)
    points = random(32, 2) + np.float32(7.3)
    model = build(text, {"w": blob(codes, 4, 32, 0), "s": random(64, 1)[:, 0], "z": points}, domains=CONTRIB)
    (layer,) = run_and_check(model).layers
    assert (layer.kernel, layer.note, layer.num_bytes) == ("dequantized", "its zero points are no codes", 32 * 64 * 4)


QDQ = """g (float[M,64] x, {kind}[{shape}] w, float[{scales}] s, {kind}[{scales}] z) => (float[M,32] y) {{
    d = DequantizeLinear<axis={axis}{block}>(w, s, z)
    {product}
}}"""


@pytest.mark.parametrize(
    ("axis", "block", "turned", "kernel"),
    [
        (1, 0, False, "nbits_linear"),  # a scale per column
        (0, 0, True, "nbits_linear"),
        (-1, 0, False, "nbits_linear"),
        (0, 16, False, "nbits_linear"),  # per block of a column
        (1, 16, True, "nbits_linear"),
        (0, 0, False, "dequantized"),  # a scale per input: no rows, no groups
        (1, 8, False, "dequantized"),  # blocks of outputs
        (0, 64, False, "nbits_linear"),
    ],
)
@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_dequantized_operands(axis: int, block: int, turned: bool, kernel: str, kind: str) -> None:
    shape = (32, 64) if turned else (64, 32)
    along = axis % 2
    scales = [shape[along]] if not block else [size // block if i == along else size for i, size in enumerate(shape)]
    rng = np.random.default_rng(0)
    low = -128 if kind == "int8" else 0
    weights = {
        "w": rng.integers(low, low + 256, shape).astype(kind),
        "s": rng.uniform(0.01, 0.1, scales).astype(np.float32),
        "z": rng.integers(low, low + 256, scales).astype(kind),
    }
    body = "y = Gemm<transB=1>(x, d)" if turned else "y = MatMul(x, d)"
    named = {"shape": ",".join(map(str, shape)), "scales": ",".join(map(str, scales))}
    text = QDQ.format(kind=kind, axis=axis, block=f", block_size={block}" if block else "", product=body, **named)
    (layer,) = run_and_check(build(text, weights)).layers
    assert layer.kernel == kernel


def test_one_scale_for_all_and_no_zero_point() -> None:
    text = """g (float[M,64] x, int8[64,32] w, float s) => (float[M,32] y) {
        d = DequantizeLinear(w, s)
        y = MatMul(x, d)
    }"""
    codes = np.random.default_rng(0).integers(-8, 8, (64, 32)).astype(np.int8)
    (layer,) = run_and_check(build(text, {"w": codes, "s": np.array(0.1, np.float32)})).layers
    assert (layer.kernel, layer.bits) == ("nbits_linear", (4,))


def test_a_gemm_with_factors_and_an_addend_that_is_no_bias() -> None:
    text = """g (float[M,64] x, int8[64,32] w, float s, float[1,1] c) => (float[M,32] y, float[M,32] z) {
        d = DequantizeLinear(w, s)
        y = Gemm<alpha=2.0>(x, d)
        z = Gemm(x, d, c)
    }"""
    codes = np.random.default_rng(0).integers(-8, 8, (64, 32)).astype(np.int8)
    weights = {"w": codes, "s": np.array(0.1, np.float32), "c": np.ones((1, 1), np.float32)}
    layers = run_and_check(build(text, weights)).layers
    assert [(layer.kernel, layer.note) for layer in layers] == [("dequantized", "codes in an unknown layout")] * 2


def test_weights_that_several_layers_read_are_kept_once() -> None:
    body = PRODUCT.replace("p =", "q =").replace("(x,", "(t,")
    text = HEAD.format(more="", out=32, outputs="", body=f"t = Neg(x) {PRODUCT} {body} y = Sub(p, q)")
    codes = np.random.default_rng(0).integers(0, 16, (32, 64)).astype(np.uint8)
    model = build(text, {"w": blob(codes, 4, 32, 0), "s": random(64, 1)[:, 0]}, domains=CONTRIB)
    executor = run_and_check(model)
    counters = 4096 * 4
    assert len(executor.layers) == 2
    assert executor.num_bytes() == executor.layers[0].num_bytes + counters


def test_equal_codes_with_other_scales_are_other_weights() -> None:
    other = PRODUCT.replace("p =", "q =").replace(", s)", ", s2)")
    text = HEAD.format(more=", float[64] s2", out=32, outputs="", body=f"{PRODUCT} {other} y = Sub(p, q)")
    codes = np.random.default_rng(0).integers(0, 16, (32, 64)).astype(np.uint8)
    scales = {"s": random(64, 1)[:, 0], "s2": random(64, 1, seed=3)[:, 0]}
    run_and_check(build(text, {"w": blob(codes, 4, 32, 0), **scales}, domains=CONTRIB))


def test_constants_are_computed_once_and_random_numbers_are_not() -> None:
    text = """g (float[M,64] x, float[32,64] w, float[32,64] v) => (float[M,32] y, float[4] n) {
        s = Add(w, v)
        t = Transpose<perm=[1,0]>(s)
        y = MatMul(x, t)
        n = RandomNormal<shape=[4]>()
    }"""
    model = build(text, {"w": random(32, 64), "v": random(32, 64, seed=1)})
    executor = Executor(model, CPU, torch.float32)
    first, second = (run(executor, feed()) for _ in range(2))
    assert not np.array_equal(first["n"], second["n"])
    np.testing.assert_allclose(first["y"], feed()["x"] @ (random(32, 64) + random(32, 64, seed=1)).T, atol=1e-5)
    (layer,) = executor.layers
    assert (layer.kernel, layer.num_bytes) == ("dequantized", 32 * 64 * 4)
    assert executor.num_bytes() == 32 * 64 * 4  # not what it was made of


def test_products_inside_a_subgraph() -> None:
    text = HEAD.format(
        more=", bool b",
        out=32,
        outputs="",
        body=f"y = If<then_branch = t () => (float[M,32] p) {{ {PRODUCT} }}, else_branch = e () => (float[M,32] q) "
        "{ q = Identity(o) }>(b) ",
    ).replace(", bool b", ", bool b, float[3,32] o")
    codes = np.random.default_rng(0).integers(0, 16, (32, 64)).astype(np.uint8)
    weights = {"w": blob(codes, 4, 32, 0), "s": random(64, 1)[:, 0], "o": random(3, 32)}
    model = build(text, {**weights, "b": np.array(True)}, domains=CONTRIB)
    (layer,) = run_and_check(model).layers
    assert layer.kernel == "nbits_linear"


def test_finite_constants_stay_finite_in_half_precision() -> None:
    """A mask's lowest float32 times 0 is 0."""
    text = "g (float[M,64] x, float low) => (float[M,64] y) { z = Sub(x, x) y = Mul(z, low) }"
    model = build(text, {"low": np.array(np.finfo(np.float32).min, np.float32)})
    for dtype in (torch.float16, torch.bfloat16):
        assert not run(Executor(model, CPU, dtype), feed())["y"].any()


@pytest.mark.parametrize(("columns", "kernel"), [(48, "nbits_linear"), (40, "nbits_linear"), (20, "dequantized")])
def test_columns_cut_from_whole_groups(columns: int, kernel: str) -> None:
    """A cut that leaves whole groups out is not how groups are filled up."""
    text = f"""g (float[M,{columns}] x, uint8[4,3,16] q, float[4,3,1] z, float[4,3] s, int64[1] i, int64[2] h,
                  int64[1] b, int64[1] e, int64[1] a) => (float[M,4] y) {{
        f = Cast<to=1>(q) c = Sub(f, z) u = Unsqueeze(s, i) d = Mul(c, u) r = Reshape(d, h) w = Slice(r, b, e, a)
        t = Transpose<perm=[1,0]>(w) y = MatMul(x, t)
    }}"""
    rng = np.random.default_rng(0)
    lists = {"i": [-1], "h": [4, -1], "b": [0], "e": [columns], "a": [1]}
    weights = {name: np.array(item, np.int64) for name, item in lists.items()}
    weights |= {"q": rng.integers(0, 16, (4, 3, 16)).astype(np.uint8), "s": random(4, 3)}
    weights |= {"z": rng.integers(0, 16, (4, 3, 1)).astype(np.float32)}
    executor = Executor(build(text, weights), CPU, torch.float32)
    x = random(5, columns)
    spread = (weights["q"] - weights["z"]) * weights["s"][:, :, None]
    np.testing.assert_allclose(run(executor, {"x": x})["y"], x @ spread.reshape(4, -1)[:, :columns].T, atol=1e-4)
    assert [layer.kernel for layer in executor.layers] == [kernel]


def test_an_initializer_that_a_caller_replaces() -> None:
    """It is no constant: neither packed nor computed with beforehand, and it comes in the compute type."""
    text = "g (float[M,64] x, float[64,32] w) => (float[M,32] y) { z = Neg(w) y = MatMul(x, z) }"
    model = build(text, {})
    model.graph.initializer.append(onnx.numpy_helper.from_array(random(64, 32), "w"))
    executor = Executor(model, CPU, torch.bfloat16)
    other = random(64, 32, seed=1)
    for weight, given in ((random(64, 32), feed()), (other, {**feed(), "w": other})):
        np.testing.assert_allclose(run(executor, given)["y"], -feed()["x"] @ weight, atol=0.1)


def test_unknown_treatment_of_activations() -> None:
    with pytest.raises(InputError, match="activations must be one of float, file, int8, got 'int4'"):
        Executor(product("y = Relu(p)"), CPU, torch.float32, "int4")  # type: ignore[arg-type]
