"""ONNX element types and the torch types that carry them.

    uint16 -> int32, uint32 -> int64, uint64 -> int64 (same 64 bits): torch computes with few unsigned types
    int2, int4 -> int8; uint2, uint4 -> uint8; float4e2m1 -> float32: one element each, values as they are
    float8 types -> torch's own
Weights of fewer than 8 bits stay packed as bytes until the operator that reads them runs (`Packed`).
With a `compute` type every float32, float16, bfloat16 and float64 of the model becomes that type.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from quantkit.errors import InputError
from quantkit.types import Array

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_CARRIERS: dict[ir.DataType, torch.dtype] = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT16: torch.int32,
    ir.DataType.UINT32: torch.int64,
    ir.DataType.UINT64: torch.int64,
    ir.DataType.INT2: torch.int8,
    ir.DataType.INT4: torch.int8,
    ir.DataType.UINT2: torch.uint8,
    ir.DataType.UINT4: torch.uint8,
    ir.DataType.FLOAT4E2M1: torch.float32,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    ir.DataType.FLOAT8E5M2: torch.float8_e5m2,
    ir.DataType.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    ir.DataType.FLOAT8E8M0: torch.float8_e8m0fnu,
    ir.DataType.COMPLEX64: torch.complex64,
    ir.DataType.COMPLEX128: torch.complex128,
}
# Element types that numpy only knows through ml_dtypes: their bytes pass through an integer of the same width.
_BYTES: dict[ir.DataType, type[np.generic]] = {
    ir.DataType.BFLOAT16: np.int16,
    ir.DataType.FLOAT8E4M3FN: np.uint8,
    ir.DataType.FLOAT8E4M3FNUZ: np.uint8,
    ir.DataType.FLOAT8E5M2: np.uint8,
    ir.DataType.FLOAT8E5M2FNUZ: np.uint8,
    ir.DataType.FLOAT8E8M0: np.uint8,
}
_WIDE: dict[ir.DataType, type[np.generic]] = {
    ir.DataType.UINT16: np.int32,
    ir.DataType.UINT32: np.int64,
    ir.DataType.UINT64: np.int64,
    ir.DataType.INT2: np.int8,
    ir.DataType.INT4: np.int8,
    ir.DataType.UINT2: np.uint8,
    ir.DataType.UINT4: np.uint8,
    ir.DataType.FLOAT4E2M1: np.float32,
}
SUB_BYTE = {ir.DataType.INT2: 2, ir.DataType.UINT2: 2, ir.DataType.INT4: 4, ir.DataType.UINT4: 4}
"""Bits of the types that files store several to a byte, lowest bits first."""


@dataclass(frozen=True)
class Carriers:
    """ONNX element type -> torch type.

    Attributes:
        compute: what all ordinary float types become; None keeps each as it is.
    """

    compute: torch.dtype | None = None

    def __call__(self, dtype: ir.DataType) -> torch.dtype:
        if self.compute is not None and dtype in FLOATS:
            return self.compute
        if dtype not in _CARRIERS:
            raise InputError(f"the torch backend has no tensors of type {dtype.name}")
        return _CARRIERS[dtype]


def to_torch_tensor(array: Array, dtype: ir.DataType) -> torch.Tensor:
    """The array's own memory where torch has the type, else a copy in the carrying type. Never written to."""
    values = np.asarray(array)
    if dtype in _BYTES:
        # ascontiguousarray would give a scalar an axis.
        raw = np.require(values, requirements="C").view(_BYTES[dtype])
        return _shared(raw).view(_CARRIERS[dtype])
    if dtype in _WIDE:
        values = values.astype(_WIDE[dtype])
    if values.dtype.kind not in "biufc":
        raise InputError(f"the torch backend has no tensors of type {values.dtype}")
    return _shared(values)


def _shared(values: Array) -> torch.Tensor:
    single = values.nbytes == 1  # Python keeps such bytes objects once for the whole process
    if single or values.dtype.byteorder == ">" or any(stride < 0 for stride in values.strides):
        values = np.array(values, dtype=values.dtype.newbyteorder("="))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(values)


def narrowed(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in another float type; finite numbers stay finite (masks hold the lowest float32, and 0 times infinity
    is no number)."""
    result = tensor.to(dtype)
    if dtype.itemsize < tensor.dtype.itemsize:
        beyond = result.isinf() & ~tensor.isinf()
        if bool(beyond.any()):
            limit = torch.finfo(dtype).max
            result = torch.where(beyond, result.clamp(-limit, limit), result)
    return result


def to_numpy(tensor: torch.Tensor, dtype: ir.DataType | None) -> Array:
    """The tensor as the ONNX element type's numpy type (ml_dtypes where numpy has none)."""
    plain = tensor.detach().cpu()
    if dtype is None:
        dtype = next((known for known, carrier in _CARRIERS.items() if carrier == plain.dtype), ir.DataType.FLOAT)
    if plain.dtype in (torch.bfloat16, *(kind for kind in _CARRIERS.values() if kind.itemsize == 1)):
        known = next((item for item, carrier in _CARRIERS.items() if carrier == plain.dtype and item in _BYTES), None)
        if known is not None:
            raw: Array = plain.contiguous().view(torch.int16 if known == ir.DataType.BFLOAT16 else torch.uint8).numpy()
            values = raw.view(known.numpy())
            return values if known == dtype else values.astype(dtype.numpy())
    array: Array = plain.numpy()
    return array if array.dtype == dtype.numpy() else array.astype(dtype.numpy())


@dataclass(frozen=True)
class Packed:
    """How to unpack a tensor of a type in SUB_BYTE from its bytes.

    Attributes:
        dtype: element type.
        shape: of the unpacked tensor.
    """

    dtype: ir.DataType
    shape: tuple[int, ...]

    def unpack(self, data: torch.Tensor) -> torch.Tensor:
        """[bytes] uint8 -> `shape`, int8 or uint8, one element each."""
        bits = SUB_BYTE[self.dtype]
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)
        codes: torch.Tensor = (data[:, None] >> shifts) & (2**bits - 1)
        codes = codes.reshape(-1)[: math.prod(self.shape)].reshape(self.shape)
        if self.dtype in (ir.DataType.UINT2, ir.DataType.UINT4):
            return codes
        half = 2 ** (bits - 1)
        signed: torch.Tensor = (codes ^ half).to(torch.int8) - half
        return signed


def packed_bytes(tensor: ir.TensorProtocol) -> torch.Tensor:
    """[bytes] uint8: a tensor of a type in SUB_BYTE as files store it."""
    return torch.from_numpy(np.frombuffer(bytearray(tensor.tobytes()), dtype=np.uint8))


_ = ml_dtypes  # registers the types with numpy
