"""Rows against onnxruntime: rows @ W[N, K].T is the operator's output."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest

from quantkit.calibration.rows import sample_positions, to_rows
from quantkit.errors import InputError
from quantkit.types import Array, FloatArray


def run_op(op: str, data: FloatArray, weight: FloatArray, attributes: dict[str, Any]) -> FloatArray:
    """The operator's output as onnxruntime computes it."""
    spelt = ", ".join(f'{k}="{v}"' if isinstance(v, str) else f"{k}={v}" for k, v in attributes.items())
    spelt = f"<{spelt}>" if spelt else ""
    shapes = [", ".join(map(str, array.shape)) for array in (data, weight)]
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 21]>
        one (float[{shapes[0]}] X, float[{shapes[1]}] W) => (float Y) {{ Y = {op} {spelt} (X, W) }}"""
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: FloatArray = session.run(None, {"X": data, "W": weight})[0]
    return result


def arrays(*shapes: tuple[int, ...]) -> list[FloatArray]:
    rng = np.random.default_rng(0)
    found = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    for array in found:
        array.setflags(write=False)
    return found


def read(op: str, data: Array, weight: Array, attributes: dict[str, Any], limit: int | None = None) -> FloatArray:
    groups = attributes.get("group", 1)
    return to_rows(op, data, operand_shape=weight.shape, groups=groups, attributes=attributes, limit=limit, seed=3)


def product(rows: FloatArray, matrix: Array) -> Array:
    """[T, N]: each group's rows with its share of W[N, K], in float64."""
    groups = rows.shape[0]
    parts = matrix.reshape(groups, -1, matrix.shape[-1]).astype(np.float64)
    outputs = rows.astype(np.float64) @ parts.transpose(0, 2, 1)  # [groups, T, N / groups]
    result: Array = outputs.transpose(1, 0, 2).reshape(rows.shape[1], -1)
    return result


def deviation(found: Array, expected: Array) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


