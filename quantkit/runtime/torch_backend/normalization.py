"""Normalizations, each one fused call of torch's where its result is the only one asked for."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from quantkit.runtime.torch_backend._types import Node, Op, Run, Table, Value

EPSILON = 1e-5
HALVES = (torch.float16, torch.bfloat16)


def _batch_norm(node: Node) -> Run:
    """Opset 7 and later: several outputs ask for training before opset 14, an attribute after."""
    training = bool(node.get("training_mode", 0)) if node.version >= 14 else len(node.output_types) > 1
    return _batch_norm_in(node, training)


def _batch_norm_1(node: Node) -> Run:
    return _batch_norm_in(node, len(node.output_types) > 1 and not node.get("is_test", 0))


def _batch_norm_in(node: Node, training: bool) -> Run:
    epsilon, momentum = float(node.get("epsilon", EPSILON)), float(node.get("momentum", 0.9))
    count = len(node.output_types)
    # One mean per channel, or (old opsets) one per element of a sample.
    per_element = node.version < 9 and not node.get("spatial", 1)

    def run(x: torch.Tensor, scale: torch.Tensor, b: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> Value:
        # torch takes no derivative by the statistics.
        if per_element or x.ndim < 2 or (torch.is_grad_enabled() and (mean.requires_grad or var.requires_grad)):
            y = _normalized(x, scale, b, mean, var, epsilon)
        else:
            y = torch.batch_norm(x, scale, b, mean, var, False, 0.0, epsilon, True)
        return y if count == 1 else (y, mean, var)

    def train(x: torch.Tensor, scale: torch.Tensor, b: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> Value:
        axes = (0,) if per_element else (0, *range(2, x.ndim))
        wide = x.float() if x.dtype in HALVES else x
        new_var, new_mean = torch.var_mean(wide, axes, correction=0)
        y = _normalized(x, scale, b, new_mean, new_var, epsilon)
        if count == 1:
            return y
        running = [
            (old * momentum + new * (1 - momentum)).to(old.dtype) for old, new in ((mean, new_mean), (var, new_var))
        ]
        return (y, *running, new_mean.to(mean.dtype), new_var.to(var.dtype))[:count]

    return train if training else run


def _normalized(
    x: torch.Tensor, scale: torch.Tensor, b: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """Statistics [C], or [C, D1, ...] like one sample."""
    wide = x.float() if x.dtype in HALVES else x
    factor, shift = scale.to(wide.dtype) * (var.to(wide.dtype) + epsilon).rsqrt(), mean.to(wide.dtype)
    if scale.ndim == 1 and x.ndim > 2:
        shape = (-1, *[1] * (x.ndim - 2))
        factor, shift, b = factor.reshape(shape), shift.reshape(shape), b.reshape(shape)
    return ((wide - shift) * factor + b).to(x.dtype)


def _instance_norm(node: Node) -> Run:
    epsilon = float(node.get("epsilon", EPSILON))
    return lambda x, scale, b: torch.group_norm(x, x.shape[1], scale, b, epsilon)


def _group_norm(node: Node) -> Run:
    groups, epsilon = int(node.get("num_groups")), float(node.get("epsilon", EPSILON))
    if node.version >= 21:
        return lambda x, scale, b: torch.group_norm(x, groups, scale, b, epsilon)

    def run(x: torch.Tensor, scale: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        # One scale per group.
        size = x.shape[1] // groups
        return torch.group_norm(x, groups, scale.repeat_interleave(size), b.repeat_interleave(size), epsilon)

    return run


def _layer_norm(node: Node) -> Run:
    axis, epsilon = int(node.get("axis", -1)), float(node.get("epsilon", EPSILON))
    stash = node.dtype("stash_type")
    count = len(node.output_types)

    def fused(x: torch.Tensor, scale: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        shape = x.shape[axis:]
        if scale.shape == shape and (b is None or b.shape == shape):
            return torch.layer_norm(x, shape, scale, b, epsilon)
        y = torch.layer_norm(x, shape, None, None, epsilon) * scale
        return y if b is None else y + b

    def written(x: torch.Tensor, scale: torch.Tensor, b: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        wide = x.float() if x.dtype in HALVES else x
        axes = tuple(range(axis % x.ndim, x.ndim))
        var, mean = torch.var_mean(wide, axes, correction=0, keepdim=True)
        inverse = (var + epsilon).rsqrt()
        y = ((wide - mean) * inverse).to(x.dtype) * scale
        return ((y if b is None else y + b), mean.to(stash), inverse.to(stash))[:count]

    return fused if count == 1 else written


def _rms_norm(node: Node) -> Run:
    axis, epsilon = int(node.get("axis", -1)), float(node.get("epsilon", EPSILON))

    def run(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        shape = list(x.shape[axis:])
        if scale.shape == x.shape[axis:] and scale.dtype == x.dtype:
            return torch.rms_norm(x, shape, scale, epsilon)
        return (torch.rms_norm(x, shape, None, epsilon) * scale).to(x.dtype)

    return run


def _lrn(node: Node) -> Run:
    """Each value over (bias + alpha times the mean square of `size` channels around it) ** beta."""
    alpha, beta = float(node.get("alpha", 1e-4)), float(node.get("beta", 0.75))
    bias, size = float(node.get("bias", 1.0)), int(node.get("size"))
    before, after = (size - 1) // 2, size // 2

    def run(x: torch.Tensor) -> torch.Tensor:
        squares = (x * x).reshape(x.shape[0], 1, x.shape[1], math.prod(x.shape[2:]))
        means = functional.avg_pool2d(functional.pad(squares, (0, 0, before, after)), (size, 1), stride=1).reshape(
            x.shape
        )
        divisor: torch.Tensor = torch.pow(means * alpha + bias, beta)
        return x / divisor

    return run


def _lp_norm(node: Node) -> Run:
    """A vector of zeros stays one."""
    axis, p = int(node.get("axis", -1)), float(node.get("p", 2))

    def run(x: torch.Tensor) -> torch.Tensor:
        norm: torch.Tensor = torch.linalg.vector_norm(x, p, axis, keepdim=True)
        return x / norm.masked_fill(norm == 0, 1)

    return run


def _mean_variance(node: Node) -> Run:
    axes = tuple(int(axis) for axis in node.get("axes", (0, 2, 3)))

    def run(x: torch.Tensor) -> torch.Tensor:
        deviation = x - x.mean(axes, keepdim=True)
        return deviation / ((deviation * deviation).mean(axes, keepdim=True).sqrt() + 1e-9)

    return run


TABLE: Table = {
    ("BatchNormalization", 1): Op(_batch_norm_1),
    ("BatchNormalization", 7): Op(_batch_norm),
    ("GroupNormalization", 18): Op(_group_norm),
    ("InstanceNormalization", 1): Op(_instance_norm),
    ("LRN", 1): Op(_lrn),
    ("LayerNormalization", 17): Op(_layer_norm),
    ("LpNormalization", 1): Op(_lp_norm),
    ("MeanVarianceNormalization", 9): Op(_mean_variance),
    ("RMSNormalization", 23): Op(_rms_norm),
}
