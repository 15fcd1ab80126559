"""Open a model and bring it to the one form that everything behind expects.

Large weights stay where they are: external data is memory-mapped, and no step serialises the whole model.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from quantkit.errors import InputError
from quantkit.graph import _checks
from quantkit.graph._schema import cause_of, check_attributes, check_schema
from quantkit.graph.normalize import normalize
from quantkit.graph.targets import DTYPE_NAMES, weight_values

MIN_OPSET = 7
BROKEN = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What the passes raise on models that no operator's schema allows."""


ALREADY = (
    "this model was quantized before: figures compare with it, not with the float model that it came from; start from "
    "that one for the best result"
)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for the pass.

    Attributes:
        model: normalised; belongs to the caller.
        source: the file it came from; None for a model given in memory.
        size: bytes of the original on disk: the model file and the external data files it uses. For a model in
            memory, the bytes of its tensors and of the rest of the graph once serialised.
        digest: sha256, in hexadecimal, of the original's content, external data included.
        notes: what normalisation did that a user should know, one short sentence each.
        weight_files: external data files of the original.
    """

    model: ir.Model
    source: Path | None
    size: int
    digest: str
    notes: tuple[str, ...]
    weight_files: tuple[Path, ...] = ()


def load_model(model: str | Path | onnx.ModelProto | ir.Model, *, opset: int = 21) -> LoadedModel:
    """Open, check and normalise a model; a model given in memory is not changed.

    Args:
        model: a file, or a model in memory.
        opset: the default domain is upgraded to this version when it is older, and never downgraded.

    Raises:
        InputError: the file or its external data cannot be read or leaves the model's folder, the model is broken, a
            weight holds NaN or infinity, or an operator cannot be upgraded.
    """
    source = Path(model) if isinstance(model, (str, Path)) else None
    where = str(source) if source else "the model"
    with quiet():
        opened, size, digest = open_model(model)
        _check_versions(opened, where)
        check_attributes(opened, where)
        spare = _copy(opened, where)
        files = tuple(sorted(external_files(opened)))
        try:
            normalised, notes = normalize(opened, opset, where)
            _checks.check_weights(normalised, where)
            return LoadedModel(normalised, source, size, digest, (*notes, *_weight_notes(normalised)), files)
        except InputError:
            raise
        except BROKEN as error:
            check_schema(spare, where)  # a broken model explains itself here
            raise InputError(
                f"{where} cannot be prepared ({type(error).__name__}: {cause_of(error)}); if onnxruntime runs it, "
                "simplify it, for instance with onnxscript's optimizer, and try again"
            ) from error


def open_model(model: object) -> tuple[ir.Model, int, str]:
    """The model as it is, the bytes of its original and their digest; a model given in memory is not changed.

    Raises:
        InputError: the file or its external data cannot be read or leaves the model's folder, or the model is broken.
    """
    if isinstance(model, (str, Path)):
        return _open_file(Path(model))
    if isinstance(model, onnx.ModelProto):
        return _open_proto(model)
    if isinstance(model, ir.Model):
        return _open_ir(model)
    raise InputError(f"a model is a path, an onnx.ModelProto or an onnx_ir.Model, got {type(model).__name__}")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the passes' own remarks off the console: what matters becomes a note or an error."""
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        # NaN and infinity of a broken model show in its weights afterwards.
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def data_files(path: Path) -> set[Path]:
    """The files beside a model's file that hold its weights, and no weight read."""
    model = ir.from_proto(_checks.read_proto(path))
    ir.external_data.set_base_dir(model.graph, path.parent)
    return external_files(model)


def external_files(model: ir.Model) -> set[Path]:
    """The files beside a model that hold its weights."""
    return {
        Path(value.const_value.path)
        for graph in model.graphs()
        for value in graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }


def _weight_notes(model: ir.Model) -> list[str]:
    """Properties of the weights that keep the pass from them."""
    notes = [ALREADY] if "quantkit.plan" in model.metadata_props else []
    overridable = sum(value.is_initializer() for value in model.graph.inputs)
    if overridable:
        notes.append(
            f"{overridable} initializers are also inputs, so a caller may override them: they stay as they are"
        )
    weights = {value.name: value.dtype for _, value in weight_values(model)}
    for dtype, name in DTYPE_NAMES.items():
        count = sum(found == dtype for found in weights.values())
        if count:
            notes.append(f"{count} weights are {name}: only float32 weights are compressed")
    return notes


