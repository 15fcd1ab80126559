"""Old opsets: the upgraded model gives what the old one gave, for every operator whose meaning or form changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from quantkit.errors import InputError
from quantkit.graph.load import load_model

Array = npt.NDArray[Any]
Build = Callable[..., onnx.ModelProto]
Run = Callable[..., list[Array]]

RNG = np.random.default_rng(0)
IMAGE = RNG.standard_normal((2, 6, 8, 8)).astype(np.float32)
CUBE = RNG.standard_normal((2, 3, 4)).astype(np.float32)
GATES = RNG.standard_normal((1, 20, 9)).astype(np.float32)

CUBE_CASES = {
    "dropout ratio": (7, "y, m = Dropout<ratio=0.3>(x)"),
    "dropout input": (12, "r = Constant<value=float{0.3}>() y = Dropout(x, r)"),
    "slice": (7, "y = Slice<axes=[1,2], starts=[1,0], ends=[3,-1]>(x)"),
    "slice without axes": (9, "y = Slice<starts=[1], ends=[2]>(x)"),
    "clip": (7, "y = Clip<min=-0.5, max=0.5>(x)"),
    "clip one side": (10, "y = Clip<max=0.25>(x)"),
    "softmax flattens": (11, "y = Softmax(x)"),
    "softmax axis 0": (7, "z = Softmax<axis=0>(x) y = Relu(z)"),
    "softmax negative axis": (12, "y = Softmax<axis=-2>(x)"),
    "softmax last axis": (11, "y = Softmax<axis=2>(x)"),
    "logsoftmax": (11, "y = LogSoftmax<axis=1>(x)"),
    "hardmax": (11, "y = Hardmax(x)"),
    "reduce sum": (11, "y = ReduceSum<axes=[1], keepdims=0>(x)"),
    "reduce sum all": (11, "y = ReduceSum<keepdims=0>(x)"),
    "reduce mean": (13, "y = ReduceMean<axes=[-1,0]>(x)"),
    "reduce max": (7, "y = ReduceMax<axes=[1], keepdims=1>(x)"),
    "pad value": (7, 'y = Pad<mode="constant", pads=[0,1,0,0,2,0], value=2.0>(x)'),
    "pad edge": (10, 'y = Pad<mode="edge", pads=[0,1,0,0,0,1]>(x)'),
    "topk": (7, "y, i = TopK<k=2, axis=1>(x)"),
    "unsqueeze": (7, "y = Unsqueeze<axes=[1,3]>(x)"),
    "squeeze": (11, "z = Unsqueeze<axes=[0,4]>(x) y = Squeeze<axes=[4,0]>(z)"),
    "split even": (7, "y, z = Split<axis=2>(x)"),
    "split sizes": (11, "y, z = Split<axis=2, split=[1,3]>(x)"),
    "split even 13": (13, "y, z = Split<axis=2>(x)"),
    "cast": (7, "z = Cast<to=6>(x) y = Cast<to=1>(z)"),
    "reshape": (7, "s = Constant<value=int64[2]{0,-1}>() y = Reshape(x, s)"),
    "argmax": (11, "i = ArgMax<axis=1>(x) y = Cast<to=1>(i)"),
    "variadic": (7, "z = Sum(x, x, x) w = Mean(z, x) y = Max(w, x)"),
    "contrib operator": (11, "z = com.microsoft.Gelu(x) y = Softmax(z)"),
    "subgraph": (
        11,
        "c = Constant<value=bool{1}>() s = ReduceSum<keepdims=0>(x) b = Greater(s, s) y = If (b) <"
        "then_branch = t () => (float[a, b] u) { u = ReduceSum<axes=[1], keepdims=0>(x) }, "
        "else_branch = e () => (float[a, b] v) { w = Clip(x) "
        "v = ReduceMax<axes=[1], keepdims=0>(w) }>",
    ),
    "loop": (
        9,
        "n = Constant<value=int64{3}>() c = Constant<value=bool{1}>() y = Loop(n, c, x) <body = b "
        "(int64 i, bool ci, float[2,3,4] xi) => (bool co, float[2,3,4] xo) { co = Identity(ci) "
        "t = Unsqueeze<axes=[0]>(xi) u = Squeeze<axes=[0]>(t) w = Clip<min=-0.7>(u) xo = Add(w, x) }>",
    ),
}
IMAGE_CASES = {
    "upsample 7": (7, 'y = Upsample<mode="nearest", scales=[1.0,1.0,2.0,3.0]>(x)'),
    "upsample 9 linear": (9, 's = Constant<value=float[4]{1,1,2,3}>() y = Upsample<mode="linear">(x, s)'),
    "resize linear": (10, 's = Constant<value=float[4]{1,1,2,3}>() y = Resize<mode="linear">(x, s)'),
    "resize grows": (10, 's = Constant<value=float[4]{1,1,2.5,3}>() y = Resize<mode="nearest">(x, s)'),
    "resize shrinks": (10, "s = Constant<value=float[4]{1,1,0.4,0.7}>() y = Resize(x, s)"),
    "resize sizes": (
        11,
        "r = Constant<value=float[0]{}>() s = Constant<value=float[0]{}>() "
        "z = Constant<value=int64[4]{2,6,12,20}>() "
        'y = Resize<mode="linear", coordinate_transformation_mode="align_corners">(x, r, s, z)',
    ),
    "max pool": (7, "y = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(x)"),
    "average pool": (7, "y = AveragePool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(x)"),
    "pad reflect": (7, 'y = Pad<mode="reflect", pads=[0,0,2,0,0,0,1,1]>(x)'),
    "softmax over channels": (11, "p = GlobalAveragePool(x) y = Softmax(p)"),
    "roi align": (
        10,
        "r = Constant<value=float[1,4]{0,0,6,6}>() b = Constant<value=int64[1]{1}>() "
        "y = RoiAlign<output_height=2, output_width=2>(x, r, b)",
    ),
}


def same(old: list[Array], new: list[Array]) -> None:
    for before, after in zip(old, new, strict=True):
        assert before.shape == after.shape and before.dtype == after.dtype
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)


def check(model: onnx.ModelProto, feeds: Mapping[str, Array], run: Run) -> onnx.ModelProto:
    before = model.SerializeToString()
    loaded = load_model(model)
    assert loaded.model.opset_imports[""] == 21 and loaded.model.ir_version >= 10
    same(run(model, feeds), run(loaded.model, feeds))
    assert model.SerializeToString() == before
    return model


@pytest.mark.parametrize("name", CUBE_CASES)
def test_operators(name: str, build: Build, run: Run) -> None:
    opset, body = CUBE_CASES[name]
    domains = ', "com.microsoft": 1' if "com.microsoft" in body else ""
    check(build(f"g (float[2,3,4] x) => (float y) {{ {body} }}", opset=opset, domains=domains), {"x": CUBE}, run)


@pytest.mark.parametrize("name", ["softmax flattens", "softmax negative axis", "hardmax", "logsoftmax"])
def test_softmax_of_unknown_shape(name: str, build: Build, run: Run) -> None:
    opset, body = CUBE_CASES[name]
    check(build(f"g (float[a,b,c] x) => (float[a,b,c] y) {{ {body} }}", opset=opset), {"x": CUBE}, run)


@pytest.mark.parametrize("name", IMAGE_CASES)
def test_image_operators(name: str, build: Build, run: Run) -> None:
    opset, body = IMAGE_CASES[name]
    check(build(f"g (float[2,6,8,8] x) => (float y) {{ {body} }}", opset=opset), {"x": IMAGE}, run)


@pytest.mark.parametrize("opset", [7, 8, 9, 13])
def test_batch_normalization(opset: int, build: Build, run: Run) -> None:
    text = "g (float[2,6,8,8] x, float[6] s, float[6] b, float[6] m, float[6] v) => (float[2,6,8,8] y) {"
    spatial = ", spatial=1" if opset < 9 else ""
    model = build(f"{text} y = BatchNormalization<epsilon=0.01{spatial}>(x, s, b, m, v) }}", opset=opset)
    vectors = {name: IMAGE[0, :, 0, index] for index, name in enumerate("sbm")}
    check(model, {"x": IMAGE, **vectors, "v": np.abs(IMAGE[0, :, 0, 3])}, run)


def test_gemm_7(build: Build, run: Run) -> None:
    text = "g (float[3,4] x, float[4,5] w, float[5] b) => (float[3,5] y) { y = Gemm<alpha=0.5, beta=2.0>(x, w, b) }"
    feeds = {"x": CUBE[0], "w": GATES[0, :4, :5].copy(), "b": GATES[0, 0, :5].copy()}
    check(build(text, opset=7), feeds, run)


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent(op: str, gates: int, build: Build, run: Run) -> None:
    text = f"g (float[2,3,4] x) => (float[2,1,3,5] y) {{ y = {op}<hidden_size=5>(x, w, r) }}"
    rows = gates * 5
    weights = {"w": GATES[:, :rows, :4].copy(), "r": GATES[:, :rows, 4:].copy()}
    text = text.replace("x)", f"x, float[1,{rows},4] w, float[1,{rows},5] r)", 1)
    check(build(text, weights, opset=7), {"x": CUBE}, run)


@pytest.mark.parametrize("directions", ["", ", directions=[1]"])
def test_scan_8_runs_over_a_batch(directions: str, build: Build, run: Run) -> None:
    text = (
        f"g (float[2,3,4] x, float[2,4] s0) => (float[2,4] s1, float[2,3,4] y) {{ s1, y = Scan <num_scan_inputs=1"
        f"{directions}, body = b (float[4] s, float[4] xi) => (float[4] so, float[4] yo) "
        '{ so = Add(s, xi) t = Unsqueeze<axes=[0]>(so) yo = Squeeze<axes=[0]>(t) }> ("", s0, x) }'
    )
    check(build(text, opset=8), {"x": CUBE, "s0": CUBE[:, 1]}, run)


def test_scatter(build: Build, run: Run) -> None:
    text = "g (float[2,3,4] x, int64[1,3,4] i, float[1,3,4] u) => (float[2,3,4] y) { y = Scatter<axis=0>(x, i, u) }"
    check(build(text, opset=9), {"x": CUBE, "i": np.ones((1, 3, 4), np.int64), "u": CUBE[:1]}, run)


def test_group_normalization(build: Build, run: Run) -> None:
    text = "g (float[2,6,8,8] x, float[3] s, float[3] b) => (float y) { y = GroupNormalization<num_groups=3>(x, s, b) }"
    check(build(text, opset=18), {"x": IMAGE, "s": IMAGE[0, :3, 0, 0], "b": IMAGE[0, :3, 1, 0]}, run)


def test_grid_sample_and_dft(build: Build, run: Run) -> None:
    text = 'g (float[2,6,8,8] x, float[2,4,4,2] s) => (float y) { y = GridSample<mode="bilinear">(x, s) }'
    grid = np.tanh(IMAGE[:, :2, :4, :4]).transpose(0, 2, 3, 1).copy()
    check(build(text, opset=16), {"x": IMAGE, "s": grid}, run)
    check(build("g (float[2,8,1] x) => (float y) { y = DFT(x) }", opset=17), {"x": IMAGE[:, 0, 0, :, None]}, run)


def test_newer_models_are_left_at_their_opset(build: Build) -> None:
    loaded = load_model(build("g (float[2] x) => (float[2] y) { y = Relu(x) }", opset=22))
    assert loaded.model.opset_imports[""] == 22 and loaded.notes == ()


def test_upgrade_is_noted(build: Build) -> None:
    loaded = load_model(build("g (float[2] x) => (float[2] y) { y = Relu(x) }", opset=9), opset=17)
    assert loaded.model.opset_imports[""] == 17
    assert "upgraded opset 9 -> 17" in loaded.notes


BLOCKED = {
    "BatchNormalization 'bn' has spatial=0": (
        8,
        "g (float[1,2,3] x, float[6] s, float[6] b, float[6] m, float[6] v) => (float y) "
        "{ [bn] y = BatchNormalization<spatial=0>(x, s, b, m, v) }",
    ),
    "BatchNormalization 'bn' is in training mode": (
        9,
        "g (float[1,2,3] x, float[2] s, float[2] b, float[2] m, float[2] v) => (float y, float n) "
        "{ [bn] y, n, o, p, q = BatchNormalization(x, s, b, m, v) }",
    ),
    "Dropout 'drop' returns its mask": (7, "g (float[2] x) => (float y, float m) { [drop] y, m = Dropout(x) }"),
    "Resize 'up' computes its scales": (10, "g (float[2] x, float[1] s) => (float y) { [up] y = Resize(x, s) }"),
    "Resize 'up' grows one axis and shrinks another": (
        10,
        "g (float[4,4] x) => (float y) { s = Constant<value=float[2]{2,0.5}>() [up] y = Resize(x, s) }",
    ),
    "Resize 'up' has coordinate_transformation_mode=tf_half_pixel_for_nn": (
        11,
        "g (float[4,4] x) => (float y) { r = Constant<value=float[0]{}>() s = Constant<value=float[2]{2,2}>() "
        '[up] y = Resize<coordinate_transformation_mode="tf_half_pixel_for_nn">(x, r, s) }',
    ),
    "Scan 'scan' has sequence lengths": (
        8,
        "g (int64[2] n, float[2,4] s0, float[2,3,4] x) => (float s1, float y) { [scan] s1, y = Scan<num_scan_inputs=1, "
        "body = b (float[4] s, float[4] u) => (float[4] t, float[4] v) { t = Add(s, u) v = Add(s, s) }>(n, s0, x) }",
    ),
    "Add 'add' has the attribute 'broadcast', which opset 21 does not know": (
        7,
        "g (float[2] x) => (float y) { [add] y = Add<broadcast=1>(x, x) }",
    ),
    "Relu 'relu' has 2 inputs": (7, "g (float[2] x) => (float y) { [relu] y = Relu(x, x) }"),
}


@pytest.mark.parametrize("message", BLOCKED)
def test_impossible_upgrades_name_the_node(message: str, build: Build) -> None:
    opset, text = BLOCKED[message]
    with pytest.raises(InputError, match=f"cannot be upgraded from opset {opset} to 21: {message}"):
        load_model(build(text, opset=opset))


def test_usable_models_stay_at_their_opset(build: Build, run: Run) -> None:
    text = (
        "g (float[n,c,8] x, float[3] s, float[3] b) => (float y) { [gn] y = GroupNormalization<num_groups=3>(x, s, b) }"
    )
    loaded = load_model(build(text, opset=18))
    assert loaded.model.opset_imports[""] == 18
    assert loaded.notes == ("kept at opset 18: GroupNormalization 'gn' reads values of unknown shape",)


def test_unknown_opset(build: Build) -> None:
    model = build("g (float[2] x) => (float y) { y = Relu(x) }", opset=12)
    with pytest.raises(InputError, match="cannot be upgraded from opset 12 to 99: Target opset version 99"):
        load_model(model, opset=99)


def test_operator_that_is_gone(build: Build) -> None:
    model = build("g (float[2] x, float[1] s) => (float y) { [up] y = Upsample(x, s) }", opset=12)
    with pytest.raises(InputError, match="opset 21 has no operator Upsample 'up'"):
        load_model(model)


def test_unknown_operators_are_not_judged(build: Build) -> None:
    model = build(
        "g (float[2] x) => (float y) { z = Mystery<k=1>(x) y = my.domain.Op(z) }", opset=9, domains=', "my.domain": 3'
    )
    loaded = load_model(model)
    assert [node.op_type for node in loaded.model.graph] == ["Mystery", "Op"]
    assert loaded.model.opset_imports == {"": 21, "my.domain": 3}
