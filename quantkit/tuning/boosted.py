"""Gradient-boosted trees as a surrogate: xgboost, several times over resampled trials."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xgboost

from quantkit.tuning.surrogate import Prediction, scale
from quantkit.types import Array

OURS = -1
"""Owner of the trials of the model in question."""


@dataclass(frozen=True)
class Boosted:
    """Gradient-boosted trees, several times over resampled trials (bagging): their spread is the doubt.

    Attributes:
        members: boosters.
        rounds, rate, gamma, depth: of each; `rate` and `gamma` are xgboost's eta and gamma.
    """

    members: int = 8
    rounds: int = 60
    rate: float = 0.3
    gamma: float = 0.0
    depth: int = 4

    def predict(
        self,
        known: Array,
        values: Array,
        asked: Array,
        *,
        seed: int,
        owners: Array | None = None,
        trust: float = 1.0,
    ) -> Prediction:
        """Train on [n, f] -> [n], predict [m, f].

        Args:
            trust: how much a trial of another model counts, against 1 for one of OURS.
            owners: [n] which model a trial belongs to: whole models are drawn, because what differs from model to
                model is the doubt that counts; OURS are always there. None = single trials are drawn.
        """
        rng = np.random.default_rng(seed)
        data = xgboost.DMatrix(asked)
        rows = []
        for member in range(self.members):
            drawn = np.ones(len(values)) if self.members == 1 else _drawn(rng, len(values), owners)
            if owners is not None:
                drawn = np.where(owners == OURS, drawn, trust * drawn)
            centre, spread = scale(values, drawn)
            train = xgboost.DMatrix(known, label=(values - centre) / spread, weight=drawn)
            booster = xgboost.train(self._settings(seed + member), train, self.rounds)
            rows.append(booster.predict(data).astype(np.float64) * spread + centre)
        table = np.stack(rows)
        return Prediction(table.mean(axis=0), table.std(axis=0))

    def _settings(self, seed: int) -> dict[str, Any]:
        return {
            "objective": "reg:squarederror",
            "eta": self.rate,
            "gamma": self.gamma,
            "max_depth": self.depth,
            "tree_method": "exact",
            "nthread": 1,
            "seed": seed % 2**31,
            "base_score": 0.0,
            "verbosity": 0,
        }


def _drawn(rng: np.random.Generator, count: int, owners: Array | None) -> Array:
    """[n] how often each trial was drawn, with replacement."""
    if owners is None:
        return rng.multinomial(count, np.full(count, 1 / count)).astype(np.float64)
    names, places = np.unique(owners, return_inverse=True)
    others = names != OURS
    number = int(others.sum())
    times = np.ones(len(names))
    if number:
        times[others] = rng.multinomial(number, np.full(number, 1 / number))
    return np.asarray(times[places], np.float64)
