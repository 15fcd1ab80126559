"""The face that `onnx.backend.test`, ONNX's own conformance suite, drives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx.backend.base import Backend, BackendRep

from quantkit.runtime.torch_backend._dtypes import to_numpy, to_torch_tensor
from quantkit.runtime.torch_backend.module import TorchModule, to_torch


@dataclass(frozen=True)
class TorchRep(BackendRep):
    """A prepared model."""

    module: TorchModule
    device: str

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
        """numpy arrays in the model's order -> numpy arrays; sequences are lists."""
        del kwargs
        values = [
            _from_numpy(value, dtype, self.device)
            for value, dtype in zip(inputs, self.module.input_types, strict=False)
        ]
        with torch.no_grad():
            results = self.module(*values)
        outputs = results if isinstance(results, tuple) else (results,)
        return tuple(_back(value, dtype) for value, dtype in zip(outputs, self.module.output_types, strict=True))


class TorchBackend(Backend):
    """onnx.backend.base.Backend over `to_torch`."""

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> TorchRep:
        del kwargs
        place = "cuda" if device.startswith("CUDA") else "cpu"
        return TorchRep(to_torch(model).to(place), place)

    @classmethod
    def run_model(cls, model: onnx.ModelProto, inputs: Sequence[Any], device: str = "CPU", **kwargs: Any) -> Any:
        return cls.prepare(model, device, **kwargs).run(inputs)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        return device == "CPU" or (device.startswith("CUDA") and torch.cuda.is_available())


def _from_numpy(value: Any, dtype: ir.DataType | None, device: str) -> Any:
    if value is None or isinstance(value, list):
        return None if value is None else [_from_numpy(item, dtype, device) for item in value]
    array = np.asarray(value)
    return to_torch_tensor(array, ir.DataType.from_numpy(array.dtype) if dtype is None else dtype).to(device)


def _back(value: Any, dtype: ir.DataType | None) -> Any:
    if isinstance(value, (list, tuple)):
        return [_back(item, dtype) for item in value]
    return None if value is None else to_numpy(value, dtype)
