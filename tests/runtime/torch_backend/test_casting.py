"""Cast, CastLike, BitCast: every pair of types against numpy and ml_dtypes."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.helper as oh
import pytest
import torch

from quantkit.errors import InputError
from quantkit.runtime.torch_backend import to_torch
from quantkit.runtime.torch_backend.backend import TorchBackend
from tests.runtime.torch_backend.cases import single

KIND = onnx.TensorProto
TYPES: dict[int, Any] = {
    KIND.BOOL: np.bool_,
    KIND.INT2: ml_dtypes.int2,
    KIND.UINT2: ml_dtypes.uint2,
    KIND.INT4: ml_dtypes.int4,
    KIND.UINT4: ml_dtypes.uint4,
    KIND.INT8: np.int8,
    KIND.UINT8: np.uint8,
    KIND.INT16: np.int16,
    KIND.UINT16: np.uint16,
    KIND.INT32: np.int32,
    KIND.UINT32: np.uint32,
    KIND.INT64: np.int64,
    KIND.UINT64: np.uint64,
    KIND.FLOAT16: np.float16,
    KIND.BFLOAT16: ml_dtypes.bfloat16,
    KIND.FLOAT: np.float32,
    KIND.DOUBLE: np.float64,
    KIND.FLOAT8E4M3FN: ml_dtypes.float8_e4m3fn,
    KIND.FLOAT8E4M3FNUZ: ml_dtypes.float8_e4m3fnuz,
    KIND.FLOAT8E5M2: ml_dtypes.float8_e5m2,
    KIND.FLOAT8E5M2FNUZ: ml_dtypes.float8_e5m2fnuz,
    KIND.FLOAT4E2M1: ml_dtypes.float4_e2m1fn,
}
FLOATS = (KIND.FLOAT16, KIND.BFLOAT16, KIND.FLOAT, KIND.DOUBLE)
FLOAT8 = (KIND.FLOAT8E4M3FN, KIND.FLOAT8E4M3FNUZ, KIND.FLOAT8E5M2, KIND.FLOAT8E5M2FNUZ)
SMALL = (KIND.INT2, KIND.UINT2, KIND.INT4, KIND.UINT4)
LIMITS: dict[int, float] = dict(zip(FLOAT8, (448.0, 240.0, 57344.0, 57344.0), strict=True))
UNSIGNED = (KIND.UINT2, KIND.UINT4, KIND.UINT8, KIND.UINT16, KIND.UINT32, KIND.UINT64)


def numbers(kind: int) -> Any:
    """The ends of a type's range, and what is inside."""
    if kind == KIND.BOOL:
        return np.array([False, True])
    if kind in (*FLOATS, *FLOAT8, KIND.FLOAT4E2M1):
        values = np.array([0, 0.4, 0.5, 1, 1.5, 2.5, 3.7, 5, 6])
        return np.concatenate([values, -values]).astype(TYPES[kind])
    if kind in SMALL:
        return np.arange(0 if kind in UNSIGNED else -2, 2 if kind in (KIND.INT2, KIND.INT4) else 4).astype(TYPES[kind])
    info = np.iinfo(TYPES[kind])
    return np.array([info.min, info.min + 1, 0, 1, 77, info.max - 1, info.max], TYPES[kind])


def converted(values: Any, target: int) -> Any:
    """By numpy, in steps that it has."""
    if target == KIND.BOOL:
        return values.astype(np.float64) != 0
    if target in SMALL and values.dtype.kind not in "biu":
        values = np.trunc(values.astype(np.float64)).astype(np.int64)
    if target in SMALL:
        bits = 2 if target in (KIND.INT2, KIND.UINT2) else 4
        low = values.astype(np.int64) & ((1 << bits) - 1)
        half = 0 if target in UNSIGNED else 1 << (bits - 1)
        return ((low ^ half) - half).astype(TYPES[target])
    if values.dtype.kind not in "biuf":
        values = values.astype(np.float64)
    if target in FLOAT8:
        limit = LIMITS[target]
        return np.clip(values.astype(np.float32), -limit, limit).astype(TYPES[target])
    if target in UNSIGNED and values.dtype.kind == "f":
        values = values.astype(np.int64)
    with np.errstate(over="ignore"):
        return values.astype(TYPES[target])


