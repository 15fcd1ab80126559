"""Pair terms: exact where they must be, used on held-out evidence only; accuracy budgets by bisection."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from quantkit.allocators._pairs import cost_of
from quantkit.allocators._table import joined, losses, scored, total, units_of, weights_of
from quantkit.allocators.interlayer import METHOD, Evidence, Interlayer, augmented
from quantkit.allocators.measured import Measured
from quantkit.budget import Budget
from quantkit.errors import InputError
from quantkit.graph.load import load_model
from quantkit.graph.targets import find_targets
from quantkit.network import Network
from quantkit.quantizers.rtn import RTN
from quantkit.runtime.probe import Probe
from quantkit.types import AllocationProblem, Measurement, QuantizedWeight, QuantSpec, Target
from tests.helpers.models import build, random

# Outputs of rank 3 are compared by squared error, so that a loss is quadratic in the weights where layers are parallel.
PARALLEL = """g (float[N,2,16] x, float[N,2,16] z, float[16,16] w1, float[16,16] w2, float[16,16] w3, float[16,16] w4)
              => (float[N,2,16] y) {
    a = MatMul(x, w1)
    b = MatMul(z, w2)
    c = Add(a, b)
    d = MatMul(x, w3)
    e = Add(c, d)
    f = MatMul(z, w4)
    y = Add(e, f)
}"""
TOWERS = """g (float[N,2,16] x, float[N,2,16] z, float[16,16] w1, float[16,16] w2)
            => (float[N,2,16] y, float[N,2,16] v) {
    y = MatMul(x, w1)
    v = MatMul(z, w2)
}"""
CHAIN = """g (float[N,16] x, float[16,16] w1, float[16,16] w2, float[16,16] w3, float[16,16] w4, float[16,16] w5)
           => (float[N,16] y) {
    a = MatMul(x, w1)
    ar = Relu(a)
    b = MatMul(ar, w2)
    bs = Add(b, a)
    c = MatMul(bs, w3)
    cr = Relu(c)
    d = MatMul(cr, w4)
    ds = Add(d, c)
    y = MatMul(ds, w5)
}"""
NETWORKS: Mapping[str, tuple[str, Mapping[str, tuple[int, int]]]] = {
    "parallel": (PARALLEL, {f"w{layer}": (16, 16) for layer in range(1, 5)}),
    "towers": (TOWERS, {"w1": (16, 16), "w2": (16, 16)}),
    "chain": (CHAIN, {**{f"w{layer}": (16, 16) for layer in range(1, 5)}, "w5": (16, 16)}),
}
WIDTHS = (8, 4, 3, 2)


def rounded(target: Target, spec: QuantSpec) -> QuantizedWeight:
    return RTN().quantize(target.load(), spec, None)


def stored(target: Target, spec: QuantSpec) -> int:
    return spec.bits * math.prod(target.shape) // 8


def refuse(chosen: Mapping[str, QuantSpec], name: str = "") -> Measurement:
    raise AssertionError("nothing is emitted here")


def problem(name: str, budget: Budget | None = None, **changes: Any) -> AllocationProblem:
    text, shapes = NETWORKS[name]
    # Parallel layers of proportional weights make proportional errors, which add up far from independently.
    alike = name == "parallel"
    weights = {
        key: (2 + 0.01 * place) * random(*shape, seed=0 if alike else place)
        for place, (key, shape) in enumerate(shapes.items())
    }
    model = load_model(build(text, weights)).model
    targets = find_targets(model)[0]
    rng = np.random.default_rng(3)
    inputs = {str(value.name): (2, 16) if name != "chain" else (16,) for value in model.graph.inputs}
    probes = [
        Probe(
            model,
            targets,
            [{key: rng.standard_normal((24, *shape)).astype(np.float32) for key, shape in inputs.items()}],
        )
        for _ in range(2)
    ]
    fields: dict[str, Any] = {
        "targets": targets,
        "stats": {},
        "candidates": {key: tuple(QuantSpec(bits, 8) for bits in WIDTHS) for key in targets},
        "budget": budget or Budget(avg_bits=3.5),
        "size": stored,
        "float_size": 4 * sum(math.prod(target.shape) for target in targets.values()) + 100,
        "fixed_size": 100,
        "quantize": rounded,
        "evaluate": refuse,
        "network": Network(*probes, macs=1000),
    }
    return AllocationProblem(**{**fields, **changes})


def table_of(made: AllocationProblem) -> list[list[float]]:
    units = units_of(made)
    return losses(units, scored(made, units, "measured", Measured()).raw)


def test_sums_with_pair_terms_are_exact_for_a_quadratic_loss() -> None:
    made = problem("parallel")
    units, table = units_of(made), table_of(made)
    assert made.network is not None and len(units) == 4
    terms = Interlayer(window=3).terms(made, units, table)
    assert len(terms) == 6
    wrong = 0
    for choice in itertools.product(range(len(WIDTHS)), repeat=4):
        true = made.network.calibration.loss(weights_of(made, joined(units, choice)))
        assert cost_of(table, terms, choice) == pytest.approx(true, rel=1e-5, abs=1e-7)
        wrong += abs(total(table, choice) - true) > 0.02 * true
    assert wrong > 100  # and without them they are not


def test_terms_of_independent_towers_vanish() -> None:
    made = problem("towers")
    (term,) = Interlayer().terms(made, units_of(made), table := table_of(made)).values()
    assert np.abs(term).max() < 1e-6 * max(map(max, table))


def test_terms_do_not_depend_on_the_order_of_units() -> None:
    made = problem("chain")
    units, table = units_of(made), table_of(made)
    forward = Interlayer(window=4).terms(made, units, table)
    backward = Interlayer(window=4).terms(made, units[::-1], table[::-1])
    last = len(units) - 1
    for (u, v), block in forward.items():
        np.testing.assert_allclose(block, backward[last - v, last - u].T, rtol=0, atol=1e-5 * max(map(max, table)))


def test_the_window_says_who_is_a_neighbour() -> None:
    made = problem("chain")
    terms = Interlayer(window=1).terms(made, units_of(made), table_of(made))
    assert set(terms) == {(0, 1), (1, 2), (2, 3), (3, 4)}


def test_one_width_is_carried_over_by_the_size_of_errors() -> None:
    """Where not every pair of widths is affordable; at the width that was measured it is the same."""
    made = problem("parallel")
    units, table = units_of(made), table_of(made)
    whole = Interlayer().terms(made, units, table)
    scaled = Interlayer(affordable=0, reference_bits=3).terms(made, units, table)
    errors = []
    for unit in units:
        weight = made.targets[unit.name].load()
        errors.append([np.linalg.norm(weights_of(made, option)[unit.name] - weight) for option in unit.options])
    for (u, v), block in whole.items():
        assert scaled[u, v][1, 1] == pytest.approx(block[1, 1], abs=1e-12)  # 3 bits
        wanted = block[1, 1] * errors[u][3] * errors[v][0] / (errors[u][1] * errors[v][1])
        assert scaled[u, v][3, 0] == pytest.approx(wanted, rel=1e-5)


def test_half_of_the_terms_is_added_to_each_unit() -> None:
    made = problem("parallel")
    units = units_of(made)
    table = [[1.0, 2.0, 3.0, 4.0]] * 3
    table.append([5.0] * 4)
    seen = augmented(units, table, {(0, 2): np.arange(16.0).reshape(4, 4)})
    assert seen == [[1.0, 4.5, 8.0, 11.5], [1.0, 2.0, 3.0, 4.0], [1.0, 4.5, 8.0, 11.5], [5.0] * 4]


def test_terms_are_used_where_they_predict_better() -> None:
    made = problem("parallel")
    found = Interlayer(window=3).allocate(made)
    assert found.notes[0].startswith("pair terms of 6 pairs of neighbours used: with them, the rank correlation on ")
    assert set(found) == set(made.targets) and set(found.scores) == {"interlayer", "measured"}
    units, terms = units_of(made), Interlayer(window=3).terms(made, units_of(made), table_of(made))
    picked = [unit.options.index({unit.name: found[unit.name]}) for unit in units]
    assert found.predicted == pytest.approx(cost_of(table_of(made), terms, picked), rel=1e-12)
    assert sum(found[name].bits * math.prod(made.targets[name].shape) for name in found) <= 3.5 * 4 * 16 * 16
    assert made.network is not None
    alone = Measured().allocate(made)
    held_out = made.network.held_out
    assert held_out.loss(weights_of(made, found)) <= held_out.loss(weights_of(made, alone))
    assert found.front[0].size < found.front[-1].size
    assert Interlayer(window=3).allocate(problem("parallel")).specs == found.specs


def test_terms_are_left_out_where_they_do_not() -> None:
    """Two units have too few assignments; terms that are noise lose against none."""
    made = problem("towers")
    found = Interlayer().allocate(made)
    assert dict(found) == dict(Measured().allocate(made))
    made = problem("chain")
    units, table = units_of(made), table_of(made)
    noise = {
        pair: block + 3 * np.random.default_rng(1).standard_normal(block.shape)
        for pair, block in Interlayer().terms(made, units, table).items()
    }
    evidence = Interlayer().evidence(made, units, table, noise)
    assert not evidence.accepted and evidence.errors[1] > evidence.errors[0]
    assert "7 pairs of neighbours left out: with them, the rank correlation" in evidence.sentence(len(noise))


def test_what_counts_as_evidence() -> None:
    better, worse = (0.5, 0.4), (0.4, 0.5)
    assert Evidence(5, (0.7, 0.8), better).accepted and Evidence(5, (0.7, 0.7), better).accepted
    assert not Evidence(5, (0.8, 0.7), better).accepted
    assert not Evidence(5, (0.7, 0.8), worse).accepted
    few = Evidence(4, (0.7, 0.8), better)
    assert not few.accepted
    assert few.sentence(2) == "pair terms of 2 pairs of neighbours left out: too few assignments to judge them by"


def test_the_file_that_is_really_made_fits() -> None:
    made = problem("parallel", Budget(max_size=600))

    def file_size(specs: Mapping[str, QuantSpec]) -> int:
        return 160 + sum(stored(made.targets[name], spec) for name, spec in specs.items())

    found = Interlayer().allocate(replace(made, file_size=file_size))
    assert file_size(found) <= 600


@dataclass
class Judge:
    """Measures plans: layers drop 4^(2 - bits) / 2, weighted by what they lose at 2 bits, and there is noise."""

    made: AllocationProblem
    noise: float = 0.0

    def __post_init__(self) -> None:
        self.asked: list[tuple[tuple[int, ...], bool]] = []
        narrow = [row[0] for row in table_of(self.made)]
        self.importance = [loss / sum(narrow) for loss in narrow]

    def __call__(self, chosen: Mapping[str, QuantSpec], name: str = "") -> Measurement:
        bits = tuple(chosen[key].bits for key in self.made.targets)
        drop = sum(share * 2 ** (3 - 2 * width) for share, width in zip(self.importance, bits, strict=True))
        drop *= 1 + self.noise * math.sin(sum(7 * width**2 * layer for layer, width in enumerate(bits, 1)))
        limit = self.made.budget.max_drop
        assert limit is not None
        self.asked.append((bits, drop <= limit))
        size = 100 + sum(stored(self.made.targets[key], spec) for key, spec in chosen.items())
        return Measurement(size, 30.0, drop, 1.0)


@pytest.fixture(scope="module")
def chain() -> AllocationProblem:
    """What is found out about it once is kept."""
    return problem("chain")


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("worst", [0.00005, 0.005, 0.025, 0.1, 0.3, 0.8])
def test_an_accuracy_is_kept_and_few_are_measured(chain: AllocationProblem, worst: float, noise: float) -> None:
    made = replace(chain, budget=Budget(max_drop=worst))
    judge = Judge(made, noise)
    method = Interlayer()
    found = method.allocate(replace(made, evaluate=judge))
    bits = tuple(found[name].bits for name in made.targets)
    kept = [widths for widths, holds in judge.asked if holds]
    if not kept:
        assert bits == (8,) * 5 and "no configuration keeps the accuracy" in found.notes[1]
        return
    assert bits in kept and sum(bits) <= sum(min(kept, key=sum))
    assert len({widths for widths, _ in judge.asked}) == len(judge.asked)
    # The start, and for each of three lower widths ceil(log2 5) + 1 and what is verified.
    assert len(judge.asked) <= 1 + 3 * (math.ceil(math.log2(5)) + 1 + method.verified)
    assert f"{len(judge.asked)} configurations were measured" in found.notes[1]
    assert noise or (sum(bits) < 5 * 8 and (sum(bits) == 10 or worst < 0.8))


def test_accuracy_and_size_together(chain: AllocationProblem) -> None:
    made = replace(chain, budget=Budget(max_drop=0.4, max_size=520))
    judge = Judge(made)
    found = Interlayer().allocate(replace(made, evaluate=judge))
    measured = judge(found)
    assert measured.drop <= 0.4 and measured.size <= 520


def test_what_needs_no_measuring() -> None:
    made = problem("parallel", Budget())
    assert {spec.bits for spec in Interlayer().allocate(made).values()} == {8}
    assert dict(Interlayer().allocate(replace(made, candidates={}))) == {}


def test_settings() -> None:
    assert METHOD is Interlayer
    for name in ("window", "reference_bits"):
        with pytest.raises(InputError, match=rf"interlayer\.{name} must be at least 1, got 0"):
            Interlayer(**{name: 0})
    with pytest.raises(InputError, match=r"interlayer\.assignments must be at least 5, got 4"):
        Interlayer(assignments=4)
    with pytest.raises(InputError, match=r"interlayer\.verified must be at least 0, got -1"):
        Interlayer(verified=-1)
    with pytest.raises(InputError, match="the allocator interlayer needs calibration data: give --calib"):
        Interlayer().allocate(problem("parallel", network=None))
