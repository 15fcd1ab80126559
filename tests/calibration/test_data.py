from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.calibration.data import CalibrationData, InputSpec, open_calibration, random_calibration
from quantkit.errors import InputError


def model(batch: int | str = "batch") -> list[InputSpec]:
    return [InputSpec("x", np.dtype(np.float32), (batch, 1))]


def counting(samples: int) -> np.ndarray:
    return np.arange(samples, dtype=np.float32)[:, None]


def numbers(data: CalibrationData) -> list[int]:
    return [int(value) for feed in data for value in feed["x"][:, 0]]


def opened(samples: int, batch: int | str = "batch", **options: int) -> CalibrationData:
    return open_calibration(counting(samples), model(batch), **options)  # type: ignore[arg-type]


def test_batches_of_eight_unless_told() -> None:
    assert [len(feed["x"]) for feed in opened(20)] == [8, 8, 4]
    assert [len(feed["x"]) for feed in opened(5, batch_size=2)] == [2, 2, 1]
    assert (len(opened(20)), opened(20).samples, opened(20).batch_size) == (3, 20, 8)


def test_a_fixed_batch_drops_the_incomplete_one() -> None:
    data = opened(11, 4)
    assert [len(feed["x"]) for feed in data] == [4, 4]
    assert (data.samples, data.batch_size, data.description) == (8, 4, "8 samples of the array")
    assert opened(11, 4, batch_size=4).samples == 8


def test_a_fixed_batch_that_cannot_be_filled() -> None:
    with pytest.raises(
        InputError, match=r"holds 3 samples, but the model's batch is fixed at 4; give at least 4 samples"
    ):
        opened(3, 4)
    with pytest.raises(InputError, match=r"batch is fixed at 4, got batch size 8; leave it out"):
        opened(11, 4, batch_size=8)


def test_every_kth_sample_is_held_out() -> None:
    kept, held = opened(20).split(0.2)
    assert numbers(held) == [2, 7, 12, 17]
    assert sorted(numbers(kept) + numbers(held)) == list(range(20))
    assert numbers(opened(20).split(4)[1]) == [2, 7, 12, 17]
    assert kept.description == "16 samples of the array"


@given(samples=st.integers(1, 40), batch=st.sampled_from(["n", 1, 3]), holdout=st.floats(0.01, 0.99))
@settings(max_examples=60, deadline=None)
def test_split_parts_are_disjoint_whole_and_never_empty(samples: int, batch: int | str, holdout: float) -> None:
    step = batch if isinstance(batch, int) else 1
    if samples < step:
        return
    data = opened(samples, batch)
    kept, held = data.split(holdout)
    assert kept.samples >= step and held.samples >= step
    assert kept.samples % step == held.samples % step == 0
    if data.samples == step:
        assert numbers(kept) == numbers(held) == numbers(data)
    else:
        assert sorted(numbers(kept) + numbers(held)) == numbers(data)
        assert abs(held.samples - holdout * data.samples) <= step


def test_parts_can_be_split_again() -> None:
    kept, _ = opened(20).split(0.5)
    inner, outer = kept.split(0.5)
    assert sorted(numbers(inner) + numbers(outer)) == numbers(kept)


@pytest.mark.parametrize("holdout", [0, -1, 0.0, 1.0, 1.5, -0.1])
def test_hold_outs_that_make_no_sense(holdout: float) -> None:
    with pytest.raises(InputError, match=rf"share between 0 and 1 or a number of samples, got {holdout}"):
        opened(5).split(holdout)


def test_a_hold_out_of_everything() -> None:
    with pytest.raises(
        InputError, match=r"a hold-out of 5 samples leaves nothing to calibrate on: 5 samples of the array"
    ):
        opened(5).split(5)


def test_parts_that_are_the_same_are_told_of() -> None:
    assert opened(2).split_note is None and opened(8, 4).split_note is None
    whole = opened(1)
    assert whole.split()[0] is whole.split()[1] is whole
    assert whole.split_note == (
        "1 sample of the array both calibrates and measures, so that the figures mean little; give at least 2 samples"
    )
    assert opened(2).subset(1).split_note == whole.split_note
    assert opened(7, 4).split_note == (
        "4 samples of the array both calibrate and measure, so that the figures mean little; give at least 8 samples"
    )


