"""What a command writes never costs what it reads, and what went wrong is said of the right file."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

import quantkit
from quantkit import cli, files
from quantkit.allocation import _losses
from quantkit.errors import InputError
from quantkit.report.types import SensitivityRow
from quantkit.runtime.ort import make_session
from tests.helpers import models


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, data with labels, and a folder of tensors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    models.quick(monkeypatch)
    onnx.save(models.cnn(), "m.onnx")
    np.savez("d.npz", **models.images(20))
    np.savez("e.npz", **models.images(20), labels=np.zeros(20, np.int64))
    Path("folder").mkdir()
    Path("folder/picture.png").write_bytes(b"kept")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        (("--calib", "d.npz"), ("-o", "d.npz")),
        (("--calib", "d.npz@::2"), ("--save-plan", "d.npz")),
        (("--calib", "d.npz:x"), ("--report", "d.json")),
        (("--calib", "x=d.npz"), ("-o", "d.npz")),
        (("--calib", "d.npz", "--eval", "e.npz", "--metric", "top1"), ("--save-plan", "e.npz")),
        (("--calib", "folder"), ("-o", "folder/picture.png")),
        (("--calib", "d.npz", "--preprocess", "p.yaml"), ("--save-plan", "p.yaml")),
        (("--calib", "d.npz", "--tokenizer", "p.yaml"), ("--save-plan", "./p.yaml")),
    ],
)
def test_data_is_not_written_over(
    arguments: tuple[str, ...], output: tuple[str, str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("p.yaml").write_text("base: caffe\n")
    if output[1] == "d.json":
        Path("d.json").symlink_to("d.npz")
    kept = Path(output[1]).read_bytes()
    assert cli.main(["compress", "m.onnx", *arguments, *output]) == 2
    assert f"{output[0]} {output[1].removeprefix('./')} would overwrite the data of --" in (
        capsys.readouterr().err.replace("--output", "-o")
    )
    assert Path(output[1]).read_bytes() == kept


def test_a_folder_of_images_may_hold_results_too(here: Path) -> None:
    Image.new("RGB", (8, 8)).save("folder/picture.png")
    asked = ["--calib", "folder", "--preprocess", "raw", "--bits", "8", "--allocator", "uniform"]
    for _ in range(2):  # the second time over the first result
        assert cli.main(["compress", "m.onnx", *asked, "--samples", "2", "-o", "folder/out.onnx"]) == 0
        Path("folder/other.png").write_bytes(Path("folder/picture.png").read_bytes())
    assert Path("folder/out.onnx").exists()


@pytest.mark.parametrize("option", ["--report", "--save-plan"])
def test_a_model_without_its_report_is_told(
    option: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(files, "write_bytes", full)
    given = ["compress", "m.onnx", "--bits", "8", "-o", "q.onnx", option, "r.json"]
    assert cli.main(given) == 2
    told = "r.json: No space left on device; the model is written and verified (q.onnx), this file is not"
    assert told in capsys.readouterr().err
    assert Path("q.onnx").exists() and not Path("r.json").exists()


def test_other_verbs_spare_data_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("d.png").symlink_to("d.npz")
    Path("p.json").write_text("{}")
    for arguments in (
        ("tune", "m.onnx", "--calib", "d.npz", "--max-size", "50%", "-o", "d.npz"),
        ("apply", "m.onnx", "p.json", "--calib", "d.npz", "-o", "d.npz"),
        ("sensitivity", "m.onnx", "--calib", "d.npz", "--plot", "d.png"),
        ("bench", "m.onnx", "--calib", "d.npz", "--plot", "d.png"),
    ):
        assert cli.main([*arguments]) == 2
        assert "would overwrite the data of --calib: d.npz" in capsys.readouterr().err


def test_loose_images_have_no_labels(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--eval", "folder", "--metric", "top1", "--preprocess", "caffe", "--calib", "folder"]
    Image.new("RGB", (8, 8)).save("folder/picture.png")
    assert cli.main(["compress", "m.onnx", *asked]) == 2
    assert "folder: the metric needs labels, and picture.png is in no class's sub-folder: give a folder with one" in (
        capsys.readouterr().err
    )


def test_accuracy_on_class_folders(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The classes that the float model finds, as folders: nothing is wrong but one image in the wrong folder."""
    session = make_session(here / "m.onnx")
    rng = np.random.default_rng(1)
    for place in range(12):
        image = rng.integers(0, 256, (8, 8, 3), np.uint8)
        found = int(session.run({"x": image.transpose(2, 0, 1)[None].astype(np.float32)})["y"].argmax())
        folder = Path("classes", str(found if place else (found + 1) % 10))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{place}.png")
    judged = ["--eval", "classes", "--metric", "top1", "--preprocess", "raw", "--json", "-q"]
    assert cli.main(["verify", "m.onnx", "--against", "m.onnx", *judged]) == 0
    figures = json.loads(capsys.readouterr().out)["accuracy"]
    assert figures == {"metric": "top1", "before": pytest.approx(11 / 12), "after": figures["before"], "samples": 12}


