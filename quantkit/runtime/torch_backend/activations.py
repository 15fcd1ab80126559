"""Activation functions, Clip and the softmax family."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812

from quantkit.runtime.torch_backend._integers import number, ordered
from quantkit.runtime.torch_backend._types import Node, Op, Run, Table, direct

AlongAxis = Callable[[torch.Tensor, int], torch.Tensor]
SELU_ALPHA, SELU_GAMMA = 1.67326319217681884765625, 1.05070102214813232421875
SOFTPLUS_LINEAR = 40.0
"""From here on log(1 + exp(x)) is x, in float64 too."""


def _with_alpha(run: Callable[[torch.Tensor, float], torch.Tensor], default: float) -> Op:
    def convert(node: Node) -> Run:
        alpha = float(node.get("alpha", default))
        return lambda x: run(x, alpha)

    return Op(convert)


def clip_by_attributes(node: Node) -> Run:
    low, high = node.get("min"), node.get("max")
    if low is None and high is None:
        return lambda x: x
    return lambda x: torch.clamp(x, low, high)


def clip(node: Node) -> Run:
    """Where low > high the result is high."""
    return ordered(_clamp, node.input_types[0], back=True)


def _clamp(x: torch.Tensor, low: torch.Tensor | None = None, high: torch.Tensor | None = None) -> torch.Tensor:
    least = None if low is None else number(low.reshape(()))
    most = None if high is None else number(high.reshape(()))
    if least is None and most is None:
        return x
    if isinstance(least, torch.Tensor) or isinstance(most, torch.Tensor):
        return torch.clamp(x, None if low is None else low.reshape(()), None if high is None else high.reshape(()))
    return torch.clamp(x, least, most)


def prelu(x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    per_channel = slope.ndim == x.ndim - 1 and x.ndim > 1 and slope.numel() == slope.shape[0] == x.shape[1]
    if x.is_floating_point() and per_channel:
        return F.prelu(x, slope.reshape(-1))
    return torch.where(x < 0, x * slope, x)


def prelu_by_channel(x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """Before version 7: one slope for all, or one for each channel."""
    if slope.numel() > 1:
        slope = slope.reshape(-1, *[1] * (x.ndim - 2))
    return torch.where(x < 0, x * slope, x)


def selu(node: Node) -> Run:
    alpha, gamma = float(node.get("alpha", SELU_ALPHA)), float(node.get("gamma", SELU_GAMMA))
    return lambda x: F.elu(x, alpha) * gamma


def hard_sigmoid(node: Node) -> Run:
    alpha, beta = float(node.get("alpha", 0.2)), float(node.get("beta", 0.5))
    return lambda x: torch.clamp(x * alpha + beta, 0.0, 1.0)


def thresholded_relu(x: torch.Tensor, alpha: float) -> torch.Tensor:
    return torch.where(x > alpha, x, 0)


def shrink(node: Node) -> Run:
    """Small values become 0, the others move towards it by `bias`."""
    bias, limit = float(node.get("bias", 0.0)), float(node.get("lambd", 0.5))

    def run(x: torch.Tensor) -> torch.Tensor:
        moved = torch.where(x < -limit, x + bias, torch.where(x > limit, x - bias, 0))
        return moved.to(x.dtype)

    return run


def swish(x: torch.Tensor, alpha: float) -> torch.Tensor:
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(x * alpha)


def swiglu(node: Node) -> Run:
    alpha = float(node.get("alpha", 1.0))
    return lambda gate, value: swish(gate, alpha) * value


def gelu(node: Node) -> Run:
    return partial(F.gelu, approximate=node.get("approximate", "none"))


def _along_axis(run: AlongAxis) -> Op:
    def convert(node: Node) -> Run:
        axis = int(node.get("axis", -1))
        return lambda x: run(x, axis)

    return Op(convert)


def coerced(run: AlongAxis) -> Op:
    """Before version 13: the axes from `axis` on count as one."""

    def convert(node: Node) -> Run:
        axis = int(node.get("axis", 1))

        def flat(x: torch.Tensor) -> torch.Tensor:
            start = axis % x.ndim if axis < 0 else axis
            if start == x.ndim - 1:
                return run(x, start)
            matrix = x.reshape(math.prod(x.shape[:start]), math.prod(x.shape[start:]))
            return run(matrix, 1).reshape(x.shape)

        return flat

    return Op(convert)


def hardmax(x: torch.Tensor, axis: int) -> torch.Tensor:
    """1 at the first greatest value."""
    places = x.argmax(axis, keepdim=True)
    return torch.zeros_like(x).scatter(axis, places, torch.ones_like(places, dtype=x.dtype))


TABLE: Table = {
    ("Celu", 12): _with_alpha(F.celu, 1.0),
    ("Clip", 1): Op(clip_by_attributes),
    ("Clip", 11): Op(clip),
    ("Elu", 1): _with_alpha(F.elu, 1.0),
    ("Gelu", 20): Op(gelu),
    ("HardSigmoid", 1): Op(hard_sigmoid),
    ("HardSwish", 14): direct(F.hardswish),
    ("Hardmax", 1): coerced(hardmax),
    ("Hardmax", 13): _along_axis(hardmax),
    ("LeakyRelu", 1): _with_alpha(F.leaky_relu, 0.01),
    ("LogSoftmax", 1): coerced(torch.log_softmax),
    ("LogSoftmax", 13): _along_axis(torch.log_softmax),
    ("Mish", 18): direct(F.mish),
    ("PRelu", 1): direct(prelu_by_channel),
    ("PRelu", 7): direct(prelu),
    ("Relu", 1): direct(torch.relu),
    ("Selu", 1): Op(selu),
    ("Shrink", 9): Op(shrink),
    ("Sigmoid", 1): direct(torch.sigmoid),
    ("Softmax", 1): coerced(torch.softmax),
    ("Softmax", 13): _along_axis(torch.softmax),
    ("Softplus", 1): direct(partial(F.softplus, threshold=SOFTPLUS_LINEAR)),
    ("Softsign", 1): direct(F.softsign),
    ("SwiGLU", 28): Op(swiglu),
    ("Swish", 24): _with_alpha(swish, 1.0),
    ("Tanh", 1): direct(torch.tanh),
    ("ThresholdedRelu", 10): _with_alpha(thresholded_relu, 1.0),
}
