from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from quantkit.calibration.arrays import read_npy, read_npz
from quantkit.calibration.data import InputSpec, open_calibration
from quantkit.errors import InputError

MODEL = [InputSpec("x", np.dtype(np.float32), ("batch", 3))]
PAIR = [InputSpec("ids", np.dtype(np.int64), ("batch", 2)), InputSpec("mask", np.dtype(np.int64), ("batch", 2))]
IMAGES = [InputSpec("image", np.dtype(np.float32), ("batch", 3, 4, 4))]
VALUES = np.arange(30, dtype=np.float32).reshape(10, 3)


def is_mapped(array: np.ndarray) -> bool:
    return isinstance(array, np.memmap) or (isinstance(array.base, np.ndarray) and is_mapped(array.base))


def gathered(data: object, name: str = "x") -> np.ndarray:
    return np.concatenate([feed[name] for feed in data])  # type: ignore[attr-defined]


def test_npz_by_input_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", mask=np.ones((5, 2), np.int64), ids=np.arange(10, dtype=np.int32).reshape(5, 2))
    data = open_calibration(tmp_path / "d.npz", PAIR, batch_size=2)
    assert (data.samples, len(data), data.description) == (5, 3, "5 samples of d.npz")
    np.testing.assert_array_equal(gathered(data, "ids"), np.arange(10).reshape(5, 2))
    assert gathered(data, "mask").dtype == np.int64


