"""From a raw uint8 image to what a vision model reads: size, channel order, `(x * scale - mean) / std`, layout."""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.calibration.inputs import InputSpec
from quantkit.errors import InputError
from quantkit.types import Array
from quantkit.wording import SHOWN, shown

CHANNELS = ("rgb", "bgr", "gray")
LAYOUTS = ("nchw", "nhwc")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box")
DTYPES = ("float32", "float16", "float64", "uint8", "int8")
MOST_PIXELS = 1 << 26
"""Of an image that is scaled, before it is cropped."""
MOST_RESULT = 1 << 24
"""Of the result, which has 8 bytes for each channel of each pixel on the way."""
LARGEST_NUMBER = 1e30
"""Of mean, std and scale."""
MOST_TOKENS = 1000
"""Of a YAML file: the time that its parser takes for deep lists grows with their square."""
FILE_BYTES = 1 << 16
"""Of the longest preprocess file."""
_LUMA = np.array([19595, 38470, 7471], np.int64)  # ITU-R 601 weights in 1/65536, the integers that Pillow uses


@dataclass(frozen=True)
class Preprocess:
    """How one image becomes an array. A field that is None follows the model's input.

    Attributes:
        size: (height, width) of the result. An image that has this size already is never resized.
        resize: what happens to an image of another size. `cover`: scaled until its shorter side reaches size / crop,
            then cropped to the centre; an int: scaled until its shorter side has that many pixels, then cropped to
            the centre; `stretch`: scaled straight to size, whatever its proportions.
        crop: share of the scaled image's side that `cover` keeps; 0.875 is 256 pixels for a 224 model.
        mean, std: one number, or one per channel in the order of `channels`; in units of scaled pixels.
        scale: what a pixel value 0 to 255 is multiplied with first.
        channels: `rgb`, `bgr` or `gray` (one channel, ITU-R 601 luma).
        layout: `nchw` or `nhwc`.
        interpolation: Pillow's filter for resizing.
        dtype: of the result; an integer type needs results that are integers within its range.
    """

    size: tuple[int, int] | None = None
    resize: int | str = "cover"
    crop: float = 1.0
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    scale: float = 1.0
    channels: str = "rgb"
    layout: str | None = None
    interpolation: str = "bilinear"
    dtype: str | None = None

    def __post_init__(self) -> None:
        wrong = [text for text in (_wrong_choice(self), _wrong_geometry(self), _wrong_arithmetic(self)) if text]
        if wrong:
            raise InputError(f"preprocess: {'; '.join(wrong)}")

    def apply(self, image: Array) -> Array:
        """uint8 [H, W, 3] -> [C, H, W], or [H, W, C] when the layout is nhwc."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise InputError(f"preprocess takes uint8 images [H, W, 3], got {image.dtype} {list(image.shape)}")
        pixels = _resized(image, self) if self.size not in (None, image.shape[:2]) else image
        if pixels.shape[0] * pixels.shape[1] > MOST_RESULT:
            raise InputError(
                f"preprocess: an image of {pixels.shape[0]}x{pixels.shape[1]} pixels has more than {MOST_RESULT}; "
                "give a preprocess file with `size: [height, width]`"
            )
        if self.channels == "gray":
            pixels = ((pixels @ _LUMA + 0x8000) >> 16)[..., None]
        elif self.channels == "bgr":
            pixels = pixels[..., ::-1]
        values = (pixels.astype(np.float64) * self.scale - np.asarray(self.mean)) / np.asarray(self.std)
        result = _to_dtype(values, np.dtype(self.dtype or "float32"))
        return np.ascontiguousarray(result if self.layout == "nhwc" else result.transpose(2, 0, 1))


def load_preprocess(source: str | Path) -> Preprocess:
    """A preset by name, or a .json/.yaml file with Preprocess's fields and an optional `base: PRESET`."""
    name = str(source)
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if path.suffix.lower() not in (".json", ".yaml", ".yml"):
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(
            f"unknown preprocess {name!r}{hint}; presets: {', '.join(PRESETS)}; or give a .json or .yaml file"
        )
    if not path.is_file():
        raise InputError(f"preprocess file {path} {'is no regular file' if path.exists() else 'does not exist'}")
    values = _read_mapping(path)
    base = values.pop("base", "raw")
    if not isinstance(base, str) or base not in PRESETS:
        raise InputError(f"{path}: unknown base {shown(base)}; presets: {', '.join(PRESETS)}")
    known = [item.name for item in fields(Preprocess)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise InputError(f"{path}: unknown key {', '.join(unknown)[:SHOWN]}; known keys: base, {', '.join(known)}")
    try:
        return replace(PRESETS[base], **{key: _plain(value) for key, value in values.items()})
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def fit_preprocess(preprocess: Preprocess, spec: InputSpec) -> Preprocess:
    """The same preprocessing with size, layout, dtype and grey channel from the model's input where it fixes them."""
    if len(spec.shape) != 4:
        raise InputError(f"input {spec.name!r} is no image input: images need rank 4, the model wants {spec.wants}")
    layout = preprocess.layout or _layout_of(spec)
    channels, height, width = (spec.shape[axis] for axis in ((1, 2, 3) if layout == "nchw" else (3, 1, 2)))
    gray = channels == 1 and isinstance(preprocess.mean, (int, float)) and isinstance(preprocess.std, (int, float))
    fitted = replace(
        preprocess,
        layout=layout,
        channels="gray" if gray else preprocess.channels,
        dtype=preprocess.dtype or spec.dtype.name,
        size=preprocess.size or ((height, width) if isinstance(height, int) and isinstance(width, int) else None),
    )
    made = (1 if fitted.channels == "gray" else 3, *(fitted.size or (None, None)))
    clash = [
        f"{what} {mine} for {theirs}"
        for what, mine, theirs in zip(("channels", "height", "width"), made, (channels, height, width), strict=True)
        if isinstance(theirs, int) and mine != theirs and mine is not None
    ]
    if clash or np.dtype(fitted.dtype) != spec.dtype:
        clash += [f"dtype {fitted.dtype} for {spec.dtype}"] if np.dtype(fitted.dtype) != spec.dtype else []
        raise InputError(
            f"preprocess does not fit input {spec.name!r}, which wants {spec.wants}: it gives {', '.join(clash)}"
        )
    return fitted


def _layout_of(spec: InputSpec) -> str:
    if spec.shape[1] in (1, 3) or (not isinstance(spec.shape[1], int) and spec.shape[3] not in (1, 3)):
        return "nchw"
    if spec.shape[3] in (1, 3):
        return "nhwc"
    raise InputError(f"input {spec.name!r} is no image input: no axis of 1 or 3 channels in {spec.wants}")


def _resized(image: Array, preprocess: Preprocess) -> Array:
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError("resizing images needs Pillow: pip install quantkit[images]") from error
    assert preprocess.size is not None
    height, width = preprocess.size
    tall, wide = _scaled_size(image.shape[0], image.shape[1], preprocess)
    if tall < height or wide < width:
        raise InputError(
            f"preprocess: resize {preprocess.resize} makes {tall}x{wide} pixels of an image of "
            f"{image.shape[0]}x{image.shape[1]}, too few for a size of {height}x{width}"
        )
    if tall * wide > MOST_PIXELS:
        raise InputError(
            f"preprocess: resize {preprocess.resize} makes {tall}x{wide} pixels of an image of "
            f"{image.shape[0]}x{image.shape[1]}, more than {MOST_PIXELS}; leave such images out"
        )
    method = Image.Resampling[preprocess.interpolation.upper()]
    scaled = np.asarray(Image.fromarray(image).resize((wide, tall), method))
    top, left = round((tall - height) / 2), round((wide - width) / 2)
    return scaled[top : top + height, left : left + width]


def _scaled_size(tall: int, wide: int, preprocess: Preprocess) -> tuple[int, int]:
    """Height and width before the crop; proportions are kept except by `stretch`."""
    assert preprocess.size is not None
    if preprocess.resize == "stretch":
        return preprocess.size
    if isinstance(preprocess.resize, int):
        low_height = low_width = preprocess.resize
    else:
        low_height, low_width = (round(side / preprocess.crop) for side in preprocess.size)
    if low_height * wide >= low_width * tall:  # the height is what limits: it becomes exact
        return low_height, low_height * wide // tall
    return low_width * tall // wide, low_width


def _to_dtype(values: Array, dtype: np.dtype[Any]) -> Array:
    if dtype.kind not in "iu":
        return values.astype(dtype)
    rounded = np.rint(values)
    limits = np.iinfo(dtype)
    if not np.allclose(values, rounded, rtol=0, atol=1e-6) or values.min() < limits.min or values.max() > limits.max:
        raise InputError(
            f"preprocess: its results, {values.min():g} to {values.max():g}, are not all integers of {dtype}; "
            "a model that reads pixels wants the preset raw"
        )
    return rounded.astype(dtype)


def _wrong_choice(preprocess: Preprocess) -> str | None:
    for name, value, allowed in (
        ("channels", preprocess.channels, CHANNELS),
        ("layout", preprocess.layout, (*LAYOUTS, None)),
        ("interpolation", preprocess.interpolation, INTERPOLATIONS),
        ("dtype", preprocess.dtype, (*DTYPES, None)),
    ):
        if value not in allowed:
            return f"{name} must be one of {', '.join(map(str, filter(None, allowed)))}, got {shown(value)}"
    return None


def _wrong_geometry(preprocess: Preprocess) -> str | None:
    size, resize, crop = preprocess.size, preprocess.resize, preprocess.crop
    pair = isinstance(size, tuple) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)
    if size is not None and not pair:
        return f"size must be [height, width] in pixels, got {shown(size)}"
    if isinstance(size, tuple) and size[0] * size[1] > MOST_RESULT:
        return f"size must have at most {MOST_RESULT} pixels, got {shown(size)}"
    if resize not in ("cover", "stretch") and not (isinstance(resize, int) and resize > 0):
        return f"resize must be cover, stretch or the pixels of the shorter side, got {shown(resize)}"
    if not isinstance(crop, (int, float)) or not 0 < crop <= 1:
        return f"crop must be above 0 and at most 1, got {shown(crop)}"
    return None


