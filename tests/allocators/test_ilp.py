"""The knapsack against trying every combination, at any magnitude of costs."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from itertools import pairwise
from threading import Thread

import numpy as np
import pytest

from quantkit.allocators import _highs
from quantkit.allocators._highs import quiet
from quantkit.allocators._ilp import Label, Limit, choose, infeasible, least, padded, solve_choice, total
from quantkit.allocators._lagrangian import choose_many
from tests.helpers.knapsack import by_dynamic_programming, cheapest

Instance = tuple[list[list[float]], list[Limit]]


def brute_force(costs: list[list[float]], limits: list[Limit]) -> float | None:
    return cheapest(costs, [(limit.amounts, limit.bound) for limit in limits])


def instance(seed: int, scale: float) -> Instance:
    """Up to 6 units of 1 to 5 options; two limits somewhere between impossible and free."""
    rng = np.random.default_rng(seed)
    sizes = [int(size) for size in rng.integers(1, 6, rng.integers(2, 7))]
    costs = [[float(cost) for cost in rng.uniform(0, 1, size) * scale] for size in sizes]
    limits = []
    for _ in range(2):
        amounts = [[float(amount) for amount in rng.uniform(0, 1, size)] for size in sizes]
        least, most = sum(min(row) for row in amounts), sum(max(row) for row in amounts)
        limits.append(Limit(amounts, float(rng.uniform(least - 0.1, most))))
    return costs, limits


def network(seed: int, units: int, options: int = 6) -> Instance:
    """As a network makes them: layers of very different size, losses that fall with the width, two budgets."""
    rng = np.random.default_rng(seed)
    bits = np.array([2, 3, 4, 5, 6, 8, 10, 12])[:options]
    weights = np.exp(rng.uniform(6, 12, units)).round()
    spread = np.exp(rng.uniform(0, 5, units))[:, None] * np.exp(rng.normal(0, 0.2, (units, options)))
    costs = (spread * 4.0**-bits).tolist()
    stored = (np.ceil(weights[:, None] * bits / 8) + rng.integers(0, 200, (units, options))).tolist()
    times = (weights[:, None] * bits * np.exp(rng.normal(0, 0.1, (units, options)))).tolist()
    return costs, [Limit(amounts, float(int(between(amounts, 0.3)))) for amounts in (stored, times)]


def between(amounts: list[list[float]], share: float) -> float:
    low, high = sum(map(min, amounts)), sum(map(max, amounts))
    return low + share * (high - low)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6, 1e-9, 1e6])
def test_the_choice_is_the_cheapest_at_every_scale(scale: float) -> None:
    """500 instances of two budgets."""
    infeasible = 0
    for seed in range(100):
        costs, limits = instance(seed, scale)
        wanted, found = brute_force(costs, limits), solve_choice(costs, limits)
        if wanted is None:
            infeasible += 1
            assert found is None
        else:
            assert found is not None and found.status == "optimal"
            assert all(total(limit.amounts, found.choice) <= limit.bound for limit in limits)
            assert found.cost == pytest.approx(wanted, rel=1e-9)
            assert found.bound <= wanted * (1 + 1e-9) and found.gap <= 1e-8
    assert 0 < infeasible < 80


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_that_of_dynamic_programming(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    costs = (rng.uniform(0, 1, (8, 4)) * scale).tolist()
    amounts = rng.integers(0, 400, (8, 4)).tolist()
    bound = int(between(amounts, 0.4))
    wanted = by_dynamic_programming(costs, amounts, bound)
    assert choose(costs, [Limit(amounts, bound)]) == wanted is not None


@pytest.mark.parametrize("spread", [1e-4, 1e-8, 1e-12])
def test_small_differences_count_beside_a_large_cost(spread: float) -> None:
    """One hopeless option must not hide what the others cost: HiGHS stops at differences of 1e-6."""
    rng = np.random.default_rng(0)
    costs = [[float(cost) for cost in rng.permutation([1.0, 2.0, 3.0]) * spread] + [1.0] for _ in range(6)]
    amounts = [[3.0, 2.0, 1.0, 0.0] for _ in costs]
    limits = [Limit(amounts, 11.0)]
    found = choose(costs, limits)
    assert found is not None
    assert total(costs, found) == pytest.approx(brute_force(costs, limits), rel=1e-9)


def test_costs_below_zero() -> None:
    costs = [[-5.0, 1.0], [2.0, -3.0]]
    limits = [Limit([[1.0, 0.0], [0.0, 1.0]], 1.0)]
    assert choose(costs, limits) == [0, 0]
    assert choose(costs) == [0, 1]
    found = solve_choice(costs)
    assert found is not None and found.cost == found.bound == -8.0


@pytest.mark.parametrize("bound", [1e-9, 1.0, 1e12])
def test_a_limit_that_fits_exactly(bound: float) -> None:
    amounts = [[bound / 2, bound], [bound / 2, bound]]
    assert choose([[1.0, 0.0], [1.0, 0.0]], [Limit(amounts, bound)]) == [0, 0]
    just_below = bound * (1 - 1e-7)
    assert choose([[1.0, 0.0], [1.0, 0.0]], [Limit(amounts, just_below)]) is None


def test_a_sum_that_only_rounding_lifts_over_the_limit() -> None:
    assert 0.1 + 0.1 + 0.1 > 0.3
    assert choose([[0.0, 1.0]] * 3, [Limit([[0.1, 0.05]] * 3, 0.3)]) == [0, 0, 0]


@pytest.mark.parametrize("seed", range(6))
def test_a_limit_is_kept_to_the_last_byte(seed: int) -> None:
    """Files of 50 MB and one unit of them: a millionth of the limit is many bytes."""
    rng = np.random.default_rng(seed)
    costs = rng.uniform(0, 1, (6, 3)).tolist()
    amounts = (10_000_000 + rng.integers(0, 40, (6, 3))).tolist()
    for bound in range(60_000_080, 60_000_160, 10):
        found = choose(costs, [Limit(amounts, bound)])
        wanted = brute_force(costs, [Limit(amounts, bound)])
        assert (found is None) == (wanted is None)
        if found is not None:
            assert sum(row[pick] for row, pick in zip(amounts, found, strict=True)) <= bound
            assert total(costs, found) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("cuts", [40, 0])
@pytest.mark.parametrize("seed", range(8))
def test_choices_a_hair_over_a_limit_are_cut_off(seed: int, cuts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best choices are within 1e-9 of the limit, closer than HiGHS looks, and about half of them exceed it."""
    monkeypatch.setattr(_highs, "CUTS", cuts)
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 3, (7, 3)) / 2
    costs = (0.1 * rng.uniform(0, 1, (7, 3)) - base).tolist()
    limit = Limit((base + 1e-10 * rng.standard_normal((7, 3))).tolist(), 4.0)
    found, wanted = solve_choice(costs, [limit]), brute_force(costs, [limit])
    assert found is not None and wanted is not None
    assert total(limit.amounts, found.choice) <= limit.bound
    assert found.bound <= wanted + 1e-9 and found.cost >= wanted - 1e-12
    if cuts:
        assert found.status == "optimal" and found.cost == pytest.approx(wanted, rel=1e-12)
    else:
        assert found.status == "feasible" and found.gap <= 1


