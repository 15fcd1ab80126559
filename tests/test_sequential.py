"""Layers quantized one after the other: what each sees and aims at, against the definition in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from quantkit.calibration import cross
from quantkit.calibration.data import open_calibration
from quantkit.calibration.rows import sample_positions, to_rows
from quantkit.errors import InputError
from quantkit.graph.load import load_model
from quantkit.graph.targets import find_targets
from quantkit.quantizers.rtn import RTN
from quantkit.report.progress import SilentProgress
from quantkit.runtime import spool
from quantkit.runtime.ort import make_session
from quantkit.sequential import Settings, quantize_sequentially
from quantkit.types import Array, FloatArray, LayerStats, QuantizedWeight, QuantSpec, Target
from quantkit.verify import session_inputs

SPEC = QuantSpec(3, group_size=16)
Doubles = npt.NDArray[np.float64]


@dataclass
class Recorder:
    """Rounds to nearest, and remembers what it was given, in order."""

    stats: frozenset[str] = frozenset({"gram", "mean", "rows"})
    seen: list[tuple[FloatArray, LayerStats | None]] = field(default_factory=list)
    specs: list[QuantSpec] = field(default_factory=list)

    def quantize(self, weight: FloatArray, spec: QuantSpec, stats: LayerStats | None) -> QuantizedWeight:
        self.seen.append((weight, stats))
        self.specs.append(spec)
        return RTN().quantize(weight, spec, None)


class Network:
    """A loaded model, its targets by the name of their weight, and its data."""

    def __init__(self, text: str, shapes: Mapping[str, tuple[int, ...]], **constants: Array) -> None:
        proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {text}')
        rng = np.random.default_rng(0)
        arrays = {name: (rng.standard_normal(shape) / 3).astype(np.float32) for name, shape in shapes.items()}
        proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in {**arrays, **constants}.items())
        self.model = load_model(proto).model
        self.targets: dict[str, Target] = find_targets(self.model)[0]
        self.recorder = Recorder()

    def walk(
        self, arrays: Mapping[str, Array], settings: Settings | None = None, batch: int | None = None, **more: Any
    ) -> Mapping[str, QuantizedWeight]:
        data = open_calibration(dict(arrays), session_inputs(make_session(self.model)), batch_size=batch)
        specs = dict.fromkeys(more.pop("names", self.targets), replace(SPEC, act_bits=8))
        settings = settings or Settings()
        return quantize_sequentially(
            self.model, self.targets, specs, data, self.recorder, settings, SilentProgress(), **more
        ).weights

    def walk_feeds(self, feeds: list[dict[str, Array]]) -> None:
        data = open_calibration(feeds, session_inputs(make_session(self.model)))
        specs = dict.fromkeys(self.targets, SPEC)
        quantize_sequentially(self.model, self.targets, specs, data, self.recorder, Settings(), SilentProgress())

    def target(self, weight: str) -> Target:
        return next(target for target in self.targets.values() if target.weight.name == weight)

    def given(self, weight: str) -> tuple[FloatArray, LayerStats | None]:
        """What the quantizer was given for a weight, when the layers were quantized in graph order."""
        return self.recorder.seen[list(self.targets).index(self.target(weight).name)]


def aimed(weight: Array, exact: Array, ours: Array, trust: float, branch: Array | float = 0.0) -> Doubles:
    """argmin |X W^T + D - X~ V^T|^2 / T + lam |V - W|^2, by stacking the penalty under the rows."""
    ours = ours.astype(np.float64)
    rows, size = ours.shape
    lam = trust * np.square(ours).sum() / rows / size
    tall = np.concatenate([ours / np.sqrt(rows), np.sqrt(lam) * np.eye(size)])
    wanted = (exact.astype(np.float64) @ weight.astype(np.float64).T + branch) / np.sqrt(rows)
    return np.linalg.lstsq(tall, np.concatenate([wanted, np.sqrt(lam) * weight.T.astype(np.float64)]))[0].T


def rounded(weight: FloatArray) -> FloatArray:
    return RTN().quantize(weight, SPEC, None).dequantize()


def normal(*shape: int, seed: int = 1) -> FloatArray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


CHAIN = """g (float[N,33] x) => (float[N,M] y) { h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }"""
CHAIN_SHAPES = {"a": (33, 40), "b": (40, 17)}


@pytest.mark.parametrize("batch", [1, 7, 50])
def test_a_layer_sees_and_aims_at_what_its_quantized_predecessor_makes(batch: int) -> None:
    net, x = Network(CHAIN, CHAIN_SHAPES), normal(50, 33)
    net.walk({"x": x}, Settings(trust=0.03), batch=batch)
    first, second = net.target("a").load(), net.target("b").load()
    weight, stats = net.given("a")
    np.testing.assert_array_equal(weight, first)  # nothing is quantized before it
    assert stats is not None and stats.gram is not None
    np.testing.assert_allclose(stats.gram[0], x.T @ x / 50, atol=1e-5)
    exact, ours = np.maximum(x @ first.T, 0), np.maximum(x @ rounded(first).T, 0)
    weight, stats = net.given("b")
    assert stats is not None and stats.gram is not None and stats.mean is not None and stats.rows is not None
    assert stats.num_tokens == 50 and stats.rows.shape == (1, 50, 40)
    np.testing.assert_allclose(stats.gram[0], ours.T @ ours / 50, atol=2e-5)
    np.testing.assert_allclose(stats.mean[0], ours.mean(axis=0), atol=2e-5)
    np.testing.assert_allclose(weight, aimed(second, exact, ours, 0.03), atol=1e-4)
    assert np.abs(weight - second).max() > 0.01  # the aim moved: the comparison above is not empty
    assert net.recorder.specs == [SPEC, SPEC]  # activations are the form's business


def test_without_an_aim_only_the_statistics_come_from_the_quantized_model() -> None:
    net, x = Network(CHAIN, CHAIN_SHAPES), normal(50, 33)
    net.walk({"x": x}, Settings(aim=False))
    ours = np.maximum(x @ rounded(net.target("a").load()).T, 0)
    weight, stats = net.given("b")
    np.testing.assert_array_equal(weight, net.target("b").load())
    assert stats is not None and stats.gram is not None
    np.testing.assert_allclose(stats.gram[0], ours.T @ ours / 50, atol=2e-5)


def test_a_layer_left_float_passes_on_the_error_of_those_before_it() -> None:
    text = "g (float[N,32] x) => (float[N,M] y) { h = MatMul(x, a) i = MatMul(h, b) y = MatMul(i, c) }"
    net, x = Network(text, {"a": (32, 32), "b": (32, 32), "c": (32, 16)}), normal(40, 32)
    net.walk({"x": x}, names=[net.target("a").name, net.target("c").name])
    a, b = net.target("a").load(), net.target("b").load()
    stats = net.recorder.seen[1][1]
    assert stats is not None and stats.gram is not None
    ours = x @ rounded(a).T @ b.T
    np.testing.assert_allclose(stats.gram[0], ours.T @ ours / 40, atol=2e-4)


def test_the_form_decides_what_later_layers_see() -> None:
    net, x = Network(CHAIN, CHAIN_SHAPES), normal(50, 33)
    net.walk({"x": x}, effective=lambda target, weight: 2 * target.load())
    ours = 2 * np.maximum(x @ net.target("a").load().T, 0)
    stats = net.given("b")[1]
    assert stats is not None and stats.gram is not None
    np.testing.assert_allclose(stats.gram[0], ours.T @ ours / 50, atol=1e-4)
    np.testing.assert_allclose(net.given("b")[0], aimed(net.target("b").load(), ours / 2, ours, 0.1), atol=1e-4)


BLOCK = """g (float[B,S,32] x, int64[B,S] attention_mask) => (float[B,S,32] y) {
    h = MatMul(x, a) r = Relu(h) o = MatMul(r, b) s = Add(shift, o) t = Add(h, s) y = MatMul(t, c) }"""
BLOCK_SHAPES = {"a": (32, 32), "b": (32, 32), "c": (32, 32), "shift": (32,)}


def test_a_layer_makes_up_for_the_branch_that_it_is_added_to_and_padding_counts_nowhere() -> None:
    net, x = Network(BLOCK, BLOCK_SHAPES), normal(6, 5, 32)
    mask = np.array([[1] * size + [0] * (5 - size) for size in (5, 2, 3, 5, 1, 4)])
    net.walk({"x": x, "attention_mask": mask}, Settings(trust=0.2), batch=4)
    a, b = net.target("a").load(), net.target("b").load()
    rows = x[mask > 0]
    branch, drifted = rows @ a.T, rows @ rounded(a).T
    weight, stats = net.given("b")
    assert stats is not None and stats.num_tokens == 20
    exact, ours = np.maximum(branch, 0), np.maximum(drifted, 0)
    np.testing.assert_allclose(weight, aimed(b, exact, ours, 0.2, branch - drifted), atol=1e-4)
    net.recorder.seen.clear()
    net.walk({"x": x, "attention_mask": mask}, Settings(trust=0.2, residual=False))
    np.testing.assert_allclose(net.given("b")[0], aimed(b, exact, ours, 0.2), atol=1e-4)


RESNET = """g (float[N,8,9,9] x) => (float[N,16,9,9] y) {
    h = Conv<pads=[1,1,1,1]>(x, a) r = Relu(h) o = Conv<group=2,pads=[1,1,1,1]>(r, b) y = Add(o, h) }"""


@pytest.mark.parametrize("early", [True, False])
def test_a_branch_of_one_number_a_row_counts_for_every_output_if_it_is_there_before_the_layer(early: bool) -> None:
    mean, relu = "m = ReduceMean<keepdims=1>(h, last)", "r = Relu(h)"
    order = f"{mean} {relu}" if early else f"{relu} {mean}"
    text = f"g (float[N,32] x) => (float[N,M] y) {{ h = MatMul(x, a) {order} o = MatMul(r, b) y = Add(o, m) }}"
    net, x = Network(text, {"a": (32, 32), "b": (32, 24)}, last=np.array([1])), normal(40, 32)
    net.walk({"x": x})
    a, b = net.target("a").load(), net.target("b").load()
    exact, ours = x @ a.T, x @ rounded(a).T
    drift = (exact - ours).mean(axis=1, keepdims=True) if early else 0.0
    wanted = aimed(b, np.maximum(exact, 0), np.maximum(ours, 0), 0.1, drift)
    np.testing.assert_allclose(net.given("b")[0], wanted, atol=2e-4)


def test_a_branch_that_is_wider_than_the_layer_is_left_alone() -> None:
    text = "g (float[N,320] x) => (float[N,M] y) { h = MatMul(x, a) r = Relu(h) o = MatMul(r, b) y = Add(o, h) }"
    net, x = Network(text, {"a": (320, 320), "b": (320, 1)}), normal(40, 320)
    net.walk({"x": x})
    a, b = net.target("a").load(), net.target("b").load()
    wanted = aimed(b, np.maximum(x @ a.T, 0), np.maximum(x @ rounded(a).T, 0), 0.1)
    np.testing.assert_allclose(net.given("b")[0], wanted, rtol=1e-3, atol=1e-3)


def test_a_branch_that_is_broadcast_over_rows_is_left_alone() -> None:
    text = """g (float[B,S,32] x) => (float[B,S,32] y) {
        h = MatMul(x, a) m = ReduceMean<keepdims=1>(h, axis) r = Relu(h) o = MatMul(r, b) y = Add(o, m) }"""
    net, x = Network(text, {"a": (32, 32), "b": (32, 32)}, axis=np.array([1])), normal(6, 5, 32)
    net.walk({"x": x})
    a, b = net.target("a").load(), net.target("b").load()
    rows = x.reshape(-1, 32)
    wanted = aimed(b, np.maximum(rows @ a.T, 0), np.maximum(rows @ rounded(a).T, 0), 0.1)
    np.testing.assert_allclose(net.given("b")[0], wanted, atol=1e-4)


def test_a_branch_of_a_convolution_that_is_broadcast_over_positions_is_left_alone() -> None:
    text = """g (float[N,16,9,9] x) => (float[N,16,9,9] y) {
        h = Conv(x, a) p = GlobalAveragePool(h) r = Relu(h) o = Conv(r, b) y = Add(o, p) }"""
    net, x = Network(text, {"a": (16, 16, 1, 1), "b": (16, 16, 1, 1)}), normal(2, 16, 9, 9)
    net.walk({"x": x}, batch=2)
    a, b, pixels = net.target("a").load(), net.target("b").load(), x.transpose(0, 2, 3, 1).reshape(-1, 16)
    wanted = aimed(b, np.maximum(pixels @ a.T, 0), np.maximum(pixels @ rounded(a).T, 0), 0.1)
    np.testing.assert_allclose(net.given("b")[0], wanted, atol=1e-4)


def conv_rows(target: Target, value: Array, limit: int | None, seed: int) -> FloatArray:
    """[groups, T, 72] of a padded 3 x 3 convolution."""
    shape, pads = target.layout.operand_shape, {"pads": [1, 1, 1, 1]}
    return to_rows("Conv", value, operand_shape=shape, groups=target.groups, attributes=pads, limit=limit, seed=seed)


@pytest.mark.parametrize("size", [3, 14])
def test_grouped_convolutions_read_the_same_positions_in_both_models_and_the_branch(size: int) -> None:
    net, x = Network(RESNET, {"a": (16, 8, 3, 3), "b": (16, 8, 3, 3)}), normal(2 * size, 8, 9, 9)
    net.walk({"x": x}, Settings(seed=3), batch=size)
    a, b = net.target("a"), net.target("b")
    pixels = conv_rows(a, x, None, 0)[0]
    exact, ours = (
        (pixels @ weight.T).reshape(-1, 9, 9, 16).transpose(0, 3, 1, 2) for weight in (a.load(), rounded(a.load()))
    )
    saw, sees, branch = [], [], []
    for number, part in enumerate((slice(0, size), slice(size, 2 * size))):  # other positions in each batch
        chosen = sample_positions(size * 81, cross.POSITIONS, 3 + number)
        assert (chosen.size < size * 81) == (size == 14)
        saw.append(conv_rows(b, np.maximum(exact[part], 0), cross.POSITIONS, 3 + number))
        sees.append(conv_rows(b, np.maximum(ours[part], 0), cross.POSITIONS, 3 + number))
        branch.append((exact - ours)[part].transpose(0, 2, 3, 1).reshape(-1, 16)[chosen])
    before, after, drift = np.concatenate(saw, axis=1), np.concatenate(sees, axis=1), np.concatenate(branch)
    weight, stats = net.given("b")
    assert stats is not None and stats.gram is not None and stats.gram.shape == (2, 72, 72)
    for group, rows in enumerate((slice(0, 8), slice(8, 16))):
        np.testing.assert_allclose(stats.gram[group], after[group].T @ after[group] / len(drift), atol=1e-4)
        wanted = aimed(b.load()[rows], before[group], after[group], 0.1, drift[:, rows])
        np.testing.assert_allclose(weight[rows], wanted, atol=2e-4)


def test_layers_on_one_value_share_their_statistics_but_not_their_aims() -> None:
    text = """g (float[N,32] x) => (float[N,M] y, float[N,L] z) {
        h = MatMul(x, a) y = MatMul(h, b) z = Gemm<transB=1>(h, c) }"""
    net, x = Network(text, {"a": (32, 32), "b": (32, 24), "c": (11, 32)}), normal(50, 32)
    net.walk({"x": x})
    a = net.target("a").load()
    exact, ours = x @ a.T, x @ rounded(a).T
    for name in ("b", "c"):
        np.testing.assert_allclose(net.given(name)[0], aimed(net.target(name).load(), exact, ours, 0.1), atol=1e-4)


def test_a_weight_that_is_read_twice_sees_both_inputs() -> None:
    text = """g (float[N,32] x) => (float[N,32] y, float[N,32] z) {
        s = Sigmoid(x) h = MatMul(s, a) z = MatMul(h, b) r = Relu(h) y = MatMul(r, a) }"""
    net, x = Network(text, {"a": (32, 32), "b": (32, 32)}), normal(50, 32)
    net.walk({"x": x})  # b comes first: what a reads before it must outlive it
    first, hidden = 1 / (1 + np.exp(-x)), np.maximum(1 / (1 + np.exp(-x)) @ net.target("a").load().T, 0)
    stats = net.recorder.seen[1][1]
    assert stats is not None and stats.gram is not None and stats.num_tokens == 100
    np.testing.assert_allclose(stats.gram[0], (first.T @ first + hidden.T @ hidden) / 100, atol=1e-4)


def test_a_value_that_only_a_body_reads_lives_until_then() -> None:
    text = """g (float[N,32] x, bool up) => (float[N,32] y) {
        s = Sigmoid(x) h = MatMul(s, a) r = Relu(h) i = MatMul(r, b)
        f = If (up) <then_branch = g1 () => (float[N,32] u) { u = Add(i, s) },
                     else_branch = g2 () => (float[N,32] v) { v = Identity(i) }>
        y = MatMul(f, c) }"""
    net, x = Network(text, dict.fromkeys("abc", (32, 32))), normal(40, 32)
    net.walk_feeds([{"x": x, "up": np.array(True)}])
    a, b, stats = net.target("a").load(), net.recorder.seen[1][0], net.given("c")[1]
    inner = 1 / (1 + np.exp(-x))
    ours = np.maximum(inner @ rounded(a).T, 0) @ rounded(b).T + inner
    assert stats is not None and stats.gram is not None
    np.testing.assert_allclose(stats.gram[0], ours.T @ ours / 40, atol=1e-3)


def test_tables_and_bodies_are_quantized_first_and_without_statistics() -> None:
    text = """g (int64[N] ids, bool up) => (float[N,32] y) {
        e = Gather(table, ids)
        f = If (up) <then_branch = g1 () => (float[N,32] u) { u = MatMul(e, a) },
                     else_branch = g2 () => (float[N,32] v) { v = Identity(e) }>
        y = MatMul(f, b) }"""
    net = Network(text, {"table": (20, 32), "a": (32, 32), "b": (32, 32)})
    net.walk_feeds([{"ids": np.arange(20), "up": np.array(True)}])
    assert [stats is None for _, stats in net.recorder.seen] == [True, True, False]
    table, a = net.target("table").load(), net.target("a").load()
    ours = rounded(table) @ rounded(a).T
    weight, stats = net.recorder.seen[2]
    assert stats is not None and stats.gram is not None
    np.testing.assert_allclose(stats.gram[0], ours.T @ ours / 20, atol=1e-4)
    np.testing.assert_allclose(weight, aimed(net.target("b").load(), table @ a.T, ours, 0.1), atol=1e-3)


def watch(monkeypatch: pytest.MonkeyPatch) -> tuple[list[list[str]], list[set[str]]]:
    """Operators of every part that is run, and names of the values written for every batch."""
    parts: list[list[str]] = []
    written: list[set[str]] = []
    session, write = spool.make_session, spool.Spool._write
    monkeypatch.setattr(
        spool,
        "make_session",
        lambda model, **options: parts.append([node.op_type for node in model.graph]) or session(model, **options),
    )
    monkeypatch.setattr(spool.Spool, "_write", lambda *args: written.append(set(args[1])) or write(*args))
    return parts, written


def test_every_node_runs_once_in_either_model_and_only_what_is_read_again_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = """g (float[N,32] x) => (float[N,32] y) {
        k = DequantizeLinear(codes, scale) h = MatMul(x, a) r = Relu(h) i = MatMul(r, b) s = Sigmoid(i) j = Mul(s, r)
        l = MatMul(j, k) y = MatMul(l, c) }"""
    stored = {"codes": np.ones((32, 32), np.int8), "scale": np.array(0.1, np.float32)}
    net = Network(text, dict.fromkeys("abc", (32, 32)), **stored)
    parts, written = watch(monkeypatch)
    net.walk({"x": normal(32, 32)}, batch=32)
    assert parts[::2] == parts[1::2]
    assert parts[0] == ["MatMul", "Relu"]
    assert sorted(parts[2]) == ["DequantizeLinear", "MatMul", "MatMul", "Mul", "Sigmoid"]
    assert written == [{"x"}, {"x"}, {"r"}, {"r"}, {"l"}, {"l"}]


def test_values_that_no_file_can_hold_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    text = """g (float[N,32] x) => (float[N,32] y) {
        q = SplitToSequence<axis=0>(x) h = MatMul(x, a) r = Relu(h) i = MatMul(r, b)
        o = ConcatFromSequence<axis=0>(q) s = Add(i, o) y = MatMul(s, c) }"""
    net = Network(text, dict.fromkeys("abc", (32, 32)))
    x, (parts, written) = normal(40, 32), watch(monkeypatch)
    net.walk({"x": x}, batch=40)
    assert written[2:] == [{"s"}, {"s"}]  # nothing at the cut where the sequence lives
    assert parts[2].count("MatMul") == 2
    a, b, stats = net.target("a").load(), net.recorder.seen[1][0], net.given("c")[1]
    ours = np.maximum(x @ rounded(a).T, 0) @ rounded(b).T + x
    assert stats is not None and stats.gram is not None
    np.testing.assert_allclose(stats.gram[0], ours.T @ ours / 40, atol=1e-3)


def test_the_aim_lowers_the_error_on_other_data() -> None:
    text = """g (float[N,48] x) => (float[N,M] y) {
        h = MatMul(x, a) i = Relu(h) j = MatMul(i, b) k = Relu(j) y = MatMul(k, c) }"""
    net = Network(text, {"a": (48, 64), "b": (64, 64), "c": (64, 24)})
    base = normal(48, 48, seed=5) @ np.diag(np.linspace(0.1, 2, 48)).astype(np.float32)
    a, b, c = (net.target(name).load() for name in "abc")

    def error(settings: Settings) -> float:
        made = net.walk({"x": normal(600, 48) @ base}, settings)
        test = normal(600, 48, seed=2) @ base
        q, r, s = (made[net.target(name).name].dequantize() for name in "abc")
        exact = np.maximum(np.maximum(test @ a.T, 0) @ b.T, 0) @ c.T
        ours = np.maximum(np.maximum(test @ q.T, 0) @ r.T, 0) @ s.T
        return float(np.square(exact - ours).sum() / np.square(exact).sum())

    assert error(Settings()) < 0.9 * error(Settings(aim=False))


def test_nothing_is_changed_and_the_order_of_the_answer_is_that_of_the_question() -> None:
    net = Network(CHAIN, CHAIN_SHAPES)
    before = ir.to_proto(net.model).SerializeToString(deterministic=True)
    names = list(reversed(net.targets))
    assert list(net.walk({"x": normal(20, 33)}, names=names)) == names
    assert ir.to_proto(net.model).SerializeToString(deterministic=True) == before


def test_bad_settings_data_and_activations() -> None:
    with pytest.raises(InputError, match="trust must be above 0, got 0"):
        Settings(trust=0)
    net = Network(CHAIN, CHAIN_SHAPES)
    big = {"x": normal(20, 33)}
    with pytest.raises(InputError, match="the activation 'r' is NaN or infinite in the partly quantized model"):
        net.walk(big, effective=lambda target, weight: np.full(target.shape, 3e38, np.float32))

    class Nothing:
        description = "no samples at all"

        def __iter__(self) -> Any:
            return iter(())

    data: Any = Nothing()
    with pytest.raises(InputError, match="the calibration data holds no samples: no samples at all"):
        quantize_sequentially(net.model, net.targets, {}, data, net.recorder, Settings(), SilentProgress())
