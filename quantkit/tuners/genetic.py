"""A genetic algorithm: tournament selection among the best trials, uniform crossover, mutation, no point twice."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from quantkit.errors import InputError
from quantkit.tuning.search import Proposal, State, Tuner
from quantkit.tuning.space import Point

ATTEMPTS = 50


@dataclass(frozen=True)
class Genetic:
    """Settings.

    Attributes:
        population: the best trials so far, from which parents come; as many random trials come first.
        mutation: probability that a gene is drawn anew.
        tournament: trials among which the better becomes a parent.
    """

    population: int = 8
    mutation: float = 0.1
    tournament: int = 2

    def __post_init__(self) -> None:
        if self.population < 2 or self.tournament < 1:
            raise InputError(
                "genetic.population must be at least 2 and genetic.tournament at least 1, "
                f"got {self.population} and {self.tournament}"
            )
        if not 0 <= self.mutation <= 1:
            raise InputError(f"genetic.mutation must be at least 0 and at most 1, got {self.mutation}")

    def propose(self, state: State, count: int) -> Proposal:
        rng = state.generator()
        found: list[Point] = []
        if len(state.points) >= self.population:
            values = np.where(state.feasible, state.values, math.inf)
            parents = [state.points[index] for index in np.argsort(values, kind="stable")[: self.population]]
            found = self._children(state, parents, rng, count)
        if len(found) < count:
            pool = [point for point in state.candidates(rng) if point not in found]
            found += [pool[index] for index in rng.permutation(len(pool))[: count - len(found)]]
        return Proposal(tuple(found))

    def _children(self, state: State, parents: list[Point], rng: np.random.Generator, count: int) -> list[Point]:
        """New points from the parents, which are sorted; fewer where all that come up were tried."""
        tried = set(state.points)
        found: list[Point] = []
        sizes = [len(dimension.values) for dimension in state.space.dimensions]
        for _ in range(ATTEMPTS * count):
            first, second = (parents[int(rng.integers(len(parents), size=self.tournament).min())] for _ in range(2))
            genes = np.where(rng.random(len(sizes)) < 0.5, first, second)
            mutated = np.where(rng.random(len(sizes)) < self.mutation, rng.integers(0, sizes), genes)
            child = state.space.canonical(tuple(int(gene) for gene in mutated))
            if child not in tried and state.allowed(child):
                tried.add(child)
                found.append(child)
                if len(found) == count:
                    break
        return found


METHOD: type[Tuner] = Genetic
