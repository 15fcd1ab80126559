"""One width for all layers under every budget and combination of budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import pytest

from quantkit.allocators.uniform import METHOD, Uniform
from quantkit.budget import Budget
from quantkit.types import AllocationProblem, Layout, Measurement, QuantizedWeight, QuantSpec, Target, Use

SHAPES = {"large": (64, 100), "small": (16, 32)}
WEIGHTS = sum(rows * columns for rows, columns in SHAPES.values())


def target(name: str, shape: tuple[int, int]) -> Target:
    data, weight = ir.val("x"), ir.val("w", const_value=ir.tensor(np.zeros(shape[::-1], np.float32)))
    use = Use(ir.node("MatMul", [data, weight]), 1, 0)
    return Target(name, "MatMul", (use,), weight, shape, 1, Layout(shape[::-1], shape[::-1], (1, 0)))


def size(item: Target, spec: QuantSpec) -> int:
    return item.shape[0] * item.shape[1] * spec.bits // 8


def no_quantizing(item: Target, spec: QuantSpec) -> QuantizedWeight:
    raise AssertionError("uniform looks at sizes and measurements only")


def problem(
    budget: Budget,
    *,
    bits: Mapping[str, Sequence[int]] | None = None,
    drops: Mapping[int, float] | None = None,
    tried: list[int] | None = None,
) -> AllocationProblem:
    """Two layers at 2 to 8 bits; `drops` says what a width costs, by the first layer's bits."""
    widths = bits or dict.fromkeys(SHAPES, range(8, 1, -1))

    def evaluate(chosen: Mapping[str, QuantSpec]) -> Measurement:
        assert drops is not None, "no accuracy budget, no measurement"
        assert set(chosen) == set(SHAPES)
        if tried is not None:
            tried.append(chosen["large"].bits)
        return Measurement(0, 30.0, drops[chosen["large"].bits], 1.0)

    return AllocationProblem(
        targets={name: target(name, shape) for name, shape in SHAPES.items()},
        stats={},
        candidates={name: tuple(QuantSpec(width, 32) for width in widths[name]) for name in widths},
        budget=budget,
        size=size,
        float_size=4 * WEIGHTS + 1000,
        fixed_size=1000,
        quantize=no_quantizing,
        evaluate=evaluate,
    )


def allocate(**arguments: Any) -> dict[str, int]:
    budget = cast(Budget, arguments.pop("budget"))
    return {name: spec.bits for name, spec in Uniform().allocate(problem(budget, **arguments)).items()}


def same(bits: int) -> dict[str, int]:
    return dict.fromkeys(SHAPES, bits)


def test_the_method_reads_no_statistics() -> None:
    assert METHOD is Uniform and Uniform().stats == frozenset()


def test_without_a_budget_all_layers_get_8_bits() -> None:
    assert allocate(budget=Budget()) == same(8)
    assert allocate(budget=Budget(), bits=dict.fromkeys(SHAPES, (3, 4))) == same(4)
    assert allocate(budget=Budget(max_latency=0.5)) == same(8)


@pytest.mark.parametrize(("average", "bits"), [(8.0, 8), (7.99, 7), (4.25, 4), (4.0, 4), (2.0, 2), (32.0, 8)])
def test_average_bits_round_down(average: float, bits: int) -> None:
    assert allocate(budget=Budget(avg_bits=average)) == same(bits)


def test_the_narrowest_width_when_nothing_fits() -> None:
    assert allocate(budget=Budget(avg_bits=1.0)) == same(2)
    assert allocate(budget=Budget(max_size=10)) == same(2)


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_the_size_counts_what_no_decision_changes(bits: int) -> None:
    exact = 1000 + WEIGHTS * bits // 8
    assert allocate(budget=Budget(max_size=exact)) == same(bits)
    assert allocate(budget=Budget(max_size=exact - 1)) == same(max(bits - 1, 2))


def test_a_size_may_be_a_share() -> None:
    assert allocate(budget=Budget(max_size=Fraction(1, 4))) == same(7)  # 1000 fixed bytes leave less than 8 bits
    assert allocate(budget=Budget(max_size=Fraction(3, 10))) == same(8)


def test_the_smallest_width_that_keeps_the_accuracy() -> None:
    tried: list[int] = []
    drops = {2: 0.4, 3: 0.02, 4: 0.01, 5: 0.0}
    assert allocate(budget=Budget(max_drop=0.01), drops=drops, tried=tried) == same(4)
    assert tried == [2, 3, 4]


def test_accuracy_within_a_size() -> None:
    drops = dict.fromkeys(range(2, 9), 0.5)
    assert allocate(budget=Budget(max_drop=0.01, max_size=1000 + WEIGHTS * 5 // 8), drops=drops) == same(5)
    drops |= {3: 0.0}
    assert allocate(budget=Budget(max_drop=0.01, max_size=1000 + WEIGHTS * 5 // 8), drops=drops) == same(3)


def test_both_size_and_average_must_hold() -> None:
    assert allocate(budget=Budget(avg_bits=6, max_size=1000 + WEIGHTS * 3 // 8)) == same(3)
    assert allocate(budget=Budget(avg_bits=3, max_size=1000 + WEIGHTS * 6 // 8)) == same(3)


def test_a_layer_without_the_width_takes_its_nearest_wider_one() -> None:
    bits = {"large": (8, 4, 2), "small": (8, 3)}
    found = allocate(budget=Budget(avg_bits=4.5), bits=bits)
    assert found == {"large": 4, "small": 8}
    # 2 bits for the large layer and 3 for the small one: their average by weights, not by layers, decides.
    average = (2 * 6400 + 3 * 512) / WEIGHTS
    assert allocate(budget=Budget(avg_bits=average), bits=bits) == {"large": 2, "small": 3}


def test_no_layers() -> None:
    assert allocate(budget=Budget(avg_bits=4), bits={"large": ()} | {"small": ()}) == {}
