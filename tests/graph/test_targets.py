"""Finding weights: which nodes are targets, which are not and why, and that W[N, K] means what it says."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes import common as passes

from quantkit.errors import InputError
from quantkit.graph.load import load_model
from quantkit.graph.targets import find_targets, load_operand
from quantkit.types import Layout, Target

Array = npt.NDArray[Any]
Build = Callable[..., onnx.ModelProto]
Run = Callable[..., list[Array]]

RNG = np.random.default_rng(0)


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def close(actual: Array, expected: Array) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def declare(name: str, array: Array) -> str:
    return f"float[{','.join(map(str, array.shape))}] {name}"


def patches(image: Array, kernel: tuple[int, int], stride: int, dilation: int, pads: tuple[int, ...]) -> Array:
    """[batch, channels*kh*kw, positions] of an image [batch, channels, height, width]."""
    image = np.pad(image, ((0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])))
    reach = [dilation * (size - 1) + 1 for size in kernel]
    windows = np.lib.stride_tricks.sliding_window_view(image, reach, axis=(2, 3))
    windows = windows[:, :, ::stride, ::stride, ::dilation, ::dilation].transpose(0, 1, 4, 5, 2, 3)
    return windows.reshape(image.shape[0], image.shape[1] * kernel[0] * kernel[1], -1)


def only(model: onnx.ModelProto) -> Target:
    targets, _ = find_targets(load_model(model).model)
    assert len(targets) == 1
    target = next(iter(targets.values()))
    matrix = target.load()
    assert matrix.shape == target.shape and matrix.dtype == np.float32 and matrix.flags.c_contiguous
    assert np.array_equal(target.layout.to_operand(matrix), load_operand(target))
    return target


@pytest.mark.parametrize(
    ("channels", "groups", "stride", "dilation", "pads"),
    [(6, 1, 1, 1, (0, 0, 0, 0)), (6, 3, 2, 1, (1, 0, 2, 1)), (6, 6, 1, 2, (2, 1, 0, 3)), (4, 2, 3, 2, (0, 2, 1, 0))],
)
def test_conv(
    channels: int, groups: int, stride: int, dilation: int, pads: tuple[int, ...], build: Build, run: Run
) -> None:
    x, w = normal(2, channels, 11, 12), normal(48, channels // groups, 3, 2)
    attributes = f"group={groups}, strides=[{stride},{stride}], dilations=[{dilation},{dilation}], pads={list(pads)}"
    model = build(f"g ({declare('x', x)}, {declare('w', w)}) => (float y) {{ y = Conv<{attributes}>(x, w) }}", {"w": w})
    target = only(model)
    assert (target.op, target.groups, target.layout.is_identity) == ("Conv", groups, True)
    matrix, made = target.load(), run(model, {"x": x})[0]
    rows = matrix.shape[0] // groups
    parts = [
        matrix[group * rows : (group + 1) * rows] @ patches(part, (3, 2), stride, dilation, pads)
        for group, part in enumerate(np.split(x, groups, axis=1))
    ]
    close(np.concatenate(parts, axis=1).reshape(made.shape), made)


@pytest.mark.parametrize("rank", [1, 3])
def test_conv_of_other_ranks(rank: int, build: Build) -> None:
    x, w = normal(2, 8, *(5,) * rank), normal(16, 8, *(3,) * rank)
    model = build(f"g ({declare('x', x)}, {declare('w', w)}) => (float y) {{ y = Conv(x, w) }}", {"w": w})
    assert only(model).shape == (16, 8 * 3**rank)


@pytest.mark.parametrize("groups", [1, 2])
def test_conv_transpose(groups: int, build: Build, run: Run) -> None:
    """Stride = kernel: every output pixel comes from one input pixel, so the product is the output rearranged."""
    x, w = normal(2, 8, 4, 5), normal(8, 6, 3, 2)
    body = f"y = ConvTranspose<group={groups}, strides=[3,2]>(x, w)"
    model = build(f"g ({declare('x', x)}, {declare('w', w)}) => (float y) {{ {body} }}", {"w": w})
    target = only(model)
    assert target.shape == (groups * 6 * 3 * 2, 8 // groups) and target.groups == groups
    matrix, made = target.load(), run(model, {"x": x})[0]
    parts = []
    for group, part in enumerate(np.split(x, groups, axis=1)):
        rows = matrix[group * 36 : (group + 1) * 36]
        pixels = np.einsum("nk,bkhw->bnhw", rows, part).reshape(2, 6, 3, 2, 4, 5)
        parts.append(pixels.transpose(0, 1, 4, 2, 5, 3).reshape(2, 6, 12, 10))
    close(np.concatenate(parts, axis=1), made)


def test_matmul(build: Build, run: Run) -> None:
    x, w = normal(2, 3, 16), normal(16, 24)
    model = build(f"g ({declare('x', x)}, {declare('w', w)}) => (float y) {{ [fc] y = MatMul(x, w) }}", {"w": w})
    target = only(model)
    assert (target.name, target.shape, target.node.name) == ("fc", (24, 16), "fc")
    assert target.uses[0].data.name == "x"
    close(x @ target.load().T, run(model, {"x": x})[0])


def test_batched_matmul(build: Build, run: Run) -> None:
    x, w = normal(4, 3, 16), normal(4, 16, 24)
    model = build(f"g ({declare('x', x)}, {declare('w', w)}) => (float y) {{ y = MatMul(x, w) }}", {"w": w})
    target = only(model)
    assert target.shape == (4 * 24, 16)
    close(np.einsum("bmk,bnk->bmn", x, target.load().reshape(4, 24, 16)), run(model, {"x": x})[0])


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
def test_gemm(trans_a: int, trans_b: int, build: Build, run: Run) -> None:
    x, w = normal(16, 16), normal(24, 16) if trans_b else normal(16, 24)
    body = f"y = Gemm<transA={trans_a}, transB={trans_b}>(x, w)"
    model = build(f"g ({declare('x', x)}, {declare('w', w)}) => (float y) {{ {body} }}", {"w": w})
    target = only(model)
    assert target.layout.is_identity == bool(trans_b)
    close((x.T if trans_a else x) @ target.load().T, run(model, {"x": x})[0])


def test_embedding(build: Build, run: Run) -> None:
    w, ids = normal(40, 16), np.array([[3, 39, 0]])
    model = build(f"g (int64[1,3] x, {declare('w', w)}) => (float y) {{ [emb] y = Gather(w, x) }}", {"w": w})
    target = only(model)
    assert (target.shape, target.uses[0].data.name) == ((40, 16), "x")
    close(target.load()[ids], run(model, {"x": ids})[0])


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent(op: str, gates: int, build: Build) -> None:
    w, r = normal(2, gates * 16, 12), normal(2, gates * 16, 16)
    text = f"g (float[2,3,12] x, {declare('w', w)}, {declare('r', r)}) => (float y)"
    body = f'[rec] y = {op}<hidden_size=16, direction="bidirectional">(x, w, r)'
    targets, untouched = find_targets(load_model(build(f"{text} {{ {body} }}", {"w": w, "r": r})).model)
    assert untouched == []
    assert {name: target.shape for name, target in targets.items()} == {
        "rec.W": (2 * gates * 16, 12),
        "rec.R": (2 * gates * 16, 16),
    }
    assert all(target.uses[0].data.name == "x" for target in targets.values())
    assert np.array_equal(targets["rec.R"].load(), r.reshape(-1, 16))


PATHS = {
    "t = Transpose(w) y = MatMul(x, t)": (24, 600),
    "t = Transpose<perm=[1,0]>(w) y = Gemm<transB=1>(z, t)": (600, 24),
    "t = Identity(w) u = Transpose(t) v = Cast<to=1>(u) y = MatMul(x, v)": (24, 600),
    "s = Constant<value_ints=[600,-1]>() t = Transpose(w) u = Reshape(t, s) y = MatMul(x, u)": (24, 600),
    "s = Constant<value_ints=[0,2]>() a = Constant<value_ints=[0]>() t = Unsqueeze(w, a) u = Squeeze(t, a) "
    "v = Transpose(u) y = MatMul(x, v)": (24, 600),
    "a = Constant<value_ints=[2]>() t = Unsqueeze(w, a) u = Flatten(t) v = Transpose(u) y = MatMul(x, v)": (24, 600),
}


@pytest.mark.parametrize("body", PATHS)
def test_weights_behind_layout_operators(body: str, build: Build, run: Run) -> None:
    """The path is kept (the weight is too large to be folded), and the matrix is what the node multiplies with."""
    rows = 24 * 25
    weight = {"w": normal(24, rows)}
    x, z = normal(2, rows), normal(2, 24)
    text = f"g (float[2,{rows}] x, float[2,24] z, float[24,{rows}] w) => (float y) {{ {body} }}"
    model = build(text, weight)
    graph = ir.from_proto(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)
    targets, _ = find_targets(graph)
    assert len(targets) == 1
    target = next(iter(targets.values()))
    assert target.shape == PATHS[body]
    data = x if target.op == "MatMul" else z
    close(data @ target.load().T, run(model, {"x": x, "z": z})[0])
    assert [node.op_type for node in target.path] == re.findall(
        r"(Transpose|Identity|Cast|Reshape|Unsqueeze|Squeeze|Flatten)", body
    )


def test_shared_weights(build: Build) -> None:
    w = normal(16, 16)
    text = f"g (float[2,16] x, {declare('w', w)}) => (float y)"
    body = "[one] a = MatMul(x, w) [two] b = MatMul(a, w) t = Transpose(w) [three] y = MatMul(b, t)"
    targets, _ = find_targets(ir.from_proto(build(f"{text} {{ {body} }}", {"w": w})))
    assert {name: [use.node.name for use in target.uses] for name, target in targets.items()} == {
        "one": ["one", "two"],
        "three": ["three"],
    }
    assert targets["one"].weight is targets["three"].weight
    assert np.array_equal(targets["three"].load(), w) and np.array_equal(targets["one"].load(), w.T)


def test_tied_embedding(build: Build) -> None:
    w = normal(600, 512)
    text = f"g (int64[2] x, {declare('w', w)}) => (float y)"
    body = "[emb] a = Gather(w, x) t = Transpose<perm=[1,0]>(w) [head] y = MatMul(a, t)"
    targets, _ = find_targets(load_model(build(f"{text} {{ {body} }}", {"w": w})).model)
    assert {name: target.shape for name, target in targets.items()} == {"emb": (600, 512), "head": (600, 512)}
    assert targets["emb"].weight is targets["head"].weight


def test_subgraphs(build: Build) -> None:
    w = normal(16, 16)
    text = (
        f"g (float[2,16] x, bool c, {declare('w', w)}) => (float y) {{ [a] z = MatMul(x, w) y = If (c) <"
        "then_branch = t () => (float[a,b] p) { [b] p = MatMul(z, w) }, "
        f"else_branch = e () => (float[a,b] q) <float[16,16] v = {{ {','.join(['0.5'] * 256)} }}> "
        "{ [c] q = MatMul(z, v) }> }"
    )
    targets, _ = find_targets(load_model(build(text, {"w": w})).model)
    assert {name: [use.node.name for use in target.uses] for name, target in targets.items()} == {
        "a": ["a", "b"],
        "c": ["c"],
    }


W = normal(16, 32)
MM = "[fc] y = MatMul(x, w)"
REASONS: dict[str, tuple[str, str, dict[str, Array]]] = {
    "both operands are activations": ("float[4,16] x, float[16,32] w", MM, {}),
    "the constant is the left operand": ("float[32,4] x, float[16,32] w", "[fc] y = MatMul(w, x)", {"w": W}),
    "the weight is a vector": ("float[4,16] x, float[16] w", MM, {"w": W[:, 0].copy()}),
    "too small to gain (255 elements)": ("float[4,15] x, float[15,17] w", MM, {"w": normal(15, 17)}),
    "too small to gain (15 x 32)": ("int64[4] x, float[15,32] w", "[fc] y = Gather(w, x)", {"w": normal(15, 32)}),
    "too small to gain (64 x 7)": ("int64[4] x, float[64,7] w", "[fc] y = Gather(w, x)", {"w": normal(64, 7)}),
    "the table has 3 dimensions, not 2": (
        "int64[4] x, float[4,4,32] w",
        "[fc] y = Gather(w, x)",
        {"w": normal(4, 4, 32)},
    ),
    "it looks up along axis 1, not along the rows": (
        "int64[4] x, float[16,32] w",
        "[fc] y = Gather<axis=1>(w, x)",
        {"w": W},
    ),
    "the table holds infinities, as a mask does": (
        "int64[4] x, float[16,32] w",
        "[fc] y = Gather(w, x)",
        {"w": np.full((16, 32), np.finfo(np.float32).min)},
    ),
    "float64 weight: convert the model to float32 first": (
        "double[4,16] x, double[16,32] w",
        MM,
        {"w": W.astype(np.float64)},
    ),
    "float16 weight: convert the model to float32 first": (
        "float16[4,16] x, float16[16,32] w",
        MM,
        {"w": W.astype(np.float16)},
    ),
    "integer weight (int32)": ("int32[4,16] x, int32[16,32] w", MM, {"w": np.ones((16, 32), np.int32)}),
    "already quantized (DequantizeLinear 'dq')": (
        "float[4,16] x, int8[16,32] w, float s",
        "[dq] v = DequantizeLinear(w, s) [fc] y = MatMul(x, v)",
        {"w": np.ones((16, 32), np.int8), "s": np.array(0.1, np.float32)},
    ),
    "already quantized": (
        "float[4,32] x, uint8[8,1,16] w, float[8] s",
        "[fc] y = com.microsoft.MatMulNBits<K=32, N=8, bits=4, block_size=32>(x, w, s)",
        {"w": np.ones((8, 1, 16), np.uint8), "s": np.ones(8, np.float32)},
    ),
    "the weight is computed by Conv 'make'": (
        "float[1,4,9,9] x, float[16,4,2,2] w",
        "[make] a = Conv(x, w) [fc] y = Conv(x, a)",
        {},
    ),
    "the weight 'w' is an input, not a constant": ("float[1,4,9,9] x, float[16,4,2,2] w", "[fc] y = Conv(x, w)", {}),
    "no form for the operator com.microsoft.FusedMatMul": (
        "float[4,16] x, float[16,32] w",
        "[fc] y = com.microsoft.FusedMatMul(x, w)",
        {"w": W},
    ),
    "no form for the operator Einsum": (
        "float[4,16] x, float[16,32] w",
        '[fc] y = Einsum<equation="mk,kn->mn">(x, w)',
        {"w": W},
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_untouched(reason: str, build: Build) -> None:
    inputs, body, weights = REASONS[reason]
    model = build(f"g ({inputs}) => (float y) {{ {body} }}", weights, domains=', "com.microsoft": 1')
    targets, untouched = find_targets(load_model(model).model)
    assert targets == {}
    assert [row.reason for row in untouched if row.name == "fc"] == [reason]


def test_weight_that_callers_see(build: Build) -> None:
    text = f"g (float[4,16] x, {declare('w', W)}) => (float y) {{ {MM} }}"
    _, untouched = find_targets(load_model(build(text, {"w": W}, keep_inputs=True)).model)
    assert [row.reason for row in untouched] == ["the weight is also a graph input, so a caller may override it"]
    model = build(text, {"w": W})
    model.graph.output.add().CopyFrom(onnx.parser.parse_graph("h (float[16,32] w) => () {}").input[0])
    _, untouched = find_targets(load_model(model).model)
    assert [row.reason for row in untouched] == ["the weight is also a graph output"]


def test_layer_norm_and_index_lookups_are_no_rows(build: Build) -> None:
    text = (
        "g (float[4,16] x, float[16] w, int64[2] t) => (float y, int64 i) { y = LayerNormalization(x, w) "
        "s = Shape(x) k = Constant<value=int64{1}>() a = Gather(s, k) b = Gather(t, a) i = Identity(b) }"
    )
    model = build(text, {"w": normal(16), "t": np.array([1, 2])})
    assert find_targets(load_model(model).model) == ({}, [])


NET = (
    "g (int64[2] x, float[40,16] e, float[16,32] w, float[32,32] v) => (float y) "
    "{ [embed] a = Gather(e, x) [fc_1] b = MatMul(a, w) [fc_2] c = MatMul(b, v) [fc_3] y = MatMul(c, v) }"
)


@pytest.fixture
def net(build: Build) -> onnx.ModelProto:
    return build(NET, {"e": normal(40, 16), "w": W, "v": normal(32, 32)})


@pytest.mark.parametrize(
    ("ignore", "left"),
    [
        ((), ["embed", "fc_1", "fc_2"]),
        (("fc_1",), ["embed", "fc_2"]),
        (("w", "e"), ["fc_2"]),
        (("fc_3",), ["embed", "fc_1"]),
        ((r"re:fc_.*",), ["embed"]),
        (("op:Gather", "fc_1"), ["fc_2"]),
    ],
)
def test_ignore(ignore: tuple[str, ...], left: list[str], net: onnx.ModelProto) -> None:
    model = load_model(net).model
    targets, untouched = find_targets(model, ignore)
    assert list(targets) == left
    everything, _ = find_targets(model)
    rows = [(row.name, row.reason) for row in untouched]
    assert rows == [(name, "ignored by the user") for name in everything if name not in left]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("fc_4", r"ignore entry 'fc_4' matches no layer: the nearest names are fc_3, fc_2, fc_1"),
        ("zzzzzz", "ignore entry 'zzzzzz' matches no layer: no name comes near"),
        ("re:fc", r"ignore entry 're:fc' matches no layer: it must match a whole name, so '\.\*' may be missing"),
        ("re:(", r"ignore entry 're:\(' is not a regular expression: missing \)"),
        ("op:Conv", "ignore entry 'op:Conv' matches no layer: the model's weights are read by Gather, MatMul"),
    ],
)
def test_ignore_that_matches_nothing(entry: str, message: str, net: onnx.ModelProto) -> None:
    with pytest.raises(InputError, match=message):
        find_targets(load_model(net).model, [entry])


def test_names_are_unique(net: onnx.ModelProto) -> None:
    for node in net.graph.node:
        node.name = "same"
    targets, _ = find_targets(ir.from_proto(net))
    assert list(targets) == ["same", "same_2", "same_3"]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_layout_round_trip(data: st.DataObject) -> None:
    view = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5)))
    perm = tuple(data.draw(st.permutations(range(len(view)))))
    cut = data.draw(st.integers(0, len(view)))
    size = int(np.prod(view))
    rows = int(np.prod([view[axis] for axis in perm[:cut]]))
    layout = Layout((size,), view, perm)
    operand = np.arange(size)
    assert np.array_equal(layout.to_operand(layout.to_matrix(operand, (rows, size // rows))), operand)
