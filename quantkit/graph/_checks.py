"""Refuse broken or hostile model files with one clear sentence, before anything reads their tensors."""

from __future__ import annotations

import hashlib
import math
import stat
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from quantkit.errors import InputError
from quantkit.graph.targets import weight_values

CHUNK = 1 << 22
"""Elements (or bytes) looked at in one go by streamed checks."""
LARGEST_PROTO = (1 << 31) - 1
"""Bytes of the largest protobuf."""
MOST_OVERLAP = 16
"""How many times its size all tensors together may read of an external data file; tied weights read a part twice."""
PATH_LENGTH = 200
"""Characters of a path from inside the model that an error repeats."""
_MAGIC = {
    b"\x89HDF": "an HDF5 file (Keras)",
    b"GGUF": "a GGUF file",
    b"\x80\x02": "a Python pickle (PyTorch)",
    b"\x1f\x8b": "a gzip archive",
    b"version https://git-lfs": "a Git LFS pointer, not the file it stands for",
}
_LATER_MAGIC = {b"ORTM": "an ORT-format model", b"TFL3": "a TensorFlow Lite model"}


_FIELDS = {
    ir.DataType.STRING: "string_data",
    ir.DataType.INT64: "int64_data",
    **dict.fromkeys((ir.DataType.UINT32, ir.DataType.UINT64), "uint64_data"),
    **dict.fromkeys((ir.DataType.FLOAT, ir.DataType.COMPLEX64), "float_data"),
    **dict.fromkeys((ir.DataType.DOUBLE, ir.DataType.COMPLEX128), "double_data"),
}
"""Data type -> the field of a tensor whose elements are no raw bytes; `int32_data` for all others."""

_ENTRY_BITS = {
    ir.DataType.COMPLEX64: 32,
    ir.DataType.COMPLEX128: 64,
    **dict.fromkeys((ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.FLOAT4E2M1), 8),
    **dict.fromkeys((ir.DataType.INT2, ir.DataType.UINT2), 8),
}
"""What one entry of that field holds, where it is not one element."""
_GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


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
    size = path.stat().st_size
    if size == 0:
        raise InputError(f"{path} is empty: export or download it again")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; check who may read it") from error
    kind = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
    kind = kind or next((kind for magic, kind in _LATER_MAGIC.items() if head[4:8] == magic), None)
    kind = kind or ("a zip archive" if head.startswith(b"PK") and zipfile.is_zipfile(path) else None)
    if kind:
        raise InputError(f"{path} is {kind}: give an ONNX model file")
    if size > LARGEST_PROTO:
        raise InputError(
            f"{path} has {size} bytes, but an ONNX file has at most {LARGEST_PROTO}: keep its weights apart"
        )
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
    try:
        for tensor in _all_tensors(proto, where):
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                external.append(_external_of(tensor, folder or Path(), where))
                if folder is not None:
                    check_place(external[-1], folder, where)
            else:
                _check_inline(tensor, where)
    except RecursionError as error:
        raise InputError(f"{where} nests its subgraphs too deeply: export it again") from error
    if folder is not None:
        _check_overlap(external, where)
    return external


def _check_overlap(external: Iterable[External], where: str) -> None:
    """The tensors of a file together are not many times the file: few bytes would otherwise stand for endless work."""
    lengths: dict[Path, int] = {}
    for place in external:
        lengths[place.path] = lengths.get(place.path, 0) + place.length
    for path, length in lengths.items():
        if length > MOST_OVERLAP * path.stat().st_size:
            raise InputError(
                f"the tensors of {where} overlap in '{path}': they read {length} bytes of a file of "
                f"{path.stat().st_size}: export it again"
            )


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
    shown = str(place.path) if len(str(place.path)) <= PATH_LENGTH else f"{str(place.path)[:PATH_LENGTH]}..."
    try:
        inside = place.path.resolve().is_relative_to(folder.resolve())
        status = place.path.stat() if inside and place.path.exists() else None
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a circle of links, a zero byte
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise InputError(
            f"{what} has its data in {shown!r}, which cannot be opened ({reason}): export it again"
        ) from error
    if not inside:
        raise InputError(
            f"{what} has its data in '{shown}', outside the model's folder: copy the data file beside the model"
        )
    if status is None:
        raise InputError(f"{what} has its data in '{shown}', which does not exist: copy it beside the model")
    if not stat.S_ISREG(status.st_mode):
        raise InputError(
            f"{what} has its data in '{shown}', which is no regular file: copy the data file beside the model"
        )
    if status.st_nlink > 1:
        raise InputError(f"{what} has its data in '{shown}', a file with several hard links: copy it beside the model")
    if place.offset < 0 or place.offset + place.length > status.st_size:
        raise InputError(
            f"{what} needs bytes {place.offset} to {place.offset + place.length} of '{shown}', "
            f"which has {status.st_size}: export or download it again"
        )


