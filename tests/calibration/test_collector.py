"""Statistics that are streamed in waves against those of all data at once, computed from the definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from quantkit.calibration import collector
from quantkit.calibration.collector import Collected, Request, Settings, collect
from quantkit.calibration.data import CalibrationData, open_calibration
from quantkit.calibration.pieces import Pieces
from quantkit.calibration.rows import to_rows
from quantkit.errors import InputError
from quantkit.graph.load import load_model
from quantkit.graph.targets import find_targets
from quantkit.report.progress import SilentProgress
from quantkit.runtime.ort import make_session
from quantkit.types import Array, Feed, LayerStats, Target
from quantkit.verify import session_inputs

EVERYTHING = frozenset({"abs_mean", "mean", "square_mean", "gram", "rows"})
PLENTY = 1 << 30
CNN = """g (float[N,3,8,8] x) => (float[N,M] y, float[N,16,8,8] r) {
    a = Conv<pads=[1,1,1,1]>(x, w1) r = Relu(a) b = Conv<group=2>(r, w2) c = Conv<group=2>(r, w3) d = Add(b, c)
    m = GlobalAveragePool(d) f = Flatten(m) y = Gemm(f, w4) }"""
SHAPES = {"w1": (16, 3, 3, 3), "w2": (16, 8, 3, 3), "w3": (16, 8, 3, 3), "w4": (16, 32)}


class Network:
    """A loaded model with its targets, and what collecting from it needs."""

    def __init__(self, text: str, shapes: Mapping[str, tuple[int, ...]], **constants: Array) -> None:
        proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {text}')
        rng = np.random.default_rng(0)
        arrays = {name: (rng.standard_normal(shape) / 4).astype(np.float32) for name, shape in shapes.items()}
        for name, array in {**arrays, **constants}.items():
            proto.graph.initializer.append(numpy_helper.from_array(array, name))
        self.model = load_model(proto).model
        self.targets: dict[str, Target] = find_targets(self.model)[0]

    def open(self, arrays: Mapping[str, Array], batch: int | None = None) -> CalibrationData:
        return open_calibration(dict(arrays), session_inputs(make_session(self.model)), batch_size=batch)

    def collect(
        self,
        data: CalibrationData,
        stats: frozenset[str] = EVERYTHING,
        histograms: Mapping[str, str] | None = None,
        limit: int = PLENTY,
        seed: int = 0,
    ) -> Collected:
        request = Request(self.targets, stats, histograms or {})
        return collect(self.model, data, request, Settings(limit, 1, seed), SilentProgress())

    def values(self, feed: Feed) -> dict[str, Array]:
        """Every float value of the main graph."""
        copy = self.model.clone()
        known = {str(value.name) for value in copy.graph.outputs}
        copy.graph.outputs.extend(value for node in copy.graph for value in node.outputs if value.name not in known)
        return {**feed, **make_session(copy).run(feed)}


def images(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((count, 3, 8, 8)).astype(np.float32)


def rows_of(target: Target, value: Array) -> Array:
    """[groups, T, K] of all positions."""
    names = ("pads", "strides", "dilations", "transA")
    attributes = {name: target.node.attributes[name].value for name in names if name in target.node.attributes}
    return to_rows(
        target.op,
        value,
        operand_shape=target.layout.operand_shape,
        groups=target.groups,
        attributes=attributes,
        limit=None,
        seed=0,
    )


def check(found: LayerStats, target: Target, value: Array) -> None:
    rows = rows_of(target, value).astype(np.float64)
    assert found.num_tokens == rows.shape[1]
    assert (found.low, found.high) == (value.min(), value.max())
    assert found.gram is not None and found.rows is not None
    assert found.mean is not None and found.abs_mean is not None and found.square_mean is not None
    np.testing.assert_allclose(found.mean, rows.mean(axis=1), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.abs_mean, np.abs(rows).mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found.square_mean, np.square(rows).mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found.gram, rows.transpose(0, 2, 1) @ rows / rows.shape[1], rtol=1e-4, atol=1e-5)
    seen = {row.astype(np.float32).tobytes() for row in rows[0]}
    assert all(row.tobytes() in seen for row in found.rows[0])
    assert found.rows.shape == (target.groups, min(rows.shape[1], collector.ROW_LIMIT), target.shape[1])


def equal(first: Collected, second: Collected, rtol: float = 0.0) -> None:
    assert first.stats.keys() == second.stats.keys() and first.histograms.keys() == second.histograms.keys()
    for name, layer in first.stats.items():
        for item in ("num_tokens", "low", "high", "abs_mean", "mean", "square_mean", "gram", "rows", "data_shapes"):
            one, other = getattr(layer, item), getattr(second.stats[name], item)
            if isinstance(one, np.ndarray):
                np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol)
            else:
                assert one == other
    for name, seen in first.histograms.items():
        np.testing.assert_array_equal(seen.counts, second.histograms[name].counts)
        np.testing.assert_array_equal(seen.edges, second.histograms[name].edges)


@pytest.mark.parametrize("batch", [1, 4, 10])
def test_streamed_statistics_are_those_of_all_data_at_once(batch: int) -> None:
    network, data = Network(CNN, SHAPES), images(10)
    found = network.collect(network.open({"x": data}, batch), histograms={"x": "x", "r": "inner", "d": "inner"})
    values = network.values({"x": data})
    assert found.stats.keys() == network.targets.keys() and len(found.stats) == 4
    for name, target in network.targets.items():
        check(found.stats[name], target, values[str(target.uses[0].data.name)])
    both = np.concatenate([values["r"].ravel(), values["d"].ravel()])
    inner = found.histograms["inner"]
    assert (inner.low, inner.high, inner.counts.sum()) == (both.min(), both.max(), both.size)
    assert inner.zeros == (both == 0).sum() > 0


def test_only_what_was_asked_for_is_filled() -> None:
    network = Network(CNN, SHAPES)
    found = network.collect(network.open({"x": images(3)}), frozenset({"mean"}))
    for layer in found.stats.values():
        assert layer.mean is not None
        assert (layer.abs_mean, layer.square_mean, layer.gram, layer.rows) == (None, None, None, None)
    assert found.histograms == {}


def waves(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Names of the values in each wave, as they run."""
    seen: list[list[str]] = []
    original = Pieces.run

    def spy(pieces: Pieces, wave: int) -> Iterator[tuple[Feed, dict[str, Array]]]:
        seen.append(list(pieces._waves[wave]))
        return original(pieces, wave)

    monkeypatch.setattr(Pieces, "run", spy)
    return seen


