"""Layers with widths, and tables of their losses."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from quantkit.allocators._table import (
    Scores,
    Unit,
)
from quantkit.budget import Budget
from quantkit.types import AllocationProblem, Layout, QuantSpec, Target, Use

SHAPES = {"a": (32, 96), "b": (16, 32), "c": (48, 48), "d": (8, 64)}
WEIGHTS = sum(rows * columns for rows, columns in SHAPES.values())
WIDTHS = (2, 3, 4, 6, 8)
FIXED = 777


def target(name: str, shape: tuple[int, int]) -> Target:
    data, weight = ir.val("x"), ir.val("w", const_value=ir.tensor(np.zeros(shape[::-1], np.float32)))
    use = Use(ir.node("MatMul", [data, weight]), 1, 0)
    return Target(name, "MatMul", (use,), weight, shape, 1, Layout(shape[::-1], shape[::-1], (1, 0)))


def size(item: Target, spec: QuantSpec) -> int:
    """Odd on purpose: no multiple of anything."""
    return item.shape[0] * item.shape[1] * spec.bits // 8 + 13


def refuse(*_: object) -> Any:
    raise AssertionError("not to be asked for")


def make(budget: Budget, *, widths: Mapping[str, Sequence[int]] | None = None, **changes: Any) -> AllocationProblem:
    bits = widths or dict.fromkeys(SHAPES, WIDTHS)
    fields: dict[str, Any] = {
        "targets": {name: target(name, shape) for name, shape in SHAPES.items()},
        "stats": {},
        "candidates": {name: tuple(QuantSpec(width, 16) for width in reversed(bits[name])) for name in bits},
        "budget": budget,
        "size": size,
        "float_size": 4 * WEIGHTS + FIXED,
        "fixed_size": FIXED,
        "quantize": refuse,
        "evaluate": refuse,
    }
    return AllocationProblem(**{**fields, **changes})


def table_of(units: Sequence[Unit], seed: int = 0) -> dict[str, tuple[float, ...]]:
    """Losses that fall about fourfold with each bit, of very different layers."""
    rng = np.random.default_rng([seed, 5])
    return {
        unit.name: tuple(
            float(10 ** rng.uniform(-3, 2) * 4.0 ** -unit.bits(option) * rng.uniform(0.8, 1.2))
            for option in range(len(unit.options))
        )
        for unit in units
    }


class Fixed:
    """An estimator that knows its table and how often it was asked."""

    def __init__(self, *, nats: bool = True, seed: int = 0) -> None:
        self.nats, self.seed, self.asked = nats, seed, 0

    def scores(self, problem: AllocationProblem, units: Sequence[Unit]) -> Scores:
        self.asked += 1
        return Scores(table_of(units, self.seed), "made up", nats=self.nats, notes=("a note",))


def every_choice(units: Sequence[Unit]) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(len(unit.options)) for unit in units)))


# --- Units


def file_bytes(made: AllocationProblem, specs: Mapping[str, QuantSpec]) -> int:
    return sum(size(made.targets[name], spec) for name, spec in specs.items())