def _open_file(path: Path) -> tuple[ir.Model, int, str]:
    proto = _checks.read_proto(path)
    external = _checks.check_tensors(proto, path.parent, str(path))
    model = _to_ir(proto, str(path))
    ir.external_data.set_base_dir(model.graph, path.parent)
    for function in model.functions.values():
        ir.external_data.set_base_dir(function.graph, path.parent)
    files = sorted({path, *(tensor.path for tensor in external)})
    size = sum({file.resolve(): file.stat().st_size for file in files}.values())
    return model, size, _checks.file_digest(path, external)


def _open_proto(proto: onnx.ModelProto) -> tuple[ir.Model, int, str]:
    if _checks.check_tensors(proto, None, "the model"):
        raise InputError("the model in memory refers to external data files: give load_model the path of its file")
    model = _to_ir(proto, "the model")
    _isolate(model)
    return model, *_checks.measure(model)


def _open_ir(original: ir.Model) -> tuple[ir.Model, int, str]:
    _checks.check_connected(original, "the model")
    model = _copy(original, "the model")
    for value in _values(model):
        if isinstance(value.type, ir.TensorType):  # a clone shares its types with the original, and they are mutable
            value.type = ir.TensorType(value.type.dtype)
    _isolate(model)
    _checks.check_external(model, "the model")
    return model, *_checks.measure(model)


def _copy(model: ir.Model, where: str) -> ir.Model:
    try:
        return model.clone()
    except RuntimeError as error:
        raise InputError(f"the nodes of {where} are not in order: sort them, each after what it reads") from error


def _to_ir(proto: onnx.ModelProto, where: str) -> ir.Model:
    try:
        model = ir.from_proto(proto)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, NotImplementedError) as error:
        raise InputError(f"{where} is not a valid ONNX model: {cause_of(error)}; export it again") from error
    _checks.check_connected(model, where)
    try:
        passes.TopologicalSortPass()(model)
    except ValueError as error:
        raise InputError(f"the nodes of {where} form a cycle: export it again") from error
    return model


def _isolate(model: ir.Model) -> None:
    """Give the model its own tensor objects, because renaming a value renames its tensor; the bytes stay shared."""
    for graph in (*model.graphs(), *(function.graph for function in model.functions.values())):
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = _own(value.const_value)
        for node in graph:
            for attribute in list(node.attributes.values()):
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    own = ir.AttrTensor(attribute.name, _own(attribute.as_tensor()))
                    node.attributes[attribute.name] = own


def _own(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if isinstance(tensor, ir.ExternalTensor):
        return ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name,
            base_dir=tensor.base_dir,
        )
    if tensor.dtype == ir.DataType.STRING:
        return ir.StringTensor(tensor.numpy(), shape=ir.Shape(tensor.shape.numpy()), name=tensor.name)
    return ir.LazyTensor(lambda: tensor, tensor.dtype, ir.Shape(tensor.shape.numpy()), name=tensor.name)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


def _check_versions(model: ir.Model, where: str) -> None:
    if "ai.onnx" in model.opset_imports:  # the long spelling of the default domain
        model.opset_imports.setdefault("", model.opset_imports.pop("ai.onnx"))
    if model.ir_version < 3:
        raise InputError(f"{where} has IR version {model.ir_version}, older than 3: export it again")
    version = model.opset_imports.get("")
    if version is None:
        if all(node.domain for node in model.graph.all_nodes()):
            model.opset_imports[""] = MIN_OPSET  # nothing to upgrade
            return
        raise InputError(f"{where} imports no opset of the default ONNX domain: export it again")
    latest = onnx.defs.onnx_opset_version()
    if version > latest:
        raise InputError(f"{where} has opset {version}, but the installed onnx knows none after {latest}: update onnx")
    if version < MIN_OPSET:
        raise InputError(f"{where} has opset {version}, older than {MIN_OPSET}: export it again with a newer opset")
