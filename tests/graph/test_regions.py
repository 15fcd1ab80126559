"""Small convolutional networks through the integer path: what runs, and how close it stays to plan and float model."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from quantkit.calibration.accumulators import act_params
from quantkit.forms import static_layers
from quantkit.graph.emit import Assignment, Emission, emit, simulate
from quantkit.graph.load import load_model
from quantkit.graph.regions import Regions, find_regions
from quantkit.graph.targets import find_targets
from quantkit.methods import make
from quantkit.metrics import sqnr
from quantkit.runtime.ort import make_session, optimized_nodes
from quantkit.types import ActParams, Array, QuantSpec

Build = Callable[..., onnx.ModelProto]
PLAN_DB, FLOAT_DB = 40.0, 20.0
LAYOUT = frozenset({"Transpose", "ReorderInput", "ReorderOutput"})
WEIGHTS = {"w1": (16, 3, 3, 3), "w2": (16, 16, 3, 3), "w3": (16, 16, 3, 3), "wide": (16, 32, 3, 3), "g1": (16, 32)}
WEIGHTS |= {"half": (16, 8, 3, 3), "half2": (16, 8, 3, 3), "deep16": (16, 1, 4, 4), "f1": (16, 16, 1, 1), "b1": (32,)}
WEIGHTS |= {"f2": (16, 16, 1, 1), "up": (16, 16, 2, 2), "vol": (16, 3, 3, 3, 3), "vol2": (8, 16, 3, 3, 3)}
WEIGHTS |= {"line": (32, 8, 3), "line2": (32, 32, 3), "c1": (16,), "c2": (16,)}
CONSTANTS: dict[str, Array] = {
    "axes": np.array([2, 3]),
    "ones": np.array([1]),
    "two": np.array([2]),
    "pads": np.array([0, 0, 1, 1, 0, 0, 1, 2]),
    "some": np.array([1, 1, 1, 2]),
    "zero": np.array(0, np.float32),
    "one": np.array(1, np.float32),
    "half1": np.array(0.5, np.float32),
    "low": np.array(-0.3, np.float32),
    "six": np.array(0.6, np.float32),  # the activations are small: this cuts as 6 does in a real network
    "real6": np.array(6, np.float32),
    "three": np.array(3, np.float32),
    "sixth": np.array(1 / 6, np.float32),
    "sizes": np.array([1, 1, 2, 2], np.float32),
    "box": np.array([0, 0, -0.2, -0.2, 1, 1, 1.2, 1.2], np.float32),
    "start": np.array([1, 2]),
    "stop": np.array([9, 8]),
    "shape": np.array([2, 16, 8, 32]),
    "flat": np.array([2, 16, -1]),
    "split5": np.array([2, 2, 16, 16, 16]),
    "split4": np.array([2, 32, 16, 16]),
    "channel": np.linspace(0.5, 1, 16, dtype=np.float32).reshape(1, 16, 1, 1),
    "spread": np.linspace(-0.5, 0.4, 32, dtype=np.float32),
    "slope": np.full((16, 1, 1), 0.2, np.float32),
    "positive": np.linspace(0.5, 1.4, 32, dtype=np.float32),
}


@dataclass(frozen=True)
class Case:
    """A graph body and what should run; see regions.toml."""

    body: str
    runs: str = ""
    inputs: str = "float[2,3,16,16] x"
    outputs: str = "float[a,b,c,d] y"
    opset: int = 21


CASES = {name: Case(**row) for name, row in tomllib.loads((Path(__file__).parent / "regions.toml").read_text()).items()}
WORDS = {
    "same": "<pads = [1, 1, 1, 1]>",
    "first": "a = Conv<pads = [1, 1, 1, 1]>(x, w1) r = Relu(a)",
    "relus": "b = Conv<pads = [1, 1, 1, 1]>(r, w2) q = Relu(b)",
    "last": "y = Conv<pads = [1, 1, 1, 1]>(p, w2)",
    "head": "a = Conv<pads = [1, 1, 1, 1]>(x, w1) r = Relu(a) b = Conv<pads = [1, 1, 1, 1]>(r, w2) s = Relu(b) "
    "m = GlobalAveragePool(s) f = Flatten(m)",
}
SHORT = {"Q": "QuantizeLinear", "DQ": "DequantizeLinear", "NhwcMaxPool": "NhwcMaxPool"}
SHORT |= {
    name: f"QLinear{name}"
    for name in ("Conv", "Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu")
}


def parse(runs: str) -> Counter[str]:
    """`Q Conv*2 float:Exp` -> counts of operators by their full names."""
    counts: Counter[str] = Counter()
    for word in runs.split():
        name, _, count = word.partition("*")
        counts[name.removeprefix("float:") if name.startswith("float:") else SHORT[name]] += int(count or 1)
    return counts


def model_of(build: Build, case: Case) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights: dict[str, Array] = {}
    for name, shape in WEIGHTS.items():
        fan = shape[0] if len(shape) == 2 else max(int(np.prod(shape[1:])), 1)
        weights[name] = (rng.standard_normal(shape) * np.sqrt(1.5 / fan)).astype(np.float32)
    body = Template(case.body).substitute(WORDS)
    used = {name: array for name, array in {**weights, **CONSTANTS}.items() if _mentions(body, name)}
    return build(f"g ({case.inputs}) => ({case.outputs}) {{ {body} }}", used, opset=case.opset)


def _mentions(body: str, name: str) -> bool:
    return any(f"{before}{name}{after}" in body for before in "( " for after in ",)")


@dataclass(frozen=True)
class Network:
    """A loaded network with everything that emission needs."""

    model: ir.Model
    feed: Mapping[str, Array]
    emission: Emission

    def outputs(self, model: ir.Model, *, literal: bool = False) -> dict[str, Array]:
        return make_session(model, optimize="none" if literal else "all").run(self.feed)


def prepare(proto: onnx.ModelProto, runtime: str = "ort-cpu", ignore: tuple[str, ...] = ()) -> Network:
    model = load_model(proto).model
    targets, _ = find_targets(model, ignore)
    static = static_layers(model, targets, runtime, "auto")
    regions = find_regions(model, [node for nodes in static.values() for node in nodes])
    feed = make_feed(proto)
    quantizer = make("quantizers", "rtn", {})
    layers = {}
    for name, target in targets.items():
        spec = QuantSpec(8, -1, symmetric=name in static)
        layers[name] = Assignment("qdq" if name in static else "packed", quantizer.quantize(target.load(), spec, None))
    return Network(model, feed, Emission(layers, regions, ranges(model, regions, feed), runtime))


def make_feed(proto: onnx.ModelProto) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    sizes = {"N": 2, "H": 10, "W": 14}
    feed = {"l": np.array(-0.3, np.float32), "h": np.array(0.6, np.float32), "flag": np.array(1, np.float32)}
    for value in proto.graph.input:
        shape = [dim.dim_value or sizes[dim.dim_param] for dim in value.type.tensor_type.shape.dim]
        if shape:
            feed[value.name] = rng.standard_normal(shape).astype(np.float32)
    return {value.name: feed[value.name] for value in proto.graph.input}


def ranges(model: ir.Model, regions: Regions, feed: Mapping[str, Array]) -> dict[str, ActParams]:
    """Extremes of every group on the feed, within what absorbed clips allow."""
    copy = model.clone()
    known = {str(value.name) for value in (*copy.graph.inputs, *copy.graph.outputs)}
    copy.graph.outputs.extend(
        value
        for node in copy.graph
        for value in node.outputs
        if value.name in regions.groups and value.name not in known
    )
    seen = {**feed, **make_session(copy, optimize="none").run(feed)}
    params = {}
    for group in set(regions.groups.values()):
        parts = [seen[name] for name in regions.members(group)]
        low, high = regions.bounds(group)
        params[group] = act_params(
            max(min(float(part.min()) for part in parts), low), min(max(float(part.max()) for part in parts), high)
        )
    return params


def agreement(reference: Mapping[str, Array], measured: Mapping[str, Array]) -> float:
    """The worst float output in dB."""
    return min(sqnr(value, measured[name]) for name, value in reference.items() if value.dtype == np.float32)


@pytest.mark.parametrize("runtime", ["ort-cpu", "portable"])
@pytest.mark.parametrize("name", CASES)
def test_the_integer_path_runs_as_planned(build: Build, name: str, runtime: str) -> None:
    case = CASES[name]
    proto = model_of(build, case)
    network = prepare(proto, runtime)
    emitted = emit(network.model, network.emission).model
    written = ir.to_proto(emitted)
    onnx.checker.check_model(written, full_check=True)
    assert [value.name for value in written.graph.input] == [value.name for value in proto.graph.input]
    assert [value.name for value in written.graph.output] == [value.name for value in proto.graph.output]
    measured = network.outputs(emitted)
    assert agreement(network.outputs(simulate(network.model, network.emission), literal=True), measured) >= PLAN_DB
    assert agreement(network.outputs(network.model, literal=True), measured) >= FLOAT_DB
    ran = Counter(node.op_type for node in optimized_nodes(emitted) if node.op_type not in LAYOUT)
    assert ran == parse(case.runs)


@pytest.mark.parametrize("name", ["Gemm(f, g1, b1)", "Gemm(f, g1)", "Gemm(q, g1)"])
def test_a_classifier_reads_integers(build: Build, name: str) -> None:
    mean = "f = ReduceMean<keepdims=0>(r, axes) q = Relu(f) "
    body = "$first " + (mean if "q" in name else "m = GlobalAveragePool(r) f = Flatten(m) ") + f"y = {name}"
    network = prepare(model_of(build, Case(body, outputs="float[a,b] y")))
    assert {assignment.form for assignment in network.emission.layers.values()} == {"qdq"}
    emitted = emit(network.model, network.emission).model
    measured = network.outputs(emitted)
    assert agreement(network.outputs(simulate(network.model, network.emission), literal=True), measured) >= PLAN_DB
    assert agreement(network.outputs(network.model), measured) >= FLOAT_DB
    ran = Counter(node.op_type for node in optimized_nodes(emitted))
    assert ran["QLinearGlobalAveragePool"] == ran["QGemm"] == ran["QuantizeLinear"] == 1


def test_a_layer_left_float_keeps_its_weights(build: Build) -> None:
    """Between two pairs onnxruntime would round the weights of a float convolution to 8 bits by itself."""
    body = "$first b = Conv$same(r, w2) s = Relu(b) y = Conv$same(s, w3)"
    network = prepare(model_of(build, Case(body)), ignore=("w2",))
    emitted = emit(network.model, network.emission).model
    ran = Counter(node.op_type for node in optimized_nodes(emitted))
    assert ran["QLinearConv"] == 2 and ran["Conv"] + ran["FusedConv"] == 1
    simulated = network.outputs(simulate(network.model, network.emission), literal=True)
    assert agreement(simulated, network.outputs(emitted)) >= PLAN_DB


def test_relus_share_a_scale_behind_a_concat(build: Build) -> None:
    regions = prepare(model_of(build, CASES["concat of relus"])).emission.regions
    assert regions.groups["r"] == regions.groups["q"] == regions.groups["k"]
    assert regions.bounds(regions.groups["k"]) == (0.0, np.inf)
    mixed = prepare(model_of(build, CASES["concat of relu and none"])).emission.regions
    assert len({mixed.groups[name] for name in ("r", "b", "k")}) == 3
    layers = ["Conv/a", "Conv/b", "Conv/y"]
    alone = find_regions(load_model(model_of(build, CASES["concat of relus"])).model, layers, share_concat=False)
    assert len({alone.groups[name] for name in ("r", "q", "k")}) == 3


@pytest.mark.parametrize(
    ("name", "value", "bounds"),
    [
        ("relu, then clip", "p", (0.0, 0.6)),
        ("clip on both sides", "p", (-0.3, 0.6)),
        ("clip above only", "p", (-np.inf, 0.6)),
        ("max pool, then relu", "p", (0.0, np.inf)),
        ("max pool, no relu", "p", (-np.inf, np.inf)),
    ],
)
def test_what_absorbed_clips_leave(build: Build, name: str, value: str, bounds: tuple[float, float]) -> None:
    regions = prepare(model_of(build, CASES[name])).emission.regions
    assert regions.bounds(regions.groups[value]) == pytest.approx(bounds, rel=1e-6)


def test_names_that_are_taken(build: Build) -> None:
    proto = model_of(build, CASES["max pool"])
    renamed = {"a": "x.q", "r": "x.dq", "p": "x.dq.q"}
    for node in proto.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    network = prepare(proto)
    emitted = emit(network.model, network.emission).model
    onnx.checker.check_model(ir.to_proto(emitted), full_check=True)
    assert agreement(network.outputs(network.model), network.outputs(emitted)) >= FLOAT_DB


def test_the_same_model_gives_the_same_bytes(build: Build) -> None:
    proto = model_of(build, CASES["two pads"])
    first, second = (prepare(proto) for _ in range(2))
    written = [ir.to_proto(emit(item.model, item.emission).model).SerializeToString() for item in (first, second)]
    assert written[0] == written[1]


def test_the_model_is_not_changed(build: Build) -> None:
    network = prepare(model_of(build, CASES["hard-swish in parts"]))
    before = ir.to_proto(network.model).SerializeToString()
    emit(network.model, network.emission)
    simulate(network.model, network.emission)
    assert ir.to_proto(network.model).SerializeToString() == before


def mutated(network: Network, params: Mapping[str, ActParams]) -> Mapping[str, Array]:
    return network.outputs(emit(network.model, replace(network.emission, activations=params)).model)


def test_wrong_grids_are_seen(build: Build) -> None:
    network = prepare(model_of(build, CASES["biases"]))
    params, wanted = network.emission.activations, network.outputs(network.model)
    assert agreement(wanted, mutated(network, params)) >= FLOAT_DB
    for group, act in params.items():
        half = {**params, group: ActParams(act.scale / 4, act.zero_point)}
        shifted = {**params, group: ActParams(act.scale, (act.zero_point + 90) % 256)}
        assert agreement(wanted, mutated(network, half)) < FLOAT_DB
        assert agreement(wanted, mutated(network, shifted)) < FLOAT_DB


@pytest.mark.parametrize("name", ["chain", "relu6", "clip on both sides", "max pool, then relu", "relu, then clip"])
def test_a_forgotten_bound_is_seen(build: Build, name: str) -> None:
    network = prepare(model_of(build, CASES[name]))
    regions = network.emission.regions
    assert regions.absorbed
    free = replace(regions, absorbed=dict.fromkeys(regions.absorbed, (-np.inf, np.inf)))
    # What calibration would see in front of the removed clips.
    unclipped = {group: ActParams(act.scale * 2, 128) for group, act in network.emission.activations.items()}
    kept = {
        group: act for group, act in network.emission.activations.items() if free.bounds(group) == regions.bounds(group)
    }
    wanted = network.outputs(network.model)
    right = agreement(wanted, mutated(network, network.emission.activations))
    assert agreement(wanted, mutated(network, {**unclipped, **kept})) < right - 8
