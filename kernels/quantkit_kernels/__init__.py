"""Matrix products with packed weights of 2, 3, 4 and 8 bits on CUDA, as torch operators."""

from quantkit_kernels.ops import COUNTERS, gather_nbits, int8_linear, make_counters, mixed_linear, nbits_linear
from quantkit_kernels.packing import MixedWeight, PackedWeight, from_matmulnbits, pack, pack_mixed, unpack

__all__ = [
    "COUNTERS",
    "MixedWeight",
    "PackedWeight",
    "from_matmulnbits",
    "gather_nbits",
    "int8_linear",
    "make_counters",
    "mixed_linear",
    "nbits_linear",
    "pack",
    "pack_mixed",
    "unpack",
]