def test_layers_that_read_one_value_share_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, added = waves(monkeypatch), []

    def counting(op: str, data: Array, **arguments: Any) -> Array:
        added.append(data.shape)
        return to_rows(op, data, **arguments)

    monkeypatch.setattr(collector, "to_rows", counting)
    network = Network(CNN, SHAPES)
    found = network.collect(network.open({"x": images(4)}, 4))
    assert seen == [["x", "r", "f"]]
    assert added == [(4, 3, 8, 8), (4, 16, 8, 8), (4, 16)]
    names = [name for name, target in network.targets.items() if target.uses[0].data.name == "r"]
    assert len(names) == 2 and found.stats[names[0]] is found.stats[names[1]]


@pytest.mark.parametrize("batch", [1, 4])
def test_many_waves_give_what_one_wave_gives(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    network, histograms = Network(CNN, SHAPES), {"x": "x", "a": "a", "r": "r", "d": "d"}
    data = network.open({"x": images(6)}, batch)
    whole = network.collect(data, histograms=histograms)
    seen = waves(monkeypatch)
    tiny = network.collect(data, histograms=histograms, limit=1)
    assert seen == [["x"], ["a"], ["r"], ["d"], ["f"]]
    # Batches are cut to save waves; here that saves none, so the very same numbers were added.
    equal(whole, tiny)


def test_batches_are_cut_where_that_saves_waves(monkeypatch: pytest.MonkeyPatch) -> None:
    network, histograms = Network(CNN, SHAPES), {"x": "x", "a": "a", "r": "r", "d": "d"}
    data = network.open({"x": images(16)}, 16)
    stats = frozenset({"mean", "gram"})
    whole = network.collect(data, stats, histograms)
    seen = waves(monkeypatch)
    sizes: list[int] = []
    original = collector._add

    def spy(item: Any, value: Array, masks: Sequence[Array], seed: int) -> None:
        sizes.append(len(value))
        original(item, value, masks, seed)

    monkeypatch.setattr(collector, "_add", spy)
    parts = network.collect(data, stats, histograms, limit=1_300_000)
    assert len(seen) == 1 and max(sizes) < 16
    assert parts.stats.keys() == whole.stats.keys()
    for group, wanted in whole.histograms.items():
        np.testing.assert_array_equal(wanted.counts, parts.histograms[group].counts)
    last = next(name for name, target in network.targets.items() if target.op == "Gemm")
    one, other = whole.stats[last].mean, parts.stats[last].mean
    assert one is not None and other is not None
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_the_same_data_gives_the_same_statistics() -> None:
    network = Network(CNN, SHAPES)
    data = network.open({"x": images(40)}, 8)
    equal(network.collect(data), network.collect(data))
    first, other = network.collect(data, seed=0), network.collect(data, seed=1)
    name = next(iter(first.stats))
    assert not np.array_equal(first.stats[name].rows, other.stats[name].rows)  # type: ignore[arg-type]


def test_a_weight_that_is_used_twice_sees_both_inputs() -> None:
    text = "g (float[N,16] x) => (float[N,M] y) { a = MatMul(x, w) b = Exp(a) y = MatMul(b, w) }"
    network = Network(text, {"w": (16, 16)})
    (name, target), data = next(iter(network.targets.items())), {"x": images(7).reshape(7, -1)[:, :16]}
    assert len(target.uses) == 2
    values = network.values(data)
    both = np.concatenate([values["x"], values["b"]])
    for limit in (PLENTY, 1):
        check(network.collect(network.open(data, 3), limit=limit).stats[name], target, both)


def test_a_branch_gives_no_statistics_and_no_error() -> None:
    text = """g (float[N,16] x, bool flag) => (float[N,M] y) {
        a = MatMul(x, w) y = If(flag) <then_branch = p () => (float[N,M] u) {e = Exp(a) u = MatMul(e, v)},
        else_branch = q () => (float[N,M] v1) {v1 = MatMul(a, z)}> }"""
    network = Network(text, {"w": (16, 32), "v": (32, 32), "z": (32, 32)})
    feeds = [{"x": np.ones((2, 16), np.float32), "flag": np.array(True)} for _ in range(3)]
    found = network.collect(open_calibration(feeds, session_inputs(make_session(network.model))))
    named = {str(target.weight.name): found.stats.get(name) for name, target in network.targets.items()}
    assert named["v"] is None  # reads a value that exists in the branch only
    assert named["w"] is not None and named["w"].num_tokens == 6
    assert named["z"] is not None and named["z"].num_tokens == 6  # reads a value from outside


def test_a_table_counts_what_it_looks_up() -> None:
    text = "g (int64[N,T] ids) => (float[N,T,M] y) { e = Gather(table, ids) y = MatMul(e, w) }"
    network = Network(text, {"table": (50, 16), "w": (16, 32)})
    ids = np.random.default_rng(0).integers(0, 50, (5, 7))
    found = network.collect(network.open({"ids": ids}, 2))
    table, product = (found.stats[name] for name in network.targets)
    assert (table.num_tokens, table.low, table.high, table.gram, table.rows) == (35, 0.0, 0.0, None, None)
    assert table.data_shapes == {(2, 7): 2, (1, 7): 1}
    assert product.data_shapes == {(2, 7, 16): 2, (1, 7, 16): 1} and product.num_tokens == 35


MASKED = """g (int64[N,T] ids, int64[N,T] attention_mask) => (float[N,T,M] y, float[N,M] z) {
    e = Gather(table, ids) h = MatMul(e, w1) f = Unsqueeze(h, two) g = MatMul(f, w2) y = Squeeze(g, two)
    one = Constant<value_int=0>() c = Gather<axis=1>(h, one) z = MatMul(c, w3) }"""


def masked(name: str = "attention_mask", kind: str = "int64") -> Network:
    text = MASKED.replace("attention_mask", name).replace(f"int64[N,T] {name}", f"{kind}[N,T] {name}")
    shapes = {"table": (50, 16), "w1": (16, 32), "w2": (32, 24), "w3": (32, 20)}
    return Network(text, shapes, two=np.array([2], np.int64))


@pytest.mark.parametrize(("kind", "dtype"), [("int64", np.int64), ("bool", bool), ("int32", np.int32)])
def test_padding_does_not_count(kind: str, dtype: type) -> None:
    network = masked(kind=kind)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 50, (6, 7))
    mask = np.arange(7) < rng.integers(1, 8, (6, 1))
    data = {"ids": ids, "attention_mask": mask.astype(dtype)}
    found = network.collect(network.open(data, 2), histograms={"h": "h"})
    values = network.values(data)
    first, second, third = (name for name, target in network.targets.items() if target.op == "MatMul")
    real = mask.sum()
    assert 6 < real < 42
    assert [found.stats[name].num_tokens for name in (first, second, third)] == [real, real, 6]
    for name, rows in ((first, values["e"][mask]), (second, values["h"][mask]), (third, values["c"])):
        layer, exact = found.stats[name], rows.astype(np.float64)
        assert layer.gram is not None and layer.rows is not None
        np.testing.assert_allclose(layer.gram[0], exact.T @ exact / len(rows), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(layer.mean, exact.mean(axis=0)[None], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(layer.abs_mean, np.abs(exact).mean(axis=0)[None], rtol=1e-4)
        np.testing.assert_allclose(layer.square_mean, np.square(exact).mean(axis=0)[None], rtol=1e-4)
        assert {row.tobytes() for row in layer.rows[0]} == {row.tobytes() for row in rows.astype(np.float32)}
    # Ranges and shapes are those of the whole tensor: the model computes padding too.
    assert (found.stats[second].low, found.stats[second].high) == (values["h"].min(), values["h"].max())
    assert found.histograms["h"].counts.sum() == values["h"].size
    assert found.stats[first].data_shapes == {(2, 7, 16): 3}


def test_padding_twice_as_long_changes_no_gram() -> None:
    network = masked()
    ids = np.random.default_rng(0).integers(0, 50, (6, 7))
    short = {"ids": ids, "attention_mask": np.ones_like(ids)}
    long = {name: np.concatenate([array, np.zeros_like(array)], axis=1) for name, array in short.items()}
    one, other = (network.collect(network.open(data, 3)) for data in (short, long))
    for name, layer in one.stats.items():
        if layer.gram is not None:
            np.testing.assert_allclose(other.stats[name].gram, layer.gram, rtol=1e-6)  # type: ignore[arg-type]
            assert other.stats[name].num_tokens == layer.num_tokens


@pytest.mark.parametrize(
    ("name", "kind", "mask"),
    [
        ("other", "int64", np.eye(6, 7, dtype=np.int64)),  # not called a mask
        ("padding_mask", "bool", np.eye(6, 7, dtype=bool)),  # may be True at padding
        ("mask", "float", np.eye(6, 7, dtype=np.float32)),  # may be something to add
        ("mask", "int64", np.zeros((6, 7), np.int64)),  # nothing would be left
    ],
)
def test_inputs_that_are_no_mask_leave_every_row(name: str, kind: str, mask: Array) -> None:
    network = masked(name, kind)
    found = network.collect(network.open({"ids": np.arange(42).reshape(6, 7), name: mask}, 3))
    tokens = [found.stats[layer].num_tokens for layer, target in network.targets.items() if target.op == "MatMul"]
    assert tokens == [42, 42, 6]


def test_a_batch_of_padding_alone_counts_whole_and_others_by_their_mask() -> None:
    network = masked()
    mask = np.zeros((4, 7), np.int64)
    mask[2, :3] = mask[3, :2] = 1
    found = network.collect(network.open({"ids": np.arange(28).reshape(4, 7), "attention_mask": mask}, 2))
    first = next(name for name, target in network.targets.items() if target.op == "MatMul")
    assert found.stats[first].num_tokens == 14 + 5


@pytest.mark.parametrize(
    ("op", "shape", "rows"),
    [
        ("MatMul", (2, 3, 5), [True, True, False, True, False, False]),
        ("Gemm", (2, 3, 5), [True, True, False, True, False, False]),
        ("MatMul", (2, 3, 2, 5), [True] * 4 + [False] * 2 + [True] * 2 + [False] * 4),
        ("MatMul", (2, 3), None),
        ("MatMul", (3, 2, 5), None),
        ("Conv", (2, 3, 5), None),
        ("LSTM", (2, 3, 5), None),
    ],
)
def test_which_rows_are_real(op: str, shape: tuple[int, ...], rows: list[bool] | None) -> None:
    other = np.ones((2, 9), np.int64)
    mask = np.array([[1, 1, 0], [2, 0, 0]])
    found = collector.real_rows(op, shape, (other, mask))
    assert (None if found is None else found.tolist()) == rows
    assert collector.real_rows(op, shape, (np.ones((2, 3), bool),)) is None


def test_a_recurrent_layer_is_seen_by_its_input_weight_only() -> None:
    text = "g (float[S,N,16] x) => (float[S,D,N,H] y) { y = LSTM<hidden_size=8>(x, W, R) }"
    network = Network(text, {"W": (1, 32, 16), "R": (1, 32, 8)})
    data = np.random.default_rng(0).standard_normal((5, 4, 16)).astype(np.float32)
    feeds = [{"x": data}]
    found = network.collect(open_calibration(feeds, session_inputs(make_session(network.model))))
    ((name, layer),) = found.stats.items()
    assert name.endswith(".W")
    check(layer, network.targets[name], data)


def test_a_fixed_batch_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(CNN.replace("float[N,3,8,8] x", "float[4,3,8,8] x"), SHAPES)
    seen = waves(monkeypatch)
    found = network.collect(network.open({"x": images(8)}), limit=1)
    assert seen == [["x"], ["r"], ["f"]]
    assert {tuple(layer.data_shapes) for layer in found.stats.values()} == {
        ((4, 3, 8, 8),),
        ((4, 16, 8, 8),),
        ((4, 16),),
    }
    assert all(sum(layer.data_shapes.values()) == 2 for layer in found.stats.values())


def test_only_scalars_as_inputs() -> None:
    text = "g (float s) => (float[N,M] y) { a = Mul(s, c) y = MatMul(a, w) }"
    network = Network(text, {"w": (16, 32)}, c=np.ones((2, 16), np.float32))
    feeds = [{"s": np.array(value, np.float32)} for value in (1.0, -3.0)]
    (layer,) = network.collect(open_calibration(feeds, session_inputs(make_session(network.model)))).stats.values()
    assert (layer.low, layer.high, layer.num_tokens) == (-3, 1, 4)


class Feeds:
    """Feeds as they are, with no checks in between."""

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self.feeds = feeds
        self.samples, self.description = len(feeds), "made-up feeds"

    def __iter__(self) -> Any:
        return iter(self.feeds)


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("bad", [0.0, -1.0])
@pytest.mark.parametrize("watch", [{}, {"a": "a"}])
def test_a_value_that_is_not_finite_is_named(place: int, bad: float, watch: dict[str, str]) -> None:
    """log 0 is infinite, log -1 is NaN; in the first batch or a later one."""
    text = "g (float[N,16] x) => (float[N,M] y) { a = Log(x) y = MatMul(a, w) }"
    network = Network(text, {"w": (16, 32)})
    feeds = [{"x": np.full((2, 16), 1 + index, np.float32)} for index in range(3)]
    feeds[place]["x"][1, 3] = bad
    wanted = r"^the activation 'a' is NaN or infinite on the calibration data; check [^.]+$"
    with pytest.raises(InputError, match=wanted):
        network.collect(Feeds(feeds), histograms=watch)  # type: ignore[arg-type]


def test_data_without_samples() -> None:
    network = Network(CNN, SHAPES)
    with pytest.raises(InputError, match="the calibration data holds no samples: made-up feeds"):
        network.collect(Feeds([]))  # type: ignore[arg-type]


def test_data_that_the_model_cannot_run() -> None:
    network = Network(CNN, SHAPES)
    with pytest.raises(InputError, match=r"onnxruntime cannot run the model on the inputs x \[2, 4, 8, 8\]"):
        network.collect(Feeds([{"x": np.zeros((2, 4, 8, 8), np.float32)}]))  # type: ignore[arg-type]


def test_nothing_to_collect() -> None:
    network = Network(CNN, SHAPES)
    request = Request({}, EVERYTHING, {})
    data = network.open({"x": images(2)})
    found = collect(network.model, data, request, Settings(PLENTY, 1, 0), SilentProgress())
    assert (found.stats, found.histograms) == ({}, {})


class Counting:
    """Progress that adds up."""

    def __init__(self) -> None:
        self.total, self.done = 0, 0

    @contextmanager
    def task(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        self.total = total or 0
        yield self.add

    def add(self, count: int) -> None:
        self.done += count


def test_progress_counts_every_sample_once_a_wave() -> None:
    network, progress = Network(CNN, SHAPES), Counting()
    request = Request(network.targets, EVERYTHING, {})
    collect(network.model, network.open({"x": images(5)}, 2), request, Settings(1, 1, 0), progress)
    assert progress.done == progress.total == 15


def test_memory_of_a_wave_is_bounded() -> None:
    """A wave never holds more than its limit allows, unless one value alone does."""
    network = Network(CNN, SHAPES)
    histograms = {name: name for name in ("x", "a", "r", "b", "c", "d")}
    request = Request({}, frozenset(), histograms)
    watched = collector._watch(network.model, request, Settings(PLENTY, 1, 0))
    feed = {"x": images(2)}
    sizes = {name: 2 * value.nbytes for name, value in network.values(feed).items() if name in histograms}
    for limit in (1, 20_000, 60_000, 100_000, PLENTY):
        parts = collector._fill_waves(network.model, feed, watched, limit)
        used = [sum(sizes[item.name] for item in part) for part in parts]
        assert all(total <= limit or len(part) == 1 for total, part in zip(used, parts, strict=True))
        firsts = [sizes[part[0].name] for part in parts[1:]]
        assert all(total + first > limit for total, first in zip(used, firsts, strict=False))
