"""Which forms a layer may take, what they cost in accuracy, and which one is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from quantkit.costs.bops import bops
from quantkit.forms import (
    UNSEEN_ACTIVATION_NOISE,
    Chooser,
    choose_forms,
    default_group_size,
    even_groups,
    multiply,
    operations_limits,
    static_layers,
    typical_rows,
)
from quantkit.graph.load import load_model
from quantkit.graph.targets import find_targets
from quantkit.methods import make
from quantkit.types import ActParams, Array, FloatArray, LayerStats, QuantizedWeight, QuantSpec, Target

SPEC = QuantSpec(4, 32)
Cost = Callable[[Target, QuantSpec, str, int], tuple[float, float]]


def load(text: str, **shapes: tuple[int, ...]) -> tuple[ir.Model, dict[str, Target]]:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {text}')
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        proto.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    model = load_model(proto).model
    return model, find_targets(model)[0]


def product() -> Target:
    text = "g (float[N,64] x) => (float[N,M] y) { y = MatMul(x, w) }"
    return next(iter(load(text, w=(64, 48))[1].values()))


def convolution(groups: int = 1) -> Target:
    text = f"g (float[N,32,9,9] x) => (float[N,a,b,c] y) {{ y = Conv<group={groups}>(x, w) }}"
    return next(iter(load(text, w=(16, 32 // groups, 3, 3))[1].values()))


def quantize(target: Target, spec: QuantSpec) -> QuantizedWeight:
    made: QuantizedWeight = make("quantizers", "rtn", {}).quantize(target.load(), spec, None)
    return made


def chooser(
    *,
    activations: str = "auto",
    group_size: int | None = None,
    static: Sequence[str] = (),
    activation_of: Mapping[str, ActParams] | None = None,
    stats: Mapping[str, LayerStats] | None = None,
    cost: Cost | None = None,
    runtime: str = "ort-cpu",
) -> Chooser:
    return Chooser(
        runtime=runtime,
        activations=activations,
        group_size=group_size,
        static=frozenset(static),
        activation_of=activation_of or {},
        stats=stats or {},
        quantize=quantize,
        cost=cost or (lambda target, spec, form, rows: (2.0, 1.0)),
    )


def rows_of(target: Target, count: int = 50) -> LayerStats:
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((target.groups, count, target.shape[1])).astype(np.float32)
    return LayerStats(count, float(rows.min()), float(rows.max()), rows=rows, data_shapes={(count, 64): 1})


# --- Options


@pytest.mark.parametrize(
    ("activations", "forms"),
    [
        ("auto", {"packed", "matmulnbits", "dynamic"}),
        ("none", {"packed", "matmulnbits"}),
        ("8", {"dynamic"}),
    ],
)
def test_forms_of_a_product_by_activations(activations: str, forms: set[str]) -> None:
    options = chooser(activations=activations).options(product(), QuantSpec(4))
    assert {option.form for option in options} == forms
    assert all(option.spec.bits == 4 for option in options)
    assert {option.form: option.spec.act_bits for option in options} == {
        form: 8 if form == "dynamic" else None for form in forms
    }


def test_a_refused_form_is_no_option() -> None:
    target = product()
    assert {option.form for option in chooser(group_size=7).options(target, QuantSpec(4))} == {"packed", "dynamic"}
    batched = "g (float[3,N,64] x) => (float[3,N,M] y) { y = MatMul(x, w) }"
    (target,) = load(batched, w=(3, 64, 48))[1].values()
    assert {option.form for option in chooser(activations="8").options(target, QuantSpec(8))} == {"packed"}


def test_every_other_operator_has_one_form() -> None:
    target = convolution()
    assert [option.form for option in chooser().options(target, QuantSpec(3))] == ["packed"]
    act = {target.name: ActParams(0.01, 128)}
    (option,) = chooser(static=[target.name], activation_of=act).options(target, QuantSpec(3))
    assert (option.form, option.spec) == ("qdq", QuantSpec(3, -1, symmetric=True, act_bits=8))
    text = "g (int64[N] x) => (float[N,M] y) { y = Gather(w, x) }"
    (table,) = load(text, w=(100, 64))[1].values()
    (option,) = chooser().options(table, QuantSpec(4))
    assert (option.form, option.milliseconds, option.ratio) == ("gather", 0.0, None)


def test_the_most_accurate_option_comes_first() -> None:
    target = product()
    for bits in (2, 4, 8):
        noises = [
            option.noise for option in chooser(stats={target.name: rows_of(target)}).options(target, QuantSpec(bits))
        ]
        assert noises == sorted(noises) and noises[0] > 0


def test_widths_of_groups_are_kept_in_every_form_that_holds_them() -> None:
    target, asked = product(), QuantSpec(3, 16, group_bits=(2, 3, 4, 3))
    found = {option.form: option.spec for option in chooser().options(target, asked)}
    assert found == {
        "packed": asked,
        "matmulnbits": asked,
        "dynamic": replace(asked, act_bits=8),
    }
    narrow = replace(asked, group_bits=(1, 3, 4, 4))
    assert {option.form for option in chooser().options(target, narrow)} == {"packed", "dynamic"}
    assert {option.form for option in chooser(runtime="portable").options(target, asked)} == {"packed", "dynamic"}


def test_a_quantizer_may_choose_widths_that_not_every_form_holds() -> None:
    def labels(item: Target, spec: QuantSpec) -> QuantizedWeight:
        return quantize(item, spec if spec.group_bits else replace(spec, group_bits=(1, 3)))

    made = replace(chooser(), quantize=labels)
    options = made.options(product(), QuantSpec(2))
    assert {option.form for option in options} == {"packed", "dynamic"}  # 1 bit has no place in the kernel
    assert all(option.spec.group_bits == (1, 3) and option.spec.bits == 2 for option in options)


def test_group_sizes() -> None:
    target = product()
    assert [default_group_size(bits) for bits in (1, 2, 4, 5, 8)] == [32, 32, 32, 128, 128]
    mine, theirs = chooser(), chooser(group_size=16)
    assert mine.spec(target, 4, "packed") == QuantSpec(4, 32)
    assert mine.spec(target, 6, "matmulnbits") == QuantSpec(6, 128)
    assert mine.spec(target, 8, "dynamic") == QuantSpec(8, -1, symmetric=True, act_bits=8)
    assert mine.spec(target, 4, "dynamic") == QuantSpec(4, 32, act_bits=8)
    assert mine.spec(target, 4, "qdq") == QuantSpec(4, -1, symmetric=True, act_bits=8)
    assert theirs.spec(target, 8, "packed") == QuantSpec(8, 16)
    assert theirs.spec(target, 8, "dynamic") == QuantSpec(8, 16, act_bits=8)
    assert chooser(group_size=-1).spec(target, 4, "packed") == QuantSpec(4, -1)


def test_the_cost_is_asked_for_the_typical_rows() -> None:
    target, asked = product(), []

    def cost(item: Target, spec: QuantSpec, form: str, rows: int) -> tuple[float, float]:
        asked.append((item.name, spec.bits, form, rows))
        return 4.0, 1.0

    options = chooser(stats={target.name: rows_of(target)}, cost=cost).options(target, QuantSpec(4))
    assert {(name, bits, rows) for name, bits, _, rows in asked} == {(target.name, 4, 64)}
    assert {form for _, _, form, _ in asked} == {option.form for option in options}
    assert all(option.ratio == 0.25 for option in options)


@pytest.mark.parametrize(
    ("shapes", "rows"),
    [
        ({}, 1),
        ({(1, 64): 5}, 1),
        ({(8, 64): 3}, 8),
        ({(8, 16, 64): 1}, 128),
        ({(100, 64): 1}, 128),
        ({(90, 64): 1}, 64),
        ({(1, 64): 3, (512, 64): 2}, 1),
        ({(1, 64): 2, (512, 64): 3}, 512),
        ({(64,): 1}, 1),
    ],
)
def test_typical_rows(shapes: dict[tuple[int, ...], int], rows: int) -> None:
    assert typical_rows(LayerStats(1, 0.0, 0.0, data_shapes=shapes)) == rows
    assert typical_rows(None) == 1


# --- Noise


def exact_noise(rows: Array, rounded: Array, weight: Array, effective: Array) -> float:
    groups = rows.shape[0]
    signal = noise = 0.0
    for group in range(groups):
        share = slice(group * len(weight) // groups, (group + 1) * len(weight) // groups)
        wanted = rows[group].astype(np.float64) @ weight[share].astype(np.float64).T
        measured = rounded[group].astype(np.float64) @ effective[share].astype(np.float64).T
        signal += float(np.square(wanted).sum())
        noise += float(np.square(measured - wanted).sum())
    return noise / signal


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("bits", [2, 8])
def test_noise_of_weights_is_the_direct_computation(groups: int, bits: int) -> None:
    target = convolution(groups)
    stats = rows_of(target)
    assert stats.rows is not None
    found = chooser(stats={target.name: stats}).noise(target, QuantSpec(bits, 32), "packed")
    weight = quantize(target, QuantSpec(bits, 32)).dequantize()
    assert found == pytest.approx(exact_noise(stats.rows, stats.rows, target.load(), weight), rel=1e-3)


def test_noise_of_static_integers_is_the_direct_computation() -> None:
    target, act = convolution(), ActParams(0.03, 120)
    stats, spec = rows_of(target), QuantSpec(5, -1, symmetric=True, act_bits=8)
    assert stats.rows is not None
    found = chooser(stats={target.name: stats}, activation_of={target.name: act}).noise(target, spec, "qdq")
    codes = np.clip(np.rint(stats.rows / np.float32(act.scale)) + act.zero_point, 0, 255)
    rounded = (codes - act.zero_point) * act.scale
    expected = exact_noise(stats.rows, rounded, target.load(), quantize(target, spec).dequantize())
    assert found == pytest.approx(expected, rel=1e-3)
    clipped = chooser(stats={target.name: stats}, activation_of={target.name: ActParams(0.003, 120)})
    assert clipped.noise(target, spec, "qdq") > 10 * found


def test_without_rows_the_weights_alone_speak() -> None:
    target = product()
    weight, effective = target.load(), quantize(target, SPEC).dequantize()
    expected = float(np.square(effective.astype(np.float64) - weight).sum() / np.square(weight, dtype=np.float64).sum())
    assert chooser().noise(target, SPEC, "packed") == pytest.approx(expected, rel=1e-6)
    no_rows = {target.name: LayerStats(4, 0.0, 1.0)}
    assert chooser(stats=no_rows).noise(target, SPEC, "packed") == pytest.approx(expected, rel=1e-6)
    dynamic = chooser().noise(target, QuantSpec(8, -1, symmetric=True, act_bits=8), "dynamic")
    assert UNSEEN_ACTIVATION_NOISE < dynamic < 2 * UNSEEN_ACTIVATION_NOISE


def test_rows_times_weight_by_groups() -> None:
    rng = np.random.default_rng(0)
    rows: FloatArray = rng.standard_normal((2, 5, 3)).astype(np.float32)
    weight: FloatArray = rng.standard_normal((8, 3)).astype(np.float32)
    found = multiply(rows, weight)
    assert found.shape == (2, 5, 4)
    np.testing.assert_allclose(found[1], rows[1] @ weight[4:].T, rtol=1e-5)


# --- What allocation counts before forms are chosen


def test_bit_operations_are_those_of_the_form_with_the_fewest() -> None:
    target = product()
    stats = {target.name: rows_of(target)}
    both, floats = chooser(stats=stats), chooser(stats=stats, activations="none")
    weights = 64 * 48
    assert both.operations(target, None) == floats.operations(target, None) == weights * 32 * 32
    assert both.operations(target, QuantSpec(3)) == weights * 3 * 8
    assert floats.operations(target, QuantSpec(3)) == weights * 3 * 32
    convolved = convolution()
    assert chooser().operations(convolved, QuantSpec(4)) == 16 * 32 * 9 * 4 * 32  # no integer form


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("share", [Fraction(1, 100), Fraction(1, 64), Fraction(1, 16)])
def test_forms_keep_the_bit_operations_that_allocation_counted(bits: int, share: Fraction) -> None:
    target = product()
    stats = {target.name: rows_of(target)}
    made = chooser(stats=stats, cost=lambda item, spec, form, rows: (1.0, 2.0 if form == "dynamic" else 1.0))
    options = {target.name: made.options(target, QuantSpec(bits))}
    (limit,) = operations_limits({target.name: target}, options, stats, share)
    chosen = choose_forms(options, model_ms=None, max_latency=None, limits=[limit])[target.name]
    spent = bops(target, chosen.spec, stats[target.name])
    most = int(share * made.operations(target, None))
    assert (spent <= most) == (made.operations(target, QuantSpec(bits)) <= most)
    if bits * 32 <= share * 1024:
        assert chosen.form != "dynamic"  # slower, and not needed
    assert operations_limits({target.name: target}, options, stats, None) == []


def test_layers_that_stay_float_count_as_such() -> None:
    first, second = replace(product(), name="first"), replace(product(), name="second")
    options = {"first": chooser().options(first, QuantSpec(8))}
    whole = 2 * 64 * 48 * 1024
    (limit,) = operations_limits({"first": first, "second": second}, options, {}, whole)
    assert limit.bound == whole / 2
    assert limit.amounts == [[64 * 48 * 8 * (item.spec.act_bits or 32) for item in options["first"]]]


def test_the_time_of_a_width_is_that_of_its_fastest_form_beside_its_own_float() -> None:
    """Where only `dynamic` is fast, that is what allocation counts, and what is chosen within the same budget."""
    times = {"packed": (1.0, 1.0), "matmulnbits": (1.5, 1.4), "dynamic": (1.2, 0.5)}
    target = product()
    stats = {target.name: rows_of(target)}
    made = chooser(stats=stats, cost=lambda item, spec, form, rows: times[form])
    assert made.operations(target, QuantSpec(4), fastest=True) == 64 * 48 * 4 * 8
    slow = chooser(stats=stats, cost=lambda item, spec, form, rows: (1.0, 2.0 if form == "dynamic" else 1.0))
    assert slow.operations(target, QuantSpec(4), fastest=True) == 64 * 48 * 4 * 32
    assert slow.operations(target, None, fastest=True) == 64 * 48 * 32 * 32
    assert made.milliseconds(target, None) == 1.0
    changed = made.milliseconds(target, QuantSpec(4)) - made.milliseconds(target, None)
    assert changed == pytest.approx(-0.7)
    options = {target.name: made.options(target, QuantSpec(4))}
    for factor in (0.9, 1.0, 1.2):
        most = factor * (3.0 + changed) / 3.0
        taken = [
            choose_forms(options, model_ms=3.0, max_latency=m, correction=factor) for m in (most + 1e-9, most + 0.5)
        ]
        assert [[option.form for option in item.values()] for item in taken] == [
            ["dynamic"],
            [options[target.name][0].form],
        ]
    assert options[target.name][0].form != "dynamic"


@pytest.mark.parametrize(
    ("num_inputs", "group_size", "wanted"),
    [(576, 128, 144), (144, 128, 144), (33, 32, 33), (27, 32, 32), (384, 128, 128), (200, 128, 100), (90, 32, 30)],
)
def test_groups_fill_up_little(num_inputs: int, group_size: int, wanted: int) -> None:
    assert even_groups(num_inputs, group_size) == wanted
    assert -(-num_inputs // wanted) * wanted - num_inputs < max(wanted - num_inputs, 0) + -(-num_inputs // wanted)


# --- Static layers

CONVOLUTIONS = "a = Conv(x, w1) r = Relu(a) b = Conv(r, w2) "
SHAPES: dict[str, tuple[int, ...]] = {"w1": (16, 3, 3, 3), "w2": (16, 16, 3, 3), "g": (16, 32), "h": (32, 32)}


def static(body: str, *, activations: str = "auto", inputs: str = "float[N,3,9,9] x", **extra: Any) -> set[str]:
    used = {name: shape for name, shape in SHAPES.items() if f"{name})" in body or f"{name}," in body}
    model, targets = load(f"g ({inputs}) => (float[a,b] y) {{ {body} }}", **used, **extra)
    return {target.node.op_type + str(target.shape[0]) for name, target in targets.items()
            if name in static_layers(model, targets, "ort-cpu", activations)}  # fmt: skip


def test_convolutions_are_static() -> None:
    assert static(CONVOLUTIONS + "y = Flatten(b)") == {"Conv16"}
    assert static(CONVOLUTIONS + "y = Flatten(b)", activations="none") == set()
    assert static(CONVOLUTIONS + "y = Flatten(b)", activations="8") == {"Conv16"}


def test_products_are_static_where_integers_reach_them() -> None:
    pooled = CONVOLUTIONS + "m = GlobalAveragePool(b) f = Flatten(m) "
    assert static(pooled + "y = MatMul(f, g)") == {"Conv16", "MatMul32"}
    assert static(pooled + "y = Gemm(f, g)") == {"Conv16", "Gemm32"}
    assert static(pooled + "e = Exp(f) y = Gemm(e, g)") == {"Conv16"}
    assert static(pooled + "d = Gemm(f, g) e = Relu(d) y = Gemm(e, h)") == {"Conv16", "Gemm32"}
    assert static(pooled + "d = Gemm(f, g) e = Exp(d) y = Gemm<transB=1>(e, h)") == {"Conv16", "Gemm32"}


def test_products_without_convolutions_are_not_static() -> None:
    assert static("d = MatMul(x, g) e = Relu(d) y = MatMul(e, h)", inputs="float[N,16] x") == set()


def test_a_product_and_its_bias_behind_convolutions_are_static() -> None:
    pooled = CONVOLUTIONS + "m = GlobalAveragePool(b) f = Flatten(m) d = MatMul(f, g) "
    assert static(pooled + "y = Add(d, c)", c=(32,)) == {"Conv16", "MatMul32"}


def test_layers_in_branches_are_not_static() -> None:
    branches = (
        "t = Cast<to=9>(flag) y = If(t) <then_branch = p () => (float[a,b] u) {c = Conv(r, w2) u = Flatten(c)}, "
        "else_branch = q () => (float[a,b] v) {v = Flatten(r)}>"
    )
    inputs = "float[N,3,9,9] x, float flag"
    model, targets = load(
        f"g ({inputs}) => (float[a,b] y) {{ a = Conv(x, w1) r = Relu(a) {branches} }}",
        w1=SHAPES["w1"], w2=SHAPES["w2"],
    )  # fmt: skip
    assert len(targets) == 2
    found = static_layers(model, targets, "ort-cpu", "auto")
    assert [target.shape for name, target in targets.items() if name in found] == [(16, 27)]
