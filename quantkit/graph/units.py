"""Which layers share one decision: matrix products that read the same value.

Query, key and value projections, and the gate and up projections of a gated block, read one activation; runtimes fuse
them, and one width for all of them keeps that possible. A weight that several nodes read is one target already.

What need not be tied, given what is emitted: layers of an integer region, on either side of an Add or a Concat too,
because activations there have 8 bits whatever the weights have, and weights are widened to int8; convolutions that read
one value, because no runtime fuses them; and the two weights W and R of an LSTM, which are stored apart and computed
with in float.
"""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.types import Target

PRODUCTS = frozenset({"MatMul", "Gemm"})


def find_units(targets: Mapping[str, Target]) -> dict[str, tuple[str, ...]]:
    """First member -> all members, in the order of `targets`."""
    joined: dict[object, list[str]] = {}
    for name, target in targets.items():
        joined.setdefault(_key(name, target), []).append(name)
    return {names[0]: tuple(names) for names in joined.values()}


def _key(name: str, target: Target) -> object:
    """Equal for targets that belong together: products of one graph that read the same values in the same way."""
    if target.op not in PRODUCTS:
        return name
    # A transposed Gemm reads other rows, and so does a product of another K.
    attributes = target.node.attributes
    transposed = "transA" in attributes and bool(attributes["transA"].as_int())
    values = frozenset((id(use.data), id(use.node.graph)) for use in target.uses)
    return (transposed, target.shape[1], values)