def test_a_cache_that_cannot_be_made_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compress", "m.onnx", "--cache", "d.npz/cache"]) == 2
    assert "--cache d.npz/cache: cannot be made: Not a directory; give another folder" in capsys.readouterr().err


def test_the_metric_is_shown(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--eval", "e.npz", "--metric", "top1", "--allocator", "uniform", "--bits", "8"]
    assert cli.main(["compress", "m.onnx", "--calib", "d.npz", *asked]) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "on 20 samples of --eval" in shown and "accuracy top1" in shown


def test_times_of_verify_say_at_which_shapes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantkit.compress(here / "m.onnx", bits=(8,)).save(here / "q.onnx")
    assert cli.main(["verify", "q.onnx", "--against", "m.onnx", "--calib", "d.npz"]) == 0
    assert "speed at x 8x3x8x8" in " ".join(capsys.readouterr().err.split())


def test_a_full_disk_is_told_of_the_file_that_did_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left on device") as caught:
        files.write_text(tmp_path / "report.html", "text")
    assert caught.value.filename == str(tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_a_note_tells_what_is_larger_once_loaded(tmp_path: Path) -> None:
    model = models.build(models.MATMUL.replace("64", "256"), {"w": models.random(256, 256)})
    settings: dict[str, Any] = {"bits": (2,), "group_size": 8, "cache": tmp_path}  # no kernel has such small groups
    (note,) = (note for note in quantkit.compress(model, **settings).report.notes if "once loaded" in note)
    assert note.startswith("weights take 262 kB once loaded (the file is smaller")


def test_reasons_tell_the_widths_on_either_side() -> None:
    losses = {2: 0.5, 4: 0.015, 8: 0.0001}
    row = SensitivityRow(("a",), losses, 4, "measured")
    assert _losses(row) == "; would lose 0.5 at 2, 0.015 at 4 (chosen), 0.0001 at 8 bits, by measured"
    assert _losses(SensitivityRow(("a",), losses, 8, "measured")).startswith(
        "; would lose 0.015 at 4, 0.0001 at 8 (cho"
    )
    assert _losses(SensitivityRow(("a",), losses, None, "slim")).count(" at ") == 3
    assert _losses(SensitivityRow(("a",), {}, 4, "slim")) == ""


@pytest.mark.parametrize("data", [False, True])
def test_an_lstm_that_gives_only_its_last_state(data: bool, here: Path) -> None:
    weights = {"W": models.random(1, 256, 32), "R": models.random(1, 256, 64), "axis": np.array([0])}
    text = """g (float[T,B,32] x) => (float[B,64] y) {
        all, last = LSTM<hidden_size=64>(x, W, R) y = Squeeze(last, axis) }"""
    model = models.build(text, weights)
    feeds = [{"x": models.random(5, 3, 32, seed=seed)} for seed in range(6)]
    result = quantkit.compress(model, bits=(4,), cache=here, **({"calibration": feeds} if data else {}))
    assert [row.kernel for row in result.report.layers] == ["LSTM", "LSTM"]
    assert (result.report.fidelity is not None) == data


def test_verify_and_apply_measure_the_metric_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compress = ["compress", "m.onnx", "--calib", "d.npz", "--avg-bits", "4", "--quantizer", "rtn", "-o", "q.onnx"]
    assert cli.main([*compress, "--save-plan", "p.json", "-q"]) == 0
    judged = ["--eval", "e.npz", "--metric", "top1"]
    assert cli.main(["verify", "q.onnx", "--against", "m.onnx", *judged, "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)["accuracy"]
    assert re.search(rf"top1 +{found['before']:.6g} > {found['after']:.6g} \(drop ", shown.err)
    assert cli.main(["apply", "m.onnx", "p.json", "--calib", "d.npz", "-o", "a.onnx", *judged, "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == found


def test_labels_reach_a_metric_of_the_users(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of a file, and those of class folders; without any it is said how to give them."""
    Path("own_metric.py").write_text(
        "def acc(outputs, feeds): return float((outputs['y'].argmax(1) == feeds['labels']).mean())"
    )
    rng = np.random.default_rng(2)
    for place in range(8):
        Path(f"classes/{place % 4}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(f"classes/{place % 4}/{place}.png")
    for source in (["e.npz"], ["classes", "--preprocess", "raw"]):
        shown = []
        for metric in ("top1", "own_metric:acc"):
            judged = ["--eval", *source, "--metric", metric, "--json", "-q"]
            assert cli.main(["verify", "m.onnx", "--against", "m.onnx", *judged]) == 0
            shown.append(json.loads(capsys.readouterr().out)["accuracy"])
        assert {**shown[1], "metric": "top1"} == shown[0]
    assert cli.main(["verify", "m.onnx", "--against", "m.onnx", "--eval", "d.npz", "--metric", "own_metric:acc"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "asks for feeds['labels'], and there are none in 20 samples of d.npz: give an .npz file with" in told


def test_labels_of_other_classes_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("e.npz", **models.images(20), labels=np.arange(900, 920) % 910)
    judged = ["--eval", "e.npz", "--metric", "top1"]
    assert cli.main(["verify", "m.onnx", "--against", "m.onnx", *judged]) == 2
    told = "the metric top1 on 20 samples of e.npz: the label 900 of sample 0 is none of the 10 classes 0 to 9"
    assert told in " ".join(capsys.readouterr().err.split())
    asked = ["--calib", "d.npz", "--max-drop", "1%", "--allocator", "uniform", "-o", "q.onnx"]
    assert cli.main(["compress", "m.onnx", *asked, *judged]) == 2
    assert told in " ".join(capsys.readouterr().err.split()) and not Path("q.onnx").exists()


def test_an_accuracy_says_on_how_many_samples(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judged = ["--eval", "e.npz", "--metric", "top1"]
    for calibration, told in ((["--calib", "d.npz@:7"], True), (["--calib", "d.npz"], False), ([], False)):
        assert cli.main(["verify", "m.onnx", "--against", "m.onnx", *calibration, *judged]) == 0
        shown = " ".join(capsys.readouterr().err.split())
        assert ("(drop 0) on 20 samples" in shown) is told and ("samples 7" if told else "samples 20") in shown


def test_saving_spares_the_float_weights(here: Path) -> None:
    onnx.save(models.cnn(), "float.onnx", save_as_external_data=True, location="float.q.onnx.data", size_threshold=16)
    kept = Path("float.q.onnx.data").read_bytes()
    found = quantkit.compress("float.onnx", bits=(8,))
    for name in ("float.q.onnx", "float.q.onnx.data"):
        with pytest.raises(InputError, match=rf"{name} would overwrite .*float\.q\.onnx\.data, which holds weights of"):
            found.save(name)
    assert Path("float.q.onnx.data").read_bytes() == kept
    found.save("other.onnx")


def test_a_quantized_model_is_told_from_a_float_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantkit.compress("m.onnx", bits=(8,)).save("q.onnx")
    for model, told in (("q.onnx", True), ("m.onnx", False)):
        assert cli.main(["inspect", model]) == 0
        assert ("note: this model was quantized before" in capsys.readouterr().err) is told
