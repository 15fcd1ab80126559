"""Words about estimators say what the figures say, and figures are brought to nats where that is known."""

from __future__ import annotations

import math

import pytest

from quantkit.allocators._findings import UNJUDGED, Findings
from quantkit.allocators._judge import Verdict
from quantkit.allocators._table import Scores, losses, units_of
from quantkit.budget import Budget
from tests.allocators.tables import make, table_of

NAMES = ("linearity", "measured", "salience")


def findings(*errors: float, scale: float = 2.0, margin: float = 0.1) -> Findings:
    units = units_of(make(Budget(avg_bits=4)))
    scores = {
        name: Scores(table_of(units, place), f"{name}'s", nats=name != "salience")
        for place, name in enumerate(NAMES[: len(errors)])
    }
    verdicts = {name: Verdict(0.5, error, math.nan, scale) for name, error in zip(scores, errors, strict=True)}
    return Findings(scores, verdicts, margin)


def test_the_best_is_called_best() -> None:
    found = findings(0.1, 0.5, 0.9)
    assert found.ranking == NAMES
    assert found.sentence("bits by linearity", "unused") == (
        "bits by linearity, which predicted random assignments best (linearity: rank correlation 0.50, off by 11 %; "
        "measured: rank correlation 0.50, off by 65 %; salience: rank correlation 0.50, off by 146 %)"
    )


@pytest.mark.parametrize(
    ("errors", "best", "words"),
    [
        ((0.842, 0.837, 2.0), "linearity", "about as well as measured"),  # 132 % and 131 %: the order of trust decided
        ((0.837, 0.842, 2.0), "linearity", "about as well as measured"),
        ((1.0, 0.95, 0.9), "linearity", "about as well as salience and measured"),
        ((1.0, 0.9, 2.0), "measured", "best"),
        ((1.0, 1.0, 0.5), "salience", "best"),
    ],
)
def test_near_equals_are_called_so(errors: tuple[float, ...], best: str, words: str) -> None:
    found = findings(*errors)
    assert found.ranking[0] == best
    assert found.judgement().startswith(f", which predicted random assignments {words} (")


def test_what_could_not_be_judged_is_told_without_figures() -> None:
    found = findings(math.inf, math.inf, math.inf)
    assert found.ranking == NAMES
    assert found.sentence("bits by linearity", "") == f"bits by linearity; {UNJUDGED}"
    assert found.sentence("one width everywhere", "measured to lose less than") == (
        f"one width everywhere, measured to lose less than bits by linearity; {UNJUDGED}"
    )
    flat = findings(0.2, math.inf)
    assert flat.judgement().endswith("off by 22 %; measured: the same for all of them)")
    assert "inf" not in flat.judgement() and "nan" not in flat.judgement()
    assert findings(0.2).judgement() == " (on random assignments, linearity: rank correlation 0.50, off by 22 %)"


def test_figures_of_another_quantity_are_scaled() -> None:
    found = findings(0.1, 0.5, 0.9)
    assert found.in_nats("measured") is found.scores["measured"]
    scaled, plain = found.in_nats("salience"), found.scores["salience"]
    assert scaled.nats and scaled.quantity == "nats per sample, scaled from salience's"
    assert scaled.raw == {unit: tuple(2 * loss for loss in row) for unit, row in plain.raw.items()}
    assert found.rest("measured") == 2.0 and found.rest("salience") == 1.0
    unknown = findings(0.1, 0.5, 0.9, scale=math.nan)
    assert unknown.in_nats("salience") is unknown.scores["salience"]
    assert unknown.rest("salience") is None and unknown.rest("measured") == 1.0


@pytest.mark.parametrize(("scale", "factor"), [(2.0, 2.0), (math.nan, 1.0)])
@pytest.mark.parametrize("name", NAMES)
def test_the_front_says_who_predicted_it_and_in_what(name: str, scale: float, factor: float) -> None:
    made = make(Budget(avg_bits=4))
    units = units_of(made)
    found = findings(0.1, 0.5, 0.9, scale=scale)
    points = found.front(made, units, name)
    wanted = found.in_nats(name)
    assert {(point.estimator, point.quantity, point.nats) for point in points} == {(name, wanted.quantity, wanted.nats)}
    assert wanted.nats == (name != "salience" or scale == 2.0)
    least = sum(min(row) for row in losses(units, found.scores[name].raw))
    assert len(points) >= 5 and all(point.loss >= factor * least for point in points)
    for point in points:
        loss = sum(
            found.scores[name].raw[unit.name][unit.options.index({unit.name: point.specs[unit.name]})] for unit in units
        )
        assert point.loss == pytest.approx(factor * loss, rel=1e-9)