def run(model: onnx.ModelProto, *inputs: Any) -> Any:
    """With element types that torch does not have, as the conformance suite passes them."""
    return TorchBackend.prepare(model).run(list(inputs))[0]


def typed(model: onnx.ModelProto, source: int) -> onnx.ModelProto:
    model.graph.input[0].type.tensor_type.elem_type = source
    return model


@pytest.mark.parametrize("source", TYPES, ids=lambda kind: str(KIND.DataType.Name(kind)))
def test_every_type_to_every_other(source: int) -> None:
    values = numbers(source)
    for target in TYPES:
        model = single("Cast", {"x": values}, {"to": target}, opset=25)
        found, expected = run(model, values), converted(values, target)
        assert found.dtype == expected.dtype, KIND.DataType.Name(target)
        np.testing.assert_array_equal(
            found.astype(np.float64), expected.astype(np.float64), err_msg=KIND.DataType.Name(target)
        )


@pytest.mark.parametrize(("source", "target"), [*itertools.product((KIND.FLOAT, KIND.FLOAT16), FLOAT8)])
@pytest.mark.parametrize("saturate", [0, 1])
def test_floats_of_8_bits_overflow_as_asked(source: int, target: int, saturate: int) -> None:
    limit = LIMITS[target]
    values = np.array([limit, limit * 1.02, limit * 1.1, -limit * 1.1, np.inf, -np.inf, np.nan, -0.0])
    values = np.clip(values, -65504, 65504) if source == KIND.FLOAT16 and limit > 1e4 else values
    values = values.astype(TYPES[source])
    found = run(single("Cast", {"x": values}, {"to": target, "saturate": saturate}, opset=23), values)
    expected = converted(values, target) if saturate else values.astype(np.float32).astype(TYPES[target])
    np.testing.assert_array_equal(found.astype(np.float32), expected.astype(np.float32))
    if saturate:
        assert np.isfinite(found[:6].astype(np.float32)).all()


@pytest.mark.parametrize(
    ("mode", "saturate", "codes"),
    [
        ("up", 1, [0, 0, 127, 128, 128, 129, 254, 254, 255]),
        ("nearest", 1, [0, 0, 127, 127, 128, 129, 254, 254, 255]),
        ("down", 1, [0, 0, 127, 127, 127, 128, 254, 254, 255]),
        ("nearest", 0, [255, 255, 127, 127, 128, 129, 255, 255, 255]),
    ],
)
def test_powers_of_two_round_as_asked(mode: str, saturate: int, codes: list[int]) -> None:
    values = np.array([0, 2.0**-130, 1, 1.4, 1.5, 3.9, 2.0**127 * 1.9, np.inf, np.nan], np.float32)
    if mode == "down":
        values[6] = 2.0**127
    given = {"to": KIND.FLOAT8E8M0, "saturate": saturate, "round_mode": mode}
    found = run(single("Cast", {"x": values}, given, opset=25), values)
    assert found.view(np.uint8).tolist() == codes
    model = single("Cast", {"x": found}, {"to": KIND.FLOAT}, opset=25)
    np.testing.assert_array_equal(run(model, found), found.astype(np.float32))


def test_large_unsigned_numbers_keep_their_value() -> None:
    values = np.array([2**63, 2**64 - 1, 2**63 + 2**40, 5], np.uint64)
    for target in (KIND.FLOAT, KIND.DOUBLE):
        found = run(single("Cast", {"x": values}, {"to": target}), values)
        np.testing.assert_array_equal(found, values.astype(TYPES[target]))
    back = values.astype(np.float64)[[0, 2, 3]]
    np.testing.assert_array_equal(run(single("Cast", {"x": back}, {"to": KIND.UINT64}), back), values[[0, 2, 3]])


def test_cast_like_takes_the_type_of_the_other() -> None:
    values, like = np.array([1.7, -3.2], np.float32), np.zeros(1, np.int32)
    inputs = {"x": values, "like": like}
    model = single("CastLike", inputs, opset=19)
    assert run(model, values, like).tolist() == [1, -3]
    assert run(model, values, like).dtype == np.int32


