"""Quantune (arXiv 2202.05048): gradient-boosted trees learn the figure from trials and propose the next ones.

As in the paper: trees over the configuration and the model's structure, trials of other models in the training set
(transfer), the most promising untried point next, fitted again after every batch. Different from the paper: an
ensemble says how unsure it is, and the expected improvement takes the place of the plain prediction, which stalls on
plateaus; values are relative to each model, so that trees need not learn which model they look at; points that are
likely to break a budget are worth less.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from quantkit.errors import InputError
from quantkit.tuning.acquisition import expected_improvement, pick
from quantkit.tuning.boosted import OURS, Boosted
from quantkit.tuning.search import Others, Proposal, State, Tuner
from quantkit.tuning.space import Point
from quantkit.tuning.surrogate import Prediction
from quantkit.types import Array

ACQUISITIONS = ("auto", "ei", "greedy")
LEAST_CHANCE = 1e-6
UNLIKELY = 0.2
"""Below this chance of keeping the budgets, a point is tried only when there is no other."""
ENOUGH = 6
"""Trials of a model after which it is asked whether others resemble it."""


@dataclass(frozen=True)
class Quantune:
    """Settings.

    Attributes:
        acquisition: `ei` = expected improvement, `greedy` = the best prediction, as the authors do; `auto` = greedy
            where trials of other models guide, else expected improvement.
        epsilon: share of proposals drawn at random.
        diversity: how much the points of a batch avoid each other, 0 to 1.
        first: trials before the model is asked, when there are none of other models.
        members, rounds, rate, gamma, depth: of the trees; `rate` and `gamma` are xgboost's eta and gamma.
        transfer: learn from trials of other models where there are any.
    """

    acquisition: str = "auto"
    epsilon: float = 0.05
    diversity: float = 0.5
    first: int = 3
    members: int = 8
    rounds: int = 60
    rate: float = 0.3
    gamma: float = 0.0
    depth: int = 4
    transfer: bool = True

    def __post_init__(self) -> None:
        if self.acquisition not in ACQUISITIONS:
            raise InputError(f"quantune.acquisition must be one of {', '.join(ACQUISITIONS)}, got {self.acquisition!r}")
        for name in ("epsilon", "diversity"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"quantune.{name} must be at least 0 and at most 1, got {getattr(self, name)}")
        for name in ("members", "rounds", "depth", "first"):
            if getattr(self, name) < 1:
                raise InputError(f"quantune.{name} must be at least 1, got {getattr(self, name)}")

    def propose(self, state: State, count: int) -> Proposal:
        rng = state.generator()
        pool = state.candidates(rng)
        usable = np.isfinite(state.values)
        others = state.others if self.transfer else None
        if not pool or (others is None and int(usable.sum()) < self.first):
            return Proposal(tuple(pool[index] for index in rng.permutation(len(pool))[:count]))
        seed = int(rng.integers(2**31))
        found, shift = self._predicted(state, pool, others, seed)
        best = state.best
        greedy = self.acquisition == "greedy" or (self.acquisition == "auto" and others is not None)
        gain = None
        worth = found.mean.max() - found.mean
        if best is not None:
            gains = expected_improvement(found, float(state.values[best]) - shift)
            gain, worth = float(gains.max()), worth if greedy else gains
        worth = worth * self._chance(state, pool, seed)
        chosen = pick(worth, pool, count, rng=rng, epsilon=self.epsilon, diversity=self.diversity)
        return Proposal(tuple(pool[index] for index in chosen), gain)

    @property
    def _trees(self) -> Boosted:
        return Boosted(self.members, self.rounds, self.rate, self.gamma, self.depth)

    def _predicted(self, state: State, pool: list[Point], others: Others | None, seed: int) -> tuple[Prediction, float]:
        """Of the points in the pool, and what to add to come back to this model's own figures."""
        usable = np.isfinite(state.values)
        tried = [point for point, good in zip(state.points, usable, strict=True) if good]
        values, asked = state.values[usable], state.features(pool)
        if others is None:
            return self._trees.predict(state.features(tried), values, asked, seed=seed), 0.0
        if not tried:
            return self._trees.predict(others.features, others.values, asked, seed=seed, owners=others.owners), 0.0
        ours = state.features(tried)
        # Others' figures are relative to their models; ours are, once what the others expect of these trials is known.
        expected = replace(self._trees, members=1).predict(others.features, others.values, ours, seed=0).mean
        trust = _trust(expected, values)
        if trust == 0 and len(tried) >= self.first:
            return self._trees.predict(ours, values, asked, seed=seed), 0.0
        shift = float(np.mean(values - expected))
        known = np.concatenate([others.features, ours])
        owners = np.concatenate([others.owners, np.full(len(tried), OURS)])
        together = np.concatenate([others.values, values - shift])
        return self._trees.predict(known, together, asked, seed=seed, owners=owners, trust=trust), shift

    def _chance(self, state: State, pool: list[Point], seed: int) -> Array:
        """[pool] chance of being within the budgets, from the trials of this model alone."""
        if state.feasible.all() or not state.feasible.any():
            return np.ones(len(pool))
        known = state.features(state.points)
        found = self._trees.predict(known, state.feasible.astype(np.float64), state.features(pool), seed=seed)
        return np.where(found.mean < UNLIKELY, LEAST_CHANCE, np.minimum(found.mean, 1.0))


def _trust(expected: Array, values: Array) -> float:
    """How much others' trials are worth: their correlation with ours, once there are enough of ours to tell."""
    if len(values) < ENOUGH:
        return 1.0
    if np.ptp(expected) == 0 or np.ptp(values) == 0:
        return 0.0
    return max(float(stats.spearmanr(expected, values).statistic), 0.0)


METHOD: type[Tuner] = Quantune
