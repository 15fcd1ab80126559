from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quantkit.calibration.inputs import InputSpec
from quantkit.calibration.preprocess import PRESETS, Preprocess, fit_preprocess, load_preprocess
from quantkit.errors import InputError

PIXELS = np.array([[[255, 0, 51], [1, 2, 3]]], np.uint8)  # [1, 2, 3]
FLOAT32_STEP = 1.2e-7  # half a unit in the last place of float32, relative, rounded up twice


def spec(*shape: int | str | None, dtype: type = np.float32) -> InputSpec:
    return InputSpec("image", np.dtype(dtype), shape)


def photo(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("preset", "expected"),  # per channel, the values of the two pixels
    [
        ("imagenet", [[2.2489082969, -2.1007792619], [-2.0357142857, -2.0007002801], [-0.9155555556, -1.7521568627]]),
        ("cifar10", [[2.2489082969, -2.1007792619], [-2.0357142857, -2.0007002801], [-0.9155555556, -1.7521568627]]),
        ("caffe", [[-53.0, -101.0], [-117.0, -115.0], [132.0, -122.0]]),
        ("tf", [[1.0, -0.9921568627], [-1.0, -0.9843137255], [-0.6, -0.9764705882]]),
        ("unit", [[1.0, 0.0039215686], [0.0, 0.0078431373], [0.2, 0.0117647059]]),
        ("raw", [[255.0, 1.0], [0.0, 2.0], [51.0, 3.0]]),
    ],
)
def test_presets_against_values_worked_out_by_hand(preset: str, expected: list[list[float]]) -> None:
    result = PRESETS[preset].apply(PIXELS)
    assert result.dtype == np.float32
    assert result.shape == (3, 1, 2)
    np.testing.assert_allclose(result[:, 0], expected, rtol=2e-7, atol=1e-9)


def test_arithmetic_is_exact_to_the_last_float32_place() -> None:
    image = photo(5, 7)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = ((image / 255.0 - mean) / std).transpose(2, 0, 1)
    np.testing.assert_allclose(PRESETS["imagenet"].apply(image), expected, rtol=FLOAT32_STEP, atol=1e-9)


def test_layout_nhwc_and_the_image_is_not_changed() -> None:
    image = photo(4, 6)
    before = image.copy()
    result = Preprocess(layout="nhwc", channels="bgr").apply(image)
    assert result.shape == (4, 6, 3)
    np.testing.assert_array_equal(result, image[..., ::-1].astype(np.float32))
    np.testing.assert_array_equal(image, before)


def test_gray_is_what_pillow_makes() -> None:
    image = photo(9, 5)
    expected = np.asarray(Image.fromarray(image).convert("L"))
    np.testing.assert_array_equal(Preprocess(channels="gray").apply(image)[0], expected.astype(np.float32))


def test_an_image_of_the_right_size_is_not_resized() -> None:
    image = photo(8, 8)
    result = Preprocess(size=(8, 8), resize=256, crop=0.875).apply(image)
    np.testing.assert_array_equal(result, image.transpose(2, 0, 1).astype(np.float32))


@pytest.mark.parametrize(
    ("resize", "crop", "image_size", "scaled"),
    [
        ("cover", 0.875, (40, 60), (32, 48)),  # shorter side 28 / 0.875, longer 32 * 60 // 40
        ("cover", 0.875, (60, 40), (48, 32)),
        ("cover", 1.0, (20, 30), (28, 42)),
        (50, 1.0, (40, 60), (50, 75)),
        ("stretch", 0.5, (40, 60), (28, 28)),
    ],
)
def test_resize_then_centre_crop(
    resize: int | str, crop: float, image_size: tuple[int, int], scaled: tuple[int, int]
) -> None:
    image = photo(*image_size)
    whole = np.asarray(Image.fromarray(image).resize(scaled[::-1], Image.Resampling.BILINEAR))
    top, left = (scaled[0] - 28) // 2, (scaled[1] - 28) // 2
    if (scaled[1] - 28) % 2:  # half a pixel goes to the even side
        left = round((scaled[1] - 28) / 2)
    expected = whole[top : top + 28, left : left + 28].transpose(2, 0, 1)
    result = Preprocess(size=(28, 28), resize=resize, crop=crop).apply(image)
    np.testing.assert_array_equal(result, expected.astype(np.float32))


