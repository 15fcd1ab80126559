"""Made-up tables of recipes to search in."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from quantkit.tuning.search import Limits, Others, Outcome, Searched, State, Tuner, search
from quantkit.tuning.space import Dimension, Point, Space

SPACE = Space(
    (
        Dimension("bits", (2, 3, 4, 5), ordered=True),
        Dimension("scheme", ("a", "b", "c")),
        Dimension("clipping", ("max", "kl")),
        Dimension("bias", (False, True)),
    )
)
Figure = Callable[[Point], float]


def bumpy(seed: int) -> Figure:
    """Additive, one value for each level, and a little of pairs."""
    rng = np.random.default_rng(seed)
    levels = [rng.standard_normal(len(dimension.values)) for dimension in SPACE.dimensions]
    pairs = 0.2 * rng.standard_normal((4, 3))
    return lambda point: float(
        sum(level[index] for level, index in zip(levels, point, strict=True)) + pairs[point[0], point[1]]
    )


def everywhere(point: Point) -> bool:
    return True


def start(
    *, seed: int = 0, allowed: Callable[[Point], bool] = everywhere, others: Others | None = None, space: Space = SPACE
) -> State:
    return State(space, (), (), space.encode, allowed, others, seed)


def run(
    tuner: Tuner, figure: Figure, limits: Limits, state: State | None = None, first: Sequence[Point] = ()
) -> Searched:
    return search(state or start(), tuner, lambda points: [Outcome(figure(point)) for point in points], limits, first)
