"""Plans, arrays and images made to do harm, and the command that is given them."""

from __future__ import annotations

import json
import os
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from PIL import Image

from quantkit.calibration.data import InputSpec, open_calibration, random_calibration
from quantkit.calibration.images import read_image
from quantkit.calibration.preprocess import Preprocess, load_preprocess
from quantkit.cli import main
from quantkit.errors import InputError
from quantkit.plan import load_plan
from tests.helpers import hostile, models

EXTENT = 1 << 40
HEADER = "{'descr': '%s', 'fortran_order': False, 'shape': %s, }"
Damage = Callable[[onnx.ModelProto], None]


# Plans

RULE = '{"version": 1, "layers": [{"match": "a", %s}]}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"version": 1, "layers": [], "plan": 1}', "unknown key 'plan'; known keys: version"),
        (json.dumps({f"k{number}": 1 for number in range(50_000)}), "and 49995 more; known keys: version"),
        ('{"version": 1, "layers": {}}', '"layers" must be a list of rules, got an object'),
        (RULE % '"bits": NaN', "NaN is not a JSON number"),
        (RULE % '"bits": -Infinity', "-Infinity is not a JSON number"),
        (RULE % '"bits": 1e999', "'1e999' is larger than any number that a plan can hold"),
        (RULE % '"bits": 4, "bits": 8', "'bits' given twice in one object; keep one"),
        (RULE % f'"bits": {"9" * 4000}', "layers[0]: bits must be a whole number of fewer digits, got 999"),
        (RULE % f'"bits": "{"b" * 100_000}"', "layers[0]: bits must be a whole number, got 'bbb"),
        (RULE % '"bits": 8, "group_bits": "8x999999999"', "group_bits names 999999999 groups"),
        ("[" * 100_000, "its lists are too deep for Python's recursion"),
        ('{"a":' * 100_000, "its lists are too deep for Python's recursion"),
        ("1" * 5000, "Exceeds the limit (4300 digits)"),
        (f'{{"version": {"1" * 4000}}}', "... is not supported, only 1; make the plan again"),
        ("\0", "is not JSON"),
        ("", "is not JSON"),
    ],
)
def test_plans(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(text)
    hostile.refuse(tmp_path / "p.json", "p.json", message)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(a+)+$", "repeats a group, or more than 6 times, and could search for ever"),
        ("(a|a)*", "repeats a group"),
        ("a*" * 7, "repeats a group, or more than 6 times"),
        ("(" * 2000, "has 2003 characters, the most are 1000"),
        ("a{99999999999999999999}", "is not a valid regular expression: the repetition number is too large"),
        ("[", "is not a valid regular expression"),
    ],
)
def test_patterns(pattern: str, message: str, tmp_path: Path) -> None:
    rule = {"match": f"re:{pattern}", "bits": 4}
    (tmp_path / "p.json").write_text(json.dumps({"version": 1, "layers": [rule]}))
    hostile.refuse(tmp_path / "p.json", "layers[0]", message)


def test_patterns_that_people_write(tmp_path: Path) -> None:
    patterns = [r"re:/layers\.[0-9]+/(attention|mlp)?.*[+*(]*\(\)+", "re:.*", r"re:(a|b)\*", "re:()[)*]+"]
    rules = [{"match": pattern, "bits": 4} for pattern in patterns]
    (tmp_path / "p.json").write_text(json.dumps({"version": 1, "layers": rules}))
    assert list(load_plan(tmp_path / "p.json").layers) == patterns


def test_large_plans(tmp_path: Path) -> None:
    rules = [{"match": f"m{number}", "bits": 8, "group_bits": "8x6000000"} for number in range(3)]
    (tmp_path / "p.json").write_text(json.dumps({"version": 1, "layers": rules}))
    hostile.refuse(
        tmp_path / "p.json", "layers[2]: group_bits names 6000000 groups; no layer has more than 4777216 after"
    )
    settings = {f"k{number}": number for number in range(60_000)}
    (tmp_path / "p.json").write_text(json.dumps({"version": 1, "layers": [], "settings": settings}))
    assert len(load_plan(tmp_path / "p.json").settings) == 60_000
    with (tmp_path / "p.json").open("wb") as file:
        file.truncate(20 << 30)
    hostile.refuse(tmp_path / "p.json", "is not a plan: it has 21474836480 bytes, a plan has at most 67108864")
    hostile.refuse(tmp_path / "p\0.json", "cannot read the plan", "embedded null byte")
    (tmp_path / "q.json").mkdir()
    hostile.refuse(tmp_path / "q.json", "it is a folder; give a .json file")


