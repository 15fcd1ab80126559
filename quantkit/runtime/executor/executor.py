"""Runs an ONNX graph in torch on one device, products of codes by quantkit_kernels: the engine of InferenceSession."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import onnx
import onnx_ir as ir
import torch

from quantkit.errors import InputError
from quantkit.runtime.executor._prepare import prepare
from quantkit.runtime.executor.layers import Layer
from quantkit.runtime.torch_backend._dtypes import FLOATS, Carriers
from quantkit.runtime.torch_backend.module import open_graph

HALVES = (torch.float16, torch.bfloat16)
Activations = Literal["float", "file", "int8"]
ACTIVATIONS = ("float", "file", "int8")


class Executor:
    """A compiled model on a device.

    Attributes:
        inputs, outputs: the graph's values, with names, shapes and element types; initializers that are also inputs
            are left out.
        layers: how each layer with weights runs.
    """

    def __init__(
        self,
        model: str | Path | onnx.ModelProto | ir.Model,
        device: torch.device,
        dtype: torch.dtype,
        activations: Activations = "float",
    ) -> None:
        """Load a model.

        Args:
            model: file, protobuf or graph; never changed.
            device: `cpu` runs the kernels' torch reference.
            dtype: compute type; on CUDA the kernels take half precision, in float32 weights are rebuilt at load.
            activations: see `quantkit.runtime.session.InferenceSession`.

        Raises:
            InputError: as `quantkit.runtime.torch_backend.to_torch`; unknown activations.
        """
        if activations not in ACTIVATIONS:
            raise InputError(f"activations must be one of {', '.join(ACTIVATIONS)}, got {activations!r}")
        opened = open_graph(model)
        self.inputs = tuple(value for value in opened.graph.inputs if value.const_value is None)
        self.outputs = tuple(opened.graph.outputs)
        prepared = prepare(opened, dtype, activations, device.type != "cuda" or dtype in HALVES)
        self.layers: tuple[Layer, ...] = prepared.layers
        self.device, self.dtype = device, dtype
        self._module = prepared.module.to(device).eval()
        self._stored, self._computed = Carriers(), Carriers(dtype)

    def placed(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inputs on the device, floats in the compute type; a tensor that is so already is not copied."""
        kinds = {str(value.name): value.dtype for value in self.inputs}
        found = {}
        for name, tensor in feeds.items():
            kind = kinds.get(name)
            wanted = tensor.dtype if kind is None else self._computed(kind)
            if kind is None and tensor.is_floating_point():  # takes the place of an initializer
                wanted = self.dtype
            found[name] = tensor.to(self.device, wanted)
        return found

    def run(self, feeds: Mapping[str, torch.Tensor], names: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """Outputs on the device, in the model's own types.

        Args:
            feeds: as `placed` gives them.
            names: of outputs; None = all.

        Raises:
            InputError: an input is missing or unknown, or there is no such output.
        """
        with torch.no_grad():
            found = self._module.run(feeds, names)
            kinds = {str(value.name): value.dtype for value in self.outputs}
            return {name: self._restored(value, kinds.get(name)) for name, value in found.items()}

    def _restored(self, value: torch.Tensor, kind: ir.DataType | None) -> torch.Tensor:
        return value.to(self._stored(kind)) if kind in FLOATS and isinstance(value, torch.Tensor) else value

    def held(self) -> tuple[torch.Tensor, ...]:
        """What a captured CUDA graph of `run` must keep alive beside the module."""
        return self._module.held_copies()

    def num_bytes(self) -> int:
        """Of all weights on the device."""
        tensors = (*self._module.parameters(), *self._module.buffers())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
