"""Which of many predicted points to try next."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from quantkit.tuning.space import Point
from quantkit.tuning.surrogate import Prediction
from quantkit.types import Array

LEAST = 1e-12


def expected_improvement(predicted: Prediction, best: float) -> Array:
    """[points] by how much a point is expected to fall below `best`, at least 0 (normal errors)."""
    deviation = np.maximum(predicted.deviation, LEAST)
    distance = (best - predicted.mean) / deviation
    gain = (best - predicted.mean) * stats.norm.cdf(distance) + deviation * stats.norm.pdf(distance)
    return np.maximum(np.asarray(gain, np.float64), 0.0)


def similarity(points: Sequence[Point], chosen: Point) -> Array:
    """[points] share of dimensions in which they agree."""
    return np.asarray((np.array(points) == np.array(chosen)).mean(axis=1))


def pick(
    scores: Array,
    pool: Sequence[Point],
    count: int,
    *,
    rng: np.random.Generator,
    epsilon: float = 0.0,
    diversity: float = 0.0,
) -> list[int]:
    """Indices of the highest scores, one after the other.

    Args:
        scores: [points] at least 0, higher is better; equal ones are told apart at random.
        epsilon: probability that a point is drawn at random instead.
        diversity: share of its score that a point equal to one picked already would lose; the loss grows with the
            fourth power of the similarity, so that neighbours count and strangers do not.
    """
    left = np.ones(len(pool), bool)
    order = rng.permutation(len(pool))
    worth = np.asarray(scores, np.float64).copy()
    found: list[int] = []
    while len(found) < min(count, len(pool)):
        free = order[left[order]]
        at_random = epsilon > 0 and rng.random() < epsilon
        index = int(free[0] if at_random else free[np.argmax(worth[free])])
        left[index] = False
        found.append(index)
        if diversity > 0:
            worth *= 1 - diversity * similarity(pool, pool[index]) ** 4
    return found
