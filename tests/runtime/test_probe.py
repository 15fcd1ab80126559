"""Losses of changed weights: one unit at a time through the rest of the network, and all of them at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import pytest

from quantkit.divergence import Divergence
from quantkit.graph.load import load_model
from quantkit.graph.targets import find_targets
from quantkit.report.progress import SilentProgress
from quantkit.runtime import probe as module
from quantkit.runtime.ort import make_session
from quantkit.runtime.probe import Probe
from quantkit.types import Array, Feed, FloatArray
from tests.helpers.models import build, random

Shape = tuple[int, ...]
Weights = Mapping[str, FloatArray]

CHAIN = """g (float[N,16] x, float[16,16] a, float[16,24] b, float[24,20] c) => (float[N,20] y) {
    p = MatMul(x, a)
    q = Tanh(p)
    r = MatMul(q, b)
    s = Relu(r)
    y = MatMul(s, c)
}"""
# An output that is computed before most cuts, one that a later layer reads, and one of whole numbers.
EARLY = """g (float[N,16] x, float[16,16] a, float[16,24] b, float[24,20] c)
          => (float[N,16] q, float[N,24] s, int64[N] best, float[N,20] y) {
    p = MatMul(x, a)
    q = Tanh(p)
    best = ArgMax<axis=1,keepdims=0>(q)
    r = MatMul(q, b)
    s = Relu(r)
    y = MatMul(s, c)
}"""
RESIDUAL = """g (float[N,16] x, float[16,16] a, float[16,16] b, float[16,20] c) => (float[N,20] y) {
    p = MatMul(x, a)
    q = Add(p, x)
    r = MatMul(q, b)
    s = Add(r, q)
    t = Add(s, x)
    y = MatMul(t, c)
}"""
BRANCHES = """g (float[N,16] x, float[16,16] a, float[16,16] b, float[16,16] d, float[16,20] c) => (float[N,20] y) {
    h = MatMul(x, a)
    most = ReduceMax<keepdims=0>(h)
    bound = Constant<value = float {100.0}>()
    small = Less(most, bound)
    k = If (small) <
        then_branch = one () => (float[N,16] p) { p = MatMul(h, b) },
        else_branch = two () => (float[N,16] q) { q = MatMul(x, d) }
    >
    t = Tanh(k)
    y = MatMul(t, c)
}"""
SHARED = """g (float[N,16] x, float[16,16] a, float[16,20] c) => (float[N,20] y) {
    p = MatMul(x, a)
    q = Tanh(p)
    r = MatMul(q, a)
    s = Tanh(r)
    y = MatMul(s, c)
}"""
TIED = """g (int64[N,S] ids, float[40,8] table, float[8,40] c) => (float[N,S,40] y, float[N,S,40] z) {
    e = Gather(table, ids)
    t = Transpose<perm=[1,0]>(table)
    y = MatMul(e, t)
    z = MatMul(e, c)
}"""
CNN = """g (float[N,8,6,6] x, float[16,4,3,3] a, float[16,8,2,2] b, float[8,40] c) => (float[N,40] y) {
    p = Conv<group=2,pads=[1,1,1,1]>(x, a)
    q = Relu(p)
    r = ConvTranspose<strides=[2,2]>(q, b)
    s = GlobalAveragePool(r)
    f = Flatten<axis=1>(s)
    y = MatMul(f, c)
}"""
LSTM = """g (float[T,N,16] x, float[1,64,16] a, float[1,64,16] b, float[16,20] c) => (float[T,D,N,20] y) {
    h, last, cell = LSTM<hidden_size=16>(x, a, b)
    y = MatMul(h, c)
}"""
NETWORKS: Mapping[str, tuple[str, Mapping[str, Shape]]] = {
    "chain": (CHAIN, {"a": (16, 16), "b": (16, 24), "c": (24, 20)}),
    "early outputs": (EARLY, {"a": (16, 16), "b": (16, 24), "c": (24, 20)}),
    "residual": (RESIDUAL, {"a": (16, 16), "b": (16, 16), "c": (16, 20)}),
    "branches": (BRANCHES, {"a": (16, 16), "b": (16, 16), "d": (16, 16), "c": (16, 20)}),
    "shared": (SHARED, {"a": (16, 16), "c": (16, 20)}),
    "tied": (TIED, {"table": (40, 8), "c": (8, 40)}),
    "convolutions": (CNN, {"a": (16, 4, 3, 3), "b": (16, 8, 2, 2), "c": (8, 40)}),
    "lstm": (LSTM, {"a": (1, 64, 16), "b": (1, 64, 16), "c": (16, 20)}),
}
DATA: Mapping[str, tuple[str, Sequence[Shape]]] = {
    "convolutions": ("x", [(3, 8, 6, 6), (2, 8, 6, 6)]),
    "lstm": ("x", [(5, 3, 16), (4, 2, 16)]),
    "tied": ("ids", [(3, 6), (2, 4)]),
}


def weights_of(name: str) -> dict[str, Array]:
    shapes = NETWORKS[name][1]
    return {key: 2 * random(*shape, seed=place) for place, (key, shape) in enumerate(shapes.items())}


def make(name: str) -> Probe:
    model = load_model(build(NETWORKS[name][0], weights_of(name))).model
    key, sizes = DATA.get(name, ("x", [(5, 16), (3, 16)]))
    rng = np.random.default_rng(7)
    feeds: list[Feed] = []
    for size in sizes:
        values: Array = rng.standard_normal(size).astype(np.float32)
        feeds.append({key: rng.integers(0, 40, size) if key == "ids" else values})
    return Probe(model, find_targets(model)[0], feeds)


def changed(probe: Probe, names: Sequence[str], seed: int = 0) -> dict[str, FloatArray]:
    rng = np.random.default_rng([11, seed])
    own = {name: probe.targets[name].load() for name in names}
    return {name: own[name] + np.float32(0.2) * rng.standard_normal(own[name].shape, np.float32) for name in names}


def steps(sets: Sequence[Weights]) -> Iterator[Weights]:
    yield from sets


@pytest.mark.parametrize("name", NETWORKS)
def test_one_unit_at_a_time_is_the_whole_network_with_that_unit_changed(name: str) -> None:
    probe = make(name)
    sets = {(target,): [changed(probe, [target], seed) for seed in range(3)] for target in probe.targets}
    found = probe.losses({names: partial(steps, items) for names, items in sets.items()}, SilentProgress())
    expected = [[probe.loss(weights) for weights in items] for items in sets.values()]
    assert len(found) == len(probe.targets) >= 2
    for got, wanted in zip(found, expected, strict=True):
        assert got == pytest.approx(wanted, rel=1e-4, abs=1e-9)
    # Every weight matters, but for those of a branch that is not taken.
    idle = sum(max(row) == 0 for row in expected)
    assert idle == (1 if name == "branches" else 0)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_model_with_the_changed_weights_inside_says_the_same(name: str) -> None:
    """The truth: the initializers themselves replaced."""
    probe = make(name)
    weights = weights_of(name)
    target = next(item for item in probe.targets.values() if str(item.weight.name) == "c")
    new = changed(probe, [target.name])
    weights["c"] = target.layout.to_operand(new[target.name])
    session = make_session(load_model(build(NETWORKS[name][0], weights)).model)
    truth = Divergence.of(probe.reference).mean(probe.reference, [session.run(feed) for feed in probe.feeds])
    assert truth > 1e-4
    assert probe.loss(new) == pytest.approx(truth, rel=1e-4)


def test_units_of_several_layers_in_any_order() -> None:
    probe = make("residual")
    first, second, third = probe.targets
    units = [(third,), (first, third), (second,), (second, first)]
    sets = {names: [changed(probe, names, seed) for seed in range(2)] for names in units}
    found = probe.losses({names: partial(steps, items) for names, items in sets.items()}, SilentProgress())
    for names, got in zip(units, found, strict=True):
        assert got == pytest.approx([probe.loss(weights) for weights in sets[names]], rel=1e-4)


def test_no_change_is_no_loss() -> None:
    probe = make("chain")
    own = {name: target.load() for name, target in probe.targets.items()}
    assert probe.loss({}) == probe.loss(own) == 0
    found = probe.losses({(name,): partial(steps, [{name: own[name]}]) for name in own}, SilentProgress())
    assert np.asarray(found) == pytest.approx(0, abs=1e-9)


def test_nothing_asked_is_nothing_done() -> None:
    assert make("chain").losses({}, SilentProgress()) == []


def test_a_unit_without_trials_has_no_losses() -> None:
    probe = make("chain")
    assert probe.losses({(name,): partial(steps, []) for name in probe.targets}, SilentProgress()) == [[], [], []]


def test_what_lies_before_a_unit_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments in front of the cut: one run for each feed; behind it: one for each feed and trial."""
    runs: list[tuple[str, ...]] = []
    plain = module.make_session

    def counted(*arguments: object, **options: object) -> object:
        session = plain(*arguments, **options)  # type: ignore[arg-type]
        run = session.run

        def counting(feed: Feed) -> dict[str, Array]:
            runs.append(session.output_names)
            return run(feed)

        session.run = counting  # type: ignore[method-assign]
        return session

    probe = make("chain")
    assert len(probe.reference) == 2
    monkeypatch.setattr(module, "make_session", counted)
    trials = {(name,): partial(steps, [changed(probe, [name], seed) for seed in range(3)]) for name in probe.targets}
    probe.losses(trials, SilentProgress())
    # 3 units x 3 trials x 2 feeds behind the cut, and 2 moves of the cut x 2 feeds.
    assert sum(names == ("y",) for names in runs) == 18
    assert len(runs) == 22


def test_a_cut_that_would_hold_too_much_stays_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = make("residual")
    sets = {(name,): [changed(probe, [name])] for name in probe.targets}
    trials = {names: partial(steps, items) for names, items in sets.items()}
    expected = probe.losses(trials, SilentProgress())
    monkeypatch.setattr(module, "LIVE_BYTES", 1)
    assert np.asarray(probe.losses(trials, SilentProgress())) == pytest.approx(np.asarray(expected), rel=1e-4)


def test_inputs_are_not_changed() -> None:
    probe = make("chain")
    before = [{name: array.copy() for name, array in feed.items()} for feed in probe.feeds]
    weights = changed(probe, list(probe.targets))
    kept = {name: array.copy() for name, array in weights.items()}
    probe.loss(weights)
    probe.losses({tuple(weights): partial(steps, [weights])}, SilentProgress())
    for feed, old in zip(probe.feeds, before, strict=True):
        np.testing.assert_array_equal(feed["x"], old["x"])
    for name, array in kept.items():
        np.testing.assert_array_equal(weights[name], array)