def _all_tensors(proto: onnx.ModelProto, where: str) -> Iterator[onnx.TensorProto]:
    yield from _graph_tensors(proto.graph, where)
    for function in proto.functions:
        yield from _node_tensors(function.node, where, inside=True)


def _graph_tensors(graph: onnx.GraphProto, where: str, inside: bool = False) -> Iterator[onnx.TensorProto]:
    if graph.sparse_initializer:
        name = graph.sparse_initializer[0].values.name
        raise InputError(f"{where} stores '{name}' as a sparse initializer: export it again with dense weights")
    twice = [name for name, count in Counter(tensor.name for tensor in graph.initializer).items() if count > 1]
    if twice:
        raise InputError(f"initializer '{twice[0]}' of {where} is there twice: export it again")
    yield from graph.initializer
    yield from _node_tensors(graph.node, where, inside)


def _node_tensors(nodes: Iterable[onnx.NodeProto], where: str, inside: bool = False) -> Iterator[onnx.TensorProto]:
    """Of these nodes and their subgraphs; `inside` a function, attributes may be the function's."""
    for node in nodes:
        label = node.name or (node.output[0] if node.output else node.op_type)
        for attribute in node.attribute:
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                raise InputError(f"node '{label}' of {where} holds a sparse constant: export it again with dense ones")
            if attribute.ref_attr_name and (not inside or attribute.type in _GRAPHS):
                raise InputError(
                    f"node '{label}' of {where} takes its attribute '{attribute.name}' from a function that is not "
                    "there: export it again"
                )
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from _graph_tensors(attribute.g, where, inside)
            for graph in attribute.graphs:
                yield from _graph_tensors(graph, where, inside)


def _num_elements(tensor: onnx.TensorProto, where: str) -> int:
    if any(dim < 0 for dim in tensor.dims):
        raise InputError(f"tensor '{tensor.name}' of {where} has the shape {list(tensor.dims)}: export it again")
    return math.prod(tensor.dims)


def _num_bytes(tensor: onnx.TensorProto, where: str) -> int:
    """Bytes that the declared shape and type take; sub-byte types are packed over the whole tensor."""
    elements = _num_elements(tensor, where)
    try:
        bits = ir.DataType(tensor.data_type).bitwidth
    except (ValueError, TypeError) as error:
        raise InputError(
            f"tensor '{tensor.name}' of {where} has the unknown data type {tensor.data_type}: export it again"
        ) from error
    return -(-elements * bits // 8)


def _external_of(tensor: onnx.TensorProto, folder: Path, where: str) -> External:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    what = f"tensor '{tensor.name}' of {where}"
    location = entries.get("location", "")
    if not location:
        raise InputError(f"{what} names no external data file: export it again")
    if not isinstance(location, str):
        raise InputError(f"{what} has its data in {location!r}, which is not UTF-8 text: export it again")
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
    """The elements that the shape promises are there: readers make up zeros for a tensor without any."""
    what = f"tensor '{tensor.name}' of {where}"
    is_text = tensor.data_type == onnx.TensorProto.STRING
    expected = _num_elements(tensor, where) if is_text else _num_bytes(tensor, where)
    if tensor.HasField("raw_data") and not is_text:
        got, unit = len(tensor.raw_data), "bytes"
    else:
        dtype, unit = ir.DataType(tensor.data_type), "elements"
        field = _FIELDS.get(dtype, "int32_data")
        filled = [name for name in sorted({*_FIELDS.values(), "int32_data"}) if name != field and getattr(tensor, name)]
        if filled or (is_text and tensor.HasField("raw_data")):
            raise InputError(
                f"{what} keeps its elements in {filled[0] if filled else 'raw_data'}, which is not for the type "
                f"{dtype.name.lower()}: export it again"
            )
        got = len(getattr(tensor, field))
        if not is_text:
            unit = "bytes"
            got = -(-got * _ENTRY_BITS.get(dtype, dtype.bitwidth) // 8)
    if got != expected:
        raise InputError(
            f"{what} has {got} {unit}, but its shape {list(tensor.dims)} takes {expected}: export or download it again"
        )


def check_connected(model: ir.Model, where: str) -> None:
    """Every value that a node reads or the graph returns is made by something, and by one thing only."""
    _check_names(model, where)
    for graph in (*model.graphs(), *(function.graph for function in model.functions.values())):
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
    nodes = list(model.graph.all_nodes())
    texts = [text for node in nodes for text in (node.name, node.op_type, node.domain)]
    texts += [value.name for node in nodes for value in (*node.inputs, *node.outputs) if value]
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