def test_a_lone_array_serves_the_sole_input_whatever_its_key(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", VALUES)
    np.testing.assert_array_equal(gathered(open_calibration(tmp_path / "d.npz", MODEL)), VALUES)


def test_keys_pick_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", a=VALUES, b=-VALUES, labels=np.zeros(10))
    data = open_calibration(f"{tmp_path}/d.npz:b@2:4", MODEL)
    np.testing.assert_array_equal(gathered(data), -VALUES[2:4])
    assert data.description == "2 samples of d.npz:b@2:4"
    np.savez(tmp_path / "e.npz", k1=np.zeros((3, 2), np.int64), k2=np.ones((3, 2), np.int64), other=1)
    data = open_calibration(f"{tmp_path}/e.npz:ids=k1,mask=k2", PAIR)
    assert gathered(data, "mask").min() == 1


def test_npy_and_arrays_in_memory(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", VALUES)
    for source in (tmp_path / "d.npy", VALUES, {"x": VALUES}):
        np.testing.assert_array_equal(gathered(open_calibration(source, MODEL)), VALUES)


@pytest.mark.parametrize("values", [VALUES, np.asfortranarray(VALUES), VALUES[:0], VALUES.astype(">f4")])
def test_members_of_every_memory_order_and_compression(tmp_path: Path, values: np.ndarray) -> None:
    np.savez(tmp_path / "stored.npz", x=values)
    np.savez_compressed(tmp_path / "packed.npz", x=values)
    for name in ("stored", "packed"):
        array = read_npz(tmp_path / f"{name}.npz", MODEL, {})["x"]
        np.testing.assert_array_equal(array, values)
        assert is_mapped(array) == (name == "stored" and len(values) > 0)
    np.save(tmp_path / "v.npy", values)
    np.testing.assert_array_equal(read_npy(tmp_path / "v.npy"), values)


def test_a_batch_is_a_copy_and_not_a_view_of_the_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=VALUES)
    batch = next(iter(open_calibration(tmp_path / "d.npz", MODEL)))["x"]
    assert not is_mapped(batch)
    assert batch.flags.writeable


def test_inputs_of_rank_0_go_into_every_batch() -> None:
    inputs = [*MODEL, InputSpec("scale", np.dtype(np.float32), ())]
    feeds = list(open_calibration({"x": VALUES, "scale": np.float32(2)}, inputs, batch_size=5))
    assert [feed["scale"].tolist() for feed in feeds] == [2.0, 2.0]


def test_raw_images_are_preprocessed_batch_by_batch(tmp_path: Path) -> None:
    raw = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", raw=raw, labels=np.zeros(5))
    data = open_calibration(f"{tmp_path}/d.npz:raw", IMAGES, preprocess="unit", batch_size=2)
    np.testing.assert_allclose(gathered(data, "image"), (raw / 255.0).transpose(0, 3, 1, 2), rtol=2e-7, atol=0)
    assert data.description == "5 samples of d.npz:raw, preprocess unit"


@pytest.mark.parametrize("shape", [(2, 4, 4), (2, 4, 4, 1)])
def test_grey_images(shape: tuple[int, ...]) -> None:
    raw = np.arange(32, dtype=np.uint8).reshape(shape)
    inputs = [InputSpec("image", np.dtype(np.float32), (1, 1, 4, 4))]
    data = open_calibration(raw, inputs, preprocess="raw")
    np.testing.assert_array_equal(gathered(data, "image"), raw.reshape(2, 1, 4, 4).astype(np.float32))


def test_raw_images_without_preprocess() -> None:
    with pytest.raises(InputError, match=r"wants float32 \[batch, 3, 4, 4\], got uint8 \[2, 4, 4, 3\]; .*--preprocess"):
        open_calibration(np.zeros((2, 4, 4, 3), np.uint8), IMAGES)


def test_preprocess_of_arrays_that_are_no_raw_images() -> None:
    with pytest.raises(
        InputError, match=r"preprocess wants raw images, uint8 \[samples, H, W, 3\], got float32 \[2, 3"
    ):
        open_calibration(np.zeros((2, 3, 4, 4), np.float32), IMAGES, preprocess="unit")


def test_different_numbers_of_samples() -> None:
    arrays = {"ids": np.zeros((3, 2), np.int64), "mask": np.zeros((4, 2), np.int64)}
    with pytest.raises(InputError, match=r"different numbers of samples: 3 for 'ids', 4 for 'mask'; every array needs"):
        open_calibration(arrays, PAIR)


def test_a_sample_without_batch_axis() -> None:
    with pytest.raises(InputError, match=r"wants float32 \[batch, 3\], got float32 \[3\]; the first axis must be the"):
        open_calibration(np.zeros(3, np.float32), MODEL)


def test_an_archive_without_the_inputs_tells_how_to_pick(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", xx=VALUES, labels=np.zeros(10))
    told = (
        r"d\.npz: there is no array for input 'x'; no input of the model is called 'xx' .*, 'labels'; "
        r".*; pick arrays by d\.npz:KEY or"
    )
    with pytest.raises(InputError, match=told):
        open_calibration(tmp_path / "d.npz", MODEL)


def test_keys_that_cannot_serve(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", a=VALUES, b=VALUES)
    with pytest.raises(InputError, match=r"d\.npz holds no array c; it holds a, b"):
        open_calibration(f"{tmp_path}/d.npz:c", MODEL)
    with pytest.raises(
        InputError, match=r"key 'a' can serve a model with one input only; .* d\.npz:input=KEY,input=KEY"
    ):
        open_calibration(f"{tmp_path}/d.npz:a", PAIR)
    with pytest.raises(
        InputError, match=r"no array for input 'mask'; no input of the model is called 'iids' \(did you"
    ):
        open_calibration(f"{tmp_path}/d.npz:iids=a,ids=b", PAIR)
    with pytest.raises(InputError, match=r"'ids=a,mask=': 'mask=' is not of the form input=KEY"):
        open_calibration(f"{tmp_path}/d.npz:ids=a,mask=", PAIR)


def test_python_objects_are_never_unpickled(tmp_path: Path) -> None:
    objects = np.array([{"a": 1}, None], object)
    np.savez(tmp_path / "stored.npz", x=objects)
    np.savez_compressed(tmp_path / "packed.npz", x=objects)
    np.save(tmp_path / "d.npy", objects)
    for name in ("stored.npz", "packed.npz", "d.npy"):
        with pytest.raises(InputError, match=rf"{name}.* holds Python objects, not numbers; save it with a numeric"):
            open_calibration(tmp_path / name, MODEL)


@pytest.mark.parametrize("packed", [False, True])
def test_labels_of_an_archive(tmp_path: Path, packed: bool) -> None:
    save = np.savez_compressed if packed else np.savez
    path = tmp_path / "d.npz"
    save(path, x=VALUES, labels=np.arange(20, dtype=np.uint8).reshape(10, 2), other=np.arange(10))
    with pytest.raises(InputError, match=r"d\.npz: no input of the model is called 'other'"):
        open_calibration(path, MODEL, labels=True)
    (feed,) = open_calibration(f"{path}:x=x,labels=other", MODEL, batch_size=10, labels=True)
    assert feed["labels"].tolist() == list(range(10))
    assert set(next(iter(open_calibration(f"{path}:x", MODEL, labels=True)))) == {"x"}
    save(path, x=VALUES, labels=np.arange(20, dtype=np.uint8).reshape(10, 2))
    (feed,) = open_calibration(path, MODEL, batch_size=10, labels=True)
    assert feed["labels"].dtype == np.uint8 and feed["labels"].shape == (10, 2)
    save(path, x=VALUES, labels=np.array([{}] * 10))
    with pytest.raises(InputError, match=r"array 'labels' holds Python objects, not numbers"):
        open_calibration(path, MODEL, labels=True)


def test_labels_that_look_like_images_are_not_preprocessed(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "d.npz", image=pictures, labels=pictures)
    (feed,) = open_calibration(tmp_path / "d.npz", IMAGES, preprocess="raw", labels=True)
    np.testing.assert_array_equal(feed["labels"], pictures)
    np.testing.assert_array_equal(feed["image"], pictures.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("kept", [0, 5, 70, 200])
@pytest.mark.parametrize("name", ["stored.npz", "packed.npz", "d.npy"])
def test_truncated_files(tmp_path: Path, name: str, kept: int) -> None:
    np.savez(tmp_path / "stored.npz", x=VALUES)
    np.savez_compressed(tmp_path / "packed.npz", x=VALUES)
    np.save(tmp_path / "d.npy", VALUES)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=rf"{name} is no readable \.np[yz] file \(truncated or corrupt\): "):
        open_calibration(path, MODEL)


def test_a_corrupt_member(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "d.npz", x=VALUES)
    content = bytearray((tmp_path / "d.npz").read_bytes())
    content[60:90] = bytes(30)
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"d\.npz is no readable \.npz file"):
        open_calibration(tmp_path / "d.npz", MODEL)


def test_an_unknown_npy_version(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", VALUES)
    content = bytearray((tmp_path / "d.npy").read_bytes())
    content[6] = 9
    (tmp_path / "d.npy").write_bytes(content)
    with pytest.raises(InputError, match=r"d\.npy is no readable \.npy file .*: unknown \.npy version \(9, 0\)"):
        read_npy(tmp_path / "d.npy")


def test_npy_version_2(tmp_path: Path) -> None:
    with (tmp_path / "d.npy").open("wb") as file:
        np.lib.format.write_array(file, VALUES, version=(2, 0))
    np.testing.assert_array_equal(read_npy(tmp_path / "d.npy"), VALUES)


def test_a_header_that_promises_more_than_the_file_holds(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (10**12, 3)})
    (tmp_path / "d.npy").write_bytes(buffer.getvalue())
    with zipfile.ZipFile(tmp_path / "d.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", buffer.getvalue())
    for name in ("d.npy", "d.npz"):
        with pytest.raises(InputError, match=rf"{name} is no readable"):
            open_calibration(tmp_path / name, MODEL)
