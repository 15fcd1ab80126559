"""The default allocator: the best-predicting estimator is believed, uniform is never beaten by less, budgets hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from quantkit.allocators._judge import assignments, clearly_better, judge
from quantkit.allocators._table import Allocation, Scores, joined, limits, units_of
from quantkit.allocators.auto import ENDS, METHOD, Auto
from quantkit.allocators.measured import Measured
from quantkit.allocators.uniform import Uniform
from quantkit.budget import Budget
from quantkit.errors import InputError
from quantkit.types import AllocationProblem, Array, FloatArray, Measurement, QuantSpec
from tests.allocators.test_slim import SHAPES, average, problem

# How much a squared rounding error of each layer costs.
IMPORTANCE = {"wide": 1.0, "short": 4000.0, "table": 30.0}


def true_loss(made: AllocationProblem, weights: Mapping[str, FloatArray]) -> float:
    """A network whose loss is a weighted sum of squared rounding errors."""
    return sum(
        IMPORTANCE[name] * float(np.square(weight - made.targets[name].load(), dtype=np.float64).sum())
        for name, weight in weights.items()
    )


@dataclass(frozen=True)
class FakeProbe:
    """Takes the place of the network."""

    made: AllocationProblem
    feeds: tuple[dict[str, Array], ...] = ({"x": np.zeros((4, 2), np.float32)},)

    def loss(self, weights: Mapping[str, FloatArray]) -> float:
        return true_loss(self.made, weights)

    def losses(self, trials: Mapping[tuple[str, ...], Any], progress: object) -> list[list[float]]:
        return [[self.loss(weights) for weights in trial()] for trial in trials.values()]


@dataclass(frozen=True)
class FakeNetwork:
    calibration: FakeProbe
    held_out: FakeProbe
    macs: int = 1


@dataclass
class Evaluator:
    """Measures what a plan really loses; remembers what was asked."""

    made: AllocationProblem
    loss: Callable[[str, Mapping[str, QuantSpec], float], float] = lambda name, specs, loss: loss
    samples: Callable[[str], tuple[float, ...]] = lambda name: ()
    asked: list[tuple[str, dict[str, QuantSpec]]] = field(default_factory=list)

    def __call__(self, specs: Mapping[str, QuantSpec], name: str = "trial") -> Measurement:
        self.asked.append((name, dict(specs)))
        weights = {key: self.made.quantize(self.made.targets[key], spec).dequantize() for key, spec in specs.items()}
        loss = true_loss(self.made, weights)
        size = self.made.fixed_size + sum(self.made.size(self.made.targets[key], spec) for key, spec in specs.items())
        return Measurement(size, 0.0, loss / 1e6, 1.0, self.loss(name, specs, loss), sample_losses=self.samples(name))


def ready(budget: Budget, **settings: Any) -> tuple[AllocationProblem, Evaluator]:
    plain = problem(budget)
    evaluator = Evaluator(plain, **settings)
    probe: Any = FakeProbe(plain)
    network: Any = FakeNetwork(probe, probe)
    return replace(plain, network=network, evaluate=evaluator), evaluator


def test_the_estimator_that_predicts_best_decides() -> None:
    made, evaluator = ready(Budget(avg_bits=4))
    found = Auto().allocate(made)
    assert isinstance(found, Allocation) and average(found) <= 4 + 1e-9
    assert next(iter(found.scores)) == "measured"
    # the layer that matters most gets more bits than the one that matters least
    assert found["short"].bits > found["wide"].bits
    assert found.notes and found.notes[0].startswith("bits by measured, which predicted random assignments best (")
    losses = {name: evaluator(specs).loss for name, specs in (("auto", found), ("uniform", Uniform().allocate(made)))}
    assert losses["auto"] < 0.8 * losses["uniform"]
    assert found.predicted == pytest.approx(losses["auto"], rel=0.2)


def same(specs: Mapping[str, QuantSpec]) -> bool:
    return len({spec.bits for spec in specs.values()}) == 1


def test_uniform_wins_where_it_is_measured_to_lose_less() -> None:
    best = Auto().allocate(ready(Budget(avg_bits=4))[0])
    least = ready(Budget(avg_bits=4))[1](best).loss
    for factor, wins in ((0.999, True), (1.001, False)):
        made, evaluator = ready(
            Budget(avg_bits=4), loss=lambda name, specs, loss, factor=factor: factor * least if same(specs) else loss
        )
        assert same(Auto().allocate(made)) == wins
        assert [name for name, _ in evaluator.asked] == ["bits by measured", "uniform"]


def test_others_have_to_win_clearly() -> None:
    ends = ENDS
    best = Auto().allocate(ready(Budget(avg_bits=7))[0])
    least = ready(Budget(avg_bits=7))[1](best).loss
    for factor, wins in ((0.95, False), (0.85, True)):
        made, evaluator = ready(
            Budget(avg_bits=7), loss=lambda name, specs, loss, factor=factor: factor * least if name == ends else loss
        )
        found = Auto().allocate(made)
        (other,) = [specs for name, specs in evaluator.asked if name == ends]
        assert (dict(found) == other) == wins and other != dict(best)


@pytest.mark.parametrize(("luck", "wins"), [(0.01, True), (5.0, False)])
def test_a_win_by_one_sample_is_luck(luck: float, wins: bool) -> None:
    """A fifth less on average: on all samples alike, or on one of ten."""
    ends = "8 bits at both ends"
    best = Auto().allocate(ready(Budget(avg_bits=7))[0])
    least = ready(Budget(avg_bits=7))[1](best).loss
    gains = np.full(10, 0.2) + luck * np.array([1.0] + 9 * [-1 / 9])
    made, evaluator = ready(
        Budget(avg_bits=7),
        loss=lambda name, specs, loss: 0.8 * least if name == ends else loss,
        samples=lambda name: tuple(least * (1 - gains)) if name == ends else (least,) * 10,
    )
    found = Auto().allocate(made)
    (other,) = [specs for name, specs in evaluator.asked if name == ends]
    assert (dict(found) == other) == wins


def test_differences_are_taken_sample_by_sample() -> None:
    def of(*losses: float) -> Measurement:
        return Measurement(1, 0.0, 0.0, 1.0, float(np.mean(losses)), sample_losses=losses)

    assert clearly_better(of(1.0, 9.0, 5.0), of(1.5, 9.4, 5.6))
    assert not clearly_better(of(1.0, 9.0, 5.0), of(0.9, 9.4, 4.9))
    assert not clearly_better(of(1.0, 9.0, 5.0), of(1.0, 9.0, 5.0))
    # Without samples that belong together, the means alone.
    assert clearly_better(of(1.0), of(1.1)) and clearly_better(of(1.0, 2.0), of(1.0, 2.0, 3.0))
    assert clearly_better(of(1.0, 2.0), of(math.inf, 2.0)) and not clearly_better(of(math.inf, 2.0), of(1.0, 2.0))
    assert not clearly_better(of(math.inf, 2.0), of(math.inf, 2.0))


def test_sizes_hold_in_bytes() -> None:
    made, evaluator = ready(Budget(max_size=6500))
    found = Auto().allocate(made)
    assert evaluator(found).size <= 6500
    assert all(evaluator(specs).size <= 6500 for name, specs in list(evaluator.asked) if name != "trial")


def test_nothing_to_choose_is_uniform_and_measures_nothing() -> None:
    for budget in (Budget(), Budget(avg_bits=8), Budget(max_size=10**6)):
        made, evaluator = ready(budget)
        found = Auto().allocate(made)
        assert {spec.bits for spec in found.values()} == {8} and not evaluator.asked and not made.known
    blind = replace(ready(Budget(avg_bits=3))[0], network=None)
    assert {spec.bits for spec in Auto().allocate(blind).values()} == {3}


def test_an_accuracy_is_kept_by_the_smallest_point_of_the_front() -> None:
    made, evaluator = ready(Budget(max_drop=1e-3))
    found = Auto().allocate(made)
    assert evaluator(found).drop <= 1e-3
    smaller = [point for point in found.front if point.size < evaluator(found).size]
    assert len(smaller) >= 2
    assert all(evaluator(point.specs).drop > 1e-3 for point in smaller[-2:])
    assert [point.size for point in found.front] == sorted(point.size for point in found.front)
    assert [point.loss for point in found.front] == sorted((point.loss for point in found.front), reverse=True)


@pytest.fixture(autouse=True)
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The made-up network here has no gradients."""
    monkeypatch.setattr("quantkit.allocators.auto.has_torch", lambda: False)


