"""`quantkit tune` and `quantkit.tuning.tune.tune` from a model to a file."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from quantkit.budget import Budget
from quantkit.calibration.request import CalibrationRequest, EvaluationRequest
from quantkit.cli import main
from quantkit.errors import InputError
from quantkit.pipeline import apply
from quantkit.runtime.ort import make_session
from quantkit.tuning.history import open_history
from quantkit.tuning.trials import Progressed
from quantkit.tuning.tune import Tuned, TuneSettings, tune
from tests.helpers import models


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.quick(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))


def tuned(trials: int = 8, *, bits: float = 4.0, path: Path | None = None, **settings: Any) -> Tuned:
    settings.setdefault("allocator", "uniform")
    search = {key: settings.pop(key) for key in ("tuner", "batch", "objective") if key in settings}
    return tune(
        models.cnn(),
        calibration=models.images(40),
        budget=settings.pop("budget", Budget(avg_bits=bits)),
        search_settings=TuneSettings(trials, history=path, **search),
        **settings,
    )


def test_never_worse_than_the_allocator_and_the_uniform_plan() -> None:
    seen: list[Progressed] = []
    found = tuned(10, watch=seen.append, allocator="auto")
    assert len(found.trials) == 10 == len(seen)
    losses = [trial.loss for trial, fits in zip(found.trials, found.feasible, strict=True) if fits]
    kept = found.trials[found.best]
    assert kept.loss == min(losses) and found.feasible[found.best]
    assert [trial.configuration["plan"] for trial in found.trials[:2]] != []
    uniform = [trial for trial in found.trials if trial.configuration["plan"] == "uniform"]
    assert uniform and kept.loss <= uniform[0].loss
    assert len({json.dumps(dict(trial.configuration), sort_keys=True) for trial in found.trials}) == 10
    report = found.result.report
    assert report.average_bits <= 4.0 + 1e-9
    assert any("10 trials" in note for note in report.notes)
    chosen = [row for row in report.contenders if row.chosen]
    assert len(chosen) == 1 and chosen[0].name.startswith(f"{found.best + 1}: ")
    assert found.front and all(found.trials[index].complete for index in found.front)


def test_the_trial_is_the_model_that_is_written(tmp_path: Path) -> None:
    """Size and loss of the trial are those of the file, and its plan makes the same bytes again."""
    found = tuned(6)
    out = tmp_path / "q.onnx"
    found.result.save(out)
    assert out.stat().st_size == found.result.report.size_after
    assert found.trials[found.best].size == pytest.approx(out.stat().st_size, abs=64)
    session = make_session(out)
    assert session.run({"x": models.images(4)["x"]})["y"].shape == (4, 10)
    again = apply(models.cnn(), found.result.plan, calibration=models.images(40))
    again.save(tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == out.read_bytes()


def test_interrupted_and_resumed_it_tries_the_same_and_measures_nothing_twice(tmp_path: Path) -> None:
    whole = tuned(9, path=tmp_path / "whole.jsonl")
    part = tmp_path / "part.jsonl"

    def stop(done: Progressed) -> None:
        if len(done.trials) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned(9, path=part, watch=stop)
    kept = part.read_bytes()
    resumed = tuned(9, path=part)
    assert resumed.known == 5 and part.read_bytes().startswith(kept)
    assert [trial.configuration for trial in resumed.trials] == [trial.configuration for trial in whole.trials]
    assert [trial.loss for trial in resumed.trials] == [trial.loss for trial in whole.trials]
    assert resumed.best == whole.best
    lines = len(part.read_bytes().splitlines())
    third = tuned(9, path=part)
    assert third.known == 9 and len(part.read_bytes().splitlines()) == lines


def test_killed_and_resumed(tmp_path: Path) -> None:
    """SIGKILL in the middle: the next run goes on, and ends with the same file as one that was left alone."""
    onnx.save(models.cnn(), tmp_path / "m.onnx")
    np.savez(tmp_path / "calib.npz", **models.images(40))
    command = [sys.executable, "-m", "quantkit", "tune", "m.onnx", "--calib", "calib.npz", "--avg-bits", "4"]
    command += ["--trials", "6", "--allocator", "uniform", "--workers", "1", "--cache", "cache", "-q"]
    environment = {**os.environ, "HOME": str(tmp_path)}
    subprocess.run([*command, "-o", "whole.onnx"], cwd=tmp_path, env=environment, check=True, timeout=300)
    log = tmp_path / "part.onnx.trials.jsonl"
    for lines in (2, 4):
        running = subprocess.Popen([*command, "-o", "part.onnx"], cwd=tmp_path, env=environment)
        deadline = time.monotonic() + 300
        while running.poll() is None and time.monotonic() < deadline:
            if log.exists() and len(log.read_bytes().splitlines()) >= lines:
                running.send_signal(signal.SIGKILL)
            time.sleep(0.02)
        assert not (tmp_path / "part.onnx").exists()
    subprocess.run([*command, "-o", "part.onnx"], cwd=tmp_path, env=environment, check=True, timeout=300)
    lines = log.read_text().splitlines()
    whole = [line for line in lines if re.search(r'"sum": "[0-9a-f]{12}"}$', line)]  # a kill may have torn one
    keys = [json.loads(line)["row"]["key"] for line in whole]
    assert len(keys) == len(set(keys)) and len(lines) - len(whole) <= 2
    trials = [row for row in open_history(log).rows.values() if "trial" in row]
    assert len(trials) == 6
    assert (tmp_path / "part.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()


def test_batches_and_processes(tmp_path: Path) -> None:
    alone, together = (tuned(8, batch=3, workers=workers) for workers in (1, 2))
    assert [trial.configuration for trial in alone.trials] == [trial.configuration for trial in together.trials]
    assert [trial.losses for trial in alone.trials] == [trial.losses for trial in together.trials]


@pytest.mark.parametrize("tuner", ["random", "grid", "genetic", "additive"])
def test_every_tuner(tuner: str) -> None:
    found = tuned(5, tuner=tuner)
    assert len(found.trials) == 5 and found.feasible[found.best]


def test_trials_of_another_model_are_learnt_from(tmp_path: Path) -> None:
    history = tmp_path / "history"
    history.mkdir()
    tuned(6, path=history)
    seen: list[Any] = []
    other = tune(
        models.build(models.CNN, {**_weights(seed=3)}),
        calibration=models.images(40),
        budget=Budget(avg_bits=4.0),
        search_settings=TuneSettings(4, history=history),
        allocator="uniform",
        watch=seen.append,
    )
    assert other.known == 0 and len(other.trials) == 4
    rows = [json.loads(line)["row"] for line in (history / "trials.jsonl").read_text().splitlines()]
    assert len({row["model"] for row in rows if "trial" in row}) == 2
    assert {len(row["features"]) for row in rows if "trial" in row} == {len(rows[-1]["columns"])}


def _weights(seed: int) -> dict[str, Any]:
    return {
        "w1": models.random(16, 3, 3, 3, seed=seed),
        "b1": models.random(16, seed=seed),
        "w2": models.random(32, 16, 3, 3, seed=seed),
        "w3": models.random(32, 10, seed=seed),
    }


def test_the_smallest_that_keeps_the_accuracy() -> None:
    found = tuned(8, budget=Budget(max_drop=0.2))
    assert found.objective == "size"
    sizes = [trial.size for trial, fits in zip(found.trials, found.feasible, strict=True) if fits]
    kept = found.trials[found.best]
    assert kept.size == min(sizes) and kept.drop is not None and kept.drop <= 0.2


def test_the_users_metric(tmp_path: Path) -> None:
    data = models.images(24)
    labels = make_session(ir.from_proto(models.cnn())).run(data)["y"].argmax(axis=1)
    np.savez(tmp_path / "eval.npz", **data, labels=labels)
    request = EvaluationRequest(CalibrationRequest(str(tmp_path / "eval.npz")), "top1")
    found = tuned(5, evaluation=request, objective="drop")
    drops = [trial.drop for trial in found.trials if trial.complete]
    assert None not in drops and found.trials[found.best].drop == min(drop for drop in drops if drop is not None)


def test_a_latency_budget_is_measured() -> None:
    found = tuned(4, budget=Budget(avg_bits=4.0, max_latency=100.0))
    assert all(trial.latency is not None and math.isfinite(trial.latency) for trial in found.trials if trial.complete)
    assert found.feasible[found.best]


def test_nothing_fits() -> None:
    """The file nearest to the budget is written, and the report says what is not met."""
    found = tuned(3, budget=Budget(max_size=100))
    assert not any(found.feasible) and found.result.report.unmet
    assert all(not trial.losses for trial in found.trials)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": Budget()}, "tuning needs a budget: give --max-size, --avg-bits, --max-bops, --max-latency or"),
        ({"objective": "drop"}, "the objective drop needs the user's metric: give --eval and --metric"),
        ({"objective": "size"}, "the objective size needs an accuracy to keep: give --max-drop"),
        ({"objective": "speed"}, "objective must be one of loss, drop, size, got 'speed'"),
        ({"tuner": "quantum"}, "there is no tuner 'quantum'; did you mean 'quantune'?"),
        ({"trials": 0}, "trials must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"holdout": 95}, "holdout must be at least 1 and at most 90 (percent of the samples), got 95"),
    ],
)
def test_wrong_arguments(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        tuned(**settings)


def test_it_needs_data() -> None:
    with pytest.raises(InputError, match="tuning needs calibration data to measure on: give --calib"):
        tune(models.cnn(), calibration=None, budget=Budget(avg_bits=4.0))
    with pytest.raises(InputError, match="executor must be one of local, ray, got 'slurm'"):
        TuneSettings(executor="slurm")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    onnx.save(models.cnn(), tmp_path / "m.onnx")
    np.savez(tmp_path / "calib.npz", **models.images(40))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["tune", "m.onnx", "--calib", "calib.npz", "--avg-bits", "4", "--trials", "5", "--allocator", "uniform"]
    assert main([*arguments, "--json", "--save-plan", "plan.json"]) == 0
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert len(data["trials"]) == 5 and sum(row["kept"] for row in data["trials"]) == 1 and data["known"] == 0
    assert data["output"] == "m.q.onnx" and (files / "m.q.onnx").exists() and (files / "plan.json").exists()
    assert "trial 1: " in err and "best so far" in err and "5 trials: the front" in err
    assert "0 of 5 trials were known from m.q.onnx.trials.jsonl" in err
    assert main([*arguments, "-q", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["known"] == 5 and err == ""
    assert main([*arguments, "-q", "--history", "all"]) == 0
    assert (files / "all" / "trials.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--avg-bits", "4"], "tuning needs calibration data to measure on: give --calib"),
        (["--calib", "calib.npz"], "tuning needs a budget: give --max-size"),
        (
            ["--calib", "calib.npz", "--avg-bits", "4", "--history", "m.onnx"],
            "--history m.onnx is a file; give a folder",
        ),
        (["--calib", "calib.npz", "--avg-bits", "4", "--trials", "0"], "trials must be at least 1, got 0"),
        (
            ["--calib", "calib.npz", "--avg-bits", "4", "--set", "quantune.members=0"],
            "quantune.members must be at least",
        ),
    ],
)
def test_wrong_commands(files: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["tune", "m.onnx", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (files / "m.q.onnx").exists()


def test_interrupting_the_command_says_where_the_trials_are(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("quantkit.tuning.trials.score_all", stop)
    assert main(["tune", "m.onnx", "--calib", "calib.npz", "--avg-bits", "4"]) == 2
    message = "interrupted; the trials so far are kept in m.q.onnx.trials.jsonl: the same command goes on"
    assert message in capsys.readouterr().err
