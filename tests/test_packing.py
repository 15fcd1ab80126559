"""Packing: exact sizes, exact inverses, and MatMulNBits' layout bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import InputError
from quantkit.packing import Bytes, blob, pack, pack_plane, pack_zero_points, packed_size, planes, unpack
from quantkit.types import Array, FloatArray, QuantizedWeight, QuantSpec


def test_worked_example() -> None:
    low, high = pack(np.array([5, 2, 7, 1], dtype=np.uint8), 3)
    assert low.tolist() == [0b01_11_10_01]
    assert high.tolist() == [0b0101]


@pytest.mark.parametrize("bits", range(1, 9))
def test_planes_are_powers_of_two_that_add_up(bits: int) -> None:
    assert sum(planes(bits)) == bits
    assert all(width in (1, 2, 4, 8) for width in planes(bits))
    assert list(planes(bits)) == sorted(planes(bits), reverse=True)


@pytest.mark.parametrize("bits", range(1, 9))
def test_unpack_is_the_inverse_and_sizes_are_exact(bits: int) -> None:
    for count in (0, 1, 7, 8, 9, 1001):
        codes = np.random.default_rng(count).integers(0, 2**bits, count).astype(np.uint8)
        packed = pack(codes, bits)
        np.testing.assert_array_equal(unpack(packed, bits, count), codes)
        assert sum(plane.size for plane in packed) == packed_size(count, bits)
    assert packed_size(8000, bits) == 1000 * bits


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 8), st.lists(st.integers(0, 255), max_size=40))
def test_every_code_sits_where_the_layout_says(bits: int, values: list[int]) -> None:
    codes = np.array(values, dtype=np.uint8) & np.uint8(2**bits - 1)
    shift = 0
    for plane, width in zip(pack(codes, bits), planes(bits), strict=True):
        for index, code in enumerate(codes.tolist()):
            byte, place = divmod(index * width, 8)
            assert int(plane[byte]) >> place & (2**width - 1) == code >> shift & (2**width - 1)
        shift += width


def test_codes_of_a_matrix_are_packed_in_memory_order() -> None:
    codes = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.testing.assert_array_equal(pack(codes, 4)[0], pack_plane(codes.reshape(-1), 0, 4))
    assert pack(codes, 4)[0].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA]
    np.testing.assert_array_equal(pack(codes.T, 4)[0], pack(np.ascontiguousarray(codes.T), 4)[0])


def quantized(num_rows: int, num_inputs: int, bits: int, block: int, symmetric: bool) -> QuantizedWeight:
    rng = np.random.default_rng(bits)
    spec = QuantSpec(bits, block, symmetric)
    num_groups = -(-num_inputs // block)
    zero_points = rng.integers(0, 2**bits, (num_rows, num_groups))
    if symmetric:
        zero_points[:] = 2 ** (bits - 1)
    return QuantizedWeight(
        spec,
        rng.integers(0, 2**bits, (num_rows, num_inputs)).astype(np.uint8),
        rng.uniform(0.5, 2, (num_rows, num_groups)).astype(np.float32),
        zero_points.astype(np.float32),
        np.full(num_groups, bits, dtype=np.uint8),
    )


def run_matmulnbits(weight: QuantizedWeight, data: FloatArray, packed: Bytes, zero_points: Bytes | None) -> FloatArray:
    """onnxruntime's own reading of the packed bytes."""
    num_rows, num_inputs = weight.shape
    bits, block = weight.spec.bits, weight.spec.group_size
    constants: dict[str, Array] = {"B": packed, "S": weight.scales.reshape(-1)}
    if zero_points is not None:
        constants["Z"] = zero_points
    attributes = (
        f"K={num_inputs}, N={num_rows}, bits={bits}, block_size={block}, accuracy_level={0 if bits == 4 else 4}"
    )
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
        one (float[T, {num_inputs}] X) => (float[T, {num_rows}] Y) {{
            Y = com.microsoft.MatMulNBits <{attributes}> ({", ".join(["X", *constants])})
        }}"""
    )
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: FloatArray = session.run(None, {"X": data})[0]
    return result


def whole_numbers(num_rows: int, num_inputs: int, block: int) -> FloatArray:
    """Rows that the kernel's rounding of each block to int8 leaves exact: whole numbers, the largest of a block 127."""
    data = np.random.default_rng(0).integers(-127, 128, (num_rows, num_inputs))
    data[:, ::block] = 127
    return data.astype(np.float32)


