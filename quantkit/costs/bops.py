"""Multiplications and bit operations of one sample (HAWQ-V3, arXiv 2011.10680): MACs x weight x activation bits.

Activations that stay float count 32 bits, whatever a kernel does inside (MatMulNBits may round them to 8): the figure
compares plans, it is no time. What is stored does not count either, only what is multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from quantkit.types import LayerStats, QuantSpec, Target

FLOAT_BITS = 32
RECURRENT = frozenset({"LSTM", "GRU", "RNN"})


def macs(target: Target, stats: LayerStats | None) -> int:
    """Multiplications of one sample through all uses of a target, at the typical shape that calibration saw.

    Positions that only meet a convolution's padding count as well, as kernels multiply them. Without shapes, every
    weight counts once. Of a two-dimensional input every row is a sample. A table that is only looked up multiplies
    nothing.
    """
    if target.op == "Gather":
        return 0
    num_rows, num_inputs = target.shape
    return num_rows * num_inputs * _positions(target, stats)


def bops(target: Target, spec: QuantSpec | None, stats: LayerStats | None) -> int:
    """Bit operations; None = float weights, 32 x 32 bits."""
    weight_bits = FLOAT_BITS if spec is None else spec.average_bits(target.shape[1])
    activation_bits = FLOAT_BITS if spec is None or spec.act_bits is None else spec.act_bits
    return round(macs(target, stats) * weight_bits * activation_bits)


def shapes_of(target: Target, stats: Mapping[str, LayerStats]) -> LayerStats | None:
    """The statistics that tell a target's shapes: the other weight of an LSTM runs as often as the one on the input."""
    known = stats.get(target.name)
    if known is None and target.op in RECURRENT and target.name.endswith(".R"):
        return stats.get(target.name.removesuffix(".R") + ".W")
    return known


def _positions(target: Target, stats: LayerStats | None) -> int:
    """How often each weight is multiplied for one sample, over all uses."""
    if stats is None:
        return len(target.uses)
    counts = [_per_sample(target, shape) for shape, count in stats.data_shapes.items() if shape for _ in range(count)]
    return max(round(float(np.median(counts))), 1) * len(target.uses) if counts else len(target.uses)


def _per_sample(target: Target, shape: tuple[int, ...]) -> float:
    """Of one use whose data input has this shape."""
    if target.op == "Conv":
        return math.prod(_conv_output(target, shape[2:]))
    if target.op == "ConvTranspose":  # every input position meets the whole kernel, which W's rows hold
        return math.prod(shape[2:])
    if target.op in RECURRENT:  # steps: [steps, batch, inputs], or [batch, steps, inputs]
        return shape[1 if _integer(target, "layout") else 0]
    if target.op == "Gemm":  # its rows are samples
        return 1
    # Slices of a batched weight meet their own parts of the data: those axes repeat no weight.
    slices, outer = target.layout.operand_shape[:-2], shape[:-2]
    own = outer[max(len(outer) - len(slices), 0) :] if slices else ()
    batch_axes = outer[: len(outer) - len(own)]
    repeated = [size for size, count in zip(reversed(own), reversed(slices), strict=False) if count == 1]
    rows = shape[-2] if outer or slices else 1  # of a two-dimensional input, every row is a sample
    return math.prod([*batch_axes[1:], *repeated]) * rows


def _integer(target: Target, name: str) -> int:
    return target.node.attributes[name].as_int() if name in target.node.attributes else 0


def _conv_output(target: Target, spatial: tuple[int, ...]) -> list[int]:
    """Output positions along every axis."""
    node = target.node
    axes = len(spatial)

    def ints(name: str, default: list[int]) -> list[int]:
        return list(node.attributes[name].as_ints()) if name in node.attributes else default

    kernel = list(target.layout.operand_shape[2:])
    strides, dilations = ints("strides", [1] * axes), ints("dilations", [1] * axes)
    pads = ints("pads", [0] * (2 * axes))
    auto = node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else "NOTSET"
    sizes = []
    for axis, size in enumerate(spatial):
        reach = dilations[axis] * (kernel[axis] - 1) + 1
        if auto.startswith("SAME"):
            sizes.append(-(-size // strides[axis]))
        else:
            padded = size if auto == "VALID" else size + pads[axis] + pads[axis + axes]
            sizes.append(max((padded - reach) // strides[axis] + 1, 0))
    return sizes
