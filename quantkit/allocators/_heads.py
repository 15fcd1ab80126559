"""Second derivative of the divergence from the float model, at the float model's own outputs: H = A A^T, per sample.

There the divergence is 0 and so is its slope, so that what the network itself is curved by drops out: the Hessian of
the loss with respect to weights is exactly J^T H J (the generalised Gauss-Newton matrix, positive semidefinite), J
being the derivative of the outputs. No labels are needed.

    class scores z       p = softmax(z)      H = diag(p) - p p^T       A = diag(sqrt p) - p (sqrt p)^T
    probabilities y      as above with z = log y, dz = dy / y
    everything else      energy e = mean |y|^2 of a sample             H = 1/e                  A = 1/sqrt e
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantkit.divergence import LEAST, Output


@dataclass(frozen=True)
class Head:
    """One float output of one batch. Tensors are [samples, size], float64.

    Attributes:
        shape, dtype: of the output.
        slope: derivative of what the divergence compares (scores, or y itself) with respect to the output.
        softmax: p of class scores and probabilities, None for all other outputs.
        energy: of all other outputs.
    """

    shape: torch.Size
    dtype: torch.dtype
    slope: torch.Tensor
    softmax: torch.Tensor | None
    energy: float

    @classmethod
    def of(cls, output: Output, value: torch.Tensor) -> Head:
        """At the value that the float model has."""
        rows = _rows(value.detach())
        finite = torch.isfinite(rows)
        slope, softmax = finite.double(), None
        if output.kind == "probabilities":
            slope = torch.where(finite & (rows > LEAST), 1 / rows.clamp(min=LEAST), 0.0)
            softmax = torch.softmax(rows.clamp(min=LEAST).log(), 1)
        elif output.kind == "logits":
            softmax = torch.softmax(torch.nan_to_num(rows), 1)
        return cls(value.shape, value.dtype, slope, softmax, output.energy)

    @property
    def columns(self) -> int:
        """Of A, for each sample."""
        return self.slope.shape[1]

    @property
    def rows(self) -> int:
        """Samples, if the first axis counts them."""
        return self.slope.shape[0]

    def product(self, tangent: torch.Tensor) -> torch.Tensor:
        """H t, shaped and typed like the output."""
        t = _rows(tangent) * self.slope
        if self.softmax is None:
            return self._like(t * self.slope / self.energy)
        p = self.softmax
        return self._like(self.slope * p * (t - (p * t).sum(1, keepdim=True)))

    def curvature(self, tangent: torch.Tensor) -> float:
        """t^T H t of all samples; never negative."""
        t = _rows(tangent) * self.slope
        if self.softmax is None:
            return float(t.square().sum()) / self.energy
        p = self.softmax
        return float((p * (t - (p * t).sum(1, keepdim=True)).square()).sum())

    def root(self, e: torch.Tensor) -> torch.Tensor:
        """A e, shaped and typed like the output; with random signs e of any shape of its size, E[(A e)(A e)^T] = H."""
        e = _rows(e.reshape(self.shape))
        if self.softmax is None:
            return self._like(e * self.slope / self.energy**0.5)
        root = self.softmax.sqrt()
        return self._like(self.slope * (root * e - self.softmax * (root * e).sum(1, keepdim=True)))

    def column(self, index: int) -> torch.Tensor:
        """A's column of this index, for every sample."""
        chosen = torch.zeros_like(self.slope)
        chosen[:, index] = 1
        return self.root(chosen)

    def _like(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.reshape(self.shape).to(self.dtype)


def _rows(value: torch.Tensor) -> torch.Tensor:
    """[samples, size] float64; a scalar is one sample."""
    double = value.double()
    return double.reshape(len(double), -1) if double.ndim and len(double) else double.reshape(1, -1)