def test_nothing_fits() -> None:
    assert choose([[1.0], [2.0]], [Limit([[1.0], [1.0]], 1.5)]) is None
    assert choose([[1.0, 0.0]], [Limit([[0.0, 9.0]], 5.0), Limit([[9.0, 0.0]], 5.0)]) is None
    assert choose([[np.inf, np.inf]]) is None


def test_nothing_to_choose() -> None:
    assert choose([]) == []
    assert choose([[0.0], [0.0]], [Limit([[0.0], [0.0]], 0.0)]) == [0, 0]


def test_options_that_do_not_exist() -> None:
    assert choose([[np.inf, 1.0], [3.0, np.inf]]) == [1, 0]
    assert choose([[0.0, 1.0], [0.0, 1.0]], [Limit([[np.inf, 1.0], [1.0, 0.0]], 2.0)]) == [1, 0]


def test_the_same_input_gives_the_same_choice() -> None:
    costs = [[1.0, 1.0, 1.0] for _ in range(8)]
    limits = [Limit([[1.0, 2.0, 3.0] for _ in costs], 16.0)]
    assert choose(costs, limits) == choose(costs, limits) == [0] * 8


def test_of_equally_cheap_choices_the_one_that_uses_less_is_taken() -> None:
    """Two units may take their cheap option, and all four gain the same: the smallest two do."""
    costs = [[1.0, 0.0]] * 4
    sizes = [[0.0, 40.0], [0.0, 20.0], [0.0, 30.0], [0.0, 10.0]]
    assert choose(costs, [Limit(sizes, 79.0)]) == [0, 1, 1, 1]
    assert choose(costs, [Limit(sizes, 59.0)]) == [0, 1, 0, 1]
    assert choose(costs[::-1], [Limit(sizes[::-1], 59.0)]) == [1, 0, 1, 0]