def test_a_size_that_is_not_square_is_covered() -> None:
    assert Preprocess(size=(10, 30)).apply(photo(50, 50)).shape == (3, 10, 30)
    assert Preprocess(size=(30, 10)).apply(photo(20, 50)).shape == (3, 30, 10)


def test_interpolation_is_used() -> None:
    image = photo(10, 10)
    expected = np.asarray(Image.fromarray(image).resize((5, 5), Image.Resampling.NEAREST))
    result = Preprocess(size=(5, 5), interpolation="nearest").apply(image)
    np.testing.assert_array_equal(result, expected.transpose(2, 0, 1).astype(np.float32))


def test_too_few_pixels_after_resizing() -> None:
    with pytest.raises(InputError, match=r"resize 4 makes 4x8 pixels of an image of 10x20, too few for .* 6x6"):
        Preprocess(size=(6, 6), resize=4).apply(photo(10, 20))


def test_integer_results() -> None:
    result = Preprocess(dtype="uint8").apply(PIXELS)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result[:, 0], [[255, 1], [0, 2], [51, 3]])
    shifted = Preprocess(dtype="int8", mean=128.0)
    assert shifted.apply(PIXELS)[:, 0].tolist() == [[127, -127], [-128, -126], [-77, -125]]


@pytest.mark.parametrize("wrong", [Preprocess(dtype="uint8", mean=1.0), Preprocess(dtype="uint8", scale=1 / 255)])
def test_integer_results_that_do_not_fit(wrong: Preprocess) -> None:
    with pytest.raises(InputError, match=r"are not all integers of uint8; .* wants the preset raw"):
        wrong.apply(PIXELS)


def test_apply_wants_uint8_images() -> None:
    with pytest.raises(InputError, match=r"preprocess takes uint8 images \[H, W, 3\], got float32 \[3, 4, 4\]"):
        Preprocess().apply(np.zeros((3, 4, 4), np.float32))


def test_resizing_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match=r"resizing images needs Pillow: pip install quantkit\[images\]"):
        Preprocess(size=(2, 2)).apply(PIXELS)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"channels": "rbg"}, "channels must be one of rgb, bgr, gray, got 'rbg'"),
        ({"layout": "chw"}, "layout must be one of nchw, nhwc, got 'chw'"),
        ({"interpolation": "cubic"}, "interpolation must be one of nearest, .*, got 'cubic'"),
        ({"dtype": "int64"}, "dtype must be one of float32, .*, got 'int64'"),
        ({"size": (224,)}, r"size must be \[height, width\] in pixels, got \(224,\)"),
        ({"size": (0, 5)}, r"size must be \[height, width\]"),
        ({"resize": "fit"}, "resize must be cover, stretch or the pixels of the shorter side, got 'fit'"),
        ({"resize": 0}, "resize must be .*, got 0"),
        ({"crop": 1.5}, "crop must be above 0 and at most 1, got 1.5"),
        ({"mean": "a"}, "mean must be a number or a list of numbers, got 'a'"),
        ({"scale": (1.0, 1.0, 1.0)}, r"scale must be a number, got \(1.0"),
        ({"scale": float("inf")}, "scale must be a number, got inf"),
        ({"mean": (1.0, 2.0)}, "mean needs 1 or 3 numbers for channels rgb, got 2"),
        ({"std": (1.0, 2.0, 3.0), "channels": "gray"}, "std needs 1 number for channels gray, got 3"),
        ({"std": 0.0}, "std must be above 0, got 0.0"),
    ],
)
def test_wrong_fields(fields: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=f"^preprocess: {told}"):
        Preprocess(**fields)  # type: ignore[arg-type]


def test_everything_wrong_is_told_at_once() -> None:
    with pytest.raises(InputError, match=r"channels must .*; crop must .*; std must"):
        Preprocess(channels="x", crop=0, std=-1.0)


@pytest.mark.parametrize(
    ("shape", "layout", "size", "channels"),
    [
        (("n", 3, 32, 48), "nchw", (32, 48), "rgb"),
        (("n", 32, 48, 3), "nhwc", (32, 48), "rgb"),
        ((1, 1, 28, 28), "nchw", (28, 28), "gray"),
        (("n", 28, 28, 1), "nhwc", (28, 28), "gray"),
        (("n", 3, "h", "w"), "nchw", None, "rgb"),
        ((None, None, None, None), "nchw", None, "rgb"),
        ((None, None, None, 3), "nhwc", None, "rgb"),
    ],
)
def test_fit_takes_size_layout_and_gray_from_the_model(
    shape: tuple[int | str | None, ...], layout: str, size: tuple[int, int] | None, channels: str
) -> None:
    fitted = fit_preprocess(PRESETS["unit"], spec(*shape, dtype=np.float16))
    assert (fitted.layout, fitted.size, fitted.channels, fitted.dtype) == (layout, size, channels, "float16")


