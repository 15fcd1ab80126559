"""Bytes that a layer takes in the file: packed codes, scales, zero points (never bits x weights alone)."""

from __future__ import annotations

from quantkit.packing import packed_size
from quantkit.types import QuantSpec, Target

# Measured on emitted files: nodes, names and shapes of one quantized layer.
NODE_OVERHEAD = 450
SCALE_BYTES = 2  # the quantizers round scales to float16


def layer_bytes(target: Target, spec: QuantSpec) -> int:
    """Encoded size of one layer, without its bias."""
    num_rows, num_inputs = target.shape
    num_groups = spec.num_groups(num_inputs)
    codes = packed_size(num_rows * num_groups * spec.group_width(num_inputs), spec.bits)
    zero_points = 0 if spec.symmetric else packed_size(num_rows * num_groups, spec.bits)
    return codes + SCALE_BYTES * num_rows * num_groups + zero_points + NODE_OVERHEAD


def stored_bits(target: Target, spec: QuantSpec) -> float:
    """Bits per weight with scales and zero points."""
    return 8 * (layer_bytes(target, spec) - NODE_OVERHEAD) / (target.shape[0] * target.shape[1])
