"""A run that was stopped goes on where it was, and ends with the bytes of one that was not."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import quantkit
from quantkit.cache import Store
from quantkit.calibration import collector
from quantkit.calibration.collector import Collected, Request, Settings, collect
from quantkit.calibration.data import open_calibration
from quantkit.graph.load import load_model
from quantkit.graph.targets import find_targets
from quantkit.report.progress import SilentProgress
from quantkit.runtime.ort import make_session
from quantkit.runtime.probe import Probe
from quantkit.verify import session_inputs
from tests.helpers import models

KINDS = frozenset({"abs_mean", "mean", "square_mean", "gram", "rows", "abs_max"})
SETTINGS: dict[str, Any] = {"quantizer": "gptq", "allocator": "linearity", "budget": quantkit.Budget(avg_bits=4)}


def compress(cache: Path, model: onnx.ModelProto | None = None, **changes: Any) -> quantkit.Result:
    arguments = {"calibration": models.tokens(), "workers": 1, "cache": cache, **SETTINGS, **changes}
    return quantkit.compress(model or models.block(), **arguments)


def saved(result: quantkit.Result, path: Path) -> bytes:
    result.save(path)
    return path.read_bytes()


def test_stopped_anywhere_it_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.quick(monkeypatch)
    wanted = saved(compress(tmp_path / "whole"), tmp_path / "whole.onnx")
    put = Store.put
    stops = 0
    for limit in (0, 1, 2, 5, 9, 14, 20):
        count = iter(range(10**6))

        def stopping(store: Store, key: str, entry: Any, limit: int = limit, count: Any = count) -> Any:
            if next(count) == limit:
                raise KeyboardInterrupt
            return put(store, key, entry)

        monkeypatch.setattr(Store, "put", stopping)
        try:
            compress(tmp_path / "stopped")
        except KeyboardInterrupt:
            stops += 1
    assert stops >= 5
    monkeypatch.setattr(Store, "put", put)
    assert saved(compress(tmp_path / "stopped"), tmp_path / "stopped.onnx") == wanted


def test_the_second_run_does_no_work_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.quick(monkeypatch)
    first = compress(tmp_path)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("done again")

    monkeypatch.setattr(collector, "_add", never)
    monkeypatch.setattr("quantkit.quantizers.gptq.GPTQ.quantize", never)
    monkeypatch.setattr(Probe, "_loss", never)
    monkeypatch.setattr("quantkit.runtime.probe._Walk.measure", never)
    second = compress(tmp_path, inputs="float")
    assert second.report.sensitivities == first.report.sensitivities


@pytest.mark.parametrize("change", ["weights", "data", "setting", "seed", "program"])
def test_nothing_stale_is_used(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.quick(monkeypatch)
    settings: dict[str, Any] = {"inputs": "float", "allocator": "uniform"}
    compress(tmp_path, **settings)
    model = models.block()
    if change == "weights":
        weights = onnx.numpy_helper.to_array(model.graph.initializer[1]).copy()
        weights[0, 0] += 0.5
        model.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(weights, model.graph.initializer[1].name))
    changes: dict[str, dict[str, Any]] = {
        "data": {"calibration": {"ids": (models.tokens()["ids"] + 1) % 50}},
        "setting": {"settings": {"gptq.damp": 0.3}},
        "seed": {"seed": 1},
    }
    if change == "program":
        monkeypatch.setattr("quantkit.cache.program", lambda: "another")
    calls = 0
    original = quantkit.quantizers.gptq.GPTQ.quantize  # type: ignore[attr-defined]

    def counting(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*arguments)

    monkeypatch.setattr("quantkit.quantizers.gptq.GPTQ.quantize", counting)
    changed = settings | changes.get(change, {})
    got = compress(tmp_path, model, **changed)
    fresh = compress(tmp_path / "empty", model, **changed)
    assert saved(got, tmp_path / "a.onnx") == saved(fresh, tmp_path / "b.onnx")
    assert calls > 0


def test_what_is_stamped_on_a_file_is_not_remembered_with_its_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.quick(monkeypatch)
    sizes = []
    for stamps in (100, 250):
        monkeypatch.setattr("quantkit.candidate.provenance_bytes", lambda _, stamps=stamps: stamps)
        rows = compress(tmp_path, allocator="uniform", inputs="float").report.contenders
        sizes.append([row.size for row in rows])
    assert [size + 150 for size in sizes[0]] == sizes[1]


class Net:
    """Statistics of the text's network, piece by piece."""

    def __init__(self) -> None:
        self.model = load_model(models.cnn()).model
        self.targets = find_targets(self.model)[0]
        inputs = session_inputs(make_session(self.model))
        self.data = open_calibration(models.images(), inputs, batch_size=5)

    def collect(self, store: Store, limit: int, histograms: Mapping[str, str]) -> Collected:
        request = Request(self.targets, KINDS, histograms)
        return collect(self.model, self.data, request, Settings(limit, 1, 0, store), SilentProgress())


