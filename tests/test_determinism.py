"""Same inputs, same bytes: in two processes, with empty caches, and whatever the clock says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import quantkit
from tests.helpers import models


def saved(result: quantkit.Result, path: Path) -> bytes:
    result.save(path)
    return path.read_bytes()


def test_two_processes_and_one_cache_of_real_times(tmp_path: Path) -> None:
    onnx.save(models.block(), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", **models.tokens())
    made = []
    for name in ("a", "b"):
        command = ["compress", "m.onnx", "-o", f"{name}.onnx", "--calib", "d.npz", "--cache", "cache", "--quiet"]
        done = models.quantkit(tmp_path, *command, "--save-plan", f"{name}.json", "--bits", "8")
        assert (done.returncode, done.stderr) == (0, "")
        made.append([(tmp_path / f"{name}.{kind}").read_bytes() for kind in ("onnx", "json")])
    assert made[0] == made[1]


@pytest.mark.parametrize("kind", ["cnn", "block"])
def test_times_that_lead_to_the_same_forms_lead_to_the_same_bytes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx.save(models.cnn() if kind == "cnn" else models.block(), tmp_path / "m.onnx")
    data = models.images() if kind == "cnn" else models.tokens()
    made, reasons = [], set()
    for factor in (0.91, 0.93):
        models.quick(monkeypatch, factor)
        cache = tmp_path / f"cache {factor}"
        result = quantkit.compress(tmp_path / "m.onnx", calibration=data, cache=cache, bits=(4,))
        made.append(saved(result, tmp_path / f"{factor}.onnx"))
        reasons.add(" ".join(layer.reason for layer in result.plan.layers.values()))
    assert made[0] == made[1]
    assert len(reasons) == (1 if kind == "cnn" else 2)  # reasons tell what was measured


def test_another_seed_shows_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.quick(monkeypatch)
    made = [
        quantkit.compress(models.cnn(), random_calibration=True, seed=seed, calibrator="minmax", cache=tmp_path)
        for seed in (0, 0, 1)
    ]
    first, same, other = (saved(result, tmp_path / f"{place}.onnx") for place, result in enumerate(made))
    assert first == same != other
    assert made[0].plan.activations != made[2].plan.activations
    assert made[0].report.provenance["quantkit.calibration"] != made[2].report.provenance["quantkit.calibration"]
