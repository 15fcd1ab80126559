"""Models of one node, run by the torch backend and by onnxruntime, and their derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import onnxruntime
import torch

from quantkit.runtime.torch_backend import to_torch
from quantkit.runtime.torch_backend._dtypes import to_numpy

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """One node.

    Attributes:
        op: operator type.
        inputs: values; None = absent.
        attributes: of the node.
        outputs: how many; a 0 in the place of an output leaves it out.
        opset: of the domain.
        domain: of the operator.
        constants: positions of inputs that are initializers.
        label: for the test's name.
        kind: element type of the outputs; 0 = to be inferred.
    """

    op: str
    inputs: Sequence[Any]
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int | Sequence[int] = 1
    opset: int = 21
    domain: str = ""
    constants: Sequence[int] = ()
    label: str = ""
    kind: int = 0

    def __str__(self) -> str:
        return f"{self.op}-{self.label}" if self.label else self.op

    def model(self) -> onnx.ModelProto:
        names = ["" if value is None else f"x{position}" for position, value in enumerate(self.inputs)]
        kept = [1] * self.outputs if isinstance(self.outputs, int) else self.outputs
        results = [f"y{position}" if keep else "" for position, keep in enumerate(kept)]
        node = oh.make_node(self.op, names, results, name="the_node", domain=self.domain, **self.attributes)
        tensors = [nh.from_array(np.asarray(self.inputs[position]), names[position]) for position in self.constants]
        formal = [
            oh.make_tensor_value_info(name, oh.np_dtype_to_tensor_dtype(value.dtype), list(value.shape))
            for position, (name, value) in enumerate(zip(names, self.inputs, strict=True))
            if value is not None and position not in self.constants
        ]
        final = [onnx.ValueInfoProto(name=name) for name in results if name]
        if self.kind:
            final = [oh.make_tensor_value_info(name, self.kind, None) for name in results if name]
        imports = [oh.make_opsetid("", 21)] if self.domain else []
        imports.append(oh.make_opsetid(self.domain, 1 if self.domain else self.opset))
        graph = oh.make_graph([node], "g", formal, final, tensors)
        return oh.make_model(graph, opset_imports=imports, ir_version=10)

    def feeds(self) -> dict[str, Array]:
        return {
            f"x{position}": np.asarray(value)
            for position, value in enumerate(self.inputs)
            if value is not None and position not in self.constants
        }


def by_torch(case: Case) -> list[Array]:
    module = to_torch(case.model())
    with torch.no_grad():
        results = module.run({name: torch.from_numpy(value) for name, value in case.feeds().items()})
    return [to_numpy(value, dtype) for value, dtype in zip(results.values(), module.output_types, strict=True)]


def by_onnxruntime(case: Case) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(case.model().SerializeToString(), options, ["CPUExecutionProvider"])
    return list(session.run(None, case.feeds()))


def check_derivatives(case: Case) -> None:
    """First and second ones by all floating inputs, against differences, in float64."""
    module = to_torch(case.model(), dtype=torch.float64)
    fixed: dict[str, torch.Tensor] = {}
    moving: dict[str, torch.Tensor] = {}
    for name, value in case.feeds().items():
        if value.dtype.kind == "f":
            moving[name] = torch.from_numpy(value).double().requires_grad_()
        else:
            fixed[name] = torch.from_numpy(value)

    def function(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = module.run({**fixed, **dict(zip(moving, values, strict=True))})
        return tuple(value for value in results.values() if value.is_floating_point())

    points = tuple(moving.values())
    assert points
    assert torch.autograd.gradcheck(function, points, atol=1e-6)
    assert torch.autograd.gradgradcheck(function, points, atol=1e-5)
