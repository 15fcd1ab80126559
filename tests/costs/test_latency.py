"""The cache of measured times: one figure for one thing, whatever happens to the file. No time itself is judged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from quantkit.costs import latency
from quantkit.costs.latency import (
    Cost,
    LatencyCache,
    default_folder,
    is_product,
    layer_cost,
    node_cost,
    open_cache,
    predicted_ms,
    typical_shape,
)
from quantkit.graph.load import load_model
from quantkit.graph.targets import find_targets
from quantkit.runtime.ort import make_session, optimized_nodes
from quantkit.types import Feed, LayerStats, Layout, QuantSpec, Target, Use
from tests.helpers.models import build, random

SPEC = QuantSpec(4, 32)


def target(shape: tuple[int, int] = (32, 64)) -> Target:
    data, weight = ir.val("x"), ir.val("w", const_value=ir.tensor(np.zeros(shape[::-1], np.float32)))
    use = Use(ir.node("MatMul", [data, weight]), 1, 0)
    return Target("layer", "MatMul", (use,), weight, shape, 1, Layout(shape[::-1], shape[::-1], (1, 0)))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What was really measured; the figures count up, so that no two measurements agree."""
    calls: list[tuple[Any, ...]] = []

    def measure(*arguments: Any) -> tuple[float, float]:
        calls.append(arguments)
        return 1.2345678 * len(calls), 0.98765432 * len(calls)

    monkeypatch.setattr(latency, "_measure", measure)
    return calls


def cost(
    cache: LatencyCache,
    item: Target | None = None,
    spec: QuantSpec = SPEC,
    *,
    form: str = "packed",
    rows: int = 8,
    runtime: str = "ort-cpu",
    threads: int = 1,
) -> tuple[float, float]:
    found = layer_cost(item or target(), spec, form, rows, cache=cache, runtime=runtime, threads=threads)
    assert found.ratio == found.form_ms / found.float_ms
    return found.float_ms, found.form_ms


def test_the_first_use_gives_the_figures_of_every_later_one(tmp_path: Path, measured: list[Any]) -> None:
    cache = open_cache(tmp_path)
    first = cost(cache)
    assert first == (1.235, 0.9877)  # as stored, not as measured
    assert cost(cache) == first and cost(open_cache(tmp_path)) == first
    assert len(measured) == 1


def test_everything_that_matters_is_in_the_key(tmp_path: Path, measured: list[Any]) -> None:
    cache, form = open_cache(tmp_path), "matmulnbits"
    cost(cache, form=form)
    cost(cache, target((32, 96)), form=form)
    cost(cache, target((64, 32)), form=form)
    cost(cache, spec=QuantSpec(2, 32), form=form)
    cost(cache, spec=QuantSpec(4, 16), form=form)
    cost(cache, spec=QuantSpec(4, 32, symmetric=True), form=form)
    cost(cache, form="dynamic")
    cost(cache, form=form, rows=16)
    cost(cache, form=form, runtime="portable")
    cost(cache, form=form, threads=2)
    assert len(measured) == 10 == len(cache.entries)
    # A group as wide as the row is one scale a row; the layer's name and the activations' width do not matter.
    cost(cache, spec=QuantSpec(4, -1), form=form)
    cost(cache, spec=QuantSpec(4, 64), form=form)
    cost(cache, replace(target(), name="other"), replace(SPEC, act_bits=8), form=form)
    assert len(measured) == 11
    cost(cache, spec=QuantSpec(3, 32), form=form)  # its kernel has 2, 4 and 8 bits
    assert len(measured) == 11
    cost(cache, spec=QuantSpec(5, 32), form=form)
    cost(cache, spec=QuantSpec(8, 32), form=form)
    assert len(measured) == 12


@pytest.mark.parametrize("form", ["packed", "dynamic"])
def test_codes_that_are_widened_at_load_are_timed_once_for_all_widths(
    tmp_path: Path, measured: list[Any], form: str
) -> None:
    cache = open_cache(tmp_path)
    found = {cost(cache, spec=spec, form=form) for spec in (SPEC, QuantSpec(2, 32), QuantSpec(8, -1, symmetric=True))}
    assert len(found) == len(measured) == 1


