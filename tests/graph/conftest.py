"""Small models from text, and running them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import numpy_helper

Array = npt.NDArray[Any]
Build = Callable[..., onnx.ModelProto]
Run = Callable[..., list[Array]]


def build_model(
    text: str,
    weights: Mapping[str, Array] | None = None,
    *,
    opset: int = 21,
    ir_version: int = 10,
    domains: str = "",
    keep_inputs: bool = False,
) -> onnx.ModelProto:
    """A model whose graph is given in ONNX text; inputs named in `weights` become initializers."""
    model = onnx.parser.parse_model(f'<ir_version: {ir_version}, opset_import: ["": {opset}{domains}]> {text}')
    for name, array in (weights or {}).items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    if not keep_inputs:
        kept = [value for value in model.graph.input if value.name not in (weights or {})]
        del model.graph.input[:]
        model.graph.input.extend(kept)
    return model


def run_model(model: onnx.ModelProto | ir.Model, feeds: Mapping[str, Array]) -> list[Array]:
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


@pytest.fixture
def build() -> Build:
    return build_model


@pytest.fixture
def run() -> Run:
    return run_model
