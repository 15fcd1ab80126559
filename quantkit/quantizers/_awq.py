"""What the two forms of AWQ share: candidate scales from activation means, and the error of a rounded layer."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from quantkit.types import Array, FloatArray

# Inputs that are (almost) never active count as this share of the most active one: scales stay finite.
LEAST = 1e-4


def candidate_scales(activation: Array, weight: Array | None, steps: int) -> Iterator[Array]:
    """[K] scales a^r / w^(1-r), geometric middle of the extremes 1; r = i/steps for i = 0 .. steps.

    Args:
        activation: [K] mean |x|.
        weight: [K] mean |w| relative to its group (duo scaling), or None for a^r alone, whose r = 0 is left out: it is
            the identity, which callers try anyway.
        steps: of r.
    """
    largest = float(activation.max(initial=0.0)) or 1.0
    active = np.maximum(activation, LEAST * largest)
    for step in range(0 if weight is not None else 1, steps + 1):
        ratio = step / steps
        scales = active**ratio
        if weight is not None:
            scales = scales / np.maximum(weight, LEAST) ** (1 - ratio)
        yield scales / np.sqrt(scales.max() * scales.min())


def relative_size(weight: FloatArray, width: int) -> Array:
    """[K] mean over rows of |w| relative to the largest of its group of `width` inputs."""
    num_inputs = weight.shape[1]
    total = np.zeros(num_inputs)
    for start in range(0, num_inputs, width):
        part = np.abs(weight[:, start : start + width])
        peak = part.max(axis=1, keepdims=True)
        total[start : start + width] = (part / np.where(peak > 0, peak, 1)).mean(axis=0)
    return total


def output_error(delta: FloatArray, gram: Array) -> float:
    """tr(D H D^T) with D[N, K] and H [groups, K, K]; rows of D in order of the groups."""
    groups = gram.shape[0]
    parts = delta.reshape(groups, -1, delta.shape[1])
    total = 0.0
    for part, inputs in zip(parts, gram, strict=True):
        total += float(np.einsum("nk,nk->", part @ inputs.astype(np.float32), part, dtype=np.float64))
    return total


def some_rows(num_rows: int, groups: int, limit: int) -> Array:
    """At most about `limit` row numbers, evenly from each group."""
    each = num_rows // groups
    taken = np.unique(np.linspace(0, each - 1, max(1, min(each, limit // groups))).astype(np.int64))
    return (np.arange(groups)[:, None] * each + taken).reshape(-1)
