"""Scale groups: a node whose result can be divided by s per channel, and the layers that are multiplied to make up.

    y = W x,  x = f(g)     ->     y = (W diag(s)) f(g / s)        f positively homogeneous, s > 0 per channel

The division goes into what makes x: the gain of a normalisation or a constant factor, or the rows (and the bias) of a
layer; between it and the readers lie operators that let scales pass (`graph/_channels.py`). All readers take part,
quantized or not; where one cannot, or where x is an output of the model, there is no group, and the reason is kept.
This is the algebra behind AWQ (arXiv 2306.00978), SmoothQuant (arXiv 2211.10438) and cross-layer equalization
(arXiv 1906.04721).

          gamma / s                                         W_q diag(s), W_k diag(s), W_v diag(s)
    LayerNormalization ------------------------------------ MatMul, MatMul, MatMul
          W_v / s, b_v / s                                  W_o diag(s); heads that share one v share its s
    MatMul - Add - Reshape - Transpose - softmax(..) @ v -- Transpose - Reshape - MatMul
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from quantkit.graph._channels import DEFAULT_DOMAINS, BlockedError, Channels, aligned, label, lets_through, pass_through
from quantkit.graph._trace import follow, is_constant, is_layout_node, static_shape, trace
from quantkit.graph.targets import MIN_ELEMENTS
from quantkit.types import Target

LAYERS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
# Normalisations: (domain, operator) -> (axis of the channels, indices of gain and shift).
NORMS: dict[tuple[str, str], tuple[int, tuple[int, ...]]] = {
    ("", "LayerNormalization"): (-1, (1, 2)),
    ("", "RMSNormalization"): (-1, (1,)),
    ("", "SimplifiedLayerNormalization"): (-1, (1,)),
    ("", "BatchNormalization"): (1, (1, 2)),
    ("", "InstanceNormalization"): (1, (1, 2)),
    ("com.microsoft", "SkipLayerNormalization"): (-1, (2, 3)),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): (-1, (2,)),
}
INSERTED = "insert"
NORMALISING = ("norm", "factor")


@dataclass(frozen=True)
class Edit:
    """One constant to change: operand *= s[channels] ** power.

    Attributes:
        node: name of the node that reads it.
        index: which of the node's inputs.
        channels: broadcasts against the operand.
        power: 1 for readers, -1 for what makes the value.
    """

    node: str
    index: int
    channels: Channels
    power: int


@dataclass(frozen=True)
class Group:
    """What is scaled together.

    Attributes:
        name: of the node that makes the value, or of the value itself where a Mul is inserted behind it.
        kind: `norm`, `factor` (a constant Mul), `layer`, or `insert`.
        size: channels, the length of s.
        edits: everything that changes.
        readers: node name -> [K'] channel of each channel of its input, for layers that read the value.
        value: name of the value.
        normalised: the value is what a normalisation (or a constant factor behind one) makes.
    """

    name: str
    kind: str
    size: int
    edits: tuple[Edit, ...]
    readers: Mapping[str, Channels]
    value: str
    normalised: bool


@dataclass(frozen=True)
class Found:
    """Groups that share no reader, and why the other producers have none (node name -> reason)."""

    groups: tuple[Group, ...]
    refused: Mapping[str, str]

    def reason(self, target: Target) -> str:
        """Why a layer is in no group."""
        return _reason(target.uses[0].data, self.refused)


@dataclass
class _Walk:
    """Forward from one value, over all its readers, to the layers."""

    graph: ir.Graph
    edits: list[Edit] = field(default_factory=list)
    readers: dict[str, Channels] = field(default_factory=dict)
    seen: set[ir.Node] = field(default_factory=set)

    def follow(self, value: ir.Value, channels: Channels) -> None:
        """Raises: BlockedError where some reader cannot take part."""
        open_values = [(value, channels)]
        while open_values:
            value, channels = open_values.pop()
            if value.is_graph_output():
                raise BlockedError(f"its result '{value.name}' is an output of the model")
            for node, index in value.uses():
                if node.graph is not self.graph:
                    raise BlockedError(f"{label(node)} reads it inside a subgraph")
                if node in self.seen:
                    raise BlockedError(f"{label(node)} reads it twice")
                self.seen.add(node)
                open_values += self._read(node, index, channels)

    def _read(self, node: ir.Node, index: int, channels: Channels) -> list[tuple[ir.Value, Channels]]:
        if _is_layer(node):
            self._add_reader(node, index, channels)
            return []
        if node.domain in DEFAULT_DOMAINS and node.op_type in ("Add", "Sub"):
            other = node.inputs[1 - index]
            if other is None or not is_constant(trace(other).root) or other.shape is None:
                raise BlockedError(f"{label(node)} also reads it")
            rank = max(channels.ndim, len(other.shape))
            wide = aligned(channels, rank)
            least = next((axis for axis, size in enumerate(wide.shape) if size != 1), rank)
            kept = wide.reshape(wide.shape[min(least, rank - len(other.shape)) :])
            self.edits.append(Edit(str(node.name), 1 - index, kept, -1))
            return [(node.outputs[0], wide)]
        return pass_through(node, index, channels)

    def _add_reader(self, node: ir.Node, index: int, channels: Channels) -> None:
        if index != 0:
            raise BlockedError(f"{label(node)} adds it to its result")
        axis = 1 if node.op_type in ("Conv", "ConvTranspose") else channels.ndim - 1
        if "transA" in node.attributes and node.attributes["transA"].as_int():
            raise BlockedError(f"{label(node)} reads it transposed")
        if any(size != 1 for at, size in enumerate(channels.shape) if at != axis):
            raise BlockedError(f"{label(node)} does not read channels along its inputs")
        shape = _operand_shape(node)
        inputs = _num_inputs(node, shape)
        flat = np.broadcast_to(channels.reshape(-1), (inputs,))
        self.readers[str(node.name)] = flat
        self.edits.append(Edit(str(node.name), 1, _input_channels(node, shape, flat), 1))


def find_groups(model: ir.Model, insert_for: Sequence[str] = ()) -> Found:
    """Every scale group of the main graph, in graph order; groups share no reader.

    Where two producers reach the same layers, the nearer one is taken.

    Args:
        model: normalised by `load_model`; not changed.
        insert_for: names of MatMul and Gemm nodes that get a Mul in front when no group reaches them; readers of one
            value share it.
    """
    groups: list[Group] = []
    refused: dict[str, str] = {}
    taken: set[str] = set()
    for node in reversed(list(model.graph)):
        start = _start(node)
        if start is None:
            continue
        kind, channels, first = start
        walk = _Walk(model.graph, list(first))
        try:
            walk.follow(node.outputs[0], channels)
            _check_operands(model, walk.edits)
        except BlockedError as blocked:
            refused[str(node.name)] = str(blocked)
            continue
        if walk.readers and not taken & set(walk.readers):
            taken |= set(walk.readers)
            size = int(channels.max()) + 1
            value = str(node.outputs[0].name)
            edits, normalised = tuple(walk.edits), kind in NORMALISING
            groups.append(Group(str(node.name), kind, size, edits, walk.readers, value, normalised))
    groups += _inserted(model, [name for name in insert_for if name not in taken])
    order = {str(node.name): place for place, node in enumerate(model.graph)}
    groups.sort(key=lambda group: min(order[name] for name in group.readers))
    return Found(tuple(groups), refused)


def _inserted(model: ir.Model, names: Sequence[str]) -> Iterator[Group]:
    """One group for each value that layers without a group read."""
    wanted, by_value = set(names), dict[ir.Value, _Walk]()
    for node in model.graph:
        value = node.inputs[0] if str(node.name) in wanted else None
        if value is None or value.shape is None or node.op_type not in ("MatMul", "Gemm"):
            continue
        walk = by_value.setdefault(value, _Walk(model.graph))
        try:
            inputs = _num_inputs(node, _operand_shape(node))
            probe = _Walk(model.graph)
            probe._add_reader(node, 0, aligned(np.arange(inputs), len(value.shape)))
            _check_operands(model, probe.edits)
        except BlockedError:
            continue
        walk.edits += probe.edits
        walk.readers.update(probe.readers)
    for value, walk in by_value.items():
        if walk.readers:
            size = next(iter(walk.readers.values())).size
            producer = value.producer()
            start = None if producer is None else _start(producer)
            normalised = start is not None and start[0] in NORMALISING
            name = str(value.name)
            yield Group(name, INSERTED, size, tuple(walk.edits), walk.readers, name, normalised)


def _start(node: ir.Node) -> tuple[str, Channels, list[Edit]] | None:
    """(kind, channels of the result, what divides it by s); None when the node has nothing to fold into."""
    name = str(node.name)
    norm = NORMS.get((node.domain if node.domain != "ai.onnx" else "", node.op_type))
    result = node.outputs[0]
    rank = None if result.shape is None else len(result.shape)
    if rank is None:
        return None
    if norm is not None:
        axis, slots = norm
        gain = node.inputs[slots[0]] if slots[0] < len(node.inputs) else None
        vector = None if gain is None else static_shape(gain)
        last = "axis" not in node.attributes or node.attributes["axis"].as_int() in (-1, rank - 1)
        if vector is None or len(vector) != 1 or (axis == -1 and not last):
            return None
        present = [at for at in slots if at < len(node.inputs) and node.inputs[at] is not None]
        return "norm", _along(rank, axis, vector[0]), [Edit(name, at, np.arange(vector[0]), -1) for at in present]
    if not _is_layer(node):
        return _constant_factor(node, rank)
    shape = _operand_shape(node)
    if len(shape) < 2 or (node.op_type == "MatMul" and len(shape) != 2):
        return None
    size, axis, channels = _outputs(node, shape)
    edits = [Edit(name, 1, channels, -1)]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        edits.append(Edit(name, 2, np.arange(size), -1))
    return "layer", _along(rank, axis, size), edits


def _constant_factor(node: ir.Node, rank: int) -> tuple[str, Channels, list[Edit]] | None:
    """Mul by a constant with one number for each channel: the gain of a normalisation in parts, on either side."""
    if node.domain not in DEFAULT_DOMAINS or node.op_type != "Mul":
        return None
    for index in (0, 1):
        value = node.inputs[index]
        shape = static_shape(value) if value is not None and is_constant(trace(value).root) else None
        if shape is None or sum(size != 1 for size in shape) != 1:
            continue
        axis = next(at for at, size in enumerate(shape) if size != 1) - len(shape)
        channels = np.arange(shape[axis]).reshape(shape)
        return "factor", _along(rank, axis, shape[axis]), [Edit(str(node.name), index, channels, -1)]
    return None


def _along(rank: int, axis: int, size: int) -> Channels:
    """Channels 0, 1, ... along one axis."""
    shape = [1] * rank
    shape[axis] = size
    return np.arange(size).reshape(shape)


def _is_layer(node: ir.Node) -> bool:
    """A layer with a constant weight on the right."""
    if node.domain not in DEFAULT_DOMAINS or node.op_type not in LAYERS or node.inputs[1] is None:
        return False
    return is_constant(trace(node.inputs[1]).root)


def _operand_shape(node: ir.Node) -> tuple[int, ...]:
    weight = node.inputs[1]
    assert weight is not None
    origin = trace(weight)
    assert origin.root.const_value is not None
    return static_shape(weight) or follow(origin.root.const_value.numpy(), origin.path).shape


def _flag(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _num_inputs(node: ir.Node, shape: tuple[int, ...]) -> int:
    if node.op_type == "Conv":
        return shape[1] * _flag(node, "group", 1)
    if node.op_type == "ConvTranspose":
        return shape[0]
    if node.op_type == "Gemm" and _flag(node, "transB", 0):
        return shape[1]
    return shape[-2] if len(shape) > 1 else shape[0]


def _input_channels(node: ir.Node, shape: tuple[int, ...], channels: Channels) -> Channels:
    """[K'] channels of the input, laid out against the weight operand."""
    if node.op_type == "Conv":  # [O, I/groups, *kernel]: rows of one group read one slice of the input
        groups = _flag(node, "group", 1)
        rows = np.repeat(channels.reshape(groups, -1), shape[0] // groups, axis=0)
        return rows.reshape(*rows.shape, *(1,) * (len(shape) - 2))
    if node.op_type == "ConvTranspose":
        return channels.reshape(-1, *(1,) * (len(shape) - 1))
    if len(shape) == 1 or (node.op_type == "Gemm" and _flag(node, "transB", 0)):
        return channels
    return channels[:, None]


def _outputs(node: ir.Node, shape: tuple[int, ...]) -> tuple[int, int, Channels]:
    """(how many channels it makes, their axis in the result, their layout against the weight operand)."""
    if node.op_type == "Conv":
        return shape[0], 1, np.arange(shape[0]).reshape(-1, *(1,) * (len(shape) - 1))
    if node.op_type == "ConvTranspose":  # [I, O/groups, *kernel]: group j of the inputs makes group j of the outputs
        groups = _flag(node, "group", 1)
        size = shape[1] * groups
        rows = np.repeat(np.arange(size).reshape(groups, -1), shape[0] // groups, axis=0)
        return size, 1, rows.reshape(*rows.shape, *(1,) * (len(shape) - 2))
    if node.op_type == "Gemm" and _flag(node, "transB", 0):
        return shape[0], -1, np.arange(shape[0])[:, None]
    return shape[-1], -1, np.arange(shape[-1])


def _check_operands(model: ir.Model, edits: Sequence[Edit]) -> None:
    """Raises: BlockedError where an operand is no float32 constant, or a large one that others read too."""
    nodes = {str(node.name): node for node in model.graph}
    edited = {(edit.node, edit.index): (edit.channels.tobytes(), edit.channels.shape, edit.power) for edit in edits}
    for edit in edits:
        node = nodes[edit.node]
        value = node.inputs[edit.index]
        root = None if value is None else trace(value).root
        if root is None or not is_constant(root) or root.const_value is None:
            raise BlockedError(f"input {edit.index} of {label(node)} is computed")
        if root.const_value.dtype != ir.DataType.FLOAT:
            raise BlockedError(f"input {edit.index} of {label(node)} is {root.const_value.dtype.name.lower()}")
        if root.is_graph_output():
            raise BlockedError(f"input {edit.index} of {label(node)} is also an output of the model")
        if root.const_value.size < MIN_ELEMENTS or len(root.const_value.shape) < 2:
            continue  # its copy is no larger than a bias
        key = edited[edit.node, edit.index]
        others = [other for other, index in _readers(root) if edited.get((str(other.name), index)) != key]
        if others:
            raise BlockedError(f"{label(others[0])} reads the weight '{root.name}' too, so it would be stored twice")


def _readers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Whoever reads a constant, directly or re-arranged."""
    for node, index in value.uses():
        if index == 0 and is_layout_node(node):
            yield from _readers(node.outputs[0])
        else:
            yield node, index


def _reason(value: ir.Value, refused: Mapping[str, str]) -> str:
    """Why no scale reaches a layer, seen from its input."""
    node = value.producer()
    if node is None:
        return "it reads an input of the model"
    if str(node.name) in refused:
        return refused[str(node.name)]
    if node.op_type == "Add":
        sums = [data for data in node.inputs if data is not None and not is_constant(trace(data).root)]
        return _reason(sums[0], refused) if len(sums) == 1 else f"{label(node)} adds several values"
    if not lets_through(node):
        return f"{label(node)} lets no scale through"
    found = [_reason(data, refused) for data in node.inputs if data is not None and data.producer() is not None]
    return found[-1] if found else f"nothing before {label(node)} can take a scale"
