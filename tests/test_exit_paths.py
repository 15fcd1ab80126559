"""Every way out of the command: one sentence and exit code 2, and never a file under the final name."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from quantkit.cli import main
from quantkit.files import scratch_folder
from tests.helpers import models

Write = Callable[[Path], None]
ROUND = "g (float[N,64] x) => (float[N,64] y) { y = Relu(x) }"
UNKNOWN = "g (float[N,64] x, float[64,64] w) => (float[N,64] y) { z = MatMul(x, w) y = my.own.Frobnicate(z) }"
NOISY = (
    "g (float[N,64] x, float[64,64] w) => (float[N,64] y) { r = RandomNormalLike(x) z = Add(x, r) y = MatMul(z, w) }"
)
CONSTANT = "g (float[64,64] w) => (float[4,64] y) { x = RandomNormal<shape=[4,64]>() y = MatMul(x, w) }"
STRINGS = """g (string[N] s, float[N,64] x, float[64,64] w) => (float[N,64] y, string[N] t) {
    y = MatMul(x, w)
    t = Identity(s)
}"""
HALF = "g (float16[N,64] x, float16[64,64] w) => (float16[N,64] y) { y = MatMul(x, w) }"
TINY = "g (float[N,4] x, float[4,4] w) => (float[N,4] y) { y = MatMul(x, w) }"


def fill(folder: Path) -> None:
    """Good and bad models, data and plans."""
    good = models.matmul()
    broken = {"nan": np.nan, "inf": np.inf}
    for name, value in broken.items():
        weight = models.random(64, 64)
        weight[3, 4] = value
        onnx.save(models.build(models.MATMUL, {"w": weight}), folder / f"{name}.onnx")
    proto: dict[str, onnx.ModelProto] = {
        "m": good,
        "cnn": models.cnn(),
        "block": models.block(),
        "relu": models.build(ROUND, {}),
        "old": models.matmul(opset=6, ir=3),
        "unknown": models.matmul(UNKNOWN, domains=', "my.own": 1'),
        "noisy": models.matmul(NOISY),
        "constant": models.matmul(CONSTANT),
        "strings": models.matmul(STRINGS),
        "half": models.build(HALF, {"w": models.random(64, 64).astype(np.float16)}),
        "tiny": models.build(TINY, {"w": models.random(4, 4)}),
    }
    for name, model in proto.items():
        onnx.save(model, folder / f"{name}.onnx")
    for name in ("ext", "gone", "short"):
        external: dict[str, Any] = {"save_as_external_data": True, "location": f"{name}.bin", "size_threshold": 16}
        onnx.save(models.cnn(), folder / f"{name}.onnx", **external)
    (folder / "gone.bin").unlink()
    (folder / "short.bin").write_bytes((folder / "short.bin").read_bytes()[:100])
    (folder / "empty.onnx").write_bytes(b"")
    (folder / "text.onnx").write_text("this is not a model")
    (folder / "half-a-file.onnx").write_bytes(good.SerializeToString()[:9000])
    arrays: dict[str, Any] = {
        "good": models.images(),
        "rows": {"x": models.random(16, 64)},
        "ids": models.tokens(),
        "names": {"foo": np.zeros((4, 2)), "bar": np.zeros(4)},
        "shape": {"x": np.zeros((4, 3, 9, 8), np.float32)},
        "words": {"x": np.array([["a"] * 64] * 4)},
        "nans": {"x": np.full((4, 64), np.nan, np.float32)},
        "none": {"x": np.zeros((0, 64), np.float32)},
        "far": {"ids": np.full((8, 6), 5000)},
    }
    for name, data in arrays.items():
        np.savez(folder / f"{name}.npz", **data)
    (folder / "lines.txt").write_text("one\ntwo\n")
    (folder / "pictures").mkdir()
    (folder / "pictures" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    plans = {
        "garbage": "{",
        "other": '{"version": 1, "layers": [{"match": "conv9", "bits": 4}]}',
        "wide": '{"version": 1, "layers": [{"match": "op:MatMul", "bits": 9}]}',
        "form": '{"version": 1, "layers": [{"match": "op:MatMul", "bits": 8, "form": "../../etc"}]}',
        "ranges": '{"version": 1, "layers": [{"match": "op:Conv", "bits": 8, "form": "qdq", "act_bits": 8}]}',
        "calibrator": '{"version": 1, "layers": [], "settings": {"calibrator": "best"}}',
        "seed": '{"version": 1, "layers": [], "settings": {"seed": -1}}',
        "setting": '{"version": 1, "layers": [], "settings": {"mse.stepz": 1}}',
    }
    for name, text in plans.items():
        (folder / f"{name}.json").write_text(text)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    fill(folder)
    return folder


BAD = [
    ("empty.onnx", "empty.onnx is empty"),
    ("text.onnx", "text.onnx is not an ONNX model"),
    ("half-a-file.onnx", "half-a-file.onnx is not an ONNX model, or is truncated"),
    ("old.onnx", "opset 6, older than 7"),
    ("unknown.onnx", "my.own:Frobnicate"),
    ("relu.onnx", "relu.onnx has no layer to quantize: no MatMul, Gemm, Conv"),
    ("tiny.onnx", "too small to gain"),
    ("half.onnx", "convert the model to float32 first"),
    ("nan.onnx", "weight 'w' of nan.onnx, read by node 'MatMul/y', holds NaN or infinity"),
    ("inf.onnx", "holds NaN or infinity"),
    ("gone.onnx", "'gone.bin', which does not exist"),
    ("short.onnx", "of 'short.bin', which has 100"),
    ("m.onnx --ignore re:.*", "ignored by the user"),
    ("m.onnx --ignore other", "'other' matches no layer"),
    ("m.onnx --ignore re:[", "is not a regular expression"),
    ("m.onnx --bits 9", "bits must be widths from 1 to 8, got [9]"),
    ("m.onnx --bits 0", "bits must be widths from 1 to 8, got [0]"),
    ("m.onnx --group-size 0", "group_size must be -1 (one scale per row) or at least 1, got 0"),
    ("m.onnx --set nonsense", "--set must be METHOD.SETTING=VALUE"),
    ("m.onnx --set mse.steps=many", "'mse.steps' must be a whole number, got 'many'"),
    ("m.onnx --seed -1", "--seed must be 0 or more, got -1"),
    ("m.onnx --threads -1", "--threads must be 0 or more, got -1"),
    ("m.onnx --threads 99999", "--threads must be at most 1024, got 99999"),
    ("m.onnx --cache rows.npz", "--cache rows.npz is a file; give a folder"),
    ("m.onnx --memory-limit 1", "memory limit must be at least 1MB"),
    ("m.onnx --calib missing.npz", "missing.npz does not exist"),
    ("m.onnx --calib none.npz", "it holds no samples"),
    ("m.onnx --calib nans.npz", "input 'x' has NaN or Inf"),
    ("m.onnx --calib words.npz", "input 'x' wants float32 [N, 64]"),
    ("m.onnx --calib lines.txt", "lines.txt is text, which needs --tokenizer"),
    ("m.onnx --calib no_module:function", "importing no_module failed"),
    ("cnn.onnx --calib names.npz", "there is no array for input 'x'"),
    ("cnn.onnx --calib shape.npz", "input 'x' wants float32 [N, 3, 8, 8], got float32 [4, 3, 9, 8]"),
    ("cnn.onnx --calib pictures", "raw images need --preprocess"),
    ("block.onnx --calib far.npz", "onnxruntime cannot run the model on the inputs ids"),
    ("constant.onnx --random-calibration", "the model has no inputs"),
    ("strings.onnx --random-calibration", "input 's' has the type tensor(string)"),
    ("noisy.onnx --calib rows.npz", "different outputs for the same input"),
    ("m.onnx --plan garbage.json", "garbage.json is not JSON"),
    ("m.onnx --plan other.json", "plan rule 'conv9' matches no layer; the nearest are 'MatMul/y'"),
    ("m.onnx --plan wide.json", "bits must be 1 to 8, got 9"),
    ("m.onnx --plan form.json", "there is no emitter '../../etc'"),
    ("cnn.onnx --plan ranges.json", "no activation range for"),
    ("m.onnx --plan calibrator.json", "calibrator must be one of minmax, percentile, entropy, mse, got 'best'"),
    ("m.onnx --plan seed.json", "seed must be a whole number from 0, got -1"),
    ("m.onnx --plan setting.json", "unknown setting 'mse.stepz'"),
    ("m.onnx --plan m.onnx", "m.onnx is not a plan"),
    ("m.onnx -o /dev/null", "/dev/null is a device; give a file name"),
    ("m.onnx -o pictures", "pictures is a folder; give a file name"),
    ("m.onnx -o no/out.onnx", "there is no folder no; create it first"),
    ("m.onnx -o /proc/out.onnx", "--output /proc/out.onnx: cannot write there: "),
    ("m.onnx -o m.onnx", "would overwrite the input model"),
    ("ext.onnx -o ext.bin", "which holds weights of ext.onnx"),
    ("ext.onnx --save-plan ext.bin", "which holds weights of ext.onnx"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD, ids=[row[0] for row in BAD])
def test_bad_input_is_one_sentence(
    bench: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], arguments: str, sentence: str
) -> None:
    monkeypatch.chdir(bench)
    monkeypatch.setenv("HOME", str(bench))
    before = {path: path.stat().st_mtime_ns for path in bench.rglob("*") if path.is_file()}
    target = [] if " -o " in f" {arguments}" else ["-o", "out.onnx"]
    assert main(["compress", *arguments.split(), *target]) == 2
    shown = capfd.readouterr()
    assert shown.out == "" and sentence in shown.err
    sentences = [line for line in shown.err.splitlines() if not line.startswith(" ")]
    assert len(sentences) == 1 and sentences[0].startswith("quantkit: error: ") and "internal" not in shown.err
    assert {path: path.stat().st_mtime_ns for path in bench.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("verify m.onnx --against block.onnx --random-calibration", "are not the same model: inputs ['x'] and ['ids']"),
        ("verify m.onnx --against cnn.onnx --random-calibration", "cannot run the model on the inputs x"),
        ("verify text.onnx --against m.onnx --random-calibration", "text.onnx"),
        ("verify m.onnx --against m.onnx --calib nans.npz", "NaN or Inf"),
        ("verify m.onnx --against m.onnx --random-calibration --seed -2", "--seed must be 0 or more"),
        ("bench m.onnx empty.onnx", "cannot load"),
        ("bench m.onnx block.onnx", "block.onnx has the inputs ids, but m.onnx has x"),
        ("bench m.onnx --threads 99999", "--threads must be at most 1024"),
        ("inspect short.onnx", "short.bin"),
        ("inspect missing.onnx", "there is no file missing.onnx"),
        ("methods unknown", "there is no method 'unknown'; allocators: auto, fisher, hawq, "),
        ("apply m.onnx other.json", "matches no layer"),
    ],
)
def test_other_commands(
    bench: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], arguments: str, sentence: str
) -> None:
    monkeypatch.chdir(bench)
    assert main(arguments.split()) == 2
    shown = capfd.readouterr()
    assert shown.out == "" and shown.err.startswith("quantkit: error: ") and shown.err.count("\n") == 1
    assert sentence in shown.err and "internal" not in shown.err


def test_bad_input_in_a_process_of_its_own(bench: Path) -> None:
    done = models.quantkit(bench, "compress", "gone.onnx", "-o", "out.onnx")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("quantkit: error: tensor ") and not (bench / "out.onnx").exists()


def test_odd_names_json_and_a_narrow_terminal(bench: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ünï cødé"
    folder.mkdir()
    shutil.copy(bench / "cnn.onnx", folder / "my modèl.onnx")
    shutil.copy(bench / "good.npz", tmp_path)
    arguments = ("compress", f"{folder.name}/my modèl.onnx", "--calib", "good.npz", "--calibrator", "minmax", "--json")
    done = models.quantkit(tmp_path, *arguments, setup=models.FAST)
    assert done.returncode == 0, done.stderr

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    data = json.loads(done.stdout, parse_constant=refuse)
    assert data["output"] == f"{folder.name}/my modèl.q.onnx" and data["fidelity"]["parity"] > 30
    assert (folder / "my modèl.q.onnx").stat().st_size == data["size_after"]
    assert "\x1b" not in done.stderr and "layers of" in done.stderr
    assert max(map(len, done.stderr.splitlines())) <= 80
    quiet = models.quantkit(tmp_path, *arguments[:-1], "--quiet", setup=models.FAST)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


def test_a_reader_that_goes_away(bench: Path, tmp_path: Path) -> None:
    shutil.copy(bench / "m.onnx", tmp_path)
    child = subprocess.Popen(
        models.command("compress", "m.onnx", "--json"),
        cwd=tmp_path,
        env=models.environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    assert "Traceback" not in child.stderr.read()
    assert child.wait(60) == 0
    assert (tmp_path / "m.q.onnx").exists()


def test_a_symbolic_link_is_written_through(bench: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.onnx").symlink_to("real/out.onnx")
    assert main(["compress", str(bench / "m.onnx"), "-o", str(tmp_path / "link.onnx"), "-q"]) == 0
    assert (tmp_path / "link.onnx").is_symlink() and (tmp_path / "real" / "out.onnx").is_file()
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["out.onnx"]


def test_small_external_weights_come_along(bench: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    command = ["compress", str(bench / "ext.onnx"), "-o", str(output), "-q", "--ignore", "re:.*c1"]
    assert main([*command, "--report", str(tmp_path / "r.json")]) == 0
    session = ort.InferenceSession(str(output), providers=["CPUExecutionProvider"])
    assert session.run(None, models.images(2))[0].shape == (2, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.onnx", "r.json"]
    assert json.loads((tmp_path / "r.json").read_text())["size_after"] == output.stat().st_size


LIMIT = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
"""


