"""Padding does not count in the statistics."""

from __future__ import annotations

import numpy as np
import pytest

from quantkit.calibration import collector
from quantkit.types import Array
from tests.calibration.networks import Network

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
