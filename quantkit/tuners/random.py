"""Points at random, none twice: what every other tuner has to beat."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.tuning.search import Proposal, State, Tuner


@dataclass(frozen=True)
class Random:
    """No settings."""

    def propose(self, state: State, count: int) -> Proposal:
        rng = state.generator()
        pool = state.candidates(rng)
        order = rng.permutation(len(pool))[:count]
        return Proposal(tuple(pool[index] for index in order))


METHOD: type[Tuner] = Random