def test_two_processes_keep_each_others_figures(tmp_path: Path, measured: list[Any]) -> None:
    one, other = open_cache(tmp_path), open_cache(tmp_path)
    first = cost(one, rows=1)
    cost(other, rows=2)
    assert cost(other, rows=1) == first  # measured by the first in the meantime
    both = cost(one, rows=4), cost(other, rows=4)
    assert both[0] == both[1]
    assert len(open_cache(tmp_path).entries) == 3
    assert len(measured) == 4  # the second measurement of 4 rows came too late


def test_what_was_stored_first_stays(tmp_path: Path, measured: list[Any]) -> None:
    one, other = open_cache(tmp_path), open_cache(tmp_path)
    assert one.put({"rows": 1}, [1.0, 2.0]) == [1.0, 2.0]
    assert other.get({"rows": 1}) is None
    assert other.put({"rows": 1}, [3.0, 4.0]) == [1.0, 2.0]
    assert open_cache(tmp_path).get({"rows": 1}) == [1.0, 2.0]
    assert measured == []


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '"x"', "\x00\xff", "[" * 100_000])
def test_a_corrupted_file_counts_as_empty(tmp_path: Path, measured: list[Any], text: str) -> None:
    (tmp_path / "latency.json").write_text(text, encoding="latin-1")
    cache = open_cache(tmp_path)
    assert cache.entries == {}
    cost(cache)
    assert len(open_cache(tmp_path).entries) == 1


@pytest.mark.parametrize("value", [[], ["fast"], [1.0, None], "x", 3, {"a": 1}, [0.0, 1.0], [-1.0], [float("nan")]])
def test_a_broken_entry_is_measured_again(tmp_path: Path, measured: Sequence[Any], value: object) -> None:
    cost(open_cache(tmp_path))
    stored = json.loads((tmp_path / "latency.json").read_text())
    (tmp_path / "latency.json").write_text(json.dumps(dict.fromkeys(stored, value) | {"kept": [1.0, 2.0]}))
    cache = open_cache(tmp_path)
    assert set(cache.entries) == {"kept"}
    cost(cache)
    assert len(measured) == 2 and len(open_cache(tmp_path).entries) == 2


def test_a_folder_that_cannot_be_written_only_costs_time(tmp_path: Path, measured: list[Any]) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        cache = open_cache(folder)
        assert cost(cache) == cost(cache)
    assert len(measured) == 2
    assert (tmp_path / "file").read_text() == "in the way"


def test_no_temporary_files_stay(tmp_path: Path, measured: list[Any]) -> None:
    cost(open_cache(tmp_path / "new" / "folder"))
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["latency.json"]
    assert len(measured) == 1


def test_the_users_folder_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert default_folder() == tmp_path / ".cache" / "quantkit"
    open_cache(None).put({"rows": 1}, [1.0])
    assert (tmp_path / ".cache" / "quantkit" / "latency.json").exists()


@pytest.mark.parametrize("form", ["packed", "dynamic", "matmulnbits"])
def test_a_real_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr(latency, "SECONDS", 0.01)
    found = cost(open_cache(tmp_path), form=form)
    assert all(0 < figure < 1000 for figure in found)  # milliseconds


# --- Other layers than matrix products, and static integers

CONV = "g (float[N,8,9,7] x) => (float[N,16,a,b] y) { y = Conv<ATTRIBUTES>(x, w, c) }"
TRANSPOSED = "g (float[N,8,5,5] x) => (float[N,16,a,b] y) { y = ConvTranspose<strides=[2,2]>(x, w, c) }"
TABLE = "g (int64[N,S] x) => (float[N,S,32] y) { y = Gather(w, x) }"
STEPS = "g (float[T,N,16] x) => (float[T,D,N,16] y) { y = OP<hidden_size=16>(x, w, r) }"
PRODUCT = "g (float[N,64] x) => (float[N,48] y) { y = MatMul(x, w) }"
CLASSIFIER = "g (float[N,64] x) => (float[N,48] y) { y = Gemm<transB=1>(x, w, c) }"
BATCHED = "g (float[N,3,S,32] x) => (float[N,3,S,16] y) { y = MatMul(x, w) }"


def layers(text: str, **weights: tuple[int, ...]) -> list[Target]:
    made = {name: random(*shape, 1)[..., 0] for name, shape in weights.items()}
    return list(find_targets(load_model(build(text, made)).model)[0].values())


