"""Quantized ONNX graphs on torch devices: products of packed codes by quantkit_kernels, the rest by torch."""

from quantkit.runtime.executor.executor import Executor
from quantkit.runtime.executor.layers import Layer

__all__ = ["Executor", "Layer"]
