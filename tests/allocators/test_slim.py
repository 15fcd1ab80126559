"""Widths for groups across layers: budgets met to within a group, never worse than uniform, more bits less loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from quantkit.allocators.slim import METHOD, Slim
from quantkit.allocators.uniform import Uniform
from quantkit.budget import Budget
from quantkit.costs.size import layer_bytes
from quantkit.errors import InputError
from quantkit.quantizers.rtn import RTN
from quantkit.types import (
    AllocationProblem,
    Array,
    LayerStats,
    Layout,
    Measurement,
    QuantizedWeight,
    QuantSpec,
    Target,
    Use,
)

# (N, K): of 16 inputs a group, one with a shorter last group, one layer that a single group holds.
SHAPES = {"wide": (40, 96), "short": (24, 72), "table": (64, 16)}
WEIGHTS = sum(rows * columns for rows, columns in SHAPES.values())
WIDTHS = (8, 6, 5, 4, 3, 2)


def target(name: str, shape: tuple[int, int], weight: Array) -> Target:
    data, value = ir.val("x"), ir.val("w", const_value=ir.tensor(np.ascontiguousarray(weight.T)))
    use = Use(ir.node("MatMul", [data, value]), 1, 0)
    return Target(name, "MatMul", (use,), value, shape, 1, Layout(shape[::-1], shape[::-1], (1, 0)))


def problem(budget: Budget, *, widths: Sequence[int] = WIDTHS, **changes: Any) -> AllocationProblem:
    """Three layers whose inputs differ in size from group to group; `table` was never seen by calibration."""
    rng = np.random.default_rng(0)
    targets, stats = {}, {}
    for name, shape in SHAPES.items():
        weight = rng.standard_normal(shape).astype(np.float32) * (0.1 if name == "short" else 1)
        targets[name] = target(name, shape, weight)
        rows = rng.standard_normal((200, shape[1])) * np.exp(1.5 * np.sin(np.arange(shape[1]) / 7))
        gram = (rows.T @ rows / 200)[None]
        stats[name] = LayerStats(200, -1, 1, gram=gram)
    del stats["table"]
    fields: dict[str, Any] = {
        "targets": targets,
        "stats": stats,
        "candidates": {name: tuple(QuantSpec(bits, 16) for bits in widths) for name in SHAPES},
        "budget": budget,
        "size": layer_bytes,
        "float_size": 4 * WEIGHTS + 1000,
        "fixed_size": 1000,
        "quantize": quantize,
        "evaluate": no_measuring,
    }
    return AllocationProblem(**{**fields, **changes})


def quantize(item: Target, spec: QuantSpec) -> QuantizedWeight:
    return RTN().quantize(item.load(), spec, None)


def no_measuring(chosen: Mapping[str, QuantSpec]) -> Measurement:
    raise AssertionError("only an accuracy budget needs measurements")


def average(specs: Mapping[str, QuantSpec]) -> float:
    return sum(spec.average_bits(SHAPES[name][1]) * np.prod(SHAPES[name]) for name, spec in specs.items()) / WEIGHTS


def size(found: Mapping[str, QuantSpec]) -> int:
    items = problem(Budget()).targets
    return 1000 + sum(layer_bytes(items[name], spec) for name, spec in found.items())


def loss(specs: Mapping[str, QuantSpec]) -> float:
    """What is minimised, written out: relative output errors of the groups, scaled to the quantizer's at its own width.

    The quantizer here is plain rounding at every width, which the allocator knows only at the uniform one: comparisons
    hold to within what searched ranges change.
    """
    made, total = problem(Budget()), 0.0
    for name, spec in specs.items():
        weight = made.targets[name].load().astype(np.float64)
        error = quantize(made.targets[name], spec).dequantize() - weight
        gram = made.stats[name].gram[0] if name in made.stats else np.eye(weight.shape[1])  # type: ignore[index]
        for start in range(0, weight.shape[1], 16):
            columns = slice(start, start + 16)
            block = error[:, columns]
            total += np.trace(block @ gram[columns, columns] @ block.T) / np.trace(weight @ gram @ weight.T)
    return total


SOLVERS = [Slim(), Slim(exact_groups=0)]


@pytest.mark.parametrize("solver", SOLVERS, ids=["exact", "priced"])
@pytest.mark.parametrize("bits", [2.0, 2.5, 3.0, 3.3, 4.0, 4.25, 5.75, 7.9])
def test_averages_are_met_to_within_one_group(solver: Slim, bits: float) -> None:
    found = solver.allocate(problem(Budget(avg_bits=bits)))
    assert set(found) == set(SHAPES)
    assert average(found) <= bits + 1e-9
    largest_step = 2 * 64 * 16 / WEIGHTS  # two bits more for the largest group: from 6 to 8
    assert average(found) > bits - largest_step
    for name, spec in found.items():
        assert set(spec.widths(SHAPES[name][1]).tolist()) <= set(WIDTHS)
        assert spec.group_size == 16 and abs(spec.bits - spec.average_bits(SHAPES[name][1])) <= 0.5


@pytest.mark.parametrize("solver", SOLVERS, ids=["exact", "priced"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_less_loss_than_uniform_at_the_same_average(solver: Slim, bits: int) -> None:
    made = problem(Budget(avg_bits=bits))
    found, uniform = solver.allocate(made), Uniform().allocate(made)
    assert average(found) <= average(uniform) + 1e-9
    assert bits == 2 or loss(found) < 0.9 * loss(uniform)  # at the narrowest width there is nothing to trade


def test_a_larger_budget_never_raises_the_loss() -> None:
    losses = [loss(Slim().allocate(problem(Budget(avg_bits=bits)))) for bits in np.arange(2, 6.5, 0.5)]
    assert all(after < before for before, after in pairwise(losses))


@pytest.mark.parametrize("solver", SOLVERS, ids=["exact", "priced"])
@pytest.mark.parametrize("limit", [5100, 5400, 6000, 7000, 8000])
def test_sizes_are_met_in_bytes_and_used(solver: Slim, limit: int) -> None:
    found = solver.allocate(problem(Budget(max_size=limit)))
    assert size(found) <= limit
    assert size(found) > limit - 900  # places of groups, nodes for further widths, and one group's step


def test_both_budgets_hold() -> None:
    found = Slim().allocate(problem(Budget(avg_bits=4.5, max_size=5600)))
    assert size(found) <= 5600 and average(found) <= 4.5
    tight = Slim().allocate(problem(Budget(avg_bits=3, max_size=50_000)))
    assert average(tight) <= 3


def operations(item: Target, spec: QuantSpec | None) -> int:
    weights = SHAPES[item.name][0] * SHAPES[item.name][1]
    return round(32 * weights * (32 if spec is None else spec.average_bits(SHAPES[item.name][1])))


def time_of(item: Target, spec: QuantSpec | None) -> float:
    """Milliseconds: what is 4 bits or narrower throughout is twice as fast; a tenth is gained below 8."""
    if spec is None:
        return 1.0
    widest = int(spec.widths(SHAPES[item.name][1]).max())
    return 0.5 if widest <= 4 else 0.9 if widest < 8 else 1.0


@pytest.mark.parametrize("share", [0.08, 0.11, 0.17, 0.24])
def test_bit_operations_are_met_and_used(share: float) -> None:
    whole = sum(operations(item, None) for item in problem(Budget()).targets.values())
    budget = Budget(max_bops=round(share * whole))
    made = problem(budget, bops=operations)
    found = Slim().allocate(made)
    count = sum(operations(made.targets[name], spec) for name, spec in found.items())
    assert 0.95 * share * whole < count <= share * whole
    assert loss(found) <= loss(dict.fromkeys(SHAPES, QuantSpec(int(32 * share), 16))) * 1.01


def test_operations_that_cannot_be_kept_get_the_narrowest() -> None:
    made = problem(Budget(max_bops=10), bops=operations)
    assert Slim().allocate(made) == dict.fromkeys(SHAPES, QuantSpec(2, 16))


def test_a_predicted_time_is_kept() -> None:
    made = problem(Budget(avg_bits=6, max_latency=0.6), milliseconds=time_of, model_ms=3.0)
    found = Slim().allocate(made)
    assert sum(time_of(made.targets[name], spec) for name, spec in found.items()) <= 0.6 * 3
    assert average(found) > 3
    corrected = replace(made, correction=0.8, budget=Budget(avg_bits=6, max_latency=0.75))
    wider = Slim().allocate(corrected)
    assert 0.8 * sum(time_of(made.targets[name], spec) for name, spec in wider.items()) <= 0.75 * 3
    assert average(wider) > average(found)


def test_a_time_that_nothing_keeps_costs_no_bits() -> None:
    plain = problem(Budget(avg_bits=5))
    made = replace(plain, budget=Budget(avg_bits=5, max_latency=0.1), milliseconds=time_of, model_ms=3.0)
    assert Slim().allocate(made) == Slim().allocate(plain)
    whole = sum(operations(item, None) for item in made.targets.values())
    both = replace(made, bops=operations, budget=replace(made.budget, max_bops=round(0.11 * whole)))
    found = Slim().allocate(both)
    assert 0.1 * whole < sum(operations(made.targets[name], spec) for name, spec in found.items()) <= 0.11 * whole


def test_without_a_budget_all_is_8_bits_and_nothing_is_computed() -> None:
    def refuse(item: Target, spec: QuantSpec) -> QuantizedWeight:
        raise AssertionError("there is nothing to choose")

    found = Slim().allocate(problem(Budget(), quantize=refuse))
    assert found == dict.fromkeys(SHAPES, QuantSpec(8, 16))
    assert Slim().allocate(problem(Budget(), candidates={})) == {}


def test_a_budget_below_the_narrowest_width_gets_the_narrowest() -> None:
    assert Slim().allocate(problem(Budget(avg_bits=1.0))) == dict.fromkeys(SHAPES, QuantSpec(2, 16))
    assert Slim().allocate(problem(Budget(max_size=1100))) == dict.fromkeys(SHAPES, QuantSpec(2, 16))


def test_groups_that_matter_get_more_bits() -> None:
    """Of one layer, the groups whose inputs are large; the layer's own size does not matter: errors are relative."""
    made = problem(Budget(avg_bits=4))
    found = Slim().allocate(made)
    gram = made.stats["wide"].gram
    assert gram is not None
    energy = np.add.reduceat(np.diagonal(gram[0]), np.arange(0, 96, 16))
    labels = np.array(found["wide"].group_bits)
    assert labels[energy.argmax()] == labels.max() > labels.min() == labels[energy.argmin()]


