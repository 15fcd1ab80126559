"""The command line: arguments reach the pipeline, errors are one sentence, streams and exit codes are kept."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import quantkit
from quantkit.budget import Budget
from quantkit.calibration.request import CalibrationRequest, EvaluationRequest
from quantkit.cli import explain, main
from quantkit.commands.bench import parse_shapes
from quantkit.commands.compress import parse_bits, parse_settings
from quantkit.demo import initial_weights, to_onnx
from quantkit.errors import InputError, VerificationError
from quantkit.plan import load_plan, save_plan
from quantkit.report.types import Report
from quantkit.types import LayerPlan, Plan, QuantSpec

PLAN = Plan({"conv1": LayerPlan(QuantSpec(4), None, "")}, {}, {"seed": 0})
REPORT = Report(
    model="m.onnx",
    target="ort-cpu",
    layers=(),
    untouched=(),
    size_before=100,
    size_after=25,
    average_bits=8.0,
    stored_bits=8.5,
    fidelity=None,
    timings=(),
    contenders=(),
    unmet=(),
    notes=(),
    provenance={},
)


class FakeResult:
    def __init__(self, report: Report, failure: BaseException | None) -> None:
        self.plan, self.report, self._failure = PLAN, report, failure

    def save(self, path: Path) -> None:
        if self._failure is not None:
            raise self._failure
        Path(path).write_bytes(b"quantized")


class FakePipeline(ModuleType):
    """Takes the pipeline's place; records its calls."""

    def __init__(self) -> None:
        super().__init__("quantkit.pipeline")
        self.calls: list[tuple[Path, dict[str, Any]]] = []
        self.report = REPORT
        self.failure: BaseException | None = None
        self.save_failure: BaseException | None = None

    def compress(self, model: Path, **arguments: Any) -> FakeResult:
        self.calls.append((model, arguments))
        if self.failure is not None:
            raise self.failure
        return FakeResult(self.report, self.save_failure)


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    fake = FakePipeline()
    monkeypatch.setitem(sys.modules, "quantkit.pipeline", fake)
    monkeypatch.setattr(quantkit, "pipeline", fake, raising=False)
    return fake


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.onnx"
    ir.save(to_onnx(initial_weights(np.random.default_rng(0))), path)
    return path


