"""Which layers are decided together."""

from __future__ import annotations

from quantkit.graph.load import load_model
from quantkit.graph.targets import find_targets
from quantkit.graph.units import find_units
from tests.helpers.models import BLOCK, block, build, random

Shape = tuple[int, ...]


def units(text: str, **weights: Shape) -> list[list[str]]:
    """Names of the initializers, unit by unit: nodes are renamed when a model is loaded, weights are not."""
    made = {name: random(*shape, seed=place) for place, (name, shape) in enumerate(weights.items())}
    targets = find_targets(load_model(build(text, made)).model)[0]
    found = find_units(targets)
    assert [name for members in found.values() for name in members if name not in targets] == []
    assert all(key == members[0] for key, members in found.items())
    assert sorted(name for members in found.values() for name in members) == sorted(targets)
    return [[str(targets[name].weight.name) for name in members] for members in found.values()]


def test_query_key_and_value_are_one_unit() -> None:
    targets = find_targets(load_model(block()).model)[0]
    found = [[str(targets[name].weight.name) for name in members] for members in find_units(targets).values()]
    assert found == [["table"], ["wq", "wk", "wv"], ["w1"], ["w2"]]
    assert BLOCK.count("MatMul(e,") == 3


def test_gate_and_up_are_one_unit_also_as_gemm_beside_matmul() -> None:
    text = """g (float[N,32] x, float[32,64] gate, float[64,32] up, float[64,32] down) => (float[N,32] y) {
        a = MatMul(x, gate)
        b = Gemm<transB=1>(x, up)
        s = Sigmoid(a)
        m = Mul(s, b)
        y = MatMul(m, down)
    }"""
    assert units(text, gate=(32, 64), up=(64, 32), down=(64, 32)) == [["gate", "up"], ["down"]]


def test_members_keep_the_order_of_the_graph_whatever_lies_between() -> None:
    text = """g (float[N,32] x, float[32,32] a, float[32,32] b, float[32,32] c) => (float[N,32] y) {
        p = MatMul(x, a)
        q = MatMul(p, b)
        r = MatMul(x, c)
        y = Add(q, r)
    }"""
    assert units(text, a=(32, 32), b=(32, 32), c=(32, 32)) == [["a", "c"], ["b"]]


def test_other_values_other_units() -> None:
    text = """g (float[N,32] x, float[N,32] z, float[32,32] a, float[32,32] b) => (float[N,32] y) {
        p = MatMul(x, a)
        q = MatMul(z, b)
        y = Add(p, q)
    }"""
    assert units(text, a=(32, 32), b=(32, 32)) == [["a"], ["b"]]


def test_a_transposed_gemm_reads_other_rows() -> None:
    text = """g (float[32,32] x, float[32,16] a, float[32,16] b) => (float[32,16] y) {
        p = Gemm(x, a)
        q = Gemm<transA=1>(x, b)
        y = Add(p, q)
    }"""
    assert units(text, a=(32, 16), b=(32, 16)) == [["a"], ["b"]]


def test_a_shared_weight_is_one_target_and_joins_only_what_reads_the_same_values() -> None:
    text = """g (float[N,32] x, float[32,32] a, float[32,32] b, float[32,32] c) => (float[N,32] y) {
        p = MatMul(x, a)
        q = MatMul(p, a)
        r = MatMul(x, b)
        s = MatMul(p, b)
        t = MatMul(x, c)
        u = Add(q, r)
        v = Add(s, t)
        y = Add(u, v)
    }"""
    assert units(text, a=(32, 32), b=(32, 32), c=(32, 32)) == [["a", "b"], ["c"]]


def test_convolutions_around_an_add_are_decided_apart() -> None:
    text = """g (float[N,16,8,8] x, float[16,16,3,3] a, float[16,16,3,3] b, float[16,16,1,1] c)
             => (float[N,16,8,8] y) {
        p = Conv<pads=[1,1,1,1]>(x, a)
        q = Conv<pads=[1,1,1,1]>(p, b)
        r = Conv(x, c)
        y = Add(q, r)
    }"""
    assert units(text, a=(16, 16, 3, 3), b=(16, 16, 3, 3), c=(16, 16, 1, 1)) == [["a"], ["b"], ["c"]]


def test_the_two_weights_of_an_lstm_are_decided_apart() -> None:
    text = """g (float[T,N,32] x, float[1,64,32] w, float[1,64,16] r) => (float[T,D,N,16] y) {
        y = LSTM<hidden_size=16>(x, w, r)
    }"""
    assert units(text, w=(1, 64, 32), r=(1, 64, 16)) == [["w"], ["r"]]


def test_products_in_the_two_branches_of_an_if_are_decided_apart() -> None:
    text = """g (float[N,32] x, bool c, float[32,32] a, float[32,32] b, float[32,32] d) => (float[N,32] y) {
        h = If (c) <
            then_branch = one () => (float[N,32] p) { p = MatMul(x, a) },
            else_branch = two () => (float[N,32] q) { q = MatMul(x, b) }
        >
        m = MatMul(x, d)
        y = Add(h, m)
    }"""
    assert [sorted(unit) for unit in units(text, a=(32, 32), b=(32, 32), d=(32, 32))] == [["a"], ["b"], ["d"]]


def test_nothing_to_decide() -> None:
    assert find_units({}) == {}