def test_cast_like_of_a_value_of_unknown_type_looks_at_it() -> None:
    unknown = oh.make_node("Mystery", ["u"], ["like"], domain="local")
    body = oh.make_function(
        "local", "Mystery", ["a"], ["b"], [oh.make_node("Identity", ["a"], ["b"])], [oh.make_opsetid("", 21)]
    )
    model = single("CastLike", {"x": np.array([1.7], np.float32), "like": np.zeros(1, np.int64)}, opset=21)
    model.graph.input[1].name = "u"
    model.graph.node.insert(0, unknown)
    model.functions.append(body)
    model.opset_import.append(oh.make_opsetid("local", 1))
    assert to_torch(model)(torch.tensor([1.7]), torch.zeros(1, dtype=torch.int64)).tolist() == [1]


BITS: dict[tuple[int, int], tuple[list[float], Any]] = {
    (KIND.FLOAT, KIND.UINT32): ([1.5, -2.0], np.uint32),
    (KIND.UINT32, KIND.FLOAT): ([0xC0000000, 7], np.float32),
    (KIND.UINT16, KIND.FLOAT16): ([0xC000, 3], np.float16),
    (KIND.BFLOAT16, KIND.UINT16): ([1.5, -2.0], np.uint16),
    (KIND.DOUBLE, KIND.UINT64): ([1.5, -2.0], np.uint64),
    (KIND.UINT64, KIND.INT64): ([2**64 - 1, 3], np.int64),
    (KIND.FLOAT8E4M3FN, KIND.UINT8): ([1.5, -2.0], np.uint8),
    (KIND.INT4, KIND.UINT4): ([-8, 7], ml_dtypes.uint4),
    (KIND.UINT2, KIND.INT2): ([3, 1], ml_dtypes.int2),
    (KIND.INT32, KIND.INT32): ([3, -1], np.int32),
}


@pytest.mark.parametrize(("source", "target"), BITS)
def test_bit_cast_reads_the_same_bits(source: int, target: int) -> None:
    listed, dtype = BITS[source, target]
    values = np.array(listed, TYPES[source])
    found = run(single("BitCast", {"x": values}, {"to": target}, opset=26), values)
    expected = values.view(dtype)
    if target in SMALL:  # ml_dtypes keeps them in bytes, with their sign in all of it
        expected = (values.astype(np.int64) & (15 if target == KIND.UINT4 else 3)).astype(np.int64)
        expected = expected if target == KIND.UINT4 else (expected ^ 2) - 2
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.astype(np.float64), expected.astype(np.float64))


def test_casting_to_float_passes_gradients() -> None:
    module = to_torch(single("Cast", {"x": np.ones(2, np.float64)}, {"to": KIND.FLOAT}))
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(module(x).sum(), x)[0].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("op", "source", "given", "message"),
    [
        ("Cast", KIND.FLOAT, {"to": KIND.STRING}, "a torch tensor holds no strings"),
        ("Cast", KIND.STRING, {"to": KIND.FLOAT}, "a torch tensor holds no strings"),
        ("Cast", KIND.FLOAT, {"to": KIND.FLOAT8E8M0, "round_mode": "odd"}, "no round_mode 'odd', only up, nearest"),
        ("BitCast", KIND.FLOAT, {"to": KIND.INT64}, "FLOAT and INT64 differ in width"),
        ("BitCast", KIND.FLOAT4E2M1, {"to": KIND.UINT4}, "float4e2m1 is not kept as bits"),
        ("BitCast", None, {"to": KIND.FLOAT}, "the element type of its input is not known"),
    ],
)
def test_what_is_not_done_is_refused(op: str, source: int | None, given: dict[str, Any], message: str) -> None:
    model = single(op, {"x": np.ones(2, np.float32)}, given, opset=26)
    if source is None:
        model.graph.input[0].ClearField("type")
    else:
        typed(model, source)
    with pytest.raises(InputError, match=f"{op} 'node': {message}"):
        to_torch(model)
