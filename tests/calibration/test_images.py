from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quantkit.calibration.data import InputSpec, open_calibration
from quantkit.calibration.images import class_labels, find_images, read_image
from quantkit.errors import InputError

MODEL = [InputSpec("image", np.dtype(np.float32), ("batch", 3, 6, 6))]


def save(path: Path, value: int, size: tuple[int, int] = (6, 6), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).convert(mode).save(path)
    return path


def first_values(feeds: object) -> list[float]:
    return [float(image[0, 0, 0]) for feed in feeds for image in feed["image"]]  # type: ignore[attr-defined]


def test_images_come_sorted_and_in_batches(tmp_path: Path) -> None:
    for name, value in (("c.png", 3), ("a.bmp", 1), ("b.ppm", 2)):
        save(tmp_path / name, value)
    (tmp_path / "notes.txt").write_text("no image")
    save(tmp_path / ".hidden.png", 9)
    data = open_calibration(tmp_path, MODEL, preprocess="raw", batch_size=2)
    assert (data.samples, len(data), data.batch_size) == (3, 2, 2)
    assert first_values(data) == [1, 2, 3]
    assert first_values(data) == [1, 2, 3], "a second pass gives the same"
    assert data.description == f"3 samples of {tmp_path.name}, preprocess raw"


def test_class_folders_one_level_deep(tmp_path: Path) -> None:
    for name, value in (("dog/a.png", 2), ("cat/z.png", 1), ("dog/deep/x.png", 5), (".cache/y.png", 6)):
        save(tmp_path / name, value)
    assert [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)] == ["cat/z.png", "dog/a.png"]


@pytest.mark.parametrize(
    ("folders", "labels"),
    [
        (("dog", "cat", "eel"), {"cat": 0, "dog": 1, "eel": 2}),
        (("10", "9", "0"), {"10": 10, "9": 9, "0": 0}),
        (("007", "3"), {"007": 7, "3": 3}),
        (("10", "9", "x"), {"10": 0, "9": 1, "x": 2}),
        (("n02", "n01", "1234567890"), {"1234567890": 0, "n01": 1, "n02": 2}),
    ],
)
def test_labels_of_class_folders(folders: tuple[str, ...], labels: dict[str, int], tmp_path: Path) -> None:
    for name in folders:
        save(tmp_path / name / "a.png", 1)
        save(tmp_path / name / "b.png", 2)
    (tmp_path / ".hidden").mkdir()
    files = find_images(tmp_path)
    found = class_labels(tmp_path, files)
    assert found.dtype == np.int64
    assert found.tolist() == [labels[file.parent.name] for file in files] and len(files) == 2 * len(folders)


def test_a_class_without_images_counts(tmp_path: Path) -> None:
    save(tmp_path / "b" / "1.png", 1)
    (tmp_path / "a").mkdir()
    data = open_calibration(
        tmp_path, [*MODEL, InputSpec("labels", np.dtype(np.int64), ("batch",))], preprocess="raw", batch_size=1
    )
    (feed,) = data
    assert feed["labels"].tolist() == [1] and feed["labels"].dtype == np.int64 and set(feed) == {"image", "labels"}


def test_labels_of_class_folders_where_there_are_any(tmp_path: Path) -> None:
    for name in ("cat/1.png", "dog/1.png", "dog/2.png"):
        save(tmp_path / name, 1)
    (feed,) = open_calibration(tmp_path, MODEL, preprocess="raw", labels=True)
    assert feed["labels"].tolist() == [0, 1, 1]
    save(tmp_path / "loose.png", 1)
    (feed,) = open_calibration(tmp_path, MODEL, preprocess="raw", labels=True)
    assert set(feed) == {"image"} and len(feed["image"]) == 4


def test_two_folders_of_one_class(tmp_path: Path) -> None:
    for name in ("7", "007"):
        save(tmp_path / name / "a.png", 1)
    with pytest.raises(InputError, match=r"two sub-folders are the same class's number, among 007, 7"):
        class_labels(tmp_path, find_images(tmp_path))


def test_every_nth_image(tmp_path: Path) -> None:
    for value in range(7):
        save(tmp_path / f"{value}.png", value)
    data = open_calibration(f"{tmp_path}@::3", MODEL, preprocess="raw")
    assert first_values(data) == [0, 3, 6]
    assert data.description == f"3 samples of {tmp_path.name}@::3, preprocess raw"


def test_images_are_decoded_when_they_are_needed(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 1)
    (tmp_path / "b.png").write_bytes(b"not an image")
    data = open_calibration(tmp_path, MODEL, preprocess="raw", batch_size=1)
    with pytest.raises(InputError, match=r"b\.png is no readable image: "):
        list(data)


def test_other_sizes_are_resized(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg", 100, (20, 30))
    save(tmp_path / "b.webp", 200, (7, 5))
    batch = next(iter(open_calibration(tmp_path, MODEL, preprocess="imagenet")))["image"]
    assert batch.shape == (2, 3, 6, 6)


def test_different_sizes_for_a_model_that_fixes_none(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 1, (6, 6))
    save(tmp_path / "b.png", 1, (6, 8))
    free = [InputSpec("image", np.dtype(np.float32), ("batch", 3, "h", "w"))]
    with pytest.raises(InputError, match=r"the images have different sizes, \(3, 6, 6\) and \(3, 6, 8\).*`size: "):
        open_calibration(tmp_path, free, preprocess="raw")
    assert len(list(open_calibration(tmp_path, free, preprocess="raw", batch_size=1))) == 2


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    path = save(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"), 255, mode=mode)
    image = read_image(path)
    assert image.dtype == np.uint8
    np.testing.assert_allclose(image, np.full((6, 6, 3), 255), atol=1)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((6, 6, 3), value, np.uint8)) for value in (10, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(read_image(tmp_path / "a.gif"), np.full((6, 6, 3), 10))


def test_sixteen_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((6, 6), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match=r"deep\.png has more than 8 bits per channel \(mode I;16\); save it with 8"):
        read_image(tmp_path / "deep.png")


@pytest.mark.parametrize("limit", [30, 10])  # Pillow warns above the limit and fails above twice the limit
def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    path = save(tmp_path / "bomb.png", 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(InputError, match=r"bomb\.png is too large to be a calibration image"):
        read_image(path)


def test_truncated_image(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(InputError, match=r"cut\.jpg is no readable image"):
        read_image(path)


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.png", 1)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match=r"a\.png needs Pillow: pip install quantkit\[images\]"):
        read_image(path)


def test_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no images \(\.jpg, .*\) and no test_data_set"):
        open_calibration(tmp_path, MODEL, preprocess="raw")


def test_images_need_a_preprocess(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 1)
    with pytest.raises(InputError, match=r"how the model wants them is not said: raw images need --preprocess"):
        open_calibration(tmp_path, MODEL)


def test_images_serve_one_input(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 1)
    two = [*MODEL, InputSpec("other", np.dtype(np.float32), ("batch", 2))]
    with pytest.raises(InputError, match=r"one input only; the model's inputs are image .*, other"):
        open_calibration(tmp_path, two, preprocess="raw")
