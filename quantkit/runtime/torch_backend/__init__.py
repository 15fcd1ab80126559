"""ONNX graphs as differentiable torch modules."""

from quantkit.runtime.torch_backend.module import TorchModule, to_torch

__all__ = ["TorchModule", "to_torch"]
