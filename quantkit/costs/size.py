"""Bytes that a layer takes in the file: packed codes, scales, zero points (never bits x weights alone)."""

from __future__ import annotations

import numpy as np

from quantkit.packing import packed_size, planes
from quantkit.types import QuantSpec, Target

# Measured on emitted files: nodes, names and shapes of one quantized layer.
NODE_OVERHEAD = 450
SCALE_BYTES = 2  # the quantizers round scales to float16
# Where groups differ in width: the place of each group; and nodes, names and shapes of each further width, for codes
# and once more for zero points.
PLACE_BYTES = 8
WIDTH_OVERHEAD = 150
PLANE_OVERHEAD = 95  # a further bit plane of codes or of zero points: an initializer, its name and one more input
WHOLE_BYTES = 65  # what codes or zero points that are bytes save: nothing unpacks them


def layer_bytes(target: Target, spec: QuantSpec) -> int:
    """Encoded size of one layer, without its bias."""
    widths = np.unique(spec.widths(target.shape[1])).tolist()
    arrays = 1 if spec.symmetric else 2
    nodes = WIDTH_OVERHEAD * (len(widths) - 1)
    nodes += sum(PLANE_OVERHEAD * (len(planes(bits)) - 1) - (WHOLE_BYTES if bits == 8 else 0) for bits in widths)
    return _stored(target, spec) + NODE_OVERHEAD + nodes * arrays


def stored_bits(target: Target, spec: QuantSpec) -> float:
    """Bits per weight with scales and zero points."""
    return 8 * _stored(target, spec) / (target.shape[0] * target.shape[1])


def _stored(target: Target, spec: QuantSpec) -> int:
    """Bytes of the initializers: codes, scales, zero points, places of groups."""
    num_rows, num_inputs = target.shape
    num_groups = spec.num_groups(num_inputs)
    found = np.unique(spec.widths(num_inputs), return_counts=True)
    counts = dict(zip(*(array.tolist() for array in found), strict=True))  # width -> groups
    group = num_rows * spec.group_width(num_inputs)
    codes = sum(packed_size(group * count, bits) for bits, count in counts.items())
    mixed = len(counts) > 1
    if spec.symmetric:
        zero_points = 4 * num_groups if mixed else 0
    else:  # those of 1-bit groups among others are one constant
        stored = {bits: count for bits, count in counts.items() if bits > 1 or not mixed}
        zero_points = sum(packed_size(num_rows * count, bits) for bits, count in stored.items())
    return codes + SCALE_BYTES * num_rows * num_groups + zero_points + (PLACE_BYTES * num_groups if mixed else 0)
