"""Multiplications and bit operations against counts by hand."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from quantkit.costs.bops import bops, macs, shapes_of
from quantkit.graph.load import load_model
from quantkit.graph.targets import find_targets
from quantkit.types import LayerStats, QuantSpec, Target
from tests.helpers.models import build, random

Shape = tuple[int, ...]


def targets(text: str, **weights: Shape) -> Mapping[str, Target]:
    return find_targets(load_model(build(text, {name: random(*shape) for name, shape in weights.items()})).model)[0]


def one(text: str, **weights: Shape) -> Target:
    (target,) = targets(text, **weights).values()
    return target


def seen(*shapes: Shape | tuple[Shape, int]) -> LayerStats:
    pairs = [shape if isinstance(shape[0], tuple) else (shape, 1) for shape in shapes]
    return LayerStats(1, -1.0, 1.0, data_shapes=dict(pairs))  # type: ignore[arg-type]


def conv(attributes: str, weight: Shape, axes: int = 2, groups: int = 1) -> Target:
    sizes, results = ",".join("abc"[:axes]), ",".join("pqr"[:axes])
    listed = f"<{attributes}>" if attributes else ""
    text = f"g (float[N,{weight[1] * groups},{sizes}] x) => (float[N,{weight[0]},{results}] y)"
    return one(f"{text} {{ y = Conv{listed}(x, w) }}", w=weight)


@pytest.mark.parametrize(
    ("attributes", "weight", "size", "positions"),
    [
        ("", (16, 8, 3, 3), (9, 7), 7 * 5),
        ("pads=[1,1,1,1]", (16, 8, 3, 3), (9, 7), 9 * 7),
        ("pads=[1,0,0,2]", (16, 8, 3, 3), (9, 7), 8 * 7),
        ("strides=[2,3]", (16, 8, 3, 3), (9, 7), 4 * 2),
        ("dilations=[2,1]", (16, 8, 3, 3), (9, 7), 5 * 5),
        ("dilations=[3,2],strides=[2,1],pads=[3,2,3,2]", (16, 8, 3, 3), (9, 7), 5 * 7),
        ('auto_pad="SAME_UPPER",strides=[2,2]', (16, 8, 3, 3), (9, 7), 5 * 4),
        ('auto_pad="SAME_LOWER"', (16, 8, 2, 2), (9, 7), 9 * 7),
        ('auto_pad="VALID",strides=[2,2]', (16, 8, 3, 3), (9, 7), 4 * 3),
        ("group=4", (16, 8, 3, 3), (9, 7), 7 * 5),
        ("group=8", (64, 1, 3, 3), (5, 5), 3 * 3),
    ],
)
def test_a_convolution_multiplies_its_weights_at_every_output_position(
    attributes: str, weight: Shape, size: Shape, positions: int
) -> None:
    groups = int(attributes.partition("group=")[2] or 1)
    data = (6, weight[1] * groups, *size)  # six samples: the count is of one
    assert macs(conv(attributes, weight, groups=groups), seen(data)) == int(np.prod(weight)) * positions


@pytest.mark.parametrize(("axes", "size", "positions"), [(1, (11,), 9), (3, (5, 4, 6), 3 * 2 * 4)])
def test_convolutions_of_one_and_three_axes(axes: int, size: Shape, positions: int) -> None:
    weight = (16, 8, *[3] * axes)
    assert macs(conv("", weight, axes), seen((2, 8, *size))) == int(np.prod(weight)) * positions


def test_a_transposed_convolution_multiplies_its_kernel_at_every_input_position() -> None:
    text = "g (float[N,8,a,b] x) => (float[N,32,c,d] y) { y = ConvTranspose<group=2,strides=[2,2]>(x, w) }"
    target = one(text, w=(8, 16, 3, 3))
    assert macs(target, seen((4, 8, 5, 6))) == 8 * 16 * 9 * 30


@pytest.mark.parametrize(
    ("shape", "rows"), [((7, 64), 1), ((7, 5, 64), 5), ((7, 3, 5, 64), 15), ((64,), 1), ((1, 9, 64), 9)]
)
def test_a_product_multiplies_its_weights_once_for_every_row_of_a_sample(shape: Shape, rows: int) -> None:
    dims = ",".join([*"abc"[: len(shape) - 1], "64"])
    out = ",".join([*"abc"[: len(shape) - 1], "48"])
    target = one(f"g (float[{dims}] x) => (float[{out}] y) {{ y = MatMul(x, w) }}", w=(64, 48))
    assert macs(target, seen(shape)) == 64 * 48 * rows


@pytest.mark.parametrize(("data", "rows"), [((2, 6, 5, 32), 5), ((6, 5, 32), 5), ((2, 1, 5, 32), 5)])
def test_every_slice_of_a_batched_weight_meets_its_own_rows(data: Shape, rows: int) -> None:
    dims = ",".join([*"abc"[: len(data) - 1], "32"])
    target = one(f"g (float[{dims}] x) => (float[p,q,r,s] y) {{ y = MatMul(x, w) }}".replace(
        "p,q,r,s", ",".join("pqrs"[: max(len(data), 3)])), w=(6, 32, 16))  # fmt: skip
    assert macs(target, seen(data)) == 6 * 32 * 16 * rows


def test_a_slice_for_all_meets_every_part() -> None:
    target = one("g (float[a,b,c,32] x) => (float[a,b,c,16] y) { y = MatMul(x, w) }", w=(1, 32, 16))
    assert macs(target, seen((2, 6, 5, 32))) == 32 * 16 * 6 * 5


def test_the_rows_of_a_gemm_are_samples() -> None:
    text = "g (float[N,64] x) => (float[N,48] y) { y = Gemm<transB=1>(x, w) }"
    assert macs(one(text, w=(48, 64)), seen((9, 64))) == 48 * 64
    text = "g (float[64,N] x) => (float[N,48] y) { y = Gemm<transA=1>(x, w) }"
    assert macs(one(text, w=(64, 48)), seen((64, 9))) == 48 * 64


def test_a_table_multiplies_nothing() -> None:
    target = one("g (int64[N,S] ids) => (float[N,S,32] y) { y = Gather(table, ids) }", table=(50, 32))
    assert macs(target, seen((2, 9))) == 0 == macs(target, None)
    assert bops(target, QuantSpec(4), seen((2, 9))) == 0 == bops(target, None, None)


RECURRENT = """g (float[{data}] x) => (float[a,b,c,d] y) {{
    y = {op}<hidden_size=16{layout},direction="{direction}">(x, w, r)
}}"""


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize(("direction", "directions"), [("forward", 1), ("bidirectional", 2)])
def test_recurrent_weights_are_multiplied_at_every_step(op: str, gates: int, direction: str, directions: int) -> None:
    text = RECURRENT.format(data="T,N,32", op=op, layout="", direction=direction)
    found = targets(text, w=(directions, gates * 16, 32), r=(directions, gates * 16, 16))
    by_input = next(target for name, target in found.items() if name.endswith(".W"))
    by_state = next(target for name, target in found.items() if name.endswith(".R"))
    stats = {by_input.name: seen((7, 3, 32))}  # 7 steps of 3 samples
    assert macs(by_input, shapes_of(by_input, stats)) == directions * gates * 16 * 32 * 7
    assert macs(by_state, shapes_of(by_state, stats)) == directions * gates * 16 * 16 * 7
    assert shapes_of(by_state, {}) is None and shapes_of(by_input, {}) is None


def test_the_batch_may_come_first_in_a_recurrent_layer() -> None:
    text = RECURRENT.format(data="N,T,32", op="LSTM", layout=",layout=1", direction="forward")
    target = next(iter(targets(text, w=(1, 64, 32), r=(1, 64, 16)).values()))
    assert macs(target, seen((3, 7, 32))) == 64 * 32 * 7


def test_a_shared_weight_counts_at_every_use() -> None:
    target = one("g (float[N,64] x) => (float[N,64] y) { a = MatMul(x, w) \n y = MatMul(a, w) }", w=(64, 64))
    assert len(target.uses) == 2
    assert macs(target, seen((5, 64))) == 2 * 64 * 64 == macs(target, None)


def test_the_typical_shape_is_the_median_over_runs() -> None:
    target = one("g (float[N,S,64] x) => (float[N,S,48] y) { y = MatMul(x, w) }", w=(64, 48))
    stats = seen(((2, 100, 64), 1), ((2, 8, 64), 5), ((2, 3, 64), 2))
    assert macs(target, stats) == 64 * 48 * 8


def test_without_shapes_every_weight_counts_once() -> None:
    assert macs(conv("", (16, 8, 3, 3)), None) == 16 * 8 * 9
    assert macs(conv("", (16, 8, 3, 3)), LayerStats(0, 0.0, 0.0)) == 16 * 8 * 9


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        (None, 32 * 32),
        (QuantSpec(4, 32), 4 * 32),  # float activations
        (QuantSpec(4, 32, act_bits=8), 4 * 8),
        (QuantSpec(8, -1, symmetric=True, act_bits=8), 8 * 8),
        (QuantSpec(3, 32, group_bits=(2, 4)), 3 * 32),
        (QuantSpec(3, 48, act_bits=8, group_bits=(2, 5)), 22),  # 48 inputs of 2 bits, 16 of 5: 2.75 on average
    ],
)
def test_bit_operations_are_multiplications_times_both_widths(spec: QuantSpec | None, bits: int) -> None:
    target = one("g (float[N,S,64] x) => (float[N,S,48] y) { y = MatMul(x, w) }", w=(64, 48))
    assert bops(target, spec, seen((2, 5, 64))) == 64 * 48 * 5 * bits