@pytest.mark.parametrize("limit", [1 << 30, 1])
@pytest.mark.parametrize("histograms", [{}, {"x": "x", "r1": "both", "r2": "both"}])
def test_statistics_are_found_as_they_were(limit: int, histograms: dict[str, str], tmp_path: Path) -> None:
    net = Net()
    wanted = net.collect(Store(), limit, histograms)
    for _ in range(2):
        found = net.collect(Store(tmp_path), limit, histograms)
        assert found.stats.keys() == wanted.stats.keys() and found.histograms.keys() == wanted.histograms.keys()
        for name, layer in wanted.stats.items():
            for kind in KINDS:
                np.testing.assert_array_equal(getattr(found.stats[name], kind), getattr(layer, kind))
            arrays = dict.fromkeys(KINDS)
            assert replace(found.stats[name], **arrays) == replace(layer, **arrays)
        for group, seen in wanted.histograms.items():
            np.testing.assert_array_equal(found.histograms[group].counts, seen.counts)
            np.testing.assert_array_equal(found.histograms[group].edges, seen.edges)
            assert (found.histograms[group].low, found.histograms[group].zeros) == (seen.low, seen.zeros)


def test_only_waves_that_are_missing_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    wanted = net.collect(Store(tmp_path), 1, {})
    entries = sorted((tmp_path / "work").rglob("*.entry"))
    assert len(entries) == 3
    entries[1].unlink()
    seen: set[str] = set()
    add = collector._add
    monkeypatch.setattr(collector, "_add", lambda item, *rest: seen.add(item.name) or add(item, *rest))
    found = net.collect(Store(tmp_path), 1, {})
    assert len(seen) == 1
    for name, layer in wanted.stats.items():
        np.testing.assert_array_equal(found.stats[name].gram, layer.gram)


def test_killed_runs_go_on(tmp_path: Path) -> None:
    """SIGKILL, wherever it is: then the same file as without; and no part of one in between."""
    onnx.save(models.cnn(), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", **models.images(40))
    given = ["compress", "m.onnx", "--calib", "d.npz", "--bits", "4", "--quantizer", "mse", "--allocator", "uniform"]

    def start(name: str) -> subprocess.Popen[bytes]:
        command = models.command(*given, "--cache", f"{name} cache", "-o", f"{name}.onnx", setup=models.FAST)
        command.append("--quiet")
        return subprocess.Popen(command, cwd=tmp_path, env=models.environment(tmp_path), stderr=subprocess.PIPE)

    begin = time.monotonic()
    assert start("whole").wait() == 0
    seconds = time.monotonic() - begin
    (tmp_path / "killed cache").mkdir()
    shutil.copy(tmp_path / "whole cache" / "latency.json", tmp_path / "killed cache")
    kills = 0
    for share in (0.5, 0.7, 0.9):
        process = start("killed")
        try:
            process.wait(share * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        if (tmp_path / "killed.onnx").exists():
            break
    assert kills > 0
    assert start("killed").wait() == 0
    assert (tmp_path / "killed.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()
    assert not list(tmp_path.glob(".killed*"))
