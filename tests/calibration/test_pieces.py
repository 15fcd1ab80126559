"""A model run piece by piece gives every wave what the whole model gives it, and cuts where least lives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from benchmarks.transformer import Shape, build
from quantkit.calibration.pieces import Pieces, cuts, elements, instrumented
from quantkit.graph.load import load_model
from quantkit.runtime import spool
from quantkit.runtime.ort import make_session
from quantkit.types import Feed
from tests.helpers import models

WIDE = """g (float[N,16] x, float[16,64] a, float[64,16] b, float[16,64] c, float[64,16] d) => (float[N,16] y) {
    h = MatMul(x, a)
    r = Relu(h)
    s = MatMul(r, b)
    t = Add(s, x)
    i = MatMul(t, c)
    j = Relu(i)
    k = MatMul(j, d)
    y = Add(k, t)
}"""
WEIGHTS = {"a": (16, 64), "b": (64, 16), "c": (16, 64), "d": (64, 16)}


def wide() -> ir.Model:
    weights = {name: models.random(*shape) for name, shape in WEIGHTS.items()}
    return load_model(models.build(WIDE, weights)).model


def feeds() -> Iterator[Feed]:
    for seed in range(3):
        yield {"x": models.random(5, 16, seed=seed)}


@pytest.mark.parametrize("waves", [[["x", "r", "t", "j"]], [["x", "r"], ["t", "j"]], [["x"], ["r"], ["t"], ["j"]]])
@pytest.mark.parametrize("lean", [False, True])
def test_pieces_give_what_the_whole_gives(waves: list[list[str]], lean: bool) -> None:
    model = wide()
    session = make_session(instrumented(model, ["r", "t", "j"]))
    with Pieces(model, feeds, waves, threads=1, lean=lean) as pieces:
        for number, names in enumerate(waves):
            found = list(pieces.run(number))
            assert len(found) == 3
            for (feed, values), wanted in zip(found, feeds(), strict=True):
                np.testing.assert_array_equal(feed["x"], wanted["x"])
                assert set(values) == set(names)
                whole = {**wanted, **session.run(wanted)}
                for name, value in values.items():
                    np.testing.assert_allclose(value, whole[name], rtol=1e-5, atol=1e-6)


def test_waves_may_be_left_out() -> None:
    model, waves = wide(), [["x"], ["r"], ["t"], ["j"]]
    session = make_session(instrumented(model, ["j"]))
    with Pieces(model, feeds, waves, threads=1, lean=False) as pieces:
        for (_, values), feed in zip(pieces.run(3), feeds(), strict=True):
            np.testing.assert_allclose(values["j"], session.run(feed)["j"], rtol=1e-5, atol=1e-6)


def test_every_node_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[list[str]] = []
    original = spool.make_session

    def spy(model: ir.Model, **options: object) -> object:
        parts.append([node.op_type for node in model.graph])
        return original(model, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(spool, "make_session", spy)
    with Pieces(wide(), feeds, [["x"], ["r"], ["t"], ["j"]], threads=1, lean=False) as pieces:
        for number in range(4):
            list(pieces.run(number))
    assert len(parts) == 3
    assert [op for part in parts for op in part] == ["MatMul", "Relu", "MatMul", "Add", "MatMul", "Relu"]


def test_cuts_are_where_least_lives() -> None:
    model = wide()
    names = [str(node.outputs[0].name) for node in model.graph]
    feed = next(iter(feeds()))
    # Between r and j, the value t alone lives behind the Add; between x and j as well, and nothing is wider.
    assert [names[place] for place in cuts(model, feed, [["r"], ["j"]])] == ["t", "j"]
    assert cuts(model, feed, [["x"], ["t"], ["j"]])[0] == -1
    assert [names[place] for place in cuts(model, feed, [["x"], ["j"]])][-1] == "j"


def test_a_transformer_is_cut_between_its_blocks() -> None:
    model = load_model(build(Shape(width=64, blocks=3, vocabulary=50))).model
    reads = {str(node.name): str(node.inputs[0].name) for node in model.graph if node.op_type == "MatMul"}
    waves = [[reads[f"block{block}.{part}"] for part in ("q", "o", "up", "down")] for block in range(3)]
    nodes = list(model.graph)
    feed = {"ids": np.zeros((2, 7), np.int64)}
    found = cuts(model, feed, waves)
    for place in found[:2]:  # behind the sum that a block ends with, when only the residual stream lives
        assert nodes[place].op_type == "Add"
        later = {str(value.name) for node in nodes[place + 1 :] for value in node.inputs if value is not None}
        earlier = {str(value.name) for node in nodes[: place + 1] for value in node.outputs}
        assert later & earlier == {str(nodes[place].outputs[0].name)}


def test_files_end_with_the_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Pieces(wide(), feeds, [["r"], ["j"]], threads=1, lean=False) as pieces:
        list(pieces.run(0))
        assert len(list(tmp_path.rglob("*.npz"))) == 3
    assert list(tmp_path.iterdir()) == []


def test_values_lie_in_the_folder_asked_for(tmp_path: Path) -> None:
    with Pieces(wide(), feeds, [["r"], ["j"]], threads=1, folder=tmp_path) as pieces:
        list(pieces.run(0))
        assert len(list(tmp_path.rglob("*.npz"))) == 3
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_values() -> None:
    model = wide()
    (data,) = model.graph.inputs
    assert elements(data, {"N": 3}) == 48 and elements(data, {}) == 128 * 16
    data.shape = None
    assert elements(data, {}) == 128**3
