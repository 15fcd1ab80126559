"""Models that hold one layer for every way of storing it, what they should compute, and how to look into them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from quantkit import metrics
from quantkit.calibration.accumulators import act_params
from quantkit.emitters._unpack import int8_codes
from quantkit.graph.emit import Assignment, Emission, emitter
from quantkit.graph.regions import Regions, find_regions
from quantkit.graph.targets import find_targets
from quantkit.methods import find
from quantkit.quantizers.rtn import RTN
from quantkit.runtime.ort import make_session
from quantkit.types import ActParams, Array, Feed, FloatArray, QuantizedWeight, QuantSpec, Target

FORMS = find("emitters")
RUNTIMES = ("ort-cpu", "portable")
GROUP_SIZES = (-1, 16, 32, 48, 128)  # of K = 160, 48 and 128 leave a shorter last group
SPECS = tuple(
    QuantSpec(bits, group_size, symmetric)
    for bits, group_size, symmetric in itertools.product(range(1, 9), GROUP_SIZES, (False, True))
)
# Every width both symmetric and not, with the group sizes in turn.
FEW_SPECS = tuple(
    spec for spec in SPECS if (GROUP_SIZES.index(spec.group_size) + 2 * spec.symmetric + spec.bits) % 5 == 0
)
NO_REGIONS = Regions({}, frozenset(), {}, frozenset(), frozenset())


@dataclass(frozen=True)
class Kind:
    """One operator with its shapes.

    Attributes:
        op: operator.
        data: shape of the input; for Gather of the ids.
        constants: shapes of the further inputs, weight first; None is an absent optional input.
        attributes: of the node.
        rank: of the output.
    """

    op: str
    data: tuple[int, ...]
    constants: tuple[tuple[int, ...] | None, ...]
    attributes: Mapping[str, Any]
    rank: int


KINDS: dict[str, Kind] = {
    "matmul": Kind("MatMul", (2, 5, 160), ((160, 6),), {}, 3),
    "matmul one row": Kind("MatMul", (1, 160), ((160, 6),), {}, 2),
    "gemm": Kind("Gemm", (5, 160), ((160, 6),), {}, 2),
    "gemm bias": Kind("Gemm", (5, 160), ((160, 6), (6,)), {"transB": 0}, 2),
    "gemm transB": Kind("Gemm", (5, 160), ((6, 160),), {"transB": 1}, 2),
    "gemm transB bias": Kind("Gemm", (5, 128), ((6, 128), (6,)), {"transB": 1}, 2),
    "conv": Kind("Conv", (2, 8, 6, 6), ((6, 8, 3, 3),), {"pads": [1, 1, 1, 1]}, 4),
    "conv bias": Kind("Conv", (1, 8, 7, 7), ((6, 8, 3, 3), (6,)), {"strides": [2, 2]}, 4),
    "conv grouped": Kind("Conv", (2, 16, 5, 5), ((12, 4, 3, 3), (12,)), {"group": 4}, 4),
    "conv depthwise": Kind("Conv", (1, 32, 5, 5), ((32, 1, 3, 3), (32,)), {"group": 32}, 4),
    "conv 1d": Kind("Conv", (2, 40, 9), ((5, 40, 3),), {"dilations": [2]}, 3),
    "conv 3d": Kind("Conv", (1, 8, 4, 4, 4), ((4, 8, 2, 2, 2), (4,)), {}, 5),
    "conv transpose": Kind("ConvTranspose", (1, 32, 4, 4), ((32, 5, 2, 2), (10,)), {"group": 2, "strides": [2, 2]}, 4),
    "gather": Kind("Gather", (2, 3), ((20, 160),), {}, 3),
    "lstm": Kind("LSTM", (3, 2, 24), ((1, 32, 24), (1, 32, 8), (1, 64)), {"hidden_size": 8}, 4),
    "gru": Kind("GRU", (3, 2, 20), ((2, 24, 20), (2, 24, 8)), {"hidden_size": 8, "direction": "bidirectional"}, 4),
    "rnn": Kind("RNN", (3, 2, 24), ((1, 20, 24), (1, 20, 20)), {"hidden_size": 20}, 4),
}


def normal(rng: np.random.Generator, shape: Sequence[int]) -> FloatArray:
    return rng.standard_normal(tuple(shape)).astype(np.float32)


def stack(kind: Kind, count: int, seed: int = 0) -> ir.Model:
    """`count` layers named L0, L1, ... that all read the input x; layer i makes the output y<i>."""
    rng = np.random.default_rng(seed)
    dtype = ir.DataType.INT64 if kind.op == "Gather" else ir.DataType.FLOAT
    data = ir.val("x", dtype=dtype, shape=kind.data)
    nodes, initializers = [], []
    for index in range(count):
        constants: list[ir.Value | None] = []
        for place, shape in enumerate(kind.constants):
            value = None if shape is None else ir.val(f"c{index}.{place}", const_value=ir.tensor(normal(rng, shape)))
            constants.append(value)
            initializers += [] if value is None else [value]
        inputs = [*constants, data] if kind.op == "Gather" else [data, *constants]
        node = ir.node(kind.op, inputs, dict(kind.attributes), name=f"L{index}")
        output = node.outputs[0]
        output.name, output.dtype, output.shape = f"y{index}", ir.DataType.FLOAT, ir.Shape([None] * kind.rank)
        nodes.append(node)
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([data], outputs, nodes=nodes, initializers=initializers, opset_imports={"": 21}, name="stack")
    return ir.Model(graph, ir_version=10)


def feed_of(kind: Kind, seed: int = 1) -> Feed:
    """Ids that count from both ends, or numbers whose range is not centred."""
    rng = np.random.default_rng(seed)
    if kind.op == "Gather":
        rows = (kind.constants[0] or (0,))[0]
        return {"x": rng.integers(-rows, rows, kind.data)}
    return {"x": normal(rng, kind.data) + np.float32(0.4)}


def quantize(target: Target, spec: QuantSpec) -> QuantizedWeight:
    return RTN().quantize(target.load(), spec, None)


def accepted(
    form: str, runtime: str, targets: Mapping[str, Target], specs: Sequence[QuantSpec] = SPECS
) -> dict[str, Assignment]:
    """The layers that the form takes: L<i> stored as specs[i], modulo their number."""
    layers = {}
    for name, target in targets.items():
        spec = specs[int(str(target.node.name)[1:]) % len(specs)]
        if emitter(form).refuse(target, spec, runtime) is None:
            layers[name] = Assignment(form, quantize(target, spec))
    return layers


def plan(model: ir.Model, layers: Mapping[str, Assignment], feed: Feed, runtime: str) -> Emission:
    """Where a layer is static, with regions and with ranges from a float run."""
    targets, _ = find_targets(model)
    static = [use.node.name for name, item in layers.items() if item.form == "qdq" for use in targets[name].uses]
    if not static:
        return Emission(layers, NO_REGIONS, {}, runtime)
    regions = find_regions(model, [str(name) for name in static])
    seen = expose(model, list(dict.fromkeys([*regions.groups])), feed)
    params: dict[str, ActParams] = {}
    for group in dict.fromkeys(regions.groups.values()):
        members = [seen[name] for name in regions.members(group)]
        low, high = min(float(array.min()) for array in members), max(float(array.max()) for array in members)
        bounds = regions.bounds(group)
        params[group] = act_params(max(low, bounds[0]), min(high, bounds[1]))
    return Emission(layers, regions, params, runtime)


def expose(
    model: ir.Model, names: Iterable[str], feed: Feed, optimize: Any = "none", types: Mapping[str, ir.DataType] = {}
) -> dict[str, Array]:
    """Named values of the main graph while the model runs; inputs and outputs come for free."""
    copy = model.clone()
    values = {str(value.name): value for node in copy.graph for value in node.outputs}
    known = {str(value.name) for value in copy.graph.outputs}
    for name in names:
        if name in values and name not in known:
            values[name].type = ir.TensorType(types.get(name, ir.DataType.FLOAT))
            copy.graph.outputs.append(values[name])
    return {**feed, **make_session(copy, optimize=optimize).run(feed)}


def reference(model: ir.Model, emission: Emission, feed: Feed) -> dict[str, Array]:
    """The float operators on what the forms promise: effective weights, inputs as `fake_quantize` rounds them.

    Only for layers that read graph inputs. Outputs that the regions put on a grid are rounded to it.
    """
    copy = model.clone()
    targets, _ = find_targets(copy)
    feeds = dict(feed)
    for name, item in emission.layers.items():
        form, target = emitter(item.form), targets[name]
        operand = target.layout.to_operand(form.effective_weight(item.weight))
        value = initializer(copy, f"{name}.reference", np.ascontiguousarray(operand))
        for use in target.uses:
            use.node.replace_input_with(use.weight_index, value)
            source = str(use.data.name)
            if source not in feed or target.op == "Gather":
                continue
            own = ir.val(f"{source}.{use.node.name}", dtype=ir.DataType.FLOAT, shape=feed[source].shape)
            copy.graph.inputs.append(own)
            use.node.replace_input_with(use.data_index, own)
            group = emission.regions.groups.get(source)
            act = emission.activations[group] if group else None
            feeds[str(own.name)] = form.fake_quantize(feed[source].astype(np.float32), item.weight, act)
            if act is not None:
                round_bias(copy, use.node, int8_codes(item.weight)[1] * np.float64(act.scale))
    outputs = make_session(copy, optimize="none").run(feeds)
    return {name: on_grid(emission, name, value) for name, value in outputs.items()}


def initializer(model: ir.Model, name: str, array: Array) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(array))
    model.graph.register_initializer(value)
    return value


def round_bias(model: ir.Model, node: ir.Node, steps: Array) -> None:
    """What is left of a bias in int32 codes, where it has one value per row of the weight."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None or bias.const_value is None or bias.const_value.shape not in (steps.shape, (1, *steps.shape)):
        return
    rounded = np.rint(bias.const_value.numpy() / steps) * steps
    node.replace_input_with(2, initializer(model, f"{node.name}.bias", rounded.astype(np.float32)))