def conv(attributes: str = "pads=[1,1,1,1]", channels: int = 8) -> Target:
    return layers(CONV.replace("ATTRIBUTES", attributes), w=(16, channels, 3, 3), c=(16,))[0]


NODES: list[tuple[Target, str, QuantSpec, tuple[int, ...]]] = [
    (conv(), "qdq", SPEC, (2, 8, 9, 7)),
    (conv("strides=[2,1],pads=[1,0,2,1],dilations=[1,2]"), "qdq", SPEC, (2, 8, 9, 7)),
    (conv("group=4", 2), "qdq", SPEC, (1, 8, 9, 7)),
    (conv('auto_pad="SAME_UPPER"'), "packed", SPEC, (2, 8, 9, 7)),
    (layers(TRANSPOSED, w=(8, 16, 3, 3), c=(16,))[0], "packed", SPEC, (2, 8, 5, 5)),
    (layers(TABLE, w=(50, 32))[0], "gather", SPEC, (2, 7)),
    (layers(STEPS.replace("OP", "LSTM"), w=(1, 64, 16), r=(1, 64, 16))[0], "packed", SPEC, (5, 2, 16)),
    (layers(STEPS.replace("OP", "LSTM"), w=(1, 64, 16), r=(1, 64, 16))[1], "packed", SPEC, (5, 2, 16)),
    (layers(STEPS.replace("OP", "GRU"), w=(1, 48, 16), r=(1, 48, 16))[1], "packed", SPEC, (5, 2, 16)),
    (layers(PRODUCT, w=(64, 48))[0], "qdq", SPEC, (6, 64)),
    (layers(CLASSIFIER, w=(48, 64), c=(48,))[0], "qdq", SPEC, (6, 64)),
    (layers(BATCHED, w=(3, 32, 16))[0], "packed", SPEC, (2, 3, 5, 32)),
]


@pytest.mark.parametrize(("item", "form", "spec", "shape"), NODES)
def test_every_operator_is_timed_alone_in_its_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, item: Target, form: str, spec: QuantSpec, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(latency, "SECONDS", 0.0)
    assert not is_product(item, form)
    cache = open_cache(tmp_path)
    found = node_cost(item, spec, form, shape, cache=cache, runtime="ort-cpu", threads=1)
    assert 0 < found.float_ms < 1000 and 0 < found.form_ms < 1000
    again = node_cost(item, spec, form, shape, cache=open_cache(tmp_path), runtime="ort-cpu", threads=1)
    assert again == found and len(cache.entries) == 1


def test_a_static_layer_alone_reads_and_makes_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No conversion is counted: the integer kernel runs, with the layer's own attributes, and changes of layout."""
    seen: list[Sequence[ir.Model]] = []

    def time(models: Sequence[ir.Model], feeds: Sequence[Feed], **_: Any) -> list[float]:
        seen.append(models)
        for model, feed in zip(models, feeds, strict=True):
            make_session(model).run(feed)
        return [1.0, 2.0]

    monkeypatch.setattr(latency, "time_kernels", time)
    item = conv("strides=[2,1],pads=[1,0,2,1],dilations=[1,2]")
    node_cost(item, SPEC, "qdq", (2, 8, 9, 7), cache=open_cache(tmp_path), runtime="ort-cpu", threads=1)
    ((plain, quantized),) = seen
    types = [[value.dtype for value in (model.graph.inputs[0], model.graph.outputs[0])] for model in seen[0]]
    assert types == [[ir.DataType.FLOAT] * 2, [ir.DataType.UINT8] * 2]
    ran = [node.op_type for node in optimized_nodes(quantized)]
    assert "QLinearConv" in ran and set(ran) <= {"QLinearConv", "Transpose"}
    assert [node.op_type for node in plain.graph] == ["Conv"]
    for model in seen[0]:
        (node,) = (node for node in model.graph if node.op_type == "Conv")
        assert node.attributes["strides"].as_ints() == (2, 1) and node.attributes["pads"].as_ints() == (1, 0, 2, 1)
        assert node.attributes["dilations"].as_ints() == (1, 2) and len(node.inputs) == 3  # its bias, too
        assert list(model.graph.inputs[0].shape or ()) == [2, 8, 9, 7]


