from __future__ import annotations

import gc
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from quantkit.calibration.data import CalibrationData, InputSpec, open_calibration
from quantkit.errors import InputError

X = InputSpec("x", np.dtype(np.float32), ("batch", 2))
Y = InputSpec("y", np.dtype(np.int64), ("batch",))


def feed(first: int, count: int = 3) -> dict[str, np.ndarray]:
    return {"x": np.arange(2 * first, 2 * (first + count), dtype=np.float32).reshape(count, 2)}


def numbers(data: CalibrationData) -> list[list[int]]:
    """Which samples each batch holds: sample i of `feed` is [2i, 2i + 1]."""
    return [[int(value) // 2 for value in part["x"][:, 0]] for part in data]


class Reader:
    """As onnxruntime's CalibrationDataReader."""

    def __init__(self) -> None:
        self.remaining = [feed(0), feed(3)]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.remaining.pop(0) if self.remaining else None

    def __len__(self) -> int:
        raise NotImplementedError


class RewindingReader(Reader):
    def rewind(self) -> None:
        self.remaining = [feed(0), feed(3)]


class Iterable:
    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return iter([feed(0), feed(3)])


SOURCES: dict[str, Callable[[], object]] = {
    "list": lambda: [feed(0), feed(3)],
    "generator": lambda: (feed(first) for first in (0, 3)),
    "function returning a generator": lambda: lambda: (feed(first) for first in (0, 3)),
    "function returning a list": lambda: lambda: [feed(0), feed(3)],
    "function returning a reader": lambda: Reader,
    "iterable object": Iterable,
    "reader": Reader,
    "reader with rewind": RewindingReader,
    "bare arrays": lambda: [feed(0)["x"], feed(3)["x"]],
    "tuples": lambda: [(feed(0)["x"],), (feed(3)["x"],)],
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_can_be_read_again_and_split(kind: str) -> None:
    data = open_calibration(SOURCES[kind](), [X])
    assert (data.samples, len(data), data.batch_size) == (6, 2, 3)
    assert numbers(data) == numbers(data) == [[0, 1, 2], [3, 4, 5]]
    kept, held = data.split(2)
    assert numbers(kept) == [[0, 2], [3, 5]]
    assert numbers(held) == [[1], [4]]


def test_the_digest_does_not_depend_on_the_kind_of_source() -> None:
    assert len({open_calibration(make(), [X]).digest for make in SOURCES.values()}) == 1


def test_large_feeds_are_divided_and_small_ones_not_merged() -> None:
    data = open_calibration([feed(0, 5), feed(5, 1), feed(6, 2)], [X], batch_size=2)
    assert numbers(data) == [[0, 1], [2, 3], [4], [5], [6, 7]]
    assert len(data) == 5


def test_a_single_feed_is_split_by_its_samples() -> None:
    kept, held = open_calibration([feed(0, 4)], [X]).split(1)
    assert (numbers(kept), numbers(held)) == ([[0, 1, 3]], [[2]])
    nameless = [InputSpec("x", np.dtype(np.float32), (None, 2))]
    assert open_calibration([feed(0, 4)], nameless).samples == 4


@pytest.mark.parametrize(
    ("inputs", "made"),
    [
        ([InputSpec("x", np.dtype(np.float32), ("seq_len", 2))], {"x": np.zeros((4, 2), np.float32)}),
        ([InputSpec("x", np.dtype(np.float32), (4, 2))], {"x": np.zeros((4, 2), np.float32)}),
        ([InputSpec("x", np.dtype(np.float32), ())], {"x": np.float32(1)}),
        ([X, InputSpec("z", np.dtype(np.float32), ("other",))], {"x": np.zeros((4, 2)), "z": np.zeros(4)}),
        ([X, InputSpec("z", np.dtype(np.float32), ("batch",))], {"x": np.zeros((4, 2)), "z": np.zeros(3)}),
    ],
    ids=["sequence first", "fixed batch", "rank 0", "two dynamic axes", "different lengths"],
)
def test_feeds_that_cannot_be_taken_apart(inputs: list[InputSpec], made: dict[str, np.ndarray]) -> None:
    data = open_calibration([made, made, made], inputs, batch_size=2)
    assert (data.samples, len(data)) == (3, 3)
    assert {key: array.shape for key, array in next(iter(data)).items()} == {k: np.shape(v) for k, v in made.items()}
    kept, held = data.split(0.3)
    assert (kept.samples, held.samples) == (2, 1)


def test_inputs_without_batch_go_whole_into_every_part() -> None:
    inputs = [X, InputSpec("table", np.dtype(np.float32), (5,)), InputSpec("scale", np.dtype(np.float32), ())]
    made = {**feed(0, 4), "table": np.arange(5.0), "scale": np.float32(2)}
    feeds = list(open_calibration([made], inputs, batch_size=2))
    assert [part["x"].shape for part in feeds] == [(2, 2), (2, 2)]
    assert [(part["table"].shape, part["scale"].shape) for part in feeds] == [((5,), ())] * 2


def test_several_inputs_as_tuples() -> None:
    data = open_calibration([(feed(0)["x"], [7, 8, 9])], [X, Y])
    assert next(iter(data))["y"].tolist() == [7, 8, 9]


def endless() -> Iterator[dict[str, np.ndarray]]:
    first = 0
    while True:
        yield feed(first)
        first += 3


@pytest.mark.parametrize("source", [endless, lambda: endless()], ids=["function", "lambda"])
def test_data_without_end_is_read_no_further_than_needed(source: Callable[[], object]) -> None:
    assert numbers(open_calibration(source, [X], max_samples=6)) == [[0, 1, 2], [3, 4, 5]]
    assert numbers(open_calibration(endless(), [X], max_samples=6)) == [[0, 1, 2], [3, 4, 5]]


def test_max_samples_of_a_list_are_spread_evenly() -> None:
    assert numbers(open_calibration([feed(0, 4), feed(4, 4)], [X], max_samples=2)) == [[2], [6]]


def test_a_spool_is_removed_with_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    data = open_calibration((feed(first) for first in (0, 3)), [X])
    assert [len(list(folder.iterdir())) for folder in tmp_path.iterdir()] == [2]
    assert numbers(data) == [[0, 1, 2], [3, 4, 5]]
    del data
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_spool_is_removed_when_the_data_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(InputError, match="feed 1: there is no array for input 'x'"):
        open_calibration(iter([feed(0), {}]), [X])
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_spool_keeps_bfloat16() -> None:
    inputs = [InputSpec("x", np.dtype(ml_dtypes.bfloat16), ("batch", 2))]
    assert next(iter(open_calibration(iter([feed(0)]), inputs)))["x"].dtype == np.dtype(ml_dtypes.bfloat16)


def test_every_feed_is_checked_at_once_with_its_samples() -> None:
    bad = feed(3)
    bad["x"][1, 0] = np.nan
    for source in ([feed(0), bad], iter([feed(0), bad])):
        with pytest.raises(InputError, match=r"feed 1: input 'x' has NaN or Inf \(as float32\) in sample 4"):
            open_calibration(source, [X])


@pytest.mark.parametrize("later", [[feed(0)], [feed(0), feed(3, 2)], [feed(0), {"z": np.zeros(1)}]])
def test_other_data_in_a_later_pass(later: list[dict[str, np.ndarray]]) -> None:
    passes = iter([[feed(0), feed(3)], later])
    data = open_calibration(lambda: iter(next(passes)), [X])
    with pytest.raises(InputError, match=r"gave other data in a later pass \(feed 1 differs in size or is gone\)"):
        list(data)


def test_the_wrong_number_of_arrays() -> None:
    told = r"list, feed 0 gives 2 arrays, but the model has 1 inputs \(x float32 \[batch, 2\]\); give \{input: array\}"
    with pytest.raises(InputError, match=told):
        open_calibration([(np.zeros((1, 2)), np.zeros(1))], [X])


def test_things_that_are_no_data() -> None:
    with pytest.raises(InputError, match=r"data of type int cannot be read; give a path, module:function"):
        open_calibration(3, [X])
    with pytest.raises(InputError, match=r"expected an iterable of \{input: array\}, got int"):
        open_calibration(lambda: 3, [X])


@pytest.mark.parametrize("source", [[], iter([]), list])
def test_no_feeds(source: object) -> None:
    with pytest.raises(InputError, match="it holds no samples; calibration needs at least one"):
        open_calibration(source, [X])


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the current directory."""
    (tmp_path / "user_calibration.py").write_text(
        "import numpy as np\n"
        "calls = []\n"
        "def feeds():\n"
        "    calls.append(1)\n"
        "    for first in (0, 3):\n"
        "        yield {'x': np.arange(2 * first, 2 * first + 6, dtype=np.float32).reshape(3, 2)}\n"
        "def whole():\n"
        "    calls.append(1)\n"
        "    return list(feeds())\n"
        "def fails():\n"
        "    yield next(feeds())\n"
        "    raise KeyError('no such column')\n"
        "def needs(argument):\n"
        "    pass\n"
        "def number():\n"
        "    return 3\n"
        "constant = 3\n"
    )
    (tmp_path / "broken_calibration.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    yield "user_calibration"
    sys.modules.pop("user_calibration", None)


def test_module_and_function(user_module: str) -> None:
    path = list(sys.path)
    data = open_calibration(f"{user_module}:feeds", [X])
    assert sys.path == path
    assert numbers(data) == numbers(data) == [[0, 1, 2], [3, 4, 5]]
    assert len(sys.modules[user_module].calls) == 3, "one to count, two passes"
    assert data.description == "6 samples of user_calibration:feeds"
    assert numbers(open_calibration(f"{user_module}:feeds@::4", [X])) == [[0], [4]]


def test_a_function_that_returns_a_list_is_called_once(user_module: str) -> None:
    data = open_calibration(f"{user_module}:whole", [X])
    assert numbers(data) == numbers(data)
    assert len(sys.modules[user_module].calls) == 2, "whole itself, and feeds in it"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("user_calibration:fails", "user_calibration:fails failed: KeyError: 'no such column'"),
        ("user_calibration:needs", "user_calibration:needs failed: TypeError: .*argument"),
        ("user_calibration:number", "user_calibration:number failed: InputError: expected an iterable"),
        ("user_calibration:feds", "module user_calibration has no function feds; did you mean feeds"),
        ("user_calibration:constant", "module user_calibration has no function constant"),
        ("broken_calibration:feeds", "importing broken_calibration failed: ZeroDivisionError: division by zero"),
        ("no_such_module:feeds", "importing no_such_module failed: ModuleNotFoundError: .*; write module:function"),
    ],
)
def test_what_can_go_wrong_with_a_function(user_module: str, name: str, told: str) -> None:
    path = list(sys.path)
    with pytest.raises(InputError, match=told):
        open_calibration(name, [X])
    assert sys.path == path


def write_tensor(path: Path, array: np.ndarray, name: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(numpy_helper.from_array(array, name or None).SerializeToString())


def test_test_data_sets_in_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 0):
        write_tensor(tmp_path / f"test_data_set_{number}" / "input_0.pb", np.full((3, 2), number, np.float32))
    data = open_calibration(tmp_path, [X])
    assert (data.samples, len(data), data.batch_size) == (3, 3, 1)
    assert [float(part["x"][0, 0]) for part in data] == [0, 2, 10]
    assert next(iter(data))["x"].shape == (3, 2), "a data set is never taken apart"


def test_tensors_serve_inputs_by_name_then_by_place(tmp_path: Path) -> None:
    write_tensor(tmp_path / "input_0.pb", np.arange(3), "y")
    write_tensor(tmp_path / "input_1.pb", feed(0)["x"], "x")
    assert next(iter(open_calibration(tmp_path, [X, Y])))["y"].tolist() == [0, 1, 2]
    write_tensor(tmp_path / "input_0.pb", feed(0)["x"], "other")
    write_tensor(tmp_path / "input_1.pb", np.arange(3))
    assert next(iter(open_calibration(tmp_path, [X, Y])))["y"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["labels", ""])
def test_labels_among_tensors(tmp_path: Path, name: str) -> None:
    for number in range(2):
        write_tensor(tmp_path / f"test_data_set_{number}" / "input_0.pb", feed(0)["x"], "x")
    assert [set(part) for part in open_calibration(tmp_path, [X], labels=True)] == [{"x"}] * 2
    for number in range(2):
        write_tensor(tmp_path / f"test_data_set_{number}" / "input_1.pb", np.full((3, 2), number / 2), name)
    parts = list(open_calibration(tmp_path, [X], labels=True))
    assert [part["labels"].tolist() for part in parts] == [[[0.0] * 2] * 3, [[0.5] * 2] * 3]


def test_wrong_tensors(tmp_path: Path) -> None:
    path = tmp_path / "input_0.pb"
    write_tensor(path, feed(0)["x"])
    with pytest.raises(InputError, match="there is no array for input 'y'; the model's inputs are"):
        open_calibration(tmp_path, [X, Y])
    write_tensor(tmp_path / "input_1.pb", feed(0)["x"], "x")
    with pytest.raises(InputError, match=r"input_1\.pb: a second tensor for input 'x'; each input needs one"):
        open_calibration(tmp_path, [X, Y])
    with pytest.raises(InputError, match=r"preprocess goes with images, got "):
        open_calibration(tmp_path, [X], preprocess="raw")


def test_empty_folder_of_tensors(tmp_path: Path) -> None:
    (tmp_path / "test_data_set_0").mkdir()
    with pytest.raises(InputError, match=r"test_data_set_0: there is no array for input 'x'"):
        open_calibration(tmp_path, [X])


@pytest.mark.parametrize("content", [b"", b"garbage!!", "cut"])
def test_broken_tensors(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "input_0.pb"
    write_tensor(path, feed(0)["x"])
    path.write_bytes(path.read_bytes()[:-5] if isinstance(content, str) else content)
    with pytest.raises(InputError, match=r"input_0\.pb is no readable ONNX tensor \(truncated or corrupt\): "):
        open_calibration(tmp_path, [X])


def test_tensors_with_external_data_are_refused(tmp_path: Path) -> None:
    tensor = numpy_helper.from_array(feed(0)["x"])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    (tmp_path / "input_0.pb").write_bytes(tensor.SerializeToString())
    with pytest.raises(InputError, match=r"input_0\.pb keeps its data in another file; save the tensor with its data"):
        open_calibration(tmp_path, [X])
