"""Statistics that are streamed in waves against those of all data at once, computed from the definition."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from quantkit.calibration import collector
from quantkit.calibration.accumulators import Gram
from quantkit.calibration.collector import Request, Settings, collect
from quantkit.calibration.data import open_calibration
from quantkit.calibration.pieces import Pieces
from quantkit.calibration.rows import to_rows
from quantkit.errors import InputError
from quantkit.report.progress import SilentProgress
from quantkit.runtime.ort import make_session
from quantkit.types import Array, Feed
from quantkit.verify import session_inputs
from tests.calibration.networks import CNN, EVERYTHING, PLENTY, SHAPES, Network, check, equal, images


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


def test_sums_beyond_float32_are_left_to_whoever_needs_them() -> None:
    """No warning of numpy's precedes the sentence of a quantizer that refuses them."""
    rows = np.random.default_rng(0).standard_normal((1, 40, 5)).astype(np.float32) * np.float32(1e30)
    gram = Gram()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gram.add(rows)
        gram.add(rows)
        assert not np.isfinite(gram.result()).any()


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
