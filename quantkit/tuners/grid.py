"""Points in dictionary order, the last dimension changing fastest."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from quantkit.tuning.search import Proposal, State, Tuner


@dataclass(frozen=True)
class Grid:
    """No settings."""

    def propose(self, state: State, count: int) -> Proposal:
        return Proposal(tuple(islice(state.untried(), count)))


METHOD: type[Tuner] = Grid