def test_fit_keeps_what_is_given_where_the_model_is_free() -> None:
    fitted = fit_preprocess(Preprocess(size=(50, 60), layout="nhwc"), spec("n", "h", "w", 3))
    assert (fitted.size, fitted.layout) == ((50, 60), "nhwc")


@pytest.mark.parametrize(
    ("preprocess", "shape", "told"),
    [
        (Preprocess(size=(8, 9)), ("n", 3, 8, 8), "it gives width 9 for 8$"),
        (Preprocess(layout="nhwc"), ("n", 3, 8, 8), "it gives channels 3 for 8"),
        (PRESETS["imagenet"], ("n", 1, 8, 8), "it gives channels 3 for 1"),
        (Preprocess(dtype="uint8"), ("n", 3, 8, 8), "it gives dtype uint8 for float32"),
    ],
)
def test_fit_refuses_contradictions(preprocess: Preprocess, shape: tuple[int | str, ...], told: str) -> None:
    with pytest.raises(InputError, match=rf"preprocess does not fit input 'image', which wants float32 .*{told}"):
        fit_preprocess(preprocess, spec(*shape))


def test_fit_refuses_inputs_that_are_no_images() -> None:
    with pytest.raises(InputError, match=r"input 'image' is no image input: images need rank 4, .* float32 \[n, 8\]"):
        fit_preprocess(Preprocess(), spec("n", 8))
    with pytest.raises(InputError, match=r"is no image input: no axis of 1 or 3 channels in float32 \[n, 7, 8, 9\]"):
        fit_preprocess(Preprocess(), spec("n", 7, 8, 9))


def test_json_file_starts_from_a_base(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text('{"base": "imagenet", "size": [64, 64], "crop": 1.0, "scale": "1/128", "mean": ["1/2", 0, 0.25]}')
    made = load_preprocess(path)
    assert made.size == (64, 64)
    assert made.scale == 1 / 128
    assert made.mean == (0.5, 0, 0.25)
    assert made.std == PRESETS["imagenet"].std


def test_yaml_file(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("channels: bgr\nmean: [1, 2, 3]\nstd: 1/0\n")
    with pytest.raises(InputError, match=r"p.yaml: preprocess: std must be a number .*, got '1/0'"):
        load_preprocess(path)
    path.write_text("channels: bgr\nmean: [1, 2, 3]\n")
    assert load_preprocess(path) == Preprocess(channels="bgr", mean=(1, 2, 3))


def test_unknown_preset_lists_the_presets() -> None:
    told = r"unknown preprocess 'imagnet' \(did you mean imagenet\?\); presets: imagenet, caffe, cifar10, tf, unit, raw"
    with pytest.raises(InputError, match=told):
        load_preprocess("imagnet")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("p.json", '{"means": 1, "sdt": 2}', "p.json: unknown key means, sdt; known keys: base, size, resize, crop"),
        ("p.json", '{"base": "inception"}', "p.json: unknown base 'inception'; presets: imagenet"),
        ("p.json", '{"crop": 2}', "p.json: preprocess: crop must be"),
        ("p.json", "{", "p.json cannot be read: "),
        ("p.json", "[1]", "p.json must hold a mapping of preprocess keys, got list"),
        ("p.yaml", "a: [1", "p.yaml cannot be read: "),
        ("p.yml", "3: 4", "p.yml must hold a mapping of preprocess keys"),
    ],
)
def test_wrong_files(tmp_path: Path, name: str, content: str, told: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InputError, match=told):
        load_preprocess(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"preprocess file .*no.json does not exist"):
        load_preprocess(tmp_path / "no.json")


def test_yaml_without_pyyaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    path = tmp_path / "p.yaml"
    path.write_text("crop: 1")
    with pytest.raises(InputError, match=r"needs PyYAML: pip install pyyaml, or use .json"):
        load_preprocess(path)
