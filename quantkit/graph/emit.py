"""Splice quantized weights into a copy of the model: the emitted graph, its simulation, and the file.

`emit` writes what ships. `simulate` writes what the plan promises, in float operators only: weights as the oracle
dequantizes them, activations rounded where the plan says. The two share the placement of activation pairs and nothing
else, so that comparing them finds every mistake of packing, unpacking and kernels.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common as passes

from quantkit.emitters._builder import Builder, Spill
from quantkit.files import final_path, scratch_folder, sync
from quantkit.graph.bias import shift_biases
from quantkit.graph.regions import Regions, insert_pairs
from quantkit.graph.targets import find_targets
from quantkit.methods import make
from quantkit.runtime.ort import PROTOBUF_LIMIT, inline_bytes
from quantkit.types import ActParams, Emitter, FloatArray, QuantizedWeight, Target

UNNAMED = frozenset({"", "None"})
PAGE = 4096
"""Large tensors begin at a multiple of this in an external data file, so that every system can map them."""


@dataclass(frozen=True)
class Assignment:
    """One layer as it will be written.

    Attributes:
        form: emitter's file name.
        weight: what it writes.
    """

    form: str
    weight: QuantizedWeight


@dataclass(frozen=True)
class Emission:
    """Everything that decides the emitted bytes.

    Attributes:
        layers: target name -> how it is written; an absent target stays float.
        regions: the integer part of the graph, for the layers of the form `qdq`.
        activations: group name -> scale and zero point.
        runtime: `ort-cpu` or `portable`.
        bias_shifts: target name -> [N] added to its bias (bias correction).
    """

    layers: Mapping[str, Assignment]
    regions: Regions
    activations: Mapping[str, ActParams]
    runtime: str
    bias_shifts: Mapping[str, FloatArray] = field(default_factory=dict)


def emitter(form: str) -> Emitter:
    made: Emitter = make("emitters", form, {})
    return made


@dataclass(frozen=True)
class Edge:
    """Where one use of a layer begins and ends, by name; the same in the emitted and the simulated graph.

    Attributes:
        data: the value that the layer reads.
        dtype: of that value.
        output: the value that it makes.
    """

    data: str
    dtype: ir.DataType
    output: str


@dataclass(frozen=True)
class Emitted:
    """The graph that ships.

    Attributes:
        model: it.
        names: target name -> names of the nodes and values that carry the layer, to find its kernel again.
        edges: target name -> its uses in the main graph.
    """

    model: ir.Model
    names: Mapping[str, frozenset[str]]
    edges: Mapping[str, tuple[Edge, ...]]


def emit(model: ir.Model, emission: Emission, spill: Spill | None = None) -> Emitted:
    """A copy of the model with every assigned layer in its form.

    Args:
        spill: see Builder.
    """
    copy, targets, builder = _prepare(model, emission, spill)
    edges = {name: _edges(copy, targets[name]) for name in emission.layers}
    names: dict[str, frozenset[str]] = {}
    for name, assignment in emission.layers.items():
        target = targets[name]
        carriers = {str(use.node.name) for use in target.uses} | {str(use.node.outputs[0].name) for use in target.uses}
        builder.start_trace()
        emitter(assignment.form).emit(builder, target, assignment.weight)
        names[name] = frozenset((carriers | builder.trace()) - UNNAMED)
    for name, target in targets.items():
        if name not in emission.layers:
            names[name] = frozenset({str(use.node.name) for use in target.uses} | {str(target.weight.name)}) - UNNAMED
    return Emitted(_finish(copy, model), names, edges)


def _edges(model: ir.Model, target: Target) -> tuple[Edge, ...]:
    """Of an LSTM that gives its last state only, the first output has no name."""
    edges = []
    for use in target.uses:
        made = next((str(value.name) for value in use.node.outputs if value.name), None)
        if made is not None and use.node.graph is model.graph:
            edges.append(Edge(str(use.data.name), use.data.dtype or ir.DataType.FLOAT, made))
    return tuple(edges)


def simulate(model: ir.Model, emission: Emission, spill: Spill | None = None) -> ir.Model:
    """A copy of the model that computes what the plan promises, in float32 operators; the arguments are those of
    `emit`."""
    copy, targets, builder = _prepare(model, emission, spill)
    for name, assignment in emission.layers.items():
        emitter(assignment.form).simulate(builder, targets[name], assignment.weight)
    return _finish(copy, model)


def _prepare(model: ir.Model, emission: Emission, spill: Spill | None) -> tuple[ir.Model, dict[str, Target], Builder]:
    copy = model.clone()
    targets, _ = find_targets(copy)
    builder = Builder(copy, emission.runtime, spill)
    shift_biases(targets, emission.bias_shifts, builder.const)
    if emission.regions.groups:
        insert_pairs(copy, emission.regions, emission.activations, builder.const)
    return copy, targets, builder


def _finish(model: ir.Model, original: ir.Model) -> ir.Model:
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    passes.RemoveUnusedOpsetsPass()(model)
    for function in model.functions.values():
        model.opset_imports.setdefault(function.domain, 1)
    _drop_notes(model, original)
    return model


def _drop_notes(model: ir.Model, original: ir.Model) -> None:
    """Forget what runtimes infer again, and made-up names of new nodes: much of a small file is such notes."""
    named = {node.name for graph in original.graphs() for node in graph}
    for graph in model.graphs():
        for value in graph.initializers.values():
            if not value.is_graph_input() and not value.is_graph_output():
                value.shape, value.type = None, None
        for node in graph:
            if node.name not in named:
                node.name = None
            for value in node.outputs:
                if not value.is_graph_output():
                    value.shape, value.type = None, None


def file_size(path: Path) -> int:
    """Bytes of a saved model with its external data."""
    data = path.with_name(path.name + ".data")
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)


def serialized_size(model: ir.Model) -> int:
    """Bytes that `save` will write, without writing them (within a page per tensor when data is external)."""
    if inline_bytes(model) > PROTOBUF_LIMIT:
        return inline_bytes(model)
    return int(ir.to_proto(in_memory(model)).ByteSize())


def save(model: ir.Model, path: Path, own: Path | None = None, *, durable: bool = True) -> None:
    """Write the model so that `path` is always a whole file: hidden folder beside it, fsync, rename.

    Weights beyond the protobuf limit go to `path.data`, streamed; smaller models are one file, also when the original
    keeps its weights in another.

    Args:
        own: a folder of ours: a data file in it that holds all the weights is copied as it is.
        durable: wait until the files are on the disk.

    Raises:
        InputError: the path is a folder or a device.
        OSError: the folder cannot be written or the disk is full; nothing is left under the final name.
    """
    path = final_path(path)
    data_name = path.name + ".data"
    try:
        with scratch_folder(path) as folder:
            if own is not None and (data := _data_file(model, own)) is not None:
                shutil.copyfile(data, folder / data_name)  # not linked: onnx refuses files with two names
                ir.save(_moved(model, folder, data_name), folder / path.name)
            elif inline_bytes(model) > PROTOBUF_LIMIT:
                ir.save(model.clone(), folder / path.name, external_data=data_name, alignment=PAGE)
            else:
                content = ir.to_proto(in_memory(model)).SerializeToString(deterministic=True)
                (folder / path.name).write_bytes(content)
            written = [folder / name for name in (data_name, path.name) if (folder / name).exists()]
            for file in written if durable else ():
                sync(file)
            if len(written) > 1:  # an older model under this name would now read the new weights
                path.unlink(missing_ok=True)
            for file in written:  # the model last: with it the file is complete
                file.replace(path.with_name(file.name))
            if durable:
                sync(path.parent)
    except OSError as error:
        if error.filename is None:  # a full disk does not say where
            error.filename = str(path)
        raise


def _data_file(model: ir.Model, folder: Path) -> Path | None:
    """The one file, in this folder, that holds every weight outside the graph."""
    files = {Path(tensor.path).resolve() for tensor in _external(model)}
    if len(files) != 1 or inline_bytes(model, external=False) > PROTOBUF_LIMIT:
        return None
    file = files.pop()
    return file if file.parent == folder.resolve() else None


def _external(model: ir.Model) -> list[ir.ExternalTensor]:
    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    return [tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]


def _moved(model: ir.Model, folder: Path, name: str) -> ir.Model:
    """The same graph with its external weights in the file of this name."""
    copy = model.clone()
    for graph in copy.graphs():
        for value in graph.initializers.values():
            old = value.const_value
            if isinstance(old, ir.ExternalTensor):
                place = (name, old.offset, old.length, old.dtype)
                value.const_value = ir.ExternalTensor(*place, shape=old.shape, name=old.name, base_dir=folder)
    return copy


def without_notes(model: ir.Model) -> ir.Model:
    """The model itself, its initializers without what reading a file has noted on them and saving would write again."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if not value.is_graph_input() and not value.is_graph_output():
                value.shape, value.type = None, None
    return model


def in_memory(model: ir.Model) -> ir.Model:
    """The model with all weights in memory; itself when they are."""
    if not _external(model):
        return model
    return ir.external_data.load_to_model(model.clone())
