"""Refuse broken or hostile model files with one clear sentence, before anything reads their tensors."""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx_ir.passes import common as passes

from quantkit.errors import InputError
from quantkit.graph.targets import weight_values

CHUNK = 1 << 22
"""Elements (or bytes) looked at in one go by streamed checks."""
_MAGIC = {
    b"\x89HDF": "an HDF5 file (Keras)",
    b"GGUF": "a GGUF file",
    b"\x80\x02": "a Python pickle (PyTorch)",
    b"\x1f\x8b": "a gzip archive",
    b"version https://git-lfs": "a Git LFS pointer, not the file it stands for",
}
_LATER_MAGIC = {b"ORTM": "an ORT-format model", b"TFL3": "a TensorFlow Lite model"}


@dataclass(frozen=True)
class External:
    """A tensor's place in an external data file."""

    tensor: str
    path: Path
    offset: int
    length: int


def read_proto(path: Path) -> onnx.ModelProto:
    """The model file's protobuf, external data not read."""
    if not path.exists():
        raise InputError(f"{path} does not exist: check the path of the model")
    if path.is_dir():
        raise InputError(f"{path} is a folder: give the .onnx file in it")
    if not path.is_file():
        raise InputError(f"{path} is not a regular file: give an .onnx file")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty: export or download it again")
    with path.open("rb") as file:
        head = file.read(64)
    kind = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
    kind = kind or next((kind for magic, kind in _LATER_MAGIC.items() if head[4:8] == magic), None)
    kind = kind or ("a zip archive" if head.startswith(b"PK") and zipfile.is_zipfile(path) else None)
    if kind:
        raise InputError(f"{path} is {kind}: give an ONNX model file")
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except (DecodeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is not an ONNX model, or is truncated: export or download it again") from error
    if proto.ir_version <= 0 or not (proto.graph.node or proto.graph.output):
        raise InputError(f"{path} holds no ONNX graph: export or download it again")
    return proto


def check_tensors(proto: onnx.ModelProto, folder: Path | None, where: str) -> list[External]:
    """Check every tensor's declared size against its bytes; the external ones, in order. folder None: none allowed."""
    external: list[External] = []
    for tensor in _all_tensors(proto, where):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            external.append(_external_of(tensor, folder or Path(), where))
            if folder is not None:
                check_place(external[-1], folder, where)
        else:
            _check_inline(tensor, where)
    return external


def check_external(model: ir.Model, where: str) -> None:
    """The same for the external tensors of a model in memory."""
    for tensor in _ir_tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            length = tensor.nbytes if tensor.length is None else tensor.length
            place = External(tensor.name or "", Path(tensor.path), tensor.offset or 0, length)
            if length != tensor.nbytes:
                raise InputError(_wrong_length(place, tensor.nbytes, where))
            check_place(place, Path(tensor.base_dir), where)


def check_place(place: External, folder: Path, where: str) -> None:
    """The file lies inside the folder, exists, and holds the tensor's bytes."""
    what = f"tensor '{place.tensor}' of {where}"
    if not place.path.resolve().is_relative_to(folder.resolve()):
        raise InputError(
            f"{what} has its data in '{place.path}', outside the model's folder: copy the data file beside the model"
        )
    if not place.path.is_file():
        raise InputError(f"{what} has its data in '{place.path}', which does not exist: copy it beside the model")
    status = place.path.stat()
    if status.st_nlink > 1:
        raise InputError(
            f"{what} has its data in '{place.path}', a file with several hard links: copy it beside the model"
        )
    if place.offset < 0 or place.offset + place.length > status.st_size:
        raise InputError(
            f"{what} needs bytes {place.offset} to {place.offset + place.length} of '{place.path}', "
            f"which has {status.st_size}: export or download it again"
        )


def _all_tensors(proto: onnx.ModelProto, where: str) -> Iterator[onnx.TensorProto]:
    yield from _graph_tensors(proto.graph, where)
    for function in proto.functions:
        yield from _node_tensors(function.node, where)


def _graph_tensors(graph: onnx.GraphProto, where: str) -> Iterator[onnx.TensorProto]:
    if graph.sparse_initializer:
        name = graph.sparse_initializer[0].values.name
        raise InputError(f"{where} stores '{name}' as a sparse initializer: export it again with dense weights")
    yield from graph.initializer
    yield from _node_tensors(graph.node, where)


def _node_tensors(nodes: Iterable[onnx.NodeProto], where: str) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                label = node.name or node.output[0]
                raise InputError(f"node '{label}' of {where} holds a sparse constant: export it again with dense ones")
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from _graph_tensors(attribute.g, where)
            for graph in attribute.graphs:
                yield from _graph_tensors(graph, where)


def _num_bytes(tensor: onnx.TensorProto, where: str) -> int:
    """Bytes that the declared shape and type take; sub-byte types are packed over the whole tensor."""
    if any(dim < 0 for dim in tensor.dims):
        raise InputError(f"tensor '{tensor.name}' of {where} has the shape {list(tensor.dims)}: export it again")
    try:
        bits = ir.DataType(tensor.data_type).bitwidth
    except (ValueError, TypeError) as error:
        raise InputError(
            f"tensor '{tensor.name}' of {where} has the unknown data type {tensor.data_type}: export it again"
        ) from error
    size: int = math.prod(tensor.dims) * bits
    return -(-size // 8)


def _external_of(tensor: onnx.TensorProto, folder: Path, where: str) -> External:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    what = f"tensor '{tensor.name}' of {where}"
    location = entries.get("location", "")
    if not location:
        raise InputError(f"{what} names no external data file: export it again")
    path = Path(location)
    if path.is_absolute() or ".." in path.parts or "\\" in location:
        raise InputError(
            f"{what} has its data in '{location}', outside the model's folder: copy the data file beside the model"
        )
    expected = _num_bytes(tensor, where)
    try:
        offset, length = int(entries.get("offset") or 0), int(entries.get("length") or expected)
    except ValueError as error:
        raise InputError(f"{what} has an offset or length that is no number: export it again") from error
    place = External(tensor.name, folder / path, offset, length)
    if length != expected:
        raise InputError(_wrong_length(place, expected, where))
    return place


def _wrong_length(place: External, expected: int, where: str) -> str:
    return (
        f"tensor '{place.tensor}' of {where} has {place.length} bytes in '{place.path}', "
        f"but its shape and type take {expected}: export it again"
    )


def _check_inline(tensor: onnx.TensorProto, where: str) -> None:
    if tensor.data_type == onnx.TensorProto.STRING:
        return
    expected = _num_bytes(tensor, where)
    if tensor.HasField("raw_data"):
        got = len(tensor.raw_data)
    else:  # typed fields: count elements of the types that weights have
        counts = {ir.DataType.FLOAT: len(tensor.float_data), ir.DataType.DOUBLE: len(tensor.double_data)}
        dtype = ir.DataType(tensor.data_type)
        if dtype not in counts:
            return
        got = counts[dtype] * dtype.bitwidth // 8
    if got != expected:
        raise InputError(
            f"tensor '{tensor.name}' of {where} has {got} bytes, "
            f"but its shape {list(tensor.dims)} takes {expected}: export or download it again"
        )


def check_schema(model: ir.Model, where: str) -> None:
    """ONNX's own checker, with large weights left out."""
    try:
        passes.CheckerPass()(model)
    except (onnx.checker.ValidationError, ir.passes.PassError, ir.serde.SerdeError) as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise InputError(f"{where} is not a valid ONNX model: {cause[:300]}; export it again") from error


def check_connected(model: ir.Model, where: str) -> None:
    """Every value that a node reads or the graph returns is made by something, and by one thing only."""
    _check_names(model, where)
    for graph in model.graphs():
        for node in graph:
            for value in node.inputs:
                if value is not None and not _has_origin(value):
                    label = node.name or node.op_type
                    raise InputError(
                        f"node '{label}' of {where} reads '{value.name}', which nothing makes: export it again"
                    )
        for value in graph.outputs:
            if not _has_origin(value):
                raise InputError(f"output '{value.name}' of {where} is made by nothing: export it again")


def _check_names(model: ir.Model, where: str) -> None:
    outputs = [value for node in model.graph for value in node.outputs if value.name]
    made: set[str] = set()
    for value in dict.fromkeys((*model.graph.inputs, *model.graph.initializers.values(), *outputs)):
        if value.name in made:
            raise InputError(f"value '{value.name}' of {where} is made twice: export it again")
        made.add(str(value.name))
    texts = [text for node in model.graph.all_nodes() for text in (node.name, node.op_type, node.domain)]
    texts += [value.name for node in model.graph.all_nodes() for value in (*node.inputs, *node.outputs) if value]
    if any(isinstance(text, bytes) for text in texts):
        raise InputError(f"{where} holds a name that is not UTF-8 text: export it again")


def _has_origin(value: ir.Value) -> bool:
    return value.producer() is not None or value.is_graph_input() or value.is_initializer()


def check_weights(model: ir.Model, where: str) -> None:
    """No weight or bias holds NaN or infinity. Other constants may: an attention mask of -inf is one.

    A table of Gather may hold infinity for the same reason; it is then no target.
    """
    for node, value in {value: (node, value) for node, value in weight_values(model)}.values():
        tensor = value.const_value
        if tensor is None or not tensor.dtype.is_floating_point() or tensor.dtype.bitwidth < 16:
            continue
        array = np.ravel(tensor.numpy())
        for start in range(0, array.size, CHUNK):
            block = array[start : start + CHUNK]
            if np.isnan(block).any() or (node.op_type != "Gather" and np.isinf(block).any()):
                raise InputError(
                    f"weight '{value.name}' of {where}, read by node '{node.name}', holds NaN or infinity: "
                    "repair the model before compressing it"
                )


def file_digest(path: Path, external: Iterable[External]) -> str:
    """sha256 of the model file followed by the bytes of its external tensors; file names do not enter."""
    digest = hashlib.sha256()
    _update(digest, path, 0, path.stat().st_size)
    for place in external:
        _update(digest, place.path, place.offset, place.length)
    return digest.hexdigest()


def _update(digest: Any, path: Path, offset: int, length: int) -> None:
    with path.open("rb") as file:
        file.seek(offset)
        while length > 0:
            block = file.read(min(length, CHUNK))
            digest.update(block)
            length -= len(block) or length


def measure(model: ir.Model) -> tuple[int, str]:
    """Bytes and sha256 of a model in memory, one tensor at a time."""
    digest, size = hashlib.sha256(), 0
    skeleton = model.clone()
    for graph in skeleton.graphs():
        for name, value in list(graph.initializers.items()):
            tensor = value.const_value
            if tensor is None:
                continue
            header = f"{name} {tensor.dtype} {list(tensor.shape)}".encode()
            content = tensor.numpy().astype("S") if tensor.dtype == ir.DataType.STRING else tensor.numpy()
            data = content.tobytes() if tensor.dtype == ir.DataType.STRING else tensor.tobytes()
            digest.update(header)
            digest.update(data)
            size += len(header) + len(data)
            graph.initializers.pop(name)
    rest = ir.to_proto(skeleton).SerializeToString(deterministic=True)
    digest.update(rest)
    return size + len(rest), digest.hexdigest()


def _ir_tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    yield attribute.as_tensor()
