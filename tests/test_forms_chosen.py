"""Which form every layer gets: the fastest within noise, time and other limits."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest

from quantkit.allocators._ilp import Limit
from quantkit.forms import (
    LATENCY_STEP,
    NOISE_ALLOWANCE,
    Option,
    choose_forms,
)
from quantkit.types import QuantSpec

SPEC = QuantSpec(4, 32)


def option(form: str, noise: float, milliseconds: float, float_ms: float = 1.0) -> Option:
    return Option(form, SPEC, noise, milliseconds, float_ms)


def forms(chosen: Mapping[str, Option]) -> list[str]:
    return [item.form for item in chosen.values()]


def test_with_a_latency_budget_the_most_accurate_that_fits() -> None:
    options = {name: [option("exact", 1e-6, 1.0), option("fast", 1e-4, 0.5)] for name in ("a", "b")}
    options["b"][1] = option("fast", 1e-3, 0.5)
    for budget, wanted in ((1.0, ["exact", "exact"]), (0.75, ["fast", "exact"]), (0.5, ["fast", "fast"])):
        assert forms(choose_forms(options, model_ms=2.0, max_latency=budget)) == wanted
    assert forms(choose_forms(options, model_ms=2.0, max_latency=0.1)) == ["fast", "fast"]  # the fastest there is


def test_time_outside_the_layers_cannot_be_saved() -> None:
    options = {"a": [option("exact", 1e-6, 1.0), option("fast", 1e-4, 0.5)]}
    assert forms(choose_forms(options, model_ms=10.0, max_latency=0.95)) == ["fast"]
    assert forms(choose_forms(options, model_ms=10.0, max_latency=1.0)) == ["exact"]


def test_without_a_budget_the_fastest_within_the_noise_allowance() -> None:
    close, far = NOISE_ALLOWANCE * 1e-4 * 0.99, NOISE_ALLOWANCE * 1e-4 * 1.01
    for noise, wanted in ((close, "fast"), (far, "exact")):
        options = {"a": [option("exact", 1e-4, 1.0), option("fast", noise, 0.5)]}
        assert forms(choose_forms(options, model_ms=None, max_latency=None)) == [wanted]
        assert forms(choose_forms(options, model_ms=5.0, max_latency=None)) == [wanted]
        assert forms(choose_forms(options, model_ms=None, max_latency=0.1)) == [wanted]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_of_equally_fast_forms_the_more_accurate(order: tuple[int, ...]) -> None:
    tied = [option("worse", 1.1e-4, 0.5), option("best", 1e-4, 0.51), option("worst", 1.2e-4, 0.49)]
    options = {"a": [tied[index] for index in order]}
    assert forms(choose_forms(options, model_ms=None, max_latency=None)) == ["best"]


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_noise_of_any_magnitude(scale: float) -> None:
    options = {str(unit): [option("exact", 1e-6 * scale, 1.0), option("fast", 1e-2 * scale, 0.5)] for unit in range(3)}
    options["0"][1] = option("fast", 2e-6 * scale, 0.5)
    options["1"][1] = option("fast", 3e-6 * scale, 0.5)
    assert forms(choose_forms(options, model_ms=3.0, max_latency=0.84)) == ["fast", "exact", "exact"]


def test_layers_that_were_not_measured_take_part_by_noise_only() -> None:
    options = {"a": [Option("qdq", SPEC, 1e-3, 0.0, 0.0)], "b": [option("exact", 1e-6, 1.0), option("fast", 1e-5, 0.5)]}
    assert forms(choose_forms(options, model_ms=None, max_latency=None)) == ["qdq", "fast"]


def test_no_layers() -> None:
    assert choose_forms({}, model_ms=1.0, max_latency=0.5) == {}
    assert choose_forms({}, model_ms=None, max_latency=None) == {}


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("max_latency", [None, 0.8])
def test_limits_are_kept_beside_the_time(seed: int, max_latency: float | None) -> None:
    """Against every choice of three layers with three forms each."""
    rng = np.random.default_rng(seed)
    options = {
        str(layer): [option(str(place), float(rng.uniform(1, 2)), float(rng.uniform(0.4, 1.2))) for place in range(3)]
        for layer in range(3)
    }
    amounts = [[float(rng.integers(1, 9)) for _ in range(3)] for _ in range(3)]
    bound = sum(sorted(row)[1] for row in amounts)
    found = choose_forms(
        options, model_ms=4.0, max_latency=max_latency, correction=1.03, limits=[Limit(amounts, bound)]
    )
    places = [int(item.form) for item in found.values()]
    assert sum(row[place] for row, place in zip(amounts, places, strict=True)) <= bound
    rows = list(options.values())
    every = [c for c in itertools.product(range(3), repeat=3) if sum(r[k] for r, k in zip(amounts, c)) <= bound]  # noqa: B905
    noise = {choice: sum(rows[unit][place].noise for unit, place in enumerate(choice)) for choice in every}
    time = {choice: sum(rows[unit][place].milliseconds for unit, place in enumerate(choice)) for choice in every}
    if max_latency is not None:
        allowed = [choice for choice in every if 1.03 * (1.0 + time[choice]) <= 4.0 * max_latency]
        if allowed:
            assert noise[tuple(places)] == pytest.approx(min(noise[choice] for choice in allowed))
        else:  # the fastest within the limit, but for steps of time
            assert time[tuple(places)] <= min(time.values()) + 3 * LATENCY_STEP
    else:
        assert noise[tuple(places)] <= NOISE_ALLOWANCE * min(noise.values()) * (1 + 1e-9)
        allowed = [choice for choice in every if noise[choice] <= NOISE_ALLOWANCE * min(noise.values())]
        assert time[tuple(places)] <= min(time[choice] for choice in allowed) + 3 * LATENCY_STEP


def test_a_limit_that_nothing_meets_is_met_as_nearly_as_possible() -> None:
    options = {"a": [option("exact", 1e-6, 1.0), option("fast", 1e-4, 0.5)]}
    for max_latency in (None, 0.6):
        for amounts, wanted in (([3.0, 5.0], "exact"), ([5.0, 3.0], "fast")):
            limit = Limit([amounts], 1.0)
            assert forms(choose_forms(options, model_ms=1.0, max_latency=max_latency, limits=[limit])) == [wanted]