def test_gradients_stand_in_where_measuring_costs_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.allocators.auto.has_torch", lambda: True)
    monkeypatch.setattr("quantkit.allocators.auto.Fisher", Measured)
    found = Auto(affordable=1.0).allocate(ready(Budget(avg_bits=4))[0])
    assert set(found.scores) == {"salience", "fisher"}


def test_tables_that_cost_too_much_are_not_made() -> None:
    made, _ = ready(Budget(avg_bits=4))
    found = Auto(affordable=1.0).allocate(made)
    assert set(found.scores) == {"salience"} and set(made.known) == {"salience"}


def test_the_same_seed_gives_the_same_choice() -> None:
    first, second = (Auto().allocate(ready(Budget(avg_bits=3.5))[0]) for _ in range(2))
    assert dict(first) == dict(second) and first.predicted == second.predicted


def test_random_assignments_use_the_budget_and_differ() -> None:
    made, _ = ready(Budget(avg_bits=4))
    units = units_of(made)
    choices = assignments(made, units, 8)
    assert len({tuple(choice) for choice in choices}) == len(choices) >= 3
    (limit,) = limits(made, units)
    used = [sum(row[at] for row, at in zip(limit.amounts, choice, strict=True)) / limit.bound for choice in choices]
    assert max(used) <= 1 + 1e-9 and np.median(used) > 0.8
    assert assignments(replace(made, seed=1), units, 8) != choices


