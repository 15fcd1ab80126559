"""The passes that bring an opened model to one form: current opset, no training leftovers, no foldable constants."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from graphlib import CycleError, TopologicalSorter

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript import optimizer

from quantkit.errors import InputError
from quantkit.graph._fold import fold_layers
from quantkit.graph._schema import cause_of, find_schema
from quantkit.graph._trace import LAYOUT_OPERATORS
from quantkit.graph._upgrade import BlockedError, upgrade

LARGE = 1 << 20
"""Bytes from which a weight is not copied only to re-arrange it: `find_targets` sees through layout operators."""
SMALL_OUTPUT = 8192
"""Elements up to which folding may make a constant larger than what it replaces."""
SHRINKING = frozenset({"Compress", "NonZero", "Unique"})
"""Operators whose results have a size that depends on the data, and at most a few times theirs."""
MOST_NODES = 1 << 20
"""Nodes of the largest model that functions may stand for."""
SMALL_DATA = 1024
"""Elements up to which a constant is shown to inference, which reads target shapes from it."""
INFERENCE_ERRORS = (
    *(RuntimeError, ValueError, TypeError, ir.serde.SerdeError),
    *(onnx.checker.ValidationError, onnx.shape_inference.InferenceError),
)
FALLBACK_OPSET = 13
"""A model at least this new is usable as it is when its upgrade fails."""


def normalize(model: ir.Model, opset: int, where: str) -> tuple[ir.Model, list[str]]:
    """The normalised model (the one given is used up) and what was done to it, for the user."""
    notes: list[str] = []
    if model.ir_version < 4:
        count = len(model.graph.inputs)
        passes.RemoveInitializersFromInputsPass()(model)
        if count > len(model.graph.inputs):
            notes.append(f"made {count - len(model.graph.inputs)} initializers constants that were listed as inputs")
    _inline(model, where, notes)
    _strip(model)
    declared = {
        value.name: (None if value.shape is None else value.shape.copy(), value.dtype)
        for value in (*model.graph.inputs, *model.graph.outputs)
    }
    _lift(model)
    infer_shapes(model)
    model = _upgrade(model, opset, where, notes)
    model.ir_version = max(model.ir_version, 4)  # from 4 on, initializers need not be inputs
    _lift(model)
    infer_shapes(model)
    before = Counter(node.op_type for node in model.graph.all_nodes())
    model = _fold_constants(model, notes)
    notes += fold_layers(model)
    _tidy(model)
    after = Counter(node.op_type for node in model.graph.all_nodes())
    notes += [f"removed {before[op] - after[op]} {op}" for op in ("Dropout", "Identity") if before[op] > after[op]]
    infer_shapes(model)
    for value in (*model.graph.inputs, *model.graph.outputs):
        shape, dtype = declared[value.name]
        value.shape = value.shape if shape is None else shape
        if dtype is not None and value.dtype != dtype:
            value.dtype = dtype
    return model, notes


def infer_shapes(model: ir.Model) -> None:
    """Fill in what can be known; a model that defeats inference keeps what it has."""
    passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)


def _inline(model: ir.Model, where: str, notes: list[str]) -> None:
    if not model.functions:
        return
    count = len(model.functions)
    _check_growth(model, where)
    try:
        passes.InlinePass()(model)
    except (ValueError, ir.passes.PassError, ir.passes.PreconditionError) as error:
        raise InputError(
            f"a function of {where} cannot be inlined: {cause_of(error)}; export the model without it"
        ) from error
    model.functions.clear()
    notes.append(f"inlined {count} model-local function{'s' if count > 1 else ''}")


def _check_growth(model: ir.Model, where: str) -> None:
    """Functions that call each other twice, and so on, would inline to more nodes than fit anywhere."""
    calls = {
        name: Counter(node.op_identifier() for node in function.all_nodes())
        for name, function in model.functions.items()
    }
    try:
        order = list(TopologicalSorter({key: set(count) & set(calls) for key, count in calls.items()}).static_order())
    except CycleError:
        return  # the inlining tells
    sizes: dict[ir.OperatorIdentifier, int] = {}
    for key in order:
        sizes[key] = sum(number * sizes.get(called, 1) for called, number in calls[key].items())
    total = sum(sizes.get(node.op_identifier(), 1) for node in model.graph.all_nodes())
    if total > MOST_NODES:
        raise InputError(
            f"the functions of {where} stand for {total} nodes once inlined, more than {MOST_NODES}: "
            "export the model without functions"
        )


def _upgrade(model: ir.Model, opset: int, where: str, notes: list[str]) -> ir.Model:
    current = model.opset_imports[""]
    if current >= opset:
        return model
    candidate = model.clone()
    try:
        upgrade(candidate, opset)
    except BlockedError as blocked:
        if current < FALLBACK_OPSET:
            raise InputError(
                f"{where} cannot be upgraded from opset {current} to {opset}: {blocked}; export it again with opset "
                f"{FALLBACK_OPSET} or newer"
            ) from blocked
        notes.append(f"kept at opset {current}: {blocked}")
        return model
    notes.append(f"upgraded opset {current} -> {opset}")
    return candidate


def _lift(model: ir.Model) -> None:
    """All constants become initializers of the outermost graph; every node and value has its own name."""
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.LiftSubgraphInitializersToMainGraphPass()(model)
    name_nodes(model)
    passes.NameFixPass()(model)


def _fold_constants(model: ir.Model, notes: list[str]) -> ir.Model:
    """Fold what depends on constants alone; also drops Dropout and Identity (onnxscript)."""
    candidate = model.clone()
    try:
        optimizer.fold_constants(
            candidate,
            onnx_shape_inference=True,
            input_size_limit=1 << 62,
            output_size_limit=SMALL_OUTPUT,
            should_fold=partial(_should_fold, version=candidate.opset_imports.get("", 1)),
        )
    except (RuntimeError, ValueError) as error:
        notes.append(f"constants not folded: {' '.join(str(error).split())}")
        return model
    passes.RemoveUnusedNodesPass()(candidate)
    return candidate


def _should_fold(node: ir.Node, version: int) -> bool | None:
    """False for layout operators on large weights, and where the result may be large, which shows only once it is made.

    None leaves the decision to the folder's own rules.
    """
    tensors = {value.name: value.const_value for value in node.inputs if value is not None and value.const_value}
    if node.op_type in LAYOUT_OPERATORS:
        return False if any(tensor.nbytes >= LARGE for tensor in list(tensors.values())[:1]) else None
    if node.op_type in SHRINKING or node.domain not in ("", "ai.onnx"):
        return None
    size = _result_size(node, tensors, version)
    largest = max(SMALL_OUTPUT, sum(tensor.size for tensor in tensors.values()))
    return None if size is not None and size <= largest else False


def _result_size(node: ir.Node, tensors: Mapping[str | None, ir.TensorProtocol], version: int) -> int | None:
    """Elements of what a node makes of constants; None when inference cannot tell. Shapes in the file may be wrong."""
    schema = find_schema(node.op_type, version)
    if schema is None:
        return None
    types, data = {}, {}
    for name, tensor in tensors.items():
        types[name] = ir.serde.serialize_type(ir.TensorType(tensor.dtype))
        ir.serde.serialize_shape_into(types[name], ir.Shape(tensor.shape.numpy()))
        if tensor.size <= SMALL_DATA:
            data[name] = ir.serde.serialize_tensor(tensor)
    try:
        made = onnx.shape_inference.infer_node_outputs(schema, ir.serde.serialize_node(node), types, data)  # type: ignore[arg-type]
    except INFERENCE_ERRORS:
        return None
    total = 0
    for kind in made.values():
        dims = kind.tensor_type.shape.dim
        if not kind.tensor_type.HasField("shape") or not all(dim.HasField("dim_value") for dim in dims):
            return None
        total += math.prod(dim.dim_value for dim in dims)
    return total if len(made) == len(node.outputs) else None


def _tidy(model: ir.Model) -> None:
    steps: tuple[Callable[[ir.Model], object], ...] = (
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedOpsetsPass(),
        _lift,
        _straighten,
        passes.DeduplicateHashedInitializersPass(),
        passes.RemoveUnusedNodesPass(),
        _strip,
    )
    for step in steps:
        step(model)


def _straighten(model: ir.Model) -> None:
    """Folding a Transpose leaves a strided array, which the deduplication cannot hash."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.Tensor):
            array = value.const_value.numpy()
            if not array.flags.c_contiguous:
                value.const_value = ir.tensor(
                    np.ascontiguousarray(array), dtype=value.const_value.dtype, name=value.name
                )


