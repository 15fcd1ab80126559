"""The cache of measured times: one figure for one thing, whatever happens to the file. No time itself is judged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from quantkit.costs import latency
from quantkit.costs.latency import LatencyCache, default_folder, layer_cost, open_cache
from quantkit.types import Layout, QuantSpec, Target, Use

SPEC = QuantSpec(4, 32)


def target(shape: tuple[int, int] = (32, 64)) -> Target:
    data, weight = ir.val("x"), ir.val("w", const_value=ir.tensor(np.zeros(shape[::-1], np.float32)))
    use = Use(ir.node("MatMul", [data, weight]), 1, 0)
    return Target("layer", "MatMul", (use,), weight, shape, 1, Layout(shape[::-1], shape[::-1], (1, 0)))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What was really measured; the figures count up, so that no two measurements agree."""
    calls: list[tuple[Any, ...]] = []

    def measure(*arguments: Any) -> tuple[float, float]:
        calls.append(arguments)
        return 1.2345678 * len(calls), 0.98765432 * len(calls)

    monkeypatch.setattr(latency, "_measure", measure)
    return calls


def cost(
    cache: LatencyCache,
    item: Target | None = None,
    spec: QuantSpec = SPEC,
    *,
    form: str = "packed",
    rows: int = 8,
    runtime: str = "ort-cpu",
    threads: int = 1,
) -> tuple[float, float]:
    found = layer_cost(item or target(), spec, form, rows, cache=cache, runtime=runtime, threads=threads)
    assert found.ratio == found.form_ms / found.float_ms
    return found.float_ms, found.form_ms


def test_the_first_use_gives_the_figures_of_every_later_one(tmp_path: Path, measured: list[Any]) -> None:
    cache = open_cache(tmp_path)
    first = cost(cache)
    assert first == (1.235, 0.9877)  # as stored, not as measured
    assert cost(cache) == first and cost(open_cache(tmp_path)) == first
    assert len(measured) == 1


def test_everything_that_matters_is_in_the_key(tmp_path: Path, measured: list[Any]) -> None:
    cache = open_cache(tmp_path)
    cost(cache)
    cost(cache, target((32, 96)))
    cost(cache, target((64, 32)))
    cost(cache, spec=QuantSpec(3, 32))
    cost(cache, spec=QuantSpec(4, 16))
    cost(cache, spec=QuantSpec(4, 32, symmetric=True))
    cost(cache, form="dynamic")
    cost(cache, rows=16)
    cost(cache, runtime="portable")
    cost(cache, threads=2)
    assert len(measured) == 10 == len(cache.entries)
    # A group as wide as the row is one scale a row; the layer's name and the activations' width do not matter.
    cost(cache, spec=QuantSpec(4, -1))
    cost(cache, spec=QuantSpec(4, 64))
    cost(cache, replace(target(), name="other"), replace(SPEC, act_bits=8))
    assert len(measured) == 11


def test_two_processes_keep_each_others_figures(tmp_path: Path, measured: list[Any]) -> None:
    one, other = open_cache(tmp_path), open_cache(tmp_path)
    first = cost(one, rows=1)
    cost(other, rows=2)
    assert cost(other, rows=1) == first  # measured by the first in the meantime
    both = cost(one, rows=4), cost(other, rows=4)
    assert both[0] == both[1]
    assert len(open_cache(tmp_path).entries) == 3
    assert len(measured) == 4  # the second measurement of 4 rows came too late


def test_what_was_stored_first_stays(tmp_path: Path, measured: list[Any]) -> None:
    one, other = open_cache(tmp_path), open_cache(tmp_path)
    assert one.put({"rows": 1}, [1.0, 2.0]) == [1.0, 2.0]
    assert other.get({"rows": 1}) is None
    assert other.put({"rows": 1}, [3.0, 4.0]) == [1.0, 2.0]
    assert open_cache(tmp_path).get({"rows": 1}) == [1.0, 2.0]
    assert measured == []


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '"x"', "\x00\xff", "[" * 100_000])
def test_a_corrupted_file_counts_as_empty(tmp_path: Path, measured: list[Any], text: str) -> None:
    (tmp_path / "latency.json").write_text(text, encoding="latin-1")
    cache = open_cache(tmp_path)
    assert cache.entries == {}
    cost(cache)
    assert len(open_cache(tmp_path).entries) == 1


@pytest.mark.parametrize("value", [[], ["fast"], [1.0, None], "x", 3, {"a": 1}, [0.0, 1.0], [-1.0], [float("nan")]])
def test_a_broken_entry_is_measured_again(tmp_path: Path, measured: Sequence[Any], value: object) -> None:
    cost(open_cache(tmp_path))
    stored = json.loads((tmp_path / "latency.json").read_text())
    (tmp_path / "latency.json").write_text(json.dumps(dict.fromkeys(stored, value) | {"kept": [1.0, 2.0]}))
    cache = open_cache(tmp_path)
    assert set(cache.entries) == {"kept"}
    cost(cache)
    assert len(measured) == 2 and len(open_cache(tmp_path).entries) == 2


def test_a_folder_that_cannot_be_written_only_costs_time(tmp_path: Path, measured: list[Any]) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        cache = open_cache(folder)
        assert cost(cache) == cost(cache)
    assert len(measured) == 2
    assert (tmp_path / "file").read_text() == "in the way"


def test_no_temporary_files_stay(tmp_path: Path, measured: list[Any]) -> None:
    cost(open_cache(tmp_path / "new" / "folder"))
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["latency.json"]
    assert len(measured) == 1


def test_the_users_folder_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert default_folder() == tmp_path / ".cache" / "quantkit"
    open_cache(None).put({"rows": 1}, [1.0])
    assert (tmp_path / ".cache" / "quantkit" / "latency.json").exists()


@pytest.mark.parametrize("form", ["packed", "dynamic", "matmulnbits"])
def test_a_real_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr(latency, "SECONDS", 0.01)
    found = cost(open_cache(tmp_path), form=form)
    assert all(0 < figure < 1000 for figure in found)  # milliseconds
