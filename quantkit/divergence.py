"""How far a model's outputs are from the float model's, in nats per sample.

    class scores        KL(softmax of the float model || softmax of ours); scores that already add up to 1 are taken
                        as probabilities
    everything else     |y' - y|^2 / (2 |y|^2), |y|^2 being the float model's mean over samples: the KL between two
                        Gaussians whose variance is the signal's, summed over a sample. For unit vectors: 1 - cosine.

Several float outputs add up. All of it in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from quantkit import metrics
from quantkit.types import Array

Kind = Literal["logits", "probabilities", "values"]
Outputs = Mapping[str, Array]
LEAST = 1e-12  # probability: below float32's resolution of a softmax
SUM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Output:
    """One float output.

    Attributes:
        kind: how it is compared.
        energy: mean over samples of |y|^2 (of the whole sample); used by `values`.
    """

    kind: Kind
    energy: float = 1.0


@dataclass(frozen=True)
class Divergence:
    """Compares outputs of the same feeds.

    Attributes:
        outputs: name -> kind; outputs that are no floats are left out.
    """

    outputs: Mapping[str, Output]

    @classmethod
    def of(cls, batches: Sequence[Outputs]) -> Divergence:
        """What the float model's outputs, batch by batch, look like."""
        joined = metrics.join(batches)
        samples = sum(_samples(batch) for batch in batches)
        found = {}
        for name, values in joined.items():
            if np.issubdtype(values.dtype, np.floating):
                shapes = {np.shape(batch[name])[1:] for batch in batches}
                kind = _kind(values) if len(shapes) == 1 else "values"  # lengths differ: no axis of classes
                energy = float(np.square(np.nan_to_num(values), dtype=np.float64).sum()) / max(samples, 1)
                found[name] = Output(kind, energy or 1.0)
        return cls(found)

    def sum(self, reference: Outputs, measured: Outputs) -> float:
        """Nats of all samples of one batch together; infinite where outputs are not finite or have other shapes."""
        total = 0.0
        for name, output in self.outputs.items():
            wanted, got = reference[name], measured[name]
            if wanted.shape != got.shape:
                return float("inf")
            if not np.isfinite(got).all() and np.isfinite(wanted).all():
                return float("inf")
            total += _nats(output, np.nan_to_num(wanted), np.nan_to_num(got))
        return total

    def each(self, reference: Outputs, measured: Outputs) -> Array:
        """[samples] nats of every sample of one batch; infinite where outputs are not finite or have other shapes."""
        samples = _samples(reference)
        total = np.zeros(samples)
        for name, output in self.outputs.items():
            wanted, got = reference[name], measured[name]
            if wanted.shape != got.shape:
                return np.full(samples, np.inf)
            first, second = np.nan_to_num(wanted), np.nan_to_num(got)
            apart = wanted.ndim > 0 and len(wanted) == samples
            broken = np.isfinite(wanted) & ~np.isfinite(got)
            if not apart:  # an output without the batch's axis belongs to all samples alike
                total += np.inf if broken.any() else _nats(output, first, second) / samples
                continue
            rows = [_nats(output, first[at : at + 1], second[at : at + 1]) for at in range(samples)]
            total += np.where(broken.reshape(samples, -1).any(axis=1), np.inf, rows)
        return total

    def mean(self, reference: Sequence[Outputs], measured: Sequence[Outputs]) -> float:
        """Nats per sample over batches."""
        samples = sum(_samples(batch) for batch in reference)
        return sum(self.sum(*pair) for pair in zip(reference, measured, strict=True)) / max(samples, 1)


def _kind(values: Array) -> Kind:
    scores = metrics.class_scores(values)
    if scores is None:
        return "values"
    sums = scores.sum(axis=1, dtype=np.float64)
    return "probabilities" if (scores >= 0).all() and np.allclose(sums, 1, atol=SUM_TOLERANCE) else "logits"


def _samples(outputs: Outputs) -> int:
    """Along the first axis; outputs without one are a sample."""
    return max((len(value) for value in outputs.values() if value.ndim), default=1)


def _nats(output: Output, wanted: Array, got: Array) -> float:
    first, second = wanted.astype(np.float64), got.astype(np.float64)
    if output.kind == "values":
        return float(np.square(second - first).sum()) / (2 * output.energy)
    first, second = first.reshape(len(first), -1), second.reshape(len(second), -1)
    if output.kind == "probabilities":
        first, second = (np.log(np.maximum(item, LEAST)) for item in (first, second))
    first, second = (item - _logsumexp(item) for item in (first, second))
    # With p' = p in all classes every term vanishes exactly; the sum itself is never negative but for rounding.
    return max(float((np.exp(first) * (first - second)).sum()), 0.0)


def _logsumexp(scores: Array) -> Array:
    peak = scores.max(axis=1, keepdims=True)
    return np.asarray(peak + np.log(np.exp(scores - peak).sum(axis=1, keepdims=True)))
