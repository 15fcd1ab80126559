"""Bias correction: put back the mean that rounding the weights took from a layer's output.

Rounding moves W to Q, and the output's mean by (Q - W) E[x]; subtracting that from the bias costs nothing at run time
and gives low-bit convolutions back much of what they lose (Nagel et al., arXiv 1906.04721).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from quantkit.types import Array, FloatArray, Target

OPERATORS = ("Conv", "Gemm")


def bias_shift(weight: FloatArray, effective: FloatArray, mean: Array) -> FloatArray:
    """[N] to add to the bias: (W - Q) E[x], with mean [groups, K] and rows of W in group order."""
    groups = mean.shape[0]
    lost = (weight.astype(np.float64) - effective).reshape(groups, -1, weight.shape[1])
    shift: FloatArray = np.einsum("gnk,gk->gn", lost, mean).reshape(-1).astype(np.float32)
    return shift


def correctable(target: Target) -> bool:
    """Can this layer's bias be changed: Conv or Gemm, whose bias is a constant of one value per row, or absent?"""
    return target.op in OPERATORS and all(_constant_bias(use.node, target.shape[0]) is not None for use in target.uses)


def _constant_bias(node: ir.Node, num_rows: int) -> Array | None:
    """[N] of zeros where there is none; None when it is no constant vector."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return np.zeros(num_rows, np.float32)
    if bias.const_value is None or tuple(bias.const_value.shape) != (num_rows,):
        return None
    values: Array = bias.const_value.numpy()
    return values


def shift_biases(
    targets: Mapping[str, Target], shifts: Mapping[str, FloatArray], constant: Callable[[Array, str], ir.Value]
) -> None:
    """Add the shifts in place; every layer gets a bias of its own, since equal biases may be shared.

    Args:
        targets: of the graph to change.
        shifts: target name -> [N].
        constant: makes initializers.
    """
    for name, shift in shifts.items():
        for use in targets[name].uses:
            bias = _constant_bias(use.node, targets[name].shape[0])
            assert bias is not None
            if len(use.node.inputs) < 3:
                use.node.resize_inputs(3)
            use.node.replace_input_with(2, constant(bias + shift, f"{name}.bias"))
