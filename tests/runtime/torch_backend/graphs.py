"""Graphs of several nodes, with functions of their own, for tests of the module around the converters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh

FLOAT, INT64, BOOL, INT4 = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.INT64,
    onnx.TensorProto.BOOL,
    onnx.TensorProto.INT4,
)


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    constants: Mapping[str, Any] | None = None,
    opset: int = 21,
    functions: Sequence[onnx.FunctionProto] | None = None,
) -> onnx.ModelProto:
    tensors = [nh.from_array(np.asarray(item), name) for name, item in (constants or {}).items()]
    graph = oh.make_graph(nodes, "g", inputs, outputs, tensors)
    imports = [oh.make_opsetid("", opset), oh.make_opsetid("local", 1)]
    return oh.make_model(graph, opset_imports=imports, ir_version=10, functions=functions or [])


def value(name: str, shape: list[int | str] | None = None, kind: int = FLOAT) -> onnx.ValueInfoProto:
    return oh.make_tensor_value_info(name, kind, shape)


def function_of(
    name: str, inputs: list[str], outputs: list[str], nodes: list[onnx.NodeProto], attributes: list[str] | None = None
) -> onnx.FunctionProto:
    """In the domain "local"."""
    imports = [oh.make_opsetid("", 21), oh.make_opsetid("local", 1)]
    return oh.make_function("local", name, inputs, outputs, nodes, imports, attributes or [])
