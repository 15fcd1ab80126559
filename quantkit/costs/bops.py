"""Multiplications and bit operations of one sample (HAWQ-V3, arXiv 2011.10680): MACs x weight x activation bits."""

from __future__ import annotations

import math

import numpy as np

from quantkit.types import LayerStats, QuantSpec, Target

FLOAT_BITS = 32
GATHERS = frozenset({"Gather"})


def macs(target: Target, stats: LayerStats | None) -> int:
    """Multiplications of one sample through all uses of a target, at the typical shape that calibration saw.

    Without shapes, every weight counts once. A table that is only looked up multiplies nothing.
    """
    if target.op in GATHERS:
        return 0
    num_rows, num_inputs = target.shape
    return num_rows * num_inputs * _positions(target, stats)


def bops(target: Target, spec: QuantSpec | None, stats: LayerStats | None) -> int:
    """Bit operations; None = float weights. Float activations count 32 bits."""
    weight_bits = FLOAT_BITS if spec is None else spec.average_bits(target.shape[1])
    activation_bits = FLOAT_BITS if spec is None or spec.act_bits is None else spec.act_bits
    return round(macs(target, stats) * weight_bits * activation_bits)


def _positions(target: Target, stats: LayerStats | None) -> int:
    """How often each weight of a row is multiplied for one sample, over all uses."""
    if stats is None or not stats.data_shapes:
        return len(target.uses)
    samples = [(shape, count) for shape, count in stats.data_shapes.items() if shape]
    counts = [_per_sample(target, shape) for shape, count in samples for _ in range(count)]
    return max(round(float(np.median(counts))), 1) * len(target.uses) if counts else len(target.uses)


def _per_sample(target: Target, shape: tuple[int, ...]) -> float:
    """Of one use whose data input has this shape."""
    if target.op == "Conv":
        return math.prod(_conv_output(target, shape[2:]))
    if target.op == "ConvTranspose":  # every input position meets the whole kernel, which W's rows hold
        return math.prod(shape[2:])
    if target.op in ("LSTM", "GRU", "RNN"):
        return shape[0]  # steps: [steps, batch, inputs]
    batch = shape[0] if len(shape) > 1 else 1
    return math.prod(shape[:-1]) / batch


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