def test_layers_keep_widths_they_have() -> None:
    candidates = {name: tuple(QuantSpec(bits, 16) for bits in WIDTHS) for name in SHAPES}
    candidates["short"] = (QuantSpec(8, -1, symmetric=True, act_bits=8), QuantSpec(4, -1, symmetric=True, act_bits=8))
    found = Slim().allocate(problem(Budget(avg_bits=4.5), candidates=candidates))
    assert found["short"] in candidates["short"]


@pytest.mark.parametrize("worst", [0.001, 0.02, 0.3])
def test_an_accuracy_is_kept_with_the_fewest_bits(worst: float) -> None:
    tried: list[float] = []

    def evaluate(chosen: Mapping[str, QuantSpec]) -> Measurement:
        tried.append(average(chosen))
        return Measurement(0, 30.0, 2.0 ** -average(chosen), 1.0)

    found = Slim().allocate(problem(Budget(max_drop=worst), evaluate=evaluate))
    wanted = -np.log2(worst)
    assert average(found) >= min(wanted, 8.0) - 1e-9 or average(found) == 8.0
    assert average(found) <= min(max(wanted, 2) + 0.5, 8.0)
    assert len(tried) <= 6


def test_every_proposal_is_quantized_once() -> None:
    """Uniform, widths by group, widths by layer; allocating again costs nothing."""
    asked: list[tuple[str, QuantSpec]] = []

    def counted(item: Target, spec: QuantSpec) -> QuantizedWeight:
        asked.append((item.name, spec))
        return quantize(item, spec)

    solver, made = Slim(), problem(Budget(avg_bits=4.3), quantize=counted)
    first = solver.allocate(made)
    assert asked[:3] == [(name, QuantSpec(4, 16)) for name in SHAPES]
    assert len(asked) == len(set(asked)) <= 3 * len(SHAPES)
    before = len(asked)
    assert solver.allocate(made) == first and len(asked) == before


@pytest.mark.parametrize("spoiled", [True, False])
def test_the_least_real_loss_wins(spoiled: bool) -> None:
    """Whatever was predicted: a quantizer that is bad at groups of different widths gets one width."""

    def quantizer(item: Target, spec: QuantSpec) -> QuantizedWeight:
        made = quantize(item, spec)
        alike = len(set(spec.widths(item.shape[1]).tolist())) == 1
        return made if alike or not spoiled else replace(made, scales=made.scales * 3)

    found = Slim().allocate(problem(Budget(avg_bits=4), quantize=quantizer))
    assert any(spec.group_bits for spec in found.values()) != spoiled
    assert loss(found) <= loss(dict.fromkeys(SHAPES, QuantSpec(4, 16)))


def test_settings() -> None:
    assert METHOD is Slim and "gram" in Slim().stats
    with pytest.raises(InputError, match=r"slim\.exact_groups must be at least 0, got -1"):
        Slim(exact_groups=-1)
