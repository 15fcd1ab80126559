"""The planner's simulation of a layer: the node as it was, with the weight that the form multiplies with."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from quantkit.emitters._builder import Builder
from quantkit.types import FloatArray, Target


def simulate_weight(
    builder: Builder,
    target: Target,
    effective: FloatArray,
    rounded: Callable[[Builder, ir.Value], ir.Value] | None = None,
) -> None:
    """Give every use the effective W[N, K] as a plain constant and, where asked, a rounded input."""
    operand = builder.const(target.layout.to_operand(effective), f"{target.name}.effective")
    for use in target.uses:
        data = use.data
        use.node.replace_input_with(use.weight_index, operand)
        if rounded is not None:
            use.node.replace_input_with(use.data_index, rounded(builder.at(use.node), data))
