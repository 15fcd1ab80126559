"""Random weights in every form, their float64 values, and how far a result is from the exact one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
import onnx.parser
import onnxruntime as ort
import torch
from quantkit_kernels import MixedWeight, PackedWeight, pack, pack_mixed
from torch import Tensor

from quantkit.packing import blob

Float64 = npt.NDArray[np.float64]

# Norm of the error over norm of the result, for the worst output: float16 results round by 2^-11, random over M values.
OUTPUT = 6e-4
# As OUTPUT, where the weights are rounded to float16 as well.
WEIGHTS = 1.2e-3


@dataclass(frozen=True)
class Sample:
    """codes [N, K], scales and zero points [N, G], the exact weight float64 [N, K] and its packed form."""

    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.floating]
    zero_points: npt.NDArray[np.float32]
    weight: Float64
    packed: PackedWeight

    def tensors(self) -> tuple[Tensor, Tensor]:
        return tensor(self.packed.codes), tensor(self.packed.meta)


def sample(
    bits: int, group_size: int, shape: tuple[int, int], seed: int = 0, wide: bool = False, symmetric: bool = False
) -> Sample:
    """A random weight; group_size -1: one scale per row; wide: scales that float16 does not hold."""
    rng = np.random.default_rng([seed, bits, abs(group_size), *shape])
    width = shape[1] if group_size == -1 else group_size
    grid = (shape[0], -(-shape[1] // width))
    codes = rng.integers(0, 1 << bits, shape).astype(np.uint8)
    scales = (rng.random(grid) + 0.5) * rng.choice([-1, 1], grid)
    kept = scales.astype(np.float32) * np.float32(1e-3 if wide else 1)
    kept = kept if wide else kept.astype(np.float16)
    points = np.full(grid, 1 << (bits - 1)) if symmetric else rng.integers(0, 1 << bits, grid)
    zero_points = points.astype(np.float32)
    packed = pack(codes, kept, zero_points, bits, group_size)
    return Sample(codes, kept, zero_points, exact(codes, kept, zero_points, width), packed)


def exact(
    codes: npt.NDArray[np.uint8], scales: npt.NDArray[np.floating], zero_points: npt.NDArray[np.float32], width: int
) -> Float64:
    group = np.arange(codes.shape[1]) // width
    values: Float64 = (codes.astype(np.float64) - zero_points[:, group]) * scales.astype(np.float64)[:, group]
    return values


def mixed_sample(
    group_bits: npt.NDArray[np.int64], group_size: int, shape: tuple[int, int], wide: bool = False
) -> tuple[MixedWeight, Float64]:
    """A weight whose groups have the given widths, packed and exact."""
    rng = np.random.default_rng([7, group_size, *shape])
    grid = (shape[0], len(group_bits))
    group = np.arange(shape[1]) // group_size
    codes = (rng.integers(0, 256, shape) % (1 << group_bits)[group]).astype(np.uint8)
    zero_points = (rng.integers(0, 256, grid) % (1 << group_bits)).astype(np.float32)
    scales = (rng.random(grid) + 0.5).astype(np.float32 if wide else np.float16)
    weight = exact(codes, scales, zero_points, group_size)
    return pack_mixed(codes, scales, zero_points, group_bits, group_size), weight


def activations(num_rows: int, num_inputs: int, dtype: torch.dtype = torch.float16) -> Tensor:
    rng = np.random.default_rng([3, num_rows, num_inputs])
    return tensor(rng.normal(size=(num_rows, num_inputs))).to(dtype)


def bias(num_outputs: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return tensor(np.random.default_rng([5, num_outputs]).normal(size=num_outputs)).to(dtype)


def tensor(array: npt.NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.array(array))


def product(x: Tensor, weight: Float64) -> Float64:
    result: Float64 = x.double().cpu().numpy() @ weight.T
    return result


def error(out: Tensor, expected: Float64) -> float:
    """Norm of the error of the worst output (column), relative to the norm of that column."""
    difference = np.linalg.norm(out.double().cpu().numpy() - expected, axis=0)
    return float(np.max(difference / np.linalg.norm(expected, axis=0)))


def onnxruntime_product(x: Tensor, sampled: Sample, block: int, with_points: bool = True) -> Float64:
    """x [M, K] times the weight by onnxruntime's MatMulNBits in float32; 4 and 8 bits on the bytes the kernels read."""
    bits, (num_rows, num_inputs) = sampled.packed.bits, sampled.packed.shape
    num_groups = sampled.scales.shape[1]
    stored = blob(sampled.codes, bits, block, 0) if bits == 2 else np.ascontiguousarray(sampled.packed.codes)
    initializers = {
        "B": stored.view(np.uint8).reshape(num_rows, num_groups, -1),
        "scales": sampled.scales.astype(np.float32),
    }
    if with_points:
        initializers["zero_points"] = packed_points(sampled.zero_points, bits)
    num_values = ", ".join(str(size) for size in x.shape)
    model = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        product (float[{num_values}] x) => (float[{x.shape[0]}, {num_rows}] y) {{
            y = com.microsoft.MatMulNBits <K: int = {num_inputs}, N: int = {num_rows}, bits: int = {bits},
                block_size: int = {block}, accuracy_level: int = 0> (x, {", ".join(initializers)})
        }}""")
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in initializers.items())
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: Float64 = session.run(None, {"x": x.float().numpy()})[0].astype(np.float64)
    return result


def packed_points(zero_points: npt.NDArray[np.float32], bits: int) -> npt.NDArray[np.uint8]:
    """As MatMulNBits takes them: rows of bytes, low bits first."""
    per_byte = 8 // bits
    num_rows, num_groups = zero_points.shape
    fields = np.zeros((num_rows, -(-num_groups // per_byte) * per_byte), np.uint8)
    fields[:, :num_groups] = zero_points.astype(np.uint8)
    bytes_ = np.zeros((num_rows, fields.shape[1] // per_byte), np.uint8)
    for i in range(per_byte):
        bytes_ |= fields[:, i::per_byte] << np.uint8(i * bits)
    return bytes_.reshape(-1)