@pytest.mark.parametrize("seed", range(4))
def test_a_larger_budget_never_costs_more(seed: int) -> None:
    costs, (stored, _) = network(seed, 20)
    found = []
    for share in np.linspace(0, 1, 12):
        bound = between([list(row) for row in stored.amounts], share)
        solution = solve_choice(costs, [Limit(stored.amounts, bound)])
        assert solution is not None and total(stored.amounts, solution.choice) <= bound
        found.append(solution.cost)
    assert all(after <= before for before, after in pairwise(found))
    assert found[-1] == pytest.approx(sum(map(min, costs)), rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_a_dominated_option_changes_nothing_and_order_is_carried_over(seed: int) -> None:
    costs, limits = network(seed, 15)
    found = choose(costs, limits)
    assert found is not None
    worse = [[*row, row[2] * 1.01] for row in costs]
    wider = [Limit([[*row, row[2]] for row in limit.amounts], limit.bound) for limit in limits]
    assert choose(worse, wider) == found
    order = np.random.default_rng(seed).permutation(len(costs))
    moved = [Limit([limit.amounts[unit] for unit in order], limit.bound) for limit in limits]
    assert choose([costs[unit] for unit in order], moved) == [found[unit] for unit in order]


@pytest.mark.parametrize("seed", range(4))
def test_one_price_lies_above_and_the_bound_below(seed: int) -> None:
    costs, limits = network(seed, 25)
    found = solve_choice(costs, limits)
    assert found is not None and found.status == "optimal" and found.gap <= 1e-8
    priced = choose_many(padded(costs), [padded(limit.amounts) for limit in limits], [limit.bound for limit in limits])
    assert priced is not None
    assert found.bound <= found.cost <= total(costs, priced.tolist())


def test_large_problems_are_solved_to_a_stated_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    costs, limits = network(0, 40)
    exact = solve_choice(costs, limits)
    monkeypatch.setattr(_highs, "EXACT_UNITS", 30)
    near = solve_choice(costs, limits)
    assert exact is not None and near is not None
    assert exact.cost <= near.cost * (1 + 1e-12) and near.gap <= 1.1e-6
    assert near.bound <= exact.cost * (1 + 1e-9)


def test_the_smallest_bounds() -> None:
    costs, limits = network(0, 10)
    assert least(limits[0]) == sum(map(min, limits[0].amounts))
    tight = Limit(limits[1].amounts, between([list(row) for row in limits[1].amounts], 0.05))
    smallest = least(limits[0], [tight])
    assert smallest is not None and smallest >= sum(map(min, limits[0].amounts))
    assert choose(costs, [Limit(limits[0].amounts, smallest), tight]) is not None
    assert choose(costs, [Limit(limits[0].amounts, smallest - 1), tight]) is None
    assert least(limits[0], [Limit([[1.0] * 6] * 10, 5.0)]) is None


SIZE, SPEED, BITS = Label("--max-size", " bytes", fixed=1000), Label("--max-latency", "x", per=8), Label("--avg-bits")


def test_a_budget_that_cannot_be_met_is_told_the_smallest_that_can() -> None:
    amounts = [[250.0, 500.0], [260.0, 600.0]]
    assert infeasible([Limit(amounts, 510.0)], [SIZE]) is None
    assert infeasible([Limit(amounts, 509.0)], [SIZE]) == (
        "--max-size 1509 bytes cannot be met: the smallest possible is 1510 bytes"
    )
    assert infeasible([Limit(amounts, 509.0), Limit([[1.0, 2.0], [2 / 3, 9.0]], 1.5)], [SIZE, SPEED]) == (
        "--max-size 1509 bytes cannot be met: the smallest possible is 1510 bytes; "
        "--max-latency 0.1875x cannot be met: the smallest possible is 0.208334x"
    )
    assert infeasible([], []) is None


def test_budgets_that_clash_are_told_what_each_would_have_to_be() -> None:
    sizes, times, free = [[100.0, 300.0]] * 2, [[8.0, 2.0]] * 2, [[4.0, 4.0]] * 2
    limits = [Limit(sizes, 250.0), Limit(free, 100.0), Limit(times, 8.0)]
    assert choose([[0.0, 0.0]] * 2, limits) is None
    assert infeasible(limits, [SIZE, BITS, SPEED]) == (
        "--max-size 1250 bytes and --max-latency 1x cannot be met together: with the rest as it is, "
        "--max-size would have to be 1600 bytes, or --max-latency would have to be 2x"
    )


@pytest.mark.parametrize("seed", range(8))
def test_what_the_sentence_names_can_be_met(seed: int) -> None:
    rng = np.random.default_rng(seed)
    amounts = rng.uniform(0.1, 1, (4, 3)).tolist()
    sentence = infeasible([Limit(amounts, 0.1)], [BITS])
    assert sentence is not None
    named = float(sentence.rpartition(" ")[2])
    assert choose(amounts, [Limit(amounts, named)]) is not None
    assert choose(amounts, [Limit(amounts, named * (1 - 1e-4))]) is None


PRINTING = """
import ctypes, os, sys
from quantkit.allocators._highs import quiet
library = ctypes.CDLL(None)
library.puts(b"before")
with quiet():
    library.puts(b"HighsMipSolverData::something")
    os.write(1, b"from elsewhere\\n")
    library.puts(b"Highs again")
print("after")
"""


def test_what_the_solver_prints_does_not_reach_the_output() -> None:
    shown = subprocess.run([sys.executable, "-c", PRINTING], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines() == ["before", "from elsewhere", "after"]
    assert shown.stderr == ""


def test_threads_leave_the_output_where_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    costs, limits = network(1, 12)
    found: list[list[int] | None] = []
    threads = [Thread(target=lambda: found.append(choose(costs, limits))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [choose(costs, limits)] * 4
    ctypes.CDLL(None).puts(b"still here")
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out == "still here\n"


def test_without_an_output_nothing_is_redirected() -> None:
    code = "import os; os.close(1)\nfrom quantkit.allocators._ilp import choose\nassert choose([[1.0, 0.0]]) == [1]"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_errors_pass_through() -> None:
    with pytest.raises(ZeroDivisionError), quiet():
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), quiet():  # the lock was given back
        raise ZeroDivisionError
