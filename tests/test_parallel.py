"""Layers quantized in several processes are the same, bit for bit, as in one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import quantkit
from quantkit import parallel
from quantkit.errors import InputError
from quantkit.parallel import Task, quantize_all, worker_count
from quantkit.quantizers.gptq import GPTQ
from quantkit.types import LayerStats, QuantSpec
from tests.helpers import models

SPECS = (QuantSpec(2, 16), QuantSpec(4, -1, symmetric=True))


def tasks() -> list[Task]:
    rng = np.random.default_rng(0)
    made = []
    for place, (rows, columns) in enumerate(((24, 48), (64, 16), (7, 33))):
        inputs = rng.standard_normal((100, columns)) * np.linspace(0.2, 2, columns)
        stats = LayerStats(100, -1, 1, gram=(inputs.T @ inputs / 100)[None])
        weight = rng.standard_normal((rows, columns)).astype(np.float32)
        made.append(Task(f"l{place}", weight.shape, weight.copy, stats, SPECS))
    return made


def test_processes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "WORTHWHILE", 0.0)
    alone, together = (dict(quantize_all(GPTQ(), tasks(), workers)) for workers in (1, 3))
    assert set(alone) == set(together) == {"l0", "l1", "l2"}
    for name, weights in alone.items():
        for one, other in zip(weights, together[name], strict=True):
            assert one.spec == other.spec
            for field in ("codes", "scales", "zero_points", "group_bits"):
                np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


def test_small_work_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_named", None)  # what a process would run
    assert {name for name, _ in quantize_all(GPTQ(), tasks(), 2)} == {"l0", "l1", "l2"}
    assert sum(task.work for task in tasks()) < parallel.WORTHWHILE


def test_counts() -> None:
    assert worker_count(3) == 3 and worker_count(0) >= 1
    with pytest.raises(InputError, match="workers must be 0 or more, got -1"):
        quantkit.compress(models.matmul(), workers=-1)


def test_compress_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.quick(monkeypatch)
    monkeypatch.setattr(parallel, "WORTHWHILE", 0.0)
    first, second = (
        quantkit.compress(
            models.block(),
            calibration=models.tokens(16),
            budget=quantkit.Budget(avg_bits=3.5),
            workers=workers,
            cache=tmp_path,
        )
        for workers in (1, 2)
    )
    assert first.plan == second.plan
    contents = [ir.to_proto(result.model).SerializeToString(deterministic=True) for result in (first, second)]
    assert contents[0] == contents[1]
