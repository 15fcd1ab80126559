"""SmoothQuant (arXiv 2211.10438): outliers of the activations move into the weights, which have a scale for each row.

s[c] = max|x[c]|^alpha / max|w[:, c]|^(1 - alpha) over all readers: alpha 0.5 splits the range evenly. Meant for 8-bit
integer activations with one scale for a whole tensor. Only what normalisations make is scaled, as in the paper: there a
channel's largest value tells its size. Behind a Gelu it does not (most values are near 0), and scaling does harm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from quantkit.errors import InputError
from quantkit.transforms._problem import ScaleGroup
from quantkit.types import Array, Transform

MOST = 1e4
"""Largest scale, and one over the smallest, relative to the typical one."""


@dataclass(frozen=True)
class SmoothQuant:
    """Ranges shared between activations and weights.

    Attributes:
        alpha: how much of the activations' range goes to the weights, 0 to 1.
        layers: scale values that are not the result of a normalisation, too.
        insert: where nothing can take the division (a residual Add reads the value as well), insert a Mul for all
            matrix products that read it.
    """

    alpha: float = 0.5
    layers: bool = False
    insert: bool = False

    stats: ClassVar[frozenset[str]] = frozenset({"abs_max"})
    readers: ClassVar[frozenset[str]] = frozenset({"MatMul", "Gemm"})

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise InputError(f"smoothquant.alpha must be from 0 to 1, got {self.alpha}")

    def scales(self, groups: Sequence[ScaleGroup]) -> Mapping[str, Array]:
        found = {}
        for group in groups:
            seen = all(reader.stats is not None and reader.stats.abs_max is not None for reader in group.readers)
            if seen and (self.layers or group.normalised):
                found[group.name] = self._scales(group)
        return found

    def _scales(self, group: ScaleGroup) -> Array:
        """[size]; 1 for channels that are always 0 or that nobody weighs."""
        inputs, weights = np.zeros(group.size), np.zeros(group.size)
        for reader in group.readers:
            assert reader.stats is not None and reader.stats.abs_max is not None
            groups, num_inputs = reader.channels.shape
            columns = np.abs(reader.load()).reshape(groups, -1, num_inputs).max(axis=1)
            inputs = np.maximum(inputs, reader.by_channel(reader.stats.abs_max, group.size, np.maximum))
            weights = np.maximum(weights, reader.by_channel(columns, group.size, np.maximum))
        alive = (inputs > 0) & (weights > 0)
        scales = np.where(alive, inputs, 1) ** self.alpha / np.where(alive, weights, 1) ** (1 - self.alpha)
        typical = float(np.exp(np.log(scales[alive]).mean())) if alive.any() else 1.0
        return np.where(alive, np.clip(scales, typical / MOST, typical * MOST), typical)


METHOD: type[Transform] = SmoothQuant