def test_a_full_disk(bench: Path, tmp_path: Path) -> None:
    shutil.copy(bench / "m.onnx", tmp_path)
    done = models.quantkit(tmp_path, "compress", "m.onnx", "-o", "out.onnx", setup=LIMIT)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "File too large; free some space or set TMPDIR to another folder" in done.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name != ".cache"] == ["m.onnx"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_at_the_end(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: int
) -> None:
    (tmp_path / "out.onnx").write_bytes(b"older")

    def full(handle: int) -> None:
        if tmp_path in Path(f"/proc/self/fd/{handle}").readlink().parents:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    assert main(["compress", str(bench / "m.onnx"), "-o", str(tmp_path / "out.onnx")]) == 2
    sentence = f"{tmp_path}/out.onnx: {os.strerror(number)}; free some space or write elsewhere with -o"
    assert capfd.readouterr().err == f"quantkit: error: {sentence}\n"
    assert (tmp_path / "out.onnx").read_bytes() == b"older"
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]


WAIT_IN_CALIBRATION = """
import time, quantkit.pipeline
def wait(*arguments):
    print("ready", flush=True)
    time.sleep(60)
quantkit.pipeline.collect = wait
"""
WAIT_IN_WRITE = """
import time, quantkit.graph.emit
from pathlib import Path
def wait(path):
    if Path.cwd() in path.parents:
        print("ready", flush=True)
        time.sleep(60)
quantkit.graph.emit.sync = wait
"""


