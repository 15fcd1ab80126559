"""What a surrogate knows of a model: structure and weights in a few numbers: trials of one tell of another."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from quantkit.types import FloatArray, Target

ACTIVATIONS = frozenset({"Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSwish", "HardSigmoid", "Gelu", "Erf", "Softmax"})
STRUCTURE = (
    "log nodes",
    "log weights",
    "layers",
    "convolutions",
    "products",
    "depthwise",
    "pointwise",
    "activations",
    "additions",
    "norms",
    "depth",
    "log median kurtosis",
    "log largest kurtosis",
    "log largest range",
)
"""Columns of `structure`."""
SAMPLE = 1 << 16
"""Weights of a layer that its shape figures are taken from."""


def structure(model: ir.Model, targets: Mapping[str, Target]) -> FloatArray:
    """[len(STRUCTURE)] float32."""
    ops = [node.op_type for node in model.graph]
    shapes = [target.shape for target in targets.values()]
    convolutions = [target for target in targets.values() if target.op in ("Conv", "ConvTranspose")]
    kurtosis, ranges = np.array([_shape(target) for target in targets.values()]).reshape(-1, 2).T
    figures = (
        math.log(max(len(ops), 1)),
        math.log(max(sum(rows * inputs for rows, inputs in shapes), 1)),
        len(targets),
        len(convolutions),
        sum(target.op in ("MatMul", "Gemm") for target in targets.values()),
        sum(target.groups > 1 for target in convolutions),
        sum(math.prod(target.layout.operand_shape[2:]) == 1 for target in convolutions),
        sum(op in ACTIVATIONS for op in ops),
        sum(op == "Add" for op in ops),
        sum("Normalization" in op for op in ops),
        _depth(model),
        math.log(max(float(np.median(kurtosis)), 1e-3)) if len(kurtosis) else 0.0,
        math.log(max(float(kurtosis.max()), 1e-3)) if len(kurtosis) else 0.0,
        math.log(max(float(ranges.max()), 1e-3)) if len(ranges) else 0.0,
    )
    return np.array(figures, np.float32)


def _shape(target: Target) -> tuple[float, float]:
    """(kurtosis, largest magnitude over standard deviation) of the weights, evenly sampled where there are many."""
    weight = target.load().reshape(-1)
    weight = weight[:: max(len(weight) // SAMPLE, 1)].astype(np.float64)
    deviation = float(weight.std())
    if not math.isfinite(deviation) or deviation == 0:
        return 0.0, 0.0
    centred = (weight - weight.mean()) / deviation
    return float(np.mean(centred**4)), float(np.abs(centred).max())


def _depth(model: ir.Model) -> int:
    """Nodes on the longest path from an input to an output."""
    deepest: dict[int, int] = {}
    longest = 0
    for node in model.graph:
        below = max((deepest.get(id(value), 0) for value in node.inputs if value is not None), default=0) + 1
        longest = max(longest, below)
        deepest.update({id(value): below for value in node.outputs})
    return longest