def name_nodes(model: ir.Model) -> None:
    """Every node gets a name that no other node of the model has; one without is called after what it makes."""
    taken: set[str] = set()
    tried: Counter[str] = Counter()
    unnamed: list[ir.Node] = []
    for node in model.graph.all_nodes():
        if node.name and node.name not in taken:
            taken.add(node.name)
        else:
            unnamed.append(node)
    for node in unnamed:
        made = next((value.name for value in node.outputs if value.name), "")
        base = node.name or f"{node.op_type}/{made}"
        name = base
        while name in taken:
            tried[base] += 1
            name = f"{base}_{tried[base] + 1}"
        node.name = name
        taken.add(name)


def _strip(model: ir.Model) -> None:
    """Drop doc strings and exporters' notes to themselves, which can be half a megabyte."""
    for graph in model.graphs():
        graph.doc_string = None
        _drop_exporter_keys(graph.metadata_props)
        for value in (*graph.inputs, *graph.initializers.values()):
            value.doc_string = None
            _drop_exporter_keys(value.metadata_props)
        for node in graph:
            node.doc_string = None
            _drop_exporter_keys(node.metadata_props)
            for value in node.outputs:
                value.doc_string = None
                _drop_exporter_keys(value.metadata_props)


def _drop_exporter_keys(properties: dict[str, str]) -> None:
    # `namespace` is torch's: the module path again, on every node; 4 % of a small network at 4 bits.
    for key in [key for key in properties if key.startswith("pkg.") or key == "namespace"]:
        del properties[key]