def deviation(
    weight: QuantizedWeight, block: int, pack_codes: Callable[..., Bytes], pack_zeros: Callable[..., Bytes]
) -> float:
    """Largest difference between the kernel and the oracle, relative to the largest output."""
    bits, symmetric = weight.spec.bits, weight.spec.symmetric
    data = whole_numbers(5, weight.shape[1], block)
    packed = pack_codes(weight.codes, bits, block, pad=weight.zero_points[:, -1].astype(np.uint8))
    zero_points = None if symmetric else pack_zeros(weight.zero_points, bits)
    result = run_matmulnbits(weight, data, packed, zero_points)
    expected = data.astype(np.float64) @ weight.dequantize().astype(np.float64).T
    return float(np.abs(result - expected).max() / np.abs(expected).max())


CASES = [(bits, block, inputs) for bits in (2, 4, 8) for block, inputs in ((16, 48), (32, 32), (32, 150), (128, 300))]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "block", "num_inputs"), CASES)
def test_onnxruntime_reads_what_was_packed(bits: int, block: int, num_inputs: int, symmetric: bool) -> None:
    weight = quantized(24, num_inputs, bits, block, symmetric)
    assert deviation(weight, block, blob, pack_zero_points) < 2e-6


@pytest.mark.parametrize("bits", [2, 4])
def test_a_wrong_layout_is_noticed(bits: int) -> None:
    weight = quantized(24, 150, bits, 32, symmetric=False)

    def reversed_blob(codes: Bytes, bits: int, block: int, pad: Bytes) -> Bytes:
        per_byte = 8 // bits
        padded = np.concatenate([codes, np.zeros((codes.shape[0], 10), dtype=np.uint8)], axis=1)
        return blob(padded.reshape(-1, per_byte)[:, ::-1].reshape(padded.shape), bits, block, pad)

    def unpadded_zero_points(zero_points: FloatArray, bits: int) -> Bytes:
        right = pack_zero_points(zero_points, bits)
        wrong = pack(zero_points.astype(np.uint8), bits)[0]
        return np.resize(wrong, right.shape)

    assert deviation(weight, 32, reversed_blob, pack_zero_points) > 1e-2
    assert deviation(weight, 32, blob, unpadded_zero_points) > 1e-2


def test_blob_fills_the_last_block_with_the_padding_code() -> None:
    codes = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.uint8)
    assert blob(codes, 4, 4, pad=8).tolist() == [[[0x21, 0x83]], [[0x54, 0x86]]]
    assert blob(codes, 4, 4, pad=np.array([9, 7])).tolist() == [[[0x21, 0x93]], [[0x54, 0x76]]]
    assert blob(codes, 8, 2, pad=0).shape == (2, 2, 2)


def test_inputs_are_not_written() -> None:
    codes = np.arange(16, dtype=np.uint8).reshape(2, 8)
    codes.setflags(write=False)
    unpack(pack(codes, 5), 5, codes.size)
    blob(codes, 4, 16, pad=0)
    np.testing.assert_array_equal(codes, np.arange(16).reshape(2, 8))


def test_errors_say_what_is_wrong() -> None:
    codes = np.array([[3, 9]], dtype=np.uint8)
    with pytest.raises(InputError, match=r"codes of 1 to 8 bits can be packed, got 9 bits"):
        planes(9)
    with pytest.raises(InputError, match=r"code 9 does not fit 3 bits; pack with more bits"):
        pack(codes, 3)
    with pytest.raises(InputError, match=r"code 16 does not fit 4 bits"):
        blob(codes, 4, 16, pad=16)
    with pytest.raises(InputError, match=r"MatMulNBits holds 2, 4 or 8 bits, got 5; widen the codes first"):
        blob(codes, 5, 16, pad=0)
    with pytest.raises(
        InputError, match=r"a block of 3 4-bit codes does not fill whole bytes; use a block of 16 or more"
    ):
        blob(codes, 4, 3, pad=0)
    with pytest.raises(InputError, match=r"zero points must be integers from 0 to 255 to be packed"):
        pack_zero_points(np.array([[0.5]]), 4)
    with pytest.raises(InputError, match=r"code 4 does not fit 2 bits"):
        pack_zero_points(np.array([[4.0]]), 2)