def _wrong_arithmetic(preprocess: Preprocess) -> str | None:
    channels = 1 if preprocess.channels == "gray" else 3
    for name, value in (("mean", preprocess.mean), ("std", preprocess.std), ("scale", preprocess.scale)):
        numbers = value if isinstance(value, tuple) and name != "scale" else (value,)
        if not all(isinstance(number, (int, float)) and abs(number) <= LARGEST_NUMBER for number in numbers):
            return f"{name} must be a number{'' if name == 'scale' else ' or a list of numbers'}, got {shown(value)}"
        if len(numbers) not in (1, channels):
            needed = "1 number" if channels == 1 else "1 or 3 numbers"
            return f"{name} needs {needed} for channels {preprocess.channels}, got {len(numbers)}"
        if name == "std" and not np.all(np.asarray(numbers) > 0):
            return f"std must be above 0, got {shown(value)}"
    return None


def _read_mapping(path: Path) -> dict[str, Any]:
    if path.stat().st_size > FILE_BYTES:
        raise InputError(f"{path} has {path.stat().st_size} bytes, more than a preprocess file's {FILE_BYTES}")
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix.lower() == ".json" else _parse_yaml(text)
    except RecursionError as error:
        raise InputError(f"{path} cannot be read: its lists are nested too deeply") from error
    except (ValueError, OSError) as error:  # of json, of yaml (see below) and of text that is not UTF-8
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"{path} must hold a mapping of preprocess keys, got {type(values).__name__}")
    return dict(values)