CONVS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "1d": ((2, 4, 11), (6, 4, 3), {"pads": [2, 1], "strides": [2]}),
    "1d dilated": ((2, 4, 20), (6, 4, 4), {"dilations": [3], "pads": [0, 5]}),
    "2d plain": ((2, 3, 7, 9), (5, 3, 3, 2), {}),
    "2d pointwise": ((2, 6, 5, 4), (8, 6, 1, 1), {"strides": [2, 1]}),
    "2d asymmetric pads": ((2, 3, 8, 9), (4, 3, 3, 3), {"pads": [0, 2, 3, 1], "strides": [2, 3]}),
    "2d dilated": ((1, 3, 13, 12), (4, 3, 3, 2), {"dilations": [2, 4], "pads": [2, 1, 0, 3]}),
    "2d grouped": ((2, 6, 7, 8), (9, 2, 3, 3), {"group": 3, "pads": [1, 1, 1, 1], "dilations": [2, 1]}),
    "2d depthwise": ((2, 5, 7, 8), (10, 1, 3, 3), {"group": 5, "pads": [1, 1, 1, 1]}),
    "2d same upper": ((2, 3, 8, 9), (4, 3, 4, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "2d same lower": ((2, 3, 8, 9), (4, 3, 4, 3), {"auto_pad": "SAME_LOWER", "strides": [3, 2]}),
    "2d same, stride over kernel": ((1, 2, 9, 9), (4, 2, 2, 1), {"auto_pad": "SAME_UPPER", "strides": [4, 3]}),
    "2d valid": ((2, 3, 8, 9), (4, 3, 3, 3), {"auto_pad": "VALID", "strides": [1, 2]}),
    "3d": ((2, 4, 5, 6, 7), (6, 2, 2, 3, 2), {"group": 2, "pads": [1, 0, 2, 0, 1, 1], "strides": [1, 2, 2]}),
}


@pytest.mark.parametrize("case", CONVS)
def test_conv_rows_give_the_convolution(case: str) -> None:
    data_shape, weight_shape, attributes = CONVS[case]
    data, weight = arrays(data_shape, weight_shape)
    rows = read("Conv", data, weight, attributes)
    output = np.moveaxis(run_op("Conv", data, weight, attributes), 1, -1).reshape(-1, weight_shape[0])
    assert rows.dtype == np.float32
    assert deviation(product(rows, weight.reshape(weight_shape[0], -1)), output) < 1e-5
    # What is drawn are rows of the whole, in order.
    limited = read("Conv", data, weight, attributes, limit=7)
    chosen = sample_positions(rows.shape[1], 7, seed=3)
    np.testing.assert_array_equal(limited, rows[:, chosen])


@pytest.mark.parametrize("change", [{"pads": [3, 1, 0, 2]}, {"pads": [2, 0, 1, 3]}, {"strides": [3, 2]}])
def test_a_wrong_reading_is_noticed(change: dict[str, Any]) -> None:
    _, weight_shape, attributes = CONVS["2d asymmetric pads"]
    data, weight = arrays((2, 3, 9, 9), weight_shape)
    attributes = {**attributes, "strides": [2, 2]}
    output = np.moveaxis(run_op("Conv", data, weight, attributes), 1, -1).reshape(-1, weight_shape[0])
    wrong = product(read("Conv", data, weight, {**attributes, **change}), weight.reshape(weight_shape[0], -1))
    assert wrong.shape != output.shape or deviation(wrong, output) > 0.1
    swapped = read("Conv", data.transpose(0, 1, 3, 2), weight, attributes)
    found = product(swapped, weight.reshape(weight_shape[0], -1))
    assert found.shape != output.shape or deviation(found, output) > 0.1


def test_attributes_may_be_bytes_or_absent() -> None:
    data, weight = arrays((1, 2, 6, 6), (3, 2, 3, 3))
    plain = read("Conv", data, weight, {})
    np.testing.assert_array_equal(read("Conv", data, weight, {"auto_pad": b"VALID"}), plain)
    np.testing.assert_array_equal(read("Conv", data, weight, {"auto_pad": "NOTSET", "pads": [0, 0, 0, 0]}), plain)


def test_a_sample_of_a_large_convolution_needs_little_memory() -> None:
    data = np.zeros((1, 16, 256, 256), dtype=np.float32)
    weight = np.zeros((4, 16, 5, 5), dtype=np.float32)
    tracemalloc.start()
    try:
        rows = read("Conv", data, weight, {"pads": [2, 2, 2, 2]}, limit=100)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000  # bytes; all positions take 105 MB
    finally:
        tracemalloc.stop()
    assert rows.shape == (1, 100, 400)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel", [(1, 1), (2, 3)])
def test_conv_transpose_rows_are_pixels(groups: int, kernel: tuple[int, int]) -> None:
    # With the stride equal to the kernel no outputs overlap: each pixel fills one tile of each output channel.
    data, weight = arrays((2, 6, 4, 5), (6, 3, *kernel))
    attributes = {"group": groups, "strides": list(kernel)}
    rows = read("ConvTranspose", data, weight, attributes)
    assert rows.shape == (groups, 2 * 4 * 5, 6 // groups)
    matrix = weight.reshape(groups, 6 // groups, -1).transpose(0, 2, 1).reshape(-1, 6 // groups)  # [O * kh * kw, K]
    tiles = product(rows, matrix).reshape(2, 4, 5, 3 * groups, *kernel)
    output = tiles.transpose(0, 3, 1, 4, 2, 5).reshape(2, 3 * groups, 4 * kernel[0], 5 * kernel[1])
    assert deviation(output, run_op("ConvTranspose", data, weight, attributes)) < 1e-5
    limited = read("ConvTranspose", data, weight, attributes, limit=9)
    np.testing.assert_array_equal(limited, rows[:, sample_positions(40, 9, seed=3)])


@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 5), (2, 1, 4, 5)])
def test_matmul_rows(shape: tuple[int, ...]) -> None:
    data, weight = arrays(shape, (5, 6))
    rows = read("MatMul", data, weight, {}, limit=1)
    output = run_op("MatMul", data, weight, {}).reshape(-1, 6)
    assert deviation(product(rows, weight.T), output) < 1e-5


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("trans_a", [0, 1])
def test_gemm_rows(trans_a: int, trans_b: int) -> None:
    data, weight = arrays((5, 7) if trans_a else (7, 5), (6, 5) if trans_b else (5, 6))
    attributes = {"transA": trans_a, "transB": trans_b}
    rows = read("Gemm", data, weight, attributes)
    assert deviation(product(rows, weight if trans_b else weight.T), run_op("Gemm", data, weight, attributes)) < 1e-5


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
def test_recurrent_rows_are_the_steps_of_the_sequence(op: str) -> None:
    data, weight = arrays((6, 2, 5), (1, 12, 5))
    rows = read(op, data, weight, {})
    np.testing.assert_array_equal(rows, data.reshape(1, 12, 5))


def test_sampled_positions_are_distinct_sorted_and_repeatable() -> None:
    chosen = sample_positions(1000, 50, seed=1)
    assert len(set(chosen.tolist())) == 50 and (np.diff(chosen) > 0).all()
    assert chosen[0] >= 0 and chosen[-1] < 1000
    np.testing.assert_array_equal(chosen, sample_positions(1000, 50, seed=1))
    assert not np.array_equal(chosen, sample_positions(1000, 50, seed=2))
    np.testing.assert_array_equal(sample_positions(20, 50, seed=1), np.arange(20))


def test_errors_say_what_is_wrong() -> None:
    data, weight = arrays((1, 2, 6, 6), (3, 2, 3, 3))
    with pytest.raises(InputError, match=r"Gather multiplies no input rows with its weight; leave it out"):
        read("Gather", data, weight, {})
    with pytest.raises(InputError, match=r"auto_pad must be NOTSET, VALID, SAME_UPPER or SAME_LOWER, got 'SAME'"):
        read("Conv", data, weight, {"auto_pad": "SAME"})
