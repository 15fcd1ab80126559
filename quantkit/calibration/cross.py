"""What a layer reads in the float model and in the partly quantized one, added up for both on the same rows."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quantkit.calibration.accumulators import Gram, Moments, RowSample
from quantkit.calibration.collector import POSITIONS, ROW_LIMIT, real_rows, row_attributes
from quantkit.calibration.rows import sample_positions, to_rows
from quantkit.errors import InputError
from quantkit.types import Array, Feed, FloatArray, LayerStats, Target, Use

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Read:
    """One place where a layer reads rows.

    Attributes:
        data: name of the value.
        branch: name of what an Add behind the node adds to its output; None = nothing that is there before the layer.
    """

    use: Use
    data: str
    branch: str | None


class Cross:
    """Sums for layers that read the same rows.

    Attributes:
        layers: layer -> its reads.
    """

    def __init__(self, target: Target, wanted: Set[str], seed: int) -> None:
        self._target, self._wanted = target, wanted
        self._moments, self._gram = Moments(), Gram()
        self._sample = RowSample(ROW_LIMIT, seed) if "rows" in wanted else None
        self._gap: Doubles | None = None  # sum of X - X~ [groups, K]
        self._cross: Doubles | None = None  # (X - X~)^T X~ [groups, K, K]
        self._drift: dict[str, Doubles] = {}  # layer -> D^T X~ [groups, N / groups, K]
        self._drift_sum: dict[str, Doubles] = {}  # layer -> sum of D [N]
        self._low, self._high = math.inf, -math.inf
        self._shapes: dict[tuple[int, ...], int] = {}
        self._tokens = 0
        self.layers: dict[str, tuple[Read, ...]] = {}

    def add(self, exact: Feed, ours: Feed, masks: Sequence[Array], seed: int) -> None:
        for place, read in enumerate(next(iter(self.layers.values()))):
            value = ours[read.data]
            self._look(read.data, value)
            rows, reference = (_rows(self._target, read.use, values[read.data], seed) for values in (ours, exact))
            real = real_rows(self._target.op, value.shape, masks)
            keep = np.arange(rows.shape[1]) if real is None else np.flatnonzero(real)
            rows, reference = rows[:, keep], reference[:, keep]
            self._tokens += rows.shape[1]
            self._moments.add(rows)
            self._gram.add(rows)
            if self._sample is not None:
                self._sample.add(rows)
            gap = (reference - rows).sum(axis=1, dtype=np.float64)
            self._gap = gap if self._gap is None else self._gap + gap
            cross = ((reference - rows).transpose(0, 2, 1) @ rows).astype(np.float64)
            self._cross = cross if self._cross is None else self._cross + cross
            for name, reads in self.layers.items():
                branch = reads[place].branch
                drift = None if branch is None else self._drift_rows(exact[branch] - ours[branch], value, seed)
                if drift is not None:
                    self._add_drift(name, drift[keep], rows)

    def _drift_rows(self, drift: Array, data: Array, seed: int) -> FloatArray | None:
        """[T, N] of a branch that is shaped like the layer's output, in the order of the input's rows; None if not."""
        if self._target.op != "Conv":
            return drift.reshape(-1, drift.shape[-1]) if drift.shape[:-1] == data.shape[:-1] else None
        batch, outputs, *spatial = drift.shape
        item, place = np.divmod(sample_positions(batch * math.prod(spatial), POSITIONS, seed), math.prod(spatial))
        pixels: FloatArray = drift.reshape(batch, outputs, -1)[item, :, place]
        return pixels

    def _add_drift(self, name: str, drift: FloatArray, rows: FloatArray) -> None:
        """drift [T, N], rows [groups, T, K]."""
        parts = drift.reshape(drift.shape[0], rows.shape[0], -1).transpose(1, 2, 0)
        total = (parts @ rows).astype(np.float64)
        self._drift_sum[name] = self._drift_sum.get(name, 0.0) + drift.sum(axis=0, dtype=np.float64)
        self._drift[name] = self._drift[name] + total if name in self._drift else total

    def _look(self, name: str, value: Array) -> None:
        self._shapes[value.shape] = self._shapes.get(value.shape, 0) + 1
        if value.size:
            self._low, self._high = min(self._low, float(value.min())), max(self._high, float(value.max()))
        if value.size and not (math.isfinite(self._low) and math.isfinite(self._high)):
            raise InputError(
                f"the activation {name!r} is NaN or infinite in the partly quantized model; check the data's "
                "preprocessing, or quantize the layers before it with more bits"
            )

    def aim(self, name: str, target: Target, trust: float, *, residual: bool) -> FloatArray:
        """W*[N, K], float32: the weight that answers X~ as W answers X, with lam = trust * mean diagonal of G~.

        Args:
            residual: also make up for the branches.
        """
        weight, gram = target.load(), self._gram.result()
        groups, num_inputs = gram.shape[:2]
        parts = weight.reshape(groups, -1, num_inputs).astype(np.float64)
        assert self._cross is not None
        pull = parts @ self._cross
        drift = self._drift.get(name)
        if residual and drift is not None and drift.shape[1] in (1, parts.shape[1]):
            pull += drift
        share = trust * np.diagonal(gram, axis1=1, axis2=2).mean(axis=1)
        damped = gram + np.where(share > 0, share, 1)[:, None, None] * np.eye(num_inputs)
        moved = np.linalg.solve(damped, pull.transpose(0, 2, 1) / self._tokens).transpose(0, 2, 1)
        return np.ascontiguousarray((parts + moved).reshape(weight.shape), dtype=np.float32)

    def mean_shift(self, name: str, weight: FloatArray, effective: FloatArray, residual: bool) -> FloatArray:
        """[N] to add to the bias: E[X] W^T - E[X~] Q^T (+ E[D]), so that the output keeps its mean.

        Args:
            weight, effective: W and Q, [N, K].
            residual: as for `aim`: it is the sum with the branch that keeps it.
        """
        assert self._gap is not None
        ours: Doubles = self._moments.mean
        exact = ours + self._gap / self._tokens
        groups, num_inputs = ours.shape
        parts = [matrix.reshape(groups, -1, num_inputs).astype(np.float64) for matrix in (weight, effective)]
        shift = np.einsum("gnk,gk->gn", parts[0], exact) - np.einsum("gnk,gk->gn", parts[1], ours)
        total = shift.reshape(-1)
        drift = self._drift_sum.get(name)
        if residual and drift is not None and drift.shape == total.shape:
            total = total + drift / self._tokens
        return np.asarray(total, dtype=np.float32)

    def stats(self) -> LayerStats:
        wanted, moments = self._wanted, self._moments
        return LayerStats(
            num_tokens=self._tokens,
            low=self._low,
            high=self._high,
            abs_mean=moments.abs_mean if "abs_mean" in wanted else None,
            mean=moments.mean if "mean" in wanted else None,
            square_mean=moments.square_mean if "square_mean" in wanted else None,
            gram=self._gram.result() if "gram" in wanted else None,
            rows=None if self._sample is None else self._sample.result(),
            data_shapes=dict(self._shapes),
        )


def _rows(target: Target, use: Use, value: Array, seed: int) -> FloatArray:
    """[groups, T, K], the same rows for the same seed."""
    return to_rows(
        target.op,
        value,
        operand_shape=target.layout.operand_shape,
        groups=target.groups,
        attributes=row_attributes(use.node),
        limit=POSITIONS,
        seed=seed,
    )