def on_grid(emission: Emission, name: str, value: Array) -> Array:
    if name not in emission.regions.produced:
        return value
    act = emission.activations[emission.regions.groups[name]]
    codes = np.clip(np.rint(value / np.float32(act.scale)) + act.zero_point, 0, 255)
    rounded: Array = ((codes - act.zero_point) * np.float32(act.scale)).astype(np.float32)
    return rounded


def agreement(wanted: Mapping[str, Array], got: Mapping[str, Array]) -> dict[str, float]:
    """Output -> dB; -200 for another shape or type."""
    found = {}
    for name, value in wanted.items():
        same = value.shape == got[name].shape and value.dtype == got[name].dtype
        found[name] = metrics.sqnr(value, got[name]) if same else -200.0
    return found


def disagreeing(
    wanted: Mapping[str, Array], got: Mapping[str, Array], emission: Emission, decibels: float
) -> dict[str, float]:
    """Output -> dB, of those that agree less than they must.

    On an activation grid a value may fall on the other side of a half: one step off, for one code in twenty.
    """
    bad = {}
    for name, found in agreement(wanted, got).items():
        if name in emission.regions.produced and found > -200:
            step = emission.activations[emission.regions.groups[name]].scale
            apart = np.abs(wanted[name] - got[name]) / step
            right = bool(apart.max() < 1.001 and (apart > 0.001).mean() <= 0.05)
        else:
            right = found >= decibels
        if not right:
            bad[name] = found
    return bad


def check_file(model: ir.Model) -> onnx.ModelProto:
    """The model as a valid file; for the portable runtime nothing but standard operators."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def operators(proto: onnx.ModelProto) -> set[tuple[str, str]]:
    """(domain, operator) of all nodes, subgraphs included."""
    found: set[tuple[str, str]] = set()

    def walk(nodes: Iterable[onnx.NodeProto]) -> None:
        for node in nodes:
            found.add((node.domain, node.op_type))
            for attribute in node.attribute:
                walk(attribute.g.node)

    walk(proto.graph.node)
    return found