LABELLED = {"x": counting(6), "labels": np.arange(12.0).reshape(6, 2)}
SOURCES: dict[str, Callable[[], object]] = {
    "arrays": lambda: LABELLED,
    "list": lambda: [LABELLED],
    "generator": lambda: iter([LABELLED]),
    "function": lambda: lambda: iter([LABELLED]),
    "tuples": lambda: [(LABELLED["x"], LABELLED["labels"])],
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("batch", ["batch", "N"])
def test_labels_beside_the_inputs(kind: str, batch: str) -> None:
    data = open_calibration(SOURCES[kind](), model(batch), batch_size=3, labels=True)
    feeds = list(data)
    assert [feed["labels"].dtype for feed in feeds] == [np.float64] * 2 and data.samples == 6
    np.testing.assert_array_equal(np.concatenate([feed["labels"] for feed in feeds]), LABELLED["labels"])
    with pytest.raises(InputError, match=r"no input of the model is called 'labels'|gives 2 arrays"):
        open_calibration(SOURCES[kind](), model(batch))


def test_labels_of_a_fixed_batch() -> None:
    parts = [{"x": counting(3), "labels": np.arange(3) + first} for first in (0, 3, 6)]
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in ("x", "labels")}
    for source in (parts, arrays):
        data = open_calibration(source, model(3), labels=True)
        assert [feed["labels"].tolist() for feed in data] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_data_without_labels() -> None:
    for source in ({"x": counting(4)}, [{"x": counting(4)}], iter([counting(4)]), counting(4)):
        assert [set(feed) for feed in open_calibration(source, model(), labels=True)] == [{"x"}]


def test_what_is_wrong_with_labels() -> None:
    with pytest.raises(InputError, match=r"different numbers of samples: 4 for 'x', 3 for 'labels'"):
        open_calibration({"x": counting(4), "labels": counting(3)}, model(), labels=True)
    with pytest.raises(
        InputError, match=r"input 'labels' wants int64 \[batch\], got int64 \[\]; the first axis must be"
    ):
        open_calibration({"x": counting(4), "labels": np.array(3)}, model(), labels=True)
    later = [{"x": counting(4), "labels": np.arange(4)}, {"x": counting(4)}]
    with pytest.raises(InputError, match=r"list, feed 1: there is no array for input 'labels'"):
        open_calibration(later, model(), labels=True)


def test_subset_is_spread_evenly() -> None:
    assert numbers(opened(20).subset(4)) == [2, 7, 12, 17]
    assert numbers(opened(20).subset(20)) == numbers(opened(20).subset(99)) == list(range(20))
    assert opened(20, 4).subset(6).samples == 4
    assert opened(20, 4).subset(1).samples == 4
    assert opened(20, max_samples=4).samples == 4
    with pytest.raises(InputError, match="a subset needs at least 1 sample, got 0"):
        opened(5).subset(0)


def test_digest_covers_content_and_is_stable() -> None:
    digest = opened(4).digest
    expected = hashlib.sha256(b"('x', 'float32', (4, 1))" + counting(4).tobytes()).hexdigest()
    assert digest == expected == opened(4).digest
    changed = counting(4)
    changed[3] = 9
    assert open_calibration(changed, model()).digest != digest
    assert opened(4).subset(2).digest != digest


def test_one_batch_at_a_time(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", counting(1000))
    stream = iter(open_calibration(tmp_path / "d.npy", model(), batch_size=1))
    assert next(stream)["x"].base is None, "a batch holds its own memory only"


def test_values_are_checked_in_every_batch() -> None:
    values = counting(20)
    values[13] = np.inf
    data = open_calibration(values, model())
    with pytest.raises(InputError, match=r"the array: input 'x' has NaN or Inf \(as float32\) in sample 13"):
        list(data)
    with pytest.raises(InputError, match="in sample 13"):
        list(data.split(0.25)[0])


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ("::3", [0, 3, 6, 9]),
        (":2", [0, 1]),
        ("7:", [7, 8, 9]),
        ("-2:", [8, 9]),
        ("1:9:4", [1, 5]),
        (":", list(range(10))),
    ],
)
def test_slices(tmp_path: Path, window: str, expected: list[int]) -> None:
    np.save(tmp_path / "d.npy", counting(10))
    data = open_calibration(f"{tmp_path}/d.npy@{window}", model())
    assert numbers(data) == expected
    assert data.description == f"{len(expected)} samples of d.npy@{window}"