def _parse_yaml(text: str) -> Any:
    try:
        yaml = importlib.import_module("yaml")
    except ImportError as error:
        raise InputError("reading a .yaml preprocess file needs PyYAML: pip install pyyaml, or use .json") from error
    try:
        for count, token in enumerate(yaml.scan(text)):
            if isinstance(token, yaml.AliasToken):
                raise ValueError("it has aliases (*name), and few can stand for endless lists; write them out")
            if count > MOST_TOKENS:
                raise ValueError(f"it has more than {MOST_TOKENS} marks and words; give Preprocess's fields alone")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error).replace("\n", " ")) from error
    except (AttributeError, LookupError, TypeError) as error:  # of tags such as !!bool in front of other text
        raise ValueError(f"a value is not of the kind that its tag says: {error}") from error


def _plain(value: Any) -> Any:
    """Lists as tuples, and fractions such as "1/255" as numbers."""
    if isinstance(value, list):
        return tuple(_plain(item) for item in value)
    if isinstance(value, str) and "/" in value:
        upper, _, lower = value.partition("/")
        try:
            return float(upper) / float(lower)
        except (ValueError, ZeroDivisionError):
            return value
    return value


# At the end because building one calls the checks above.
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PRESETS: Mapping[str, Preprocess] = {
    "imagenet": Preprocess(crop=0.875, scale=1 / 255, mean=_IMAGENET_MEAN, std=_IMAGENET_STD),
    "caffe": Preprocess(crop=0.875, mean=(104.0, 117.0, 123.0), channels="bgr"),
    "cifar10": Preprocess(scale=1 / 255, mean=_IMAGENET_MEAN, std=_IMAGENET_STD),
    "tf": Preprocess(crop=0.875, scale=1 / 127.5, mean=1.0),
    "unit": Preprocess(scale=1 / 255),
    "raw": Preprocess(),
}