def listen() -> None:
    """A shell starts what it runs in the background deaf to Ctrl-C, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def stopped(folder: Path, number: int, setup: str, *arguments: str) -> tuple[int, str, list[str]]:
    """(exit code, standard error, files at the moment of the signal) of a run that a signal hits."""
    child = subprocess.Popen(
        models.command("compress", "m.onnx", "-o", "out.onnx", *arguments, setup=setup),
        cwd=folder,
        env=models.environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listen,
    )
    assert child.stdout is not None and child.stderr is not None
    try:
        assert child.stdout.readline() == "ready\n"
        files = visible(folder)
        child.send_signal(number)
        errors = child.stderr.read()
        return child.wait(60), errors, files
    finally:
        child.kill()
        child.stdout.close()
        child.stderr.close()


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in ("m.onnx", "rows.npz", ".cache"))


@pytest.fixture
def folder(bench: Path, tmp_path: Path) -> Path:
    for name in ("m.onnx", "rows.npz"):
        shutil.copy(bench / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_during_calibration(number: int, folder: Path) -> None:
    code, errors, _ = stopped(folder, number, WAIT_IN_CALIBRATION, "--calib", "rows.npz", "--quiet")
    assert (code, errors) == (2, "quantkit: error: interrupted; no half-written file is left\n")
    assert visible(folder) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_during_the_write(number: int, folder: Path) -> None:
    code, errors, files = stopped(folder, number, WAIT_IN_WRITE, "--quiet")
    assert (code, errors) == (2, "quantkit: error: interrupted; no half-written file is left\n")
    assert len(files) == 1 and files[0].startswith(".out.onnx.")
    assert visible(folder) == []


def test_kill_during_the_write(folder: Path) -> None:
    (folder / "out.onnx").write_bytes(b"older")
    code, _, _ = stopped(folder, signal.SIGKILL, WAIT_IN_WRITE)
    left = visible(folder)
    assert code == -signal.SIGKILL and len(left) == 2 and left[0].startswith(".out.onnx.")
    assert (folder / "out.onnx").read_bytes() == b"older"
    assert main(["compress", str(folder / "m.onnx"), "-o", str(folder / "out.onnx"), "-q"]) == 0
    assert visible(folder) == ["out.onnx"]
    onnx.checker.check_model(str(folder / "out.onnx"), full_check=False)


def test_a_living_run_keeps_its_folder(tmp_path: Path) -> None:
    for abandoned in (".a[1]*.onnx.killed", ".a1b.onnx.of-another-file"):
        (tmp_path / abandoned).mkdir()
        (tmp_path / abandoned / ".lock").touch()
    with scratch_folder(tmp_path / "a[1]*.onnx") as first:
        with scratch_folder(tmp_path / "a[1]*.onnx") as second:
            assert first.is_dir() and second.is_dir() and first != second
        assert first.is_dir() and not second.exists()
    assert [path.name for path in tmp_path.iterdir()] == [".a1b.onnx.of-another-file"]
