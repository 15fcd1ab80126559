"""Models that predict a configuration's figure from its features, with how unsure they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quantkit.types import Array

RIDGE = 1e-6


@dataclass(frozen=True)
class Prediction:
    """Of several points.

    Attributes:
        mean: [points].
        deviation: [points] standard deviation over the ensemble, at least 0.
    """

    mean: Array
    deviation: Array


def additive(known: Array, values: Array, asked: Array, *, strength: float) -> Prediction:
    """Bayesian linear regression: ridge of the given strength, and its posterior deviation. [n, f], [n], [m, f]."""
    centre, spread = scale(values, np.ones(len(values)))
    target = (values - centre) / spread
    precision = known.T @ known + strength * np.eye(known.shape[1])
    inverse = np.linalg.inv(precision)
    slopes = inverse @ (known.T @ target)
    noise = float(np.mean(np.square(target - known @ slopes))) + RIDGE
    mean = asked @ slopes
    variance = noise * np.einsum("ij,jk,ik->i", asked, inverse, asked)
    return Prediction(mean * spread + centre, np.sqrt(np.maximum(variance, 0.0)) * spread)


def scale(values: Array, weights: Array) -> tuple[float, float]:
    """Centre and spread; equal values have the spread 1."""
    centre = float(np.average(values, weights=weights))
    spread = float(np.sqrt(np.average(np.square(values - centre), weights=weights)))
    return centre, spread if spread > 1e-12 else 1.0
