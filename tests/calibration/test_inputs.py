from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from quantkit.calibration.inputs import InputSpec, as_array, check_names, conform, fixed_batch
from quantkit.errors import InputError
from quantkit.types import Array

IMAGE = InputSpec("image", np.dtype(np.float32), ("batch", 3, 4, 4))
IDS = InputSpec("ids", np.dtype(np.int64), ("batch", "seq"))


def one(dtype: object, shape: tuple[int | str | None, ...] = ("batch",)) -> list[InputSpec]:
    return [InputSpec("x", np.dtype(dtype), shape)]  # type: ignore[call-overload]


def test_feed_comes_out_in_the_models_order_and_dtypes() -> None:
    mask = InputSpec("mask", np.dtype(np.int64), ("batch", "seq"))
    feed: dict[str, Array] = {"mask": np.ones((2, 3), np.int32), "ids": np.array([[0, 1, 2], [3, 4, 5]])}
    result = conform(feed, [IDS, mask], "data", [0, 1])
    assert list(result) == ["ids", "mask"]
    assert result["mask"].dtype == np.int64


def test_an_array_of_the_right_dtype_is_not_copied() -> None:
    array = np.zeros((2, 3, 4, 4), np.float32)
    assert conform({"image": array}, [IMAGE], "data", [0, 1])["image"] is array


@pytest.mark.parametrize(
    ("found", "wanted", "values"),
    [
        (np.float64, np.float32, [0.5, -2.0]),
        (np.float32, np.float16, [0.5, -2.0]),
        (np.float32, ml_dtypes.bfloat16, [0.5, -2.0]),
        (np.int32, np.int64, [7, -1]),
        (np.int64, np.uint8, [0, 255]),
        (np.int64, np.float32, [3, -4]),
        (np.uint8, np.float32, [3, 4]),
        (np.bool_, np.float32, [True, False]),
        (np.int64, np.bool_, [1, 0]),
        (np.float32, np.int64, [2.0, -1.0]),
    ],
)
def test_casts_that_change_no_value(found: type, wanted: type, values: list[float]) -> None:
    result = conform({"x": np.array(values, found)}, one(wanted), "data", [0, 1])["x"]
    assert result.dtype == np.dtype(wanted)
    assert result.astype(np.float64).tolist() == values


@pytest.mark.parametrize(
    ("found", "wanted", "values", "told"),
    [
        (np.float32, np.int64, [1.0, 0.5], "0.5 in sample 11 is no int64"),
        (np.float32, np.int64, [1.0, np.nan], "nan in sample 11 is no int64"),
        (np.int64, np.uint8, [256, 1], "256 in sample 10 is no uint8"),
        (np.int64, np.uint64, [1, -1], "-1 in sample 11 is no uint64"),
        (np.int64, np.float32, [1, 2**24 + 1], "16777217 in sample 11 is no float32"),
        (np.int64, np.bool_, [1, 2], "2 in sample 11 is no bool"),
    ],
)
def test_casts_that_would_change_a_value_are_refused(found: type, wanted: type, values: list[float], told: str) -> None:
    with pytest.raises(InputError, match=rf"^data: input 'x' wants .*, got .*, and {told}$"):
        conform({"x": np.array(values, found)}, one(wanted), "data", [10, 11])


def test_text_and_complex_numbers_cannot_be_converted() -> None:
    for array in (np.array(["a"]), np.array([1j])):
        with pytest.raises(InputError, match=r"input 'x' wants float32 \[batch\], got .*, which cannot be converted"):
            conform({"x": array}, one(np.float32), "data", [0])


def test_text_stays_text() -> None:
    array = np.array(["a", "bc"])
    assert conform({"x": array}, one(object), "data", [0, 1])["x"] is array


def test_raw_pixels_for_a_float_input_hint_at_preprocess() -> None:
    for shape in ((2, 3, 4, 4), (2, 4, 4, 3)):
        with pytest.raises(InputError, match=r"wants float32 \[batch, 3, 4, 4\], got uint8 .*--preprocess"):
            conform({"image": np.zeros(shape, np.uint8)}, [IMAGE], "data", [0, 1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_name_input_and_sample(bad: float) -> None:
    array = np.zeros((3, 3, 4, 4), np.float32)
    array[1, 2, 0, 3] = bad
    with pytest.raises(InputError, match=r"data: input 'image' has NaN or Inf \(as float32\) in sample 8; .*finite"):
        conform({"image": array}, [IMAGE], "data", [7, 8, 9])


def test_overflow_by_a_cast_is_found() -> None:
    with pytest.raises(InputError, match=r"NaN or Inf \(as float16\) in sample 1"):
        conform({"x": np.array([1.0, 1e6], np.float32)}, one(np.float16), "data", [0, 1])


def test_every_wrong_shape_is_listed() -> None:
    feed: dict[str, Array] = {"image": np.zeros((2, 3, 4, 5), np.float32), "ids": np.zeros(2, np.int64)}
    told = (
        r"^data: input 'image' wants float32 \[batch, 3, 4, 4\], got float32 \[2, 3, 4, 5\]; "
        r"input 'ids' wants int64 \[batch, seq\], got int64 \[2\]; the first axis must be the samples$"
    )
    with pytest.raises(InputError, match=told):
        conform(feed, [IMAGE, IDS], "data", [0, 1])


def test_a_fixed_batch_is_checked() -> None:
    with pytest.raises(InputError, match=r"wants float32 \[2\], got float32 \[3\]"):
        conform({"x": np.zeros(3, np.float32)}, one(np.float32, (2,)), "data", [0, 1, 2])


def test_names_missing_and_unknown_are_told_together() -> None:
    told = (
        r"^data: there is no array for input 'image'; "
        r"no input of the model is called 'imge' \(did you mean 'image'\?\), 'zzz'; "
        r"the model's inputs are image float32 \[batch, 3, 4, 4\], ids int64 \[batch, seq\]; do so$"
    )
    with pytest.raises(InputError, match=told):
        check_names(["imge", "zzz", "ids"], [IMAGE, IDS], "data", "; do so")


def test_object_arrays_and_ragged_lists_are_refused() -> None:
    with pytest.raises(InputError, match="data: holds Python objects, not numbers; store a numeric array"):
        as_array(np.array([{}, None], object), "data")
    with pytest.raises(InputError, match=r"data: list cannot be read as an array: .*inhomogeneous"):
        as_array([[1], [1, 2]], "data")


def test_fixed_batch() -> None:
    scalar = InputSpec("scalar", np.dtype(np.float32), ())
    assert fixed_batch([IMAGE, scalar]) is None
    assert fixed_batch([IMAGE, *one(np.float32, (4, 2))]) == 4
    with pytest.raises(
        InputError, match=r"different fixed first axes \[1, 4\], so there is no common batch; give whole"
    ):
        fixed_batch([*one(np.float32, (4,)), *one(np.float32, (1,))])


def test_spec_takes_a_scalar_type_for_a_dtype() -> None:
    spec = InputSpec("x", np.float32, [None, 3])  # type: ignore[arg-type]
    assert spec.dtype == np.dtype("float32")
    assert spec.wants == "float32 [?, 3]"
