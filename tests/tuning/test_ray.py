"""Candidates measured on a real Ray cluster, started on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from quantkit.budget import Budget
from quantkit.tuning.tune import TuneSettings, tune
from tests.helpers import models

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_a_cluster_finds_what_one_process_finds(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.quick(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))
    found = [
        tune(
            models.cnn(),
            calibration=models.images(40),
            budget=Budget(avg_bits=4.0),
            search_settings=TuneSettings(6, batch=3, executor=executor),
            allocator="uniform",
            workers=2,
        )
        for executor in ("local", "ray")
    ]
    assert [trial.losses for trial in found[0].trials] == [trial.losses for trial in found[1].trials]
    assert found[0].best == found[1].best
