"""A linear model with all pairs of settings, and its uncertainty: with few choices it is nearly as good as trees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quantkit.errors import InputError
from quantkit.tuning.acquisition import expected_improvement, pick
from quantkit.tuning.search import Proposal, State, Tuner
from quantkit.tuning.surrogate import additive
from quantkit.types import Array


@dataclass(frozen=True)
class Additive:
    """Settings.

    Attributes:
        strength: of the ridge.
        first: random trials before the model is asked.
        pairs: products of two columns too.
    """

    strength: float = 1.0
    first: int = 3
    pairs: bool = True

    def __post_init__(self) -> None:
        if self.strength <= 0:
            raise InputError(f"additive.strength must be above 0, got {self.strength}")

    def propose(self, state: State, count: int) -> Proposal:
        rng = state.generator()
        pool = state.candidates(rng)
        usable = np.isfinite(state.values)
        best = state.best
        if not pool or best is None or int(usable.sum()) < self.first:
            return Proposal(tuple(pool[index] for index in rng.permutation(len(pool))[:count]))
        known = [point for point, good in zip(state.points, usable, strict=True) if good]
        columns = self._columns(state.space.encode([*known, *pool]))
        found = additive(columns[: len(known)], state.values[usable], columns[len(known) :], strength=self.strength)
        gains = expected_improvement(found, state.values[best])
        chosen = pick(gains, pool, count, rng=rng)
        return Proposal(tuple(pool[index] for index in chosen), float(gains.max()))

    def _columns(self, encoded: Array) -> Array:
        """Standardised columns, a constant, and products of every two columns."""
        values = encoded.astype(np.float64)
        spread = values.std(axis=0)
        values = (values - values.mean(axis=0))[:, spread > 0] / spread[spread > 0]
        parts = [np.ones((len(values), 1)), values]
        if self.pairs:
            left, right = np.triu_indices(values.shape[1], 1)
            parts.append(values[:, left] * values[:, right] / 2)
        return np.concatenate(parts, axis=1)


METHOD: type[Tuner] = Additive
