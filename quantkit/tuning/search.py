"""The loop of every tuner: propose, measure, learn; no point twice, the same points for the same seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from quantkit.errors import InputError
from quantkit.tuning.space import Point, Space
from quantkit.types import Array

DRAWN = 1024
BEST = 8
"""Points whose neighbourhoods are looked at in a large space."""
PATIENCE = 3
NONE_WITHIN = "no point that was tried is within the budget, and no other is expected to be"


@dataclass(frozen=True)
class Outcome:
    """What a trial showed.

    Attributes:
        value: the figure to make small, on a scale on which differences mean the same everywhere (a logarithm of a
            loss, points of accuracy); infinite = nothing was learnt.
        feasible: within every budget, and measured completely: only such trials can be best.
    """

    value: float
    feasible: bool = True


@dataclass(frozen=True)
class Others:
    """Trials of other models.

    Attributes:
        features: [n, f], the columns that this model's points have too.
        values: [n] made comparable: every model's figures have the mean 0 and the models' median deviation.
        owners: [n] which model, 0 or more.
    """

    features: Array
    values: Array
    owners: Array

    @classmethod
    def of(cls, models: Sequence[tuple[Array, Array]]) -> Others | None:
        """From each model's ([n, f] features, [n] values); values that are not finite and single ones tell nothing."""
        usable = [(features[np.isfinite(values)], values[np.isfinite(values)]) for features, values in models]
        usable = [pair for pair in usable if len(pair[1]) > 1 and np.ptp(pair[1]) > 0]
        if not usable:
            return None
        spread = float(np.median([values.std() for _, values in usable]))
        return cls(
            np.concatenate([features for features, _ in usable]),
            np.concatenate([(values - values.mean()) * spread / values.std() for _, values in usable]),
            np.concatenate([np.full(len(values), owner) for owner, (_, values) in enumerate(usable)]),
        )


Features = Callable[[Sequence[Point]], Array]


@dataclass(frozen=True)
class State:
    """What a tuner may look at.

    Attributes:
        points, outcomes: tried so far, in order.
        features: points -> [points, columns] float.
        allowed: whether a point can be within the budget at all.
        others: trials of other models; None = there are none.
        seed: of this run.
    """

    space: Space
    points: tuple[Point, ...]
    outcomes: tuple[Outcome, ...]
    features: Features
    allowed: Callable[[Point], bool]
    others: Others | None = None
    seed: int = 0

    @property
    def values(self) -> Array:
        return np.array([outcome.value for outcome in self.outcomes], np.float64)

    @property
    def feasible(self) -> Array:
        return np.array([outcome.feasible for outcome in self.outcomes], bool)

    @property
    def best(self) -> int | None:
        """Index of the best feasible trial, the first of equals."""
        values = np.where(self.feasible & np.isfinite(self.values), self.values, math.inf)
        return int(np.argmin(values)) if len(values) and math.isfinite(values.min()) else None

    def generator(self) -> np.random.Generator:
        """Random numbers that depend on the seed and on how many trials there were."""
        return np.random.default_rng([self.seed, len(self.points)])

    def untried(self) -> Iterator[Point]:
        """Every point that is allowed and was not tried, in the space's order."""
        tried = set(self.points)
        return (point for point in self.space if point not in tried and self.allowed(point))

    def candidates(self, rng: np.random.Generator) -> list[Point]:
        """Untried, allowed points to choose from: all of a small space, else random ones and those near the best."""
        if self.space.small:
            return list(self.untried())
        tried = set(self.points)
        found = dict.fromkeys(self.space.draw(rng, DRAWN))
        order = np.argsort(np.where(self.feasible, self.values, math.inf), kind="stable")
        for index in order[:BEST]:
            found.update(dict.fromkeys(self.space.neighbours(self.points[index])))
        return [point for point in found if point not in tried and self.allowed(point)]


@dataclass(frozen=True)
class Proposal:
    """What to try next.

    Attributes:
        points: different, untried, allowed; fewer than asked for (or none) when there are no more.
        gain: expected improvement of the best of them; None = the tuner has no opinion.
    """

    points: tuple[Point, ...]
    gain: float | None = None


class Tuner(Protocol):
    """Proposes points."""

    def propose(self, state: State, count: int) -> Proposal: ...


@dataclass(frozen=True)
class Limits:
    """When to stop.

    Attributes:
        trials: at most this many, those given first included.
        batch: measured at once.
        noise: gains below it, PATIENCE times in a row, end the search; 0 = never.
        enough: a feasible trial of at most this value ends it.
    """

    trials: int
    batch: int = 1
    noise: float = 0.0
    enough: float = -math.inf

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise InputError(f"trials must be at least 1, got {self.trials}")
        if self.batch < 1:
            raise InputError(f"batch must be at least 1, got {self.batch}")


@dataclass(frozen=True)
class Searched:
    """Every trial in order, and why there are no more."""

    points: tuple[Point, ...]
    outcomes: tuple[Outcome, ...]
    ended: str
    best: int | None


def search(
    state: State,
    tuner: Tuner,
    measure: Callable[[Sequence[Point]], Sequence[Outcome]],
    limits: Limits,
    first: Sequence[Point] = (),
) -> Searched:
    """Try `first`, then what the tuner proposes.

    Args:
        state: nothing tried yet.
        measure: points -> outcomes, in order.
    """
    points: list[Point] = []
    outcomes: list[Outcome] = []
    waiting = list(dict.fromkeys(state.space.canonical(point) for point in first))[: limits.trials]
    quiet, ended = 0, f"{limits.trials} trials were asked for"
    while len(points) < limits.trials:
        if waiting:
            batch, waiting = tuple(waiting[: limits.batch]), waiting[limits.batch :]
        else:
            now = _after(state, points, outcomes)
            proposal = tuner.propose(now, min(limits.batch, limits.trials - len(points)))
            _check(now, proposal)
            batch = proposal.points
            if not batch:
                ended = "every point within the budget was tried" if any(now.feasible) else NONE_WITHIN
                break
            quiet = quiet + 1 if proposal.gain is not None and proposal.gain < limits.noise else 0
            if quiet >= PATIENCE:
                ended = "no gain above the noise is expected any more"
                break
        outcomes.extend(measure(batch))
        points.extend(batch)
        if any(outcome.feasible and outcome.value <= limits.enough for outcome in outcomes[-len(batch) :]):
            ended = f"a trial reached {limits.enough:.4g}"
            break
    final = _after(state, points, outcomes)
    return Searched(final.points, final.outcomes, ended, final.best)


def _after(state: State, points: Sequence[Point], outcomes: Sequence[Outcome]) -> State:
    return replace(state, points=tuple(points), outcomes=tuple(outcomes))


def _check(state: State, proposal: Proposal) -> None:
    """A tuner that repeats itself wastes measurements: that is a bug of the tuner."""
    tried = set(state.points)
    repeated = [point for point in proposal.points if point in tried]
    if repeated or len(set(proposal.points)) != len(proposal.points):
        raise AssertionError(f"the tuner proposed {repeated or proposal.points} again")
