"""What an executor tells about the layers of a model."""

from __future__ import annotations

from dataclasses import dataclass

KERNELS = ("nbits_linear", "mixed_linear", "int8_linear", "gather_nbits")
"""Functions of quantkit_kernels that read packed weights."""


@dataclass(frozen=True)
class Layer:
    """How one layer with weights runs.

    Attributes:
        name: of its node, or of the value it makes.
        op: operator in the file.
        kernel: one of KERNELS (weights stay packed on the device); `dequantized` (rebuilt once at load, in the compute
            type); `torch` (as the file has it).
        bits: of the codes on the device, all widths that occur; empty where none are kept.
        num_bytes: of the weight on the device.
        note: what else there is to know: why no kernel took it, what was joined to it.
    """

    name: str
    op: str
    kernel: str
    bits: tuple[int, ...]
    num_bytes: int
    note: str = ""