def test_slices_that_are_none_and_slices_that_leave_nothing(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", counting(10))
    for window in ("::-1", "::0", "a:b", "1:2:3:4"):
        with pytest.raises(
            InputError, match=rf"@{re.escape(window)} is no slice; write @START:STOP:STEP with a step of"
        ):
            open_calibration(f"{tmp_path}/d.npy@{window}", model())
    with pytest.raises(InputError, match=r"d\.npy: the slice @10: leaves none of its 10 samples; calibration needs"):
        open_calibration(f"{tmp_path}/d.npy@10:", model())


def test_a_file_whose_name_looks_like_a_slice(tmp_path: Path) -> None:
    folder = tmp_path / "a@:2"
    folder.mkdir()
    np.save(folder / "d.npy", counting(5))
    assert open_calibration(folder / "d.npy", model()).samples == 5


def test_opening_what_is_open() -> None:
    data = opened(10)
    assert open_calibration(data, model()) is data
    assert open_calibration(data, model(), max_samples=3).samples == 3


def test_a_missing_file(tmp_path: Path) -> None:
    for name in ("no.npz", "no.npz:key", "no.txt@::2", "no_folder"):
        with pytest.raises(
            InputError, match=r"calibration data .*/no.* does not exist; give \.npz, \.npy, \.txt, a folder"
        ):
            open_calibration(f"{tmp_path}/{name}", model())


@pytest.mark.parametrize(("name", "suffix"), [("data.csv", r"\.csv"), ("data", r"\(no suffix\)")])
def test_an_unknown_kind_of_file(tmp_path: Path, name: str, suffix: str) -> None:
    (tmp_path / name).write_text("1,2")
    with pytest.raises(InputError, match=rf"{name}: unknown kind of file {suffix}; give \.npz, .* or module:function"):
        open_calibration(tmp_path / name, model())


def test_no_samples() -> None:
    with pytest.raises(InputError, match="the array: it holds no samples; calibration needs at least one"):
        opened(0)


def test_a_lone_array_for_several_inputs(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", counting(3))
    two = [*model(), InputSpec("y", np.dtype(np.float32), ("batch",))]
    with pytest.raises(
        InputError, match=r"d\.npy can serve a model with one input only; the model's inputs are x .*, y"
    ):
        open_calibration(tmp_path / "d.npy", two)
    with pytest.raises(InputError, match=r"an array can serve a model with one input only"):
        open_calibration(counting(3), two)


def test_options_that_do_not_apply(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a tokenizer goes with a \.txt file, got ndarray; leave it out or give text"):
        open_calibration(counting(3), model(), tokenizer="byte")
    with pytest.raises(InputError, match=r"preprocess goes with images, got list; feeds must be preprocessed already"):
        open_calibration([{"x": counting(3)}], model(), preprocess="raw")
    with pytest.raises(InputError, match=r"preprocess goes with images, got module:function; feeds must be"):
        open_calibration("module:function", model(), preprocess="raw")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(InputError, match=r"preprocess goes with images, got .*a\.txt; leave it out"):
        open_calibration(tmp_path / "a.txt", model(), preprocess="raw", tokenizer="byte")
    with pytest.raises(InputError, match="unknown preprocess 'rwa'"):
        open_calibration(counting(3), model(), preprocess="rwa")


def test_numbers_that_make_no_sense() -> None:
    with pytest.raises(InputError, match="batch size must be at least 1, got 0"):
        opened(3, batch_size=0)
    with pytest.raises(InputError, match="max samples must be at least 1, got -1"):
        opened(3, max_samples=-1)
    with pytest.raises(InputError, match="the model has no inputs"):
        open_calibration(counting(3), [])


RANDOM = [
    InputSpec("image", np.dtype(np.float32), ("batch", 3, "side", "side")),
    InputSpec("input_ids", np.dtype(np.int64), ("batch", "seq")),
    InputSpec("attention_mask", np.dtype(np.int64), ("batch", "seq")),
    InputSpec("token_type_ids", np.dtype(np.int32), ("batch", "seq")),
    InputSpec("position_ids", np.dtype(np.int64), ("batch", "seq")),
    InputSpec("flag", np.dtype(np.bool_), ("batch",)),
    InputSpec("small", np.dtype(np.int8), ("batch", 50)),
    InputSpec("scalar", np.dtype(np.float32), ()),
]


def test_random_data() -> None:
    data = random_calibration(RANDOM, samples=10, dynamic={"seq": 5, "side": 4}, max_id=1000)
    feed = next(iter(data))
    assert [array.shape for array in feed.values()] == [(8, 3, 4, 4), *[(8, 5)] * 4, (8,), (8, 50), ()]
    assert 100 < feed["input_ids"].max() <= 1000
    assert feed["attention_mask"].min() == 1
    assert feed["token_type_ids"].max() == 0
    assert feed["position_ids"].tolist() == [[0, 1, 2, 3, 4]] * 8
    assert 0 <= feed["small"].min() <= feed["small"].max() <= 127
    assert abs(float(feed["image"].std()) - 1) < 0.2
    assert data.description == "10 samples of random data, seed 0"


def test_random_data_depends_on_the_seed_only() -> None:
    make = [random_calibration(model(), samples=9, seed=seed) for seed in (0, 0, 1)]
    assert make[0].digest == make[1].digest != make[2].digest
    held = next(iter(make[0].split(1)[1]))["x"]
    assert held.tolist() == next(iter(make[0]))["x"][4:5].tolist(), "a sample is the same in any batch"


def test_random_data_for_a_fixed_batch() -> None:
    assert random_calibration(model(6), samples=16).samples == 12
    assert random_calibration(model(6), samples=2).samples == 6
    assert next(iter(random_calibration(RANDOM[:1])))["image"].shape == (8, 3, 64, 64)


def test_random_data_that_cannot_be_made() -> None:
    with pytest.raises(InputError, match="unknown dynamic axis sequence; the model's are: seq, side"):
        random_calibration(RANDOM, dynamic={"sequence": 3})
    with pytest.raises(InputError, match="random calibration needs at least 1 sample, got 0"):
        random_calibration(RANDOM, samples=0)
    text = [InputSpec("words", np.dtype(object), ("batch",))]
    with pytest.raises(InputError, match="input 'words' wants text, which cannot be made up; give calibration data"):
        list(random_calibration(text))