# Arrays


def npy(header: str, version: int = 1, size: int | None = None) -> bytes:
    content = header.encode()
    length = struct.pack("<H" if version == 1 else "<I", len(content) if size is None else size)
    return b"\x93NUMPY" + bytes([version, 0]) + length + content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(HEADER % ("<f4", f"({EXTENT}, 4)")), "its header promises float32 [1099511627776, 4], more than the"),
        (npy(HEADER % ("<f4", f"({'9' * 4000}, 4)")), "its header promises"),
        (npy(HEADER % ("<f4", "(-1, 4)")), "there is no array of shape (-1, 4) and type"),
        (npy(HEADER % ("<f4", "(True, 4)")), "there is no array of shape (True, 4)"),
        (npy(HEADER % ("<U0", f"({EXTENT}, 4)")), "and type '<U0'"),
        (npy(HEADER % ("|O", "(4, 4)")) + b"x" * 100, "holds Python objects, not numbers"),
        (npy("(" * 5000), "is no readable .npy file (truncated or corrupt)"),
        (npy("{'shape': (4L, "), "is no readable .npy file (truncated or corrupt)"),
        (npy(HEADER % ("<f4", "(4, 4)"), 2, (1 << 32) - 1), "is no readable .npy file (truncated or corrupt)"),
        (npy(HEADER % ("<f4", "(4, 4)"))[:20], "is no readable .npy file (truncated or corrupt)"),
        (b"", "is no readable .npy file (truncated or corrupt)"),
    ],
)
def test_npy(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    hostile.refuse(tmp_path / "a.npy", "a.npy", message[:60])


def test_arrays_without_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(npy(HEADER % ("<f4", f"({EXTENT}, 0)")))
    with pytest.raises(InputError, match=r"input 'x' has the shape \[1099511627776, 0\], without a number"):
        open_calibration(tmp_path / "a.npy", [InputSpec("x", np.dtype(np.float32), ("n", None))])


def test_arrays_of_endless_samples(tmp_path: Path) -> None:
    with (tmp_path / "a.npy").open("wb") as file:
        file.write(npy(HEADER % ("|i1", f"({1 << 33}, 1)")))
        file.truncate((1 << 33) + 100)
    inputs = [InputSpec("x", np.dtype(np.int8), ("n", 1))]
    # Mapped, so that it takes the address space of 8 GiB but no memory.
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    with pytest.raises(InputError, match="holds 8589934592 samples, more than 16777216; take a part with @START"):
        open_calibration(tmp_path / "a.npy", inputs)
    assert open_calibration(f"{tmp_path}/a.npy@:16", inputs).samples == 16


def test_packed_archives(tmp_path: Path) -> None:
    """Two megabytes of zeros, packed, that claim to be more."""
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", npy(HEADER % ("<f4", f"({EXTENT}, 4)")) + bytes(1 << 21))
    hostile.refuse(path, "array 'x.npy' needs 17592186044", "bytes and holds 20972")
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02") + 24  # of the directory: the size once unpacked
    content[at : at + 4] = struct.pack("<I", (1 << 31) - 1)
    path.write_bytes(content)
    hostile.refuse(path, "holds 2147483647 bytes of compressed arrays, more than 1073741824; save it with numpy.savez")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", npy(HEADER % ("<f4", "(4, 4)"), 2, (1 << 32) - 1) + b" " * (1 << 24))
    hostile.refuse(path, "is no readable .npz file (truncated or corrupt): ")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", npy(HEADER % ("|O", "(1,)")) + b"cos\nsystem\n(S'touch harm'\ntR.")
    hostile.refuse(path, "holds Python objects, not numbers")


def test_tensors_in_files(tmp_path: Path) -> None:
    path = tmp_path / "input_0.pb"
    path.write_bytes(TensorProto(name="x", data_type=1, dims=[-1, 4], float_data=[1] * 8).SerializeToString())
    hostile.refuse(path, "holds a tensor of shape [-1, 4]; save it again")
    path.write_bytes(TensorProto(name="x", data_type=1, dims=[EXTENT, 4]).SerializeToString())
    hostile.refuse(path, "is no readable ONNX tensor (truncated or corrupt)")
    with path.open("wb") as file:
        file.truncate(20 << 30)
    hostile.refuse(path, "has 21474836480 bytes, more than a tensor's 2147483647; save it as .npz")


@pytest.mark.parametrize("dim", [EXTENT, -5])
def test_made_up_inputs(dim: int) -> None:
    with pytest.raises(InputError, match=rf"a sample of \[{dim}\] cannot be made up, the most are 268435456 numbers"):
        next(iter(random_calibration([InputSpec("x", np.dtype(np.float32), ("n", dim))])))


def test_text_without_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n" + b"x" * (3 << 20))
    ids = [InputSpec("input_ids", np.dtype(np.int64), ("n", "length"))]
    with pytest.raises(InputError, match=r"a\.txt, line 2 is longer than 1048576 bytes; give one sentence per line"):
        open_calibration(tmp_path / "a.txt", ids, tokenizer="byte")


# Images and how they are prepared


def test_image_bombs(tmp_path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(InputError, match=r"bomb\.png is too large to be a calibration image"):
        read_image(tmp_path / "bomb.png")


def test_other_decoders_open_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(InputError, match=r"a\.png is no readable image"):
        read_image(tmp_path / "a.png")


def test_images_that_grow() -> None:
    narrow = np.zeros((20_000, 1, 3), np.uint8)
    with pytest.raises(InputError, match=r"makes 4480000x224 pixels of an image of 20000x1, more than 67108864"):
        Preprocess(size=(224, 224)).apply(narrow)
    with pytest.raises(
        InputError, match=r"an image of 5000x5000 pixels has more than 16777216; give a preprocess file"
    ):
        Preprocess().apply(np.zeros((5000, 5000, 3), np.uint8))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mean: &a [1, 2]\nstd: [*a]", "it has aliases (*name), and few can stand for endless lists; write them out"),
        ("mean: " + "[" * 5000, "it has more than 1000 marks and words"),
        ("mean: " + "[" * 400, "cannot be read: "),
        ("mean: !!bool foo", "a value is not of the kind that its tag says"),
        ("mean: !!timestamp foo", "a value is not of the kind that its tag says"),
        ('mean: !!int ""', "a value is not of the kind that its tag says"),
        ("mean: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        (f"mean: {'1' * 400}", "mean must be a number or a list of numbers, got 111"),
        ("base: [1]", "unknown base [1]; presets: imagenet"),
        ("size: [1000000000, 1000000000]", "size must have at most 16777216 pixels"),
        (f"channels: {'b' * 50_000}", "channels must be one of rgb, bgr, gray, got 'bbb"),
        ("x" * 70_000, "has 70000 bytes, more than a preprocess file's 65536"),
    ],
)
def test_preprocess_files(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(text)
    hostile.refuse(tmp_path / "p.yaml", "p.yaml", message)


def test_deep_json_preprocess(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text("[" * 50_000)
    with pytest.raises(InputError, match="cannot be read: its lists are nested too deeply"):
        load_preprocess(tmp_path / "p.json")


# The command


@pytest.mark.parametrize("name", ["m.onnx", "p.json", "a.npz"])
def test_the_command_refuses_pipes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if name != "m.onnx":
        hostile.saved(models.matmul(), tmp_path)
    os.mkfifo(name)
    extra = {"p.json": ["--plan", name], "a.npz": ["--calib", name]}.get(name, [])
    before = sorted(tmp_path.iterdir())
    assert main(["compress", "m.onnx", "-o", "out.onnx", *extra]) == 2
    told = capfd.readouterr()
    assert told.out == "" and told.err.startswith("quantkit: error: ") and told.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before and "internal" not in told.err
