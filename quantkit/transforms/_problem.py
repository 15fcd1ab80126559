"""What a transform sees: groups of layers that can share scales, as arrays.

x' = x / s per channel of a group; each reader's weight becomes W[:, k] * s[channels[k]], each row of the source's
weight W[n] / s[rows[n]].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quantkit.types import Array, FloatArray, LayerStats, QuantSpec

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Reader:
    """A layer that reads what a group scales.

    Attributes:
        name: target's name.
        op: MatMul, Gemm, Conv or ConvTranspose.
        channels: [groups, K] the group's channel behind each input of each convolution group.
        spec: how the layer will be stored, as far as that is known before bits are allocated.
        load: W[N, K] without this transform's scales; rows in order of the convolution groups.
        stats: what calibration saw, None without data.
    """

    name: str
    op: str
    channels: Indices
    spec: QuantSpec
    load: Callable[[], FloatArray]
    stats: LayerStats | None

    def columns(self, values: Array) -> Array:
        """[groups, K] of values by channel, [size]."""
        return values[self.channels]

    def scaled(self, weight: FloatArray, scales: Array) -> FloatArray:
        """W diag(s), rows of each convolution group by its own inputs."""
        groups, num_inputs = self.channels.shape
        wide = weight.reshape(groups, -1, num_inputs) * self.columns(scales)[:, None, :]
        return np.asarray(wide.reshape(weight.shape), dtype=np.float32)

    def by_channel(self, values: Array, size: int, combine: np.ufunc) -> Array:
        """[size] of [groups, K]: the values of each channel's inputs, combined (np.add, np.maximum); 0 for none."""
        found = np.zeros(size)
        combine.at(found, self.channels.reshape(-1), np.asarray(values, np.float64).reshape(-1))
        return found


@dataclass(frozen=True)
class Source:
    """The layer whose rows are divided.

    Attributes:
        name: target's name.
        rows: [N] the group's channel that each row makes.
        load: W[N, K] without this transform's scales.
    """

    name: str
    rows: Indices
    load: Callable[[], FloatArray]


@dataclass(frozen=True)
class ScaleGroup:
    """Layers that are scaled together.

    Attributes:
        name: key of the result.
        kind: what the division goes into: `norm`, `factor` (a constant Mul), `layer`, or `insert` (a Mul that costs
            time).
        size: channels.
        readers: those that can be quantized, at least one.
        source: for `layer`, unless it is too small to be quantized.
        normalised: the scaled value comes straight from a normalisation.
    """

    name: str
    kind: str
    size: int
    readers: tuple[Reader, ...]
    source: Source | None
    normalised: bool