def test_verdicts() -> None:
    made, _ = ready(Budget(avg_bits=4))
    units = units_of(made)
    rng = np.random.default_rng(0)
    raw = {unit.name: tuple(np.sort(rng.exponential(size=len(unit.options)))[::-1]) for unit in units}
    choices = [[int(rng.integers(len(unit.options))) for unit in units] for _ in range(30)]
    sums = np.array([sum(raw[unit.name][at] for unit, at in zip(units, choice, strict=True)) for choice in choices])
    exact = judge(units, raw, choices, 3 * sums)
    assert exact.rank == pytest.approx(1) and exact.error == pytest.approx(0, abs=1e-9)
    assert exact.scale == pytest.approx(3) and exact.ratio == pytest.approx(1 / 3)
    inverted = judge(units, raw, choices, 1 / sums)
    assert inverted.rank == pytest.approx(-1) and inverted.error > 0.1
    noise = judge(units, raw, choices, rng.exponential(size=30))
    assert abs(noise.rank) < 0.5 and noise.error > exact.error
    assert exact.judged and inverted.judged and noise.judged
    # Too few, or all the same: no verdict; what sums are in nats is known all the same.
    for few in (
        judge(units, raw, choices[:2], 3 * sums[:2]),
        judge(units, raw, choices[:1] * 5, 3 * sums[:1].repeat(5)),
    ):
        assert not few.judged and few.error == math.inf and few.scale == pytest.approx(3)
    alike = judge(units, raw, choices, np.ones(30))
    assert not alike.judged and math.isnan(judge(units, raw, [], np.ones(0)).scale)
    flat = judge(units, {unit.name: (1.0,) * len(unit.options) for unit in units}, choices, sums)
    assert flat.error == math.inf and flat.rank == 0
    assert joined(units, choices[0]).keys() == SHAPES.keys()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"assignments": 2}, "auto.assignments must be at least 3, got 2"),
        ({"contenders": 0}, "auto.contenders must be at least 1, got 0"),
        ({"margin": 1.0}, "auto.margin must be at least 0 and below 1, got 1.0"),
    ],
)
def test_wrong_settings(settings: Mapping[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        METHOD(**settings)


def test_scores_of_another_kind_are_scaled_to_nats() -> None:
    made, evaluator = ready(Budget(avg_bits=4))
    found = Auto(affordable=1.0).allocate(made)
    plain: Scores = made.known["salience"]
    scaled = found.scores["salience"]
    assert not plain.nats and scaled.nats and scaled.quantity == f"nats per sample, scaled from {plain.quantity}"
    factors = {loss / plain.raw[name][at] for name, row in scaled.raw.items() for at, loss in enumerate(row)}
    assert max(factors) == pytest.approx(min(factors), rel=1e-12) and found.scale == 1.0
    assert found.predicted == pytest.approx(evaluator(found).loss, rel=2.0)
    assert {(point.estimator, point.quantity, point.nats) for point in found.front} == {
        ("salience", scaled.quantity, True)
    }
    for point in found.front:
        assert point.loss == pytest.approx(found.expected(point.specs), rel=1e-9)
    assert found.notes[0].startswith("bits by salience (on random assignments, salience: rank correlation ")


def test_the_front_is_in_nats() -> None:
    """Losses of single layers add up in the made-up network, so that the front tells what plans really lose."""
    made, evaluator = ready(Budget(avg_bits=4))
    found = Auto().allocate(made)
    assert {(point.estimator, point.quantity, point.nats) for point in found.front} == {
        ("measured", "nats per sample", True)
    }
    for point in found.front:
        assert point.loss == pytest.approx(evaluator(point.specs).loss, rel=0.05)
        assert point.loss == pytest.approx(found.expected(point.specs), rel=1e-9)


def test_the_sentence_and_the_figures_are_of_the_plan_that_was_kept() -> None:
    """The second estimator's plan is measured to lose less: its name, its figures and its front."""
    sentences = {}
    for winner in ("bits by measured", "bits by salience", "uniform", ENDS):
        made, evaluator = ready(
            Budget(avg_bits=6.6), loss=lambda name, specs, loss, winner=winner: 1.0 if name == winner else 2.0
        )
        found = Auto(contenders=3).allocate(made)
        kept = next(specs for name, specs in evaluator.asked if name == winner)
        assert dict(found) == kept
        sentences[winner] = found.notes[0].partition(" (")[0]
        by = winner.removeprefix("bits by ") if winner.startswith("bits by ") else "measured"
        assert next(iter(found.scores)) == by == found.front[0].estimator
        assert found.predicted == found.expected(kept) is not None
        assert dict(found.front[-1].specs) == next(specs for name, specs in evaluator.asked if name == f"bits by {by}")
    best = "bits by measured, which predicted random assignments best"
    assert sentences == {
        "bits by measured": best,
        "bits by salience": f"bits by salience, measured to lose less than {best}",
        "uniform": f"one width everywhere, measured to lose less than {best}",
        ENDS: f"first and last layer at 8 bits, one width between them, measured to lose less than {best}",
    }


def test_a_plan_that_alone_fits_is_not_said_to_lose_less() -> None:
    made, evaluator = ready(Budget(max_size=6500))

    def measured(more: Mapping[str, int]) -> Callable[..., Measurement]:
        def evaluate(specs: Mapping[str, QuantSpec], name: str = "trial") -> Measurement:
            figures = evaluator(specs, name)
            return replace(figures, size=figures.size + more[name])

        return evaluate

    for sizes, words in (
        ({"bits by measured": 9999, "bits by salience": 0, "uniform": 0, ENDS: 0}, "to be within the budget, unlike"),
        ({"bits by measured": 9999, "bits by salience": 9990, "uniform": 9999, ENDS: 9999}, "to take fewer bytes than"),
    ):
        notes = Auto(margin=0.0).allocate(replace(made, evaluate=measured(sizes))).notes
        assert f"measured {words} bits by measured, which predicted random assignments best (" in notes[0]


def test_an_accuracy_that_nothing_keeps_is_told() -> None:
    found = Auto().allocate(ready(Budget(max_drop=1e-12))[0])
    assert {spec.bits for spec in found.values()} == {8}
    assert found.notes[0].startswith(
        "every layer at its widest, as nothing that was measured keeps the accuracy, instead of bits by measured, which"
    )
    kept = Auto().allocate(ready(Budget(max_drop=1e-3))[0])
    assert kept.notes[0].startswith("bits by measured, which predicted random assignments best (")
    assert kept.predicted == kept.expected(kept.specs)


def test_a_front_that_is_asked_for_changes_nothing_else() -> None:
    for budget in (Budget(), Budget(avg_bits=8), Budget(max_size=10**6)):
        made, evaluator = ready(budget)
        plain, found = Auto().allocate(made), Auto().allocate(replace(made, front=True))
        assert dict(found) == dict(plain) and found.scores == plain.scores == {} and not evaluator.asked
        assert len(found.front) >= 5 and plain.front == () and plain.notes == ()
        assert {spec.bits for spec in found.front[0].specs.values()} == {2}
        assert {spec.bits for spec in found.front[-1].specs.values()} == {8}
        assert {(point.estimator, point.nats) for point in found.front} == {("measured", True)}
        assert found.notes[0].startswith("the front is by measured, which predicted random assignments best (")
    # Without a network to try anything on, by figures that only compare layers.
    blind = Auto().allocate(replace(ready(Budget(avg_bits=3))[0], network=None, front=True))
    assert {spec.bits for spec in blind.values()} == {3} and len(blind.front) >= 2
    assert {(point.estimator, point.quantity, point.nats) for point in blind.front} == {
        ("salience", "relative squared output error", False)
    }


def test_one_width_is_too_little_to_judge_by() -> None:
    made, _ = ready(Budget(max_drop=0.9))
    one = {name: tuple(spec for spec in specs if spec.bits == 5) for name, specs in made.candidates.items()}
    found = Auto().allocate(replace(made, candidates=one))
    assert found.notes[0] == "bits by linearity; too few different assignments to judge the estimators by"
    assert len(assignments(made, units_of(replace(made, candidates=one)), 8)) == 1