def test_a_shape_that_is_not_the_models_is_the_callers(tmp_path: Path, counted: list[Any]) -> None:
    cache = open_cache(tmp_path)
    for shape in ((1, 8, 9, 7), (4, 8, 9, 7), (1, 8, 20, 30)):
        node_cost(conv(), SPEC, "packed", shape, cache=cache, runtime="ort-cpu", threads=1)
    assert [arguments[3] for arguments in counted] == [(1, 8, 9, 7), (4, 8, 9, 7), (1, 8, 20, 30)]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []

    def measure(*arguments: Any) -> tuple[float, float]:
        calls.append(arguments)
        return 1.0 * len(calls), 2.0 * len(calls)

    monkeypatch.setattr(latency, "_measure_node", measure)
    return calls


def test_everything_that_matters_to_a_kernel_is_in_the_key(tmp_path: Path, counted: list[Any]) -> None:
    cache = open_cache(tmp_path)

    def cost(item: Target, form: str = "packed", spec: QuantSpec = SPEC, **changes: Any) -> None:
        options = {"shape": (2, 8, 9, 7), "runtime": "ort-cpu", "threads": 1, **changes}
        node_cost(item, spec, form, options.pop("shape"), cache=cache, **options)

    cost(conv())
    cost(conv("pads=[1,1,1,0]"))
    cost(conv("pads=[1,1,1,1],strides=[2,2]"))
    cost(conv("group=4", 2))
    cost(conv(), "qdq")
    cost(conv(), threads=2)
    cost(conv(), runtime="portable")
    cost(conv(), shape=(1, 8, 9, 7))
    recurrent = layers(STEPS.replace("OP", "LSTM"), w=(1, 64, 16), r=(1, 64, 16))
    for item in recurrent:  # of equal shape, and yet not the same weight
        cost(item, shape=(5, 2, 16))
    table = layers(TABLE, w=(50, 32))[0]
    for bits in (4, 8):
        cost(table, "gather", QuantSpec(bits, 32), shape=(2, 7))
    assert len(counted) == 12 == len(cache.entries)
    # Codes that are widened when the model is loaded: the kernel is the same.
    for spec in (QuantSpec(2, 32), QuantSpec(8, -1, symmetric=True, act_bits=8)):
        cost(conv(), "packed", spec)
        cost(conv(), "qdq", spec)
    cost(replace(conv(), name="other"))
    assert len(counted) == 12


def test_which_layers_are_plain_products() -> None:
    assert is_product(layers(PRODUCT, w=(64, 48))[0], "packed") and is_product(target(), "dynamic")
    assert not is_product(layers(PRODUCT, w=(64, 48))[0], "qdq")
    assert not is_product(layers(BATCHED, w=(3, 32, 16))[0], "packed") and not is_product(conv(), "packed")


def test_the_typical_shape() -> None:
    def stats(*shapes: tuple[tuple[int, ...], int]) -> LayerStats:
        return LayerStats(1, 0.0, 0.0, data_shapes=dict(shapes))

    seen = stats(((2, 8, 9, 7), 5), ((2, 8, 99, 99), 1), ((1, 8, 2, 2), 2))
    assert typical_shape(conv(), seen) == (2, 8, 9, 7)
    assert typical_shape(conv(), seen, 4.0) == (8, 8, 9, 7)  # calibration cut the batches of 8
    assert typical_shape(conv(), stats(((8, 8, 9, 7), 9)), 1.02) == (8, 8, 9, 7)
    assert typical_shape(conv(), stats(((2, 8, 9, 7), 9)), 0.01) == (1, 8, 9, 7)
    steps = layers(STEPS.replace("OP", "GRU"), w=(1, 48, 16), r=(1, 48, 16))[0]
    assert typical_shape(steps, stats(((5, 2, 16), 1)), 3.0) == (5, 6, 16)
    assert typical_shape(conv(), None) is None and typical_shape(conv(), stats()) is None
    assert typical_shape(conv(), stats(((), 3))) is None


def test_a_model_takes_what_its_layers_change() -> None:
    assert predicted_ms(10.0, []) == 10.0
    assert predicted_ms(10.0, [Cost(4.0, 1.0), Cost(3.0, 3.5)]) == 7.5
