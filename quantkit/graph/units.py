"""Which layers share one decision: matrix products that read the same value.

Query, key and value projections, and the gate and up projections of a gated block, read one activation; runtimes fuse
them, and one width for all of them keeps that possible. A weight that several nodes read is one target already. Layers
of an integer region need no common width: activations there have 8 bits whatever the weights have.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from quantkit.types import Target

PRODUCTS = frozenset({"MatMul", "Gemm"})


def find_units(targets: Mapping[str, Target]) -> dict[str, tuple[str, ...]]:
    """First member -> all members, in the order of `targets`."""
    joined: dict[object, list[str]] = {}
    for name, target in targets.items():
        joined.setdefault(_key(name, target), []).append(name)
    return {names[0]: tuple(names) for names in joined.values()}


def _key(name: str, target: Target) -> object:
    """Equal for targets that belong together: products of one graph that read the same values."""
    if target.op not in PRODUCTS:
        return name
    values: tuple[ir.Value, ...] = tuple(use.data for use in target.uses)
    return ("reads", *(id(value) for value in values))