def test_compress_passes_everything_on(pipeline: FakePipeline, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model.parent
    command = (
        f"compress {model} -o {folder}/out.onnx --calib imgs@0:64 --preprocess imagenet --samples 32 --batch-size 8 "
        "--eval test.npz --metric top1 --avg-bits 4.25 --max-size 25% --max-drop 1% --max-latency 0.8x --bits 8,4 "
        "--activations none --allocator uniform --quantizer mse --transform cle,awq --calibrator minmax "
        "--inputs quantized --augment 2 --set mse.steps=40 "
        "--group-size 64 --target portable --ignore a --ignore re:b.* --seed 3 --memory-limit 64MiB --threads 2 "
        "--workers 2 "
        f"--cache {folder}/cache --save-plan {folder}/plan.json --report {folder}/r.html --random-calibration"
    )
    assert main(command.split()) == 0
    ((given, arguments),) = pipeline.calls
    assert given == model
    progress = arguments.pop("progress")
    assert callable(progress.task)
    data = CalibrationRequest("imgs@0:64", "imagenet", None, 8, 32)
    assert arguments == {
        "calibration": data,
        "evaluation": EvaluationRequest(replace(data, source="test.npz", max_samples=None), "top1"),
        "budget": Budget(4.25, Fraction(1, 4), 0.01, 0.8),
        "plan": None,
        "bits": (4, 8),
        "activations": "none",
        "allocator": "uniform",
        "quantizer": "mse",
        "transform": "cle,awq",
        "calibrator": "minmax",
        "inputs": "quantized",
        "augment": 2,
        "group_size": 64,
        "ignore": ("a", "re:b.*"),
        "settings": {"mse.steps": "40"},
        "target": "portable",
        "threads": 2,
        "workers": 2,
        "seed": 3,
        "cache": folder / "cache",
        "memory_limit": 64 << 20,
        "random_calibration": True,
    }
    assert load_plan(folder / "plan.json") == PLAN
    assert (folder / "r.html").read_text().startswith("<!DOCTYPE html>")
    assert capsys.readouterr().out == ""


def test_defaults_are_those_of_the_options(pipeline: FakePipeline, model: Path) -> None:
    assert main(["compress", str(model), "--quiet"]) == 0
    arguments = pipeline.calls[0][1]
    named = ("calibration", "evaluation", "budget", "plan", "progress")
    assert quantkit.Options() == quantkit.Options(**{k: v for k, v in arguments.items() if k not in named})
    assert arguments["budget"] is None and arguments["calibration"] is None
    assert model.with_name("m.q.onnx").read_bytes() == b"quantized"


def test_apply_and_plan(pipeline: FakePipeline, model: Path) -> None:
    plan = model.with_name("plan.json")
    save_plan(PLAN, plan)
    assert main(["apply", str(model), str(plan), "-q"]) == 0
    assert main(["compress", str(model), "--plan", str(plan), "-q"]) == 0
    assert [call[1]["plan"] for call in pipeline.calls] == [PLAN, PLAN]


def test_streams_and_exit_codes(pipeline: FakePipeline, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.report = replace(REPORT, unmet=("size is 25 B, asked for 10 B",))
    assert main(["compress", str(model), "--json"]) == 1
    shown = capsys.readouterr()
    data = json.loads(shown.out)
    assert data["budget_met"] is False and data["ratio"] == 4.0 and data["output"].endswith("m.q.onnx")
    assert "not met: size is 25 B, asked for 10 B" in shown.err and "written: " in shown.err
    assert main(["compress", str(model), "--quiet"]) == 1
    assert capsys.readouterr() == ("", "quantkit: not met: size is 25 B, asked for 10 B\n")
    assert model.with_name("m.q.onnx").exists()
    assert main(["compress", str(model), "-q", "--report", str(model.with_name("r.json"))]) == 1
    assert json.loads(model.with_name("r.json").read_text())["size_after"] == 25


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [
        (InputError("the model is\nempty"), "the model is empty"),
        (VerificationError("parity 3 dB"), "parity 3 dB"),
        (OSError(errno.ENOSPC, "No space left on device", "/big/out"), "/big/out: No space left on device; free some"),
        (OSError(errno.ENOSPC, "No space left on device"), "m.q.onnx: No space left on device; free some"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x: Permission denied"),
        (KeyboardInterrupt(), "interrupted; no half-written file is left"),
        (MemoryError(), "not enough memory; --batch-size and --memory-limit"),
        (ModuleNotFoundError("no", name="torch"), "this needs torch: pip install 'quantkit[torch]'"),
        (ZeroDivisionError("division by zero"), "internal error, ZeroDivisionError: division by zero; --debug shows"),
    ],
)
def test_failures_are_one_sentence(
    pipeline: FakePipeline,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    failure: BaseException,
    sentence: str,
) -> None:
    pipeline.failure = failure
    output = str(model.with_name("m.q.onnx"))
    assert main(["compress", str(model), "-o", output]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("quantkit: error: ") and sentence in shown.err
    assert shown.err.count("\n") == 1 and "Traceback" not in shown.err
    assert not Path(output).exists()
    assert main(["compress", str(model), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_disk_full_while_saving_names_the_path(
    pipeline: FakePipeline, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.save_failure = OSError(errno.ENOSPC, "No space left on device")
    assert main(["compress", str(model), "--save-plan", str(model.with_name("p.json"))]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not model.with_name("p.json").exists()


def test_an_error_without_a_number_is_internal() -> None:
    assert explain(OSError("odd"), None).startswith("internal error, OSError: odd")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("{model} -o {model}", "--output {model} would overwrite the input model; give another name"),
        ("{model} -o {folder}/link.onnx", "would overwrite the input model"),
        ("{model} -o {folder}", "--output {folder} is a folder; give a file name"),
        ("{model} -o {folder}/no/out.onnx", "there is no folder {folder}/no; create it first"),
        ("{model} --save-plan {model}", "--save-plan {model} would overwrite the input model"),
        ("{model} -o {folder}/a.json --report {folder}/a.json", "--output and --report are the same file"),
        ("{model} --report {folder}/r.txt", "--report must end in .html or .json, got {folder}/r.txt"),
        ("{model} --plan {folder}/plan.json --save-plan {folder}/plan.json", "would overwrite the plan"),
        ("{folder}/none.onnx", "there is no file {folder}/none.onnx"),
        ("{folder}", "{folder} is a folder; give the .onnx file in it"),
        ("{model} --plan {folder}/none.json", "there is no file {folder}/none.json"),
        ("{model} --max-size 12XB", "max_size: unknown unit 'xb'"),
        ("{model} --memory-limit 50%", "--memory-limit must be a number of bytes"),
        ("{model} --bits 2,x", "--bits must be widths from 1 to 8 such as 2,3,4,8, got '2,x'"),
        ("{model} --set steps", "--set must be METHOD.SETTING=VALUE such as mse.steps=40, got 'steps'"),
        ("{model} --set mse.steps=1 --set mse.steps=2", "--set mse.steps is given twice"),
        ("{model} --set mse.stepz=1", "unknown setting 'mse.stepz'; settings of mse: steps"),
        ("{model} --allocator unifrom", "there is no allocator 'unifrom'; did you mean 'uniform'?"),
        ("{model} --samples 0 --calib x.npz", "--samples must be at least 1, got 0"),
        ("{model} --preprocess imagenet", "--preprocess needs data to apply to: give --calib"),
        ("{model} --metric top1", "--metric needs held-out data: give --eval"),
        ("{model} --eval x.npz", "--eval needs to know what counts: give --metric"),
        ("{model} --target tpu", "argument --target: invalid choice: 'tpu'"),
        ("{model} --avg 4", "unrecognized arguments: --avg 4; see quantkit compress --help"),
        ("", "the following arguments are required: MODEL; see quantkit compress --help"),
    ],
)
def test_bad_arguments(
    pipeline: FakePipeline, model: Path, capsys: pytest.CaptureFixture[str], arguments: str, sentence: str
) -> None:
    folder = model.parent
    (folder / "link.onnx").symlink_to(model)
    save_plan(PLAN, folder / "plan.json")
    before = model.read_bytes()
    assert main(["compress", *arguments.format(model=model, folder=folder).split()]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and sentence.format(model=model, folder=folder) in shown.err
    assert shown.err.startswith("quantkit: error: ") and shown.err.count("\n") == 1
    assert not pipeline.calls and model.read_bytes() == before


def test_preprocess_may_belong_to_the_held_out_data(pipeline: FakePipeline, model: Path) -> None:
    command = ["compress", str(model), "-q", "--eval", "imgs", "--metric", "top1", "--preprocess", "imagenet"]
    assert main(command) == 0
    assert pipeline.calls[0][1]["evaluation"].data.preprocess == "imagenet"


def test_no_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("usage: quantkit")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"quantkit {quantkit.__version__}\n"


def test_parsers() -> None:
    assert parse_bits("8,2,8") == (2, 8)
    assert parse_settings(["mse.steps=4"]) == {"mse.steps": "4"}
    assert parse_shapes(["x=1x3", "a=b=2"]) == {"x": (1, 3), "a=b": (2,)}


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    assert main([*map(str, arguments), "--json", "--quiet"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return json.loads(shown.out)


def test_inspect(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = run_json(capsys, "inspect", model)
    assert [row["op"] for row in data["targets"]] == ["Conv", "Gemm", "Gemm"]
    assert data["targets"][0]["shape"] == [32, 144]
    assert data["size"] == model.stat().st_size and data["inputs"][0]["shape"] == ["batch", 1, 8, 8]
    assert data["provenance"] == {}
    assert [(row["name"], row["op"]) for row in data["untouched"]] == [("conv1", "Conv")]
    assert "too small" in data["untouched"][0]["reason"]
    ignored = run_json(capsys, "inspect", model, "--ignore", "re:fc.*")
    assert len(ignored["targets"]) == 1
    assert main(["inspect", str(model)]) == 0
    shown = capsys.readouterr()
    assert shown.out == "" and "image FLOAT [batch, 1, 8, 8]" in shown.err


def test_inspect_shows_provenance(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = ir.load(model)
    graph.metadata_props.update({"quantkit.version": "0.1.0", "author": "me"})
    ir.save(graph, model)
    assert run_json(capsys, "inspect", model)["provenance"] == {"quantkit.version": "0.1.0"}


def test_verify(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = run_json(capsys, "verify", model, "--against", model, "--random-calibration")
    assert data["fidelity"]["cosine"] == pytest.approx(1.0) and data["timings"][0]["speedup"] > 0
    assert main(["verify", str(model), "--against", str(model)]) == 2
    assert "verify needs data to run both models on: give --calib" in capsys.readouterr().err
    assert main(["verify", str(model), "--against", str(model), "--random-calibration"]) == 0
    assert "signal to noise" in capsys.readouterr().err


def test_bench(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = run_json(capsys, "bench", model, model, "--shape", "image=4x1x8x8", "--seconds", "0.01")
    assert [row["shapes"] for row in data["rows"]] == [{"image": [4, 1, 8, 8]}] * 2
    assert data["rows"][0]["speedup"] == 1.0
    np.savez(tmp_path / "x.npz", image=np.zeros((16, 1, 8, 8), np.float32))
    data = run_json(capsys, "bench", model, "--calib", tmp_path / "x.npz", "--seconds", "0.01", "--batch-size", "2")
    assert data["rows"][0]["shapes"] == {"image": [2, 1, 8, 8]}
    assert main(["bench", str(model), "--seconds", "0.01"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--shape image=4x", "--shape must be NAME=DIMS such as x=1x3x224x224, got 'image=4x'"),
        ("--shape image=0x1x8x8", "--shape must be NAME=DIMS"),
        ("--shape 4x1", "--shape must be NAME=DIMS"),
        ("--shape image=1x1x8x8 --shape image=1x1x8x8", "--shape for 'image' is given twice"),
        ("--shape other=1x1", "--shape: the model has no input other; it has image"),
        ("--shape image=1x1x9x8", "--shape image=1x1x9x8: the model wants float32 [batch, 1, 8, 8]"),
        ("--shape image=1x8", "--shape image=1x8: the model wants float32 [batch, 1, 8, 8]"),
        ("--shape image=1x1x8x8 --calib x.npz", "--shape and --calib both say what the inputs look like"),
        ("--seconds 0", "--seconds must be above 0 and at most 3600, got 0"),
        ("--threads -1", "--threads must be 0 or more, got -1"),
    ],
)
def test_bench_bad_arguments(model: Path, capsys: pytest.CaptureFixture[str], arguments: str, sentence: str) -> None:
    assert main(["bench", str(model), *arguments.split()]) == 2
    assert sentence in capsys.readouterr().err


def rename_input(path: Path, target: Path, change: Callable[[ir.Model], None]) -> Path:
    graph = ir.load(path)
    change(graph)
    ir.save(graph, target)
    return target


def test_bench_needs_the_same_inputs(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def rename(graph: ir.Model) -> None:
        graph.graph.inputs[0].name = "picture"

    other = rename_input(model, tmp_path / "other.onnx", rename)
    assert main(["bench", str(model), str(other)]) == 2
    assert f"{other} has the inputs picture, but {model} has image" in capsys.readouterr().err


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    rows = run_json(capsys, "methods")
    assert {"kind": "quantizers", "name": "rtn"}.items() <= next(row for row in rows if row["name"] == "rtn").items()
    (mse,) = run_json(capsys, "methods", "mse")
    assert {"name": "steps", "type": "int", "default": "32"} in mse["settings"]
    assert main(["methods", "mse"]) == 0
    assert "mse.steps" in capsys.readouterr().err
    assert main(["methods"]) == 0
    assert "uniform" in capsys.readouterr().err
    assert main(["methods", "nope"]) == 2
    assert "there is no method 'nope'; allocators: " in capsys.readouterr().err


def test_json_into_a_closed_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert main(["methods", "--json", "-q"]) == 0


@pytest.mark.parametrize("arguments", [["methods", "--json", "-q"], ["compress", "--help"], ["methods"]])
def test_a_closed_pipe_is_silent(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    streams: dict[str, Any] = {"stdout": write, "stderr": subprocess.PIPE}
    if arguments == ["methods"]:
        streams = {"stdout": subprocess.PIPE, "stderr": write}
    done = subprocess.run([sys.executable, "-m", "quantkit", *arguments], **streams, check=False)
    os.close(write)
    assert not done.stdout and not done.stderr
    assert done.returncode == 0
