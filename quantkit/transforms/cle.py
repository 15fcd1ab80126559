"""Cross-layer equalization (arXiv 1906.04721): the rows of one layer and the columns behind it get equal ranges.

With r1[c] = max |row c of the source| and r2[c] = max |column c of the readers|, s[c] = sqrt(r1[c] / r2[c]) makes both
sqrt(r1 r2). Pairs that share a layer (conv - depthwise - conv) are repeated until nothing moves. Weights alone decide:
no calibration data is needed. A Relu6 between two layers blocks them, because its bound is one number for all channels.
Biases are not absorbed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from quantkit.errors import InputError
from quantkit.transforms._problem import ScaleGroup
from quantkit.types import Array, FloatArray, Transform

MOST = 1e4
"""Largest scale, and one over the smallest."""


@dataclass(frozen=True)
class CLE:
    """Equal ranges.

    Attributes:
        passes: over all pairs, at most.
        tolerance: stop when no scale changes by more than this share.
    """

    passes: int = 20
    tolerance: float = 1e-3

    stats: ClassVar[frozenset[str]] = frozenset()
    readers: ClassVar[frozenset[str]] = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose"})
    insert: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.passes < 1:
            raise InputError(f"cle.passes must be at least 1, got {self.passes}")
        if self.tolerance <= 0:
            raise InputError(f"cle.tolerance must be above 0, got {self.tolerance}")

    def scales(self, groups: Sequence[ScaleGroup]) -> Mapping[str, Array]:
        pairs = [group for group in groups if group.source is not None]
        found = {group.name: np.ones(group.size) for group in pairs}
        for _ in range(self.passes):
            moved = 0.0
            for group in pairs:
                step = self._step(group, pairs, found)
                found[group.name] = np.clip(found[group.name] * step, 1 / MOST, MOST)
                moved = max(moved, float(np.abs(np.log(step)).max(initial=0.0)))
            if moved <= self.tolerance:
                break
        return found

    def _step(self, group: ScaleGroup, pairs: Sequence[ScaleGroup], found: Mapping[str, Array]) -> Array:
        """[size] what is missing to equal ranges, with all scales so far in place; 1 for dead channels."""
        assert group.source is not None
        rows = np.abs(_current(group.source.name, group.source.load(), pairs, found)).max(axis=1)
        before, behind = np.zeros(group.size), np.zeros(group.size)
        np.maximum.at(before, group.source.rows, rows)
        for reader in group.readers:
            weight = np.abs(_current(reader.name, reader.load(), pairs, found))
            groups, num_inputs = reader.channels.shape
            columns = weight.reshape(groups, -1, num_inputs).max(axis=1)
            behind = np.maximum(behind, reader.by_channel(columns, group.size, np.maximum))
        alive = (before > 0) & (behind > 0)
        return np.sqrt(np.where(alive, before, 1) / np.where(alive, behind, 1))


def _current(name: str, weight: FloatArray, pairs: Sequence[ScaleGroup], found: Mapping[str, Array]) -> FloatArray:
    """The layer's weight as the scales so far make it; it may be the source of one group and read another."""
    for group in pairs:
        if group.source is not None and group.source.name == name:
            weight = (weight / found[group.name][group.source.rows][:, None]).astype(np.float32)
        for reader in group.readers:
            if reader.name == name:
                weight = reader.scaled(weight, found[group.name])
    return weight


METHOD: type[Transform] = CLE
