"""Models of one node, and what onnxruntime makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import onnxruntime
import torch

from quantkit.runtime.torch_backend import TorchModule, to_torch

MICROSOFT = "com.microsoft"


def single(
    op: str,
    inputs: Mapping[str, Any],
    attributes: Mapping[str, Any] | None = None,
    *,
    opset: int = 23,
    domain: str = "",
    outputs: int | Sequence[int] = 1,
    constants: Sequence[str] = (),
) -> onnx.ModelProto:
    """One node; what is given as a TensorProto or named in `constants` becomes an initializer, None an absent input.

    Args:
        outputs: how many, or the element type of each.
    """
    values, initializers, names = [], [], []
    for name, item in inputs.items():
        names.append("" if item is None else name)
        if item is None:
            continue
        if isinstance(item, onnx.TensorProto) or name in constants:
            tensor = onnx.TensorProto()
            tensor.CopyFrom(item if isinstance(item, onnx.TensorProto) else nh.from_array(np.asarray(item)))
            tensor.name = name
            initializers.append(tensor)
        else:
            array = np.asarray(item)
            kind = oh.np_dtype_to_tensor_dtype(array.dtype)
            values.append(oh.make_tensor_value_info(name, kind, array.shape))
    if isinstance(outputs, int):
        results = [onnx.ValueInfoProto(name=f"y{place}") for place in range(outputs)]
    else:
        results = [oh.make_tensor_value_info(f"y{place}", kind, None) for place, kind in enumerate(outputs)]
    node = oh.make_node(op, names, [item.name for item in results], name="node", domain=domain, **(attributes or {}))
    graph = oh.make_graph([node], "g", values, results, initializers)
    imports = [oh.make_opsetid("", opset), oh.make_opsetid(MICROSOFT, 1)]
    return oh.make_model(graph, opset_imports=imports, ir_version=13 if opset > 23 else 10)


def feed_of(model: onnx.ModelProto, inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {value.name: np.asarray(inputs[value.name]) for value in model.graph.input}


def in_torch(model: onnx.ModelProto, inputs: Mapping[str, Any], **options: Any) -> list[Any]:
    """Outputs as torch gives them, without gradients."""
    module: TorchModule = to_torch(model, **options)
    with torch.no_grad():
        found = module(**{name: torch.from_numpy(item) for name, item in feed_of(model, inputs).items()})
    return [item.numpy() for item in (found if isinstance(found, tuple) else (found,))]


def in_onnxruntime(model: onnx.ModelProto, inputs: Mapping[str, Any]) -> list[Any]:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    found: list[Any] = session.run(None, feed_of(model, inputs))
    return found


def shapes_elsewhere(model: onnx.ModelProto, inputs: Mapping[str, Any]) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """Element types and shapes on a device that has no data: nothing may be read back, nothing made on the CPU."""
    module = to_torch(model).to("meta")
    with torch.no_grad():
        found = module(**{name: torch.from_numpy(item).to("meta") for name, item in feed_of(model, inputs).items()})
    results = found if isinstance(found, tuple) else (found,)
    assert all(item.device.type == "meta" for item in results)
    return [(item.dtype, tuple(item.shape)) for item in results]
