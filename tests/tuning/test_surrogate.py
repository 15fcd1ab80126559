"""The surrogates: exact where they must be, unsure where nothing was tried, and what is missing says so at once."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from quantkit.cli import main
from quantkit.tuning.boosted import OURS, Boosted
from quantkit.tuning.surrogate import additive, scale

RNG = np.random.default_rng(0)
COLUMNS = RNG.integers(0, 2, (60, 5)).astype(np.float64)
VALUES = COLUMNS @ np.array([3.0, -2.0, 1.0, 0.5, 0.0]) + 10


def test_the_linear_model_finds_a_plane_and_is_less_sure_far_away() -> None:
    design = np.concatenate([np.ones((60, 1)), COLUMNS], axis=1)
    far = np.array([[1.0, 9, 9, 9, 9, 9]])
    found = additive(design, VALUES, np.concatenate([design, far]), strength=1e-6)
    assert found.mean[:60] == pytest.approx(VALUES, abs=1e-4)
    assert found.mean[60] == pytest.approx(10 + 9 * 2.5, abs=1e-3)
    assert (found.deviation >= 0).all()
    noisy = additive(design, VALUES + RNG.normal(0, 0.1, 60), np.concatenate([design, far]), strength=1e-6)
    assert noisy.deviation[60] > 5 * noisy.deviation[:60].max()


def test_trees_learn_and_the_spread_is_larger_where_nothing_was_seen() -> None:
    """Trials with the first setting off alone: with it on, members disagree no less than where trials are."""
    seen = COLUMNS[:, 1] == 0
    found = Boosted().predict(COLUMNS[seen], VALUES[seen], COLUMNS, seed=1)
    assert np.corrcoef(found.mean[seen], VALUES[seen])[0, 1] > 0.95
    assert found.deviation.min() >= 0
    again = Boosted().predict(COLUMNS[seen], VALUES[seen], COLUMNS, seed=1)
    assert np.array_equal(found.mean, again.mean) and np.array_equal(found.deviation, again.deviation)
    assert not np.array_equal(found.mean, Boosted().predict(COLUMNS[seen], VALUES[seen], COLUMNS, seed=2).mean)


def test_one_member_has_no_spread_and_constant_values_are_predicted() -> None:
    found = Boosted(members=1).predict(COLUMNS, np.full(60, 7.0), COLUMNS[:3], seed=0)
    assert found.mean == pytest.approx([7.0] * 3) and found.deviation.tolist() == [0.0] * 3


def test_others_that_are_not_trusted_do_not_count() -> None:
    owners = np.array([0] * 30 + [OURS] * 30)
    misled = np.where(owners == OURS, VALUES, -VALUES)
    ours = VALUES[30:]
    trusted = Boosted().predict(COLUMNS, misled, COLUMNS[30:], seed=0, owners=owners, trust=1.0)
    alone = Boosted().predict(COLUMNS, misled, COLUMNS[30:], seed=0, owners=owners, trust=0.0)
    errors = [float(np.abs(found.mean - ours).mean()) for found in (trusted, alone)]
    assert errors[1] < 0.2 * errors[0]


def test_scale() -> None:
    assert scale(np.array([1.0, 3.0]), np.array([1.0, 1.0])) == (2.0, 1.0)
    assert scale(np.array([1.0, 3.0]), np.array([0.0, 1.0])) == (3.0, 1.0)
    assert scale(np.array([5.0, 5.0]), np.ones(2)) == (5.0, 1.0)


def test_without_xgboost_the_command_says_so_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "xgboost", None)
    for name in ("quantkit.tuning.boosted", "quantkit.tuners.quantune"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    path = tmp_path / "m.onnx"
    path.write_bytes(b"")
    assert main(["tune", str(path), "--calib", "c.npz", "--avg-bits", "4"]) == 2
    assert "pip install 'quantkit[autotune]'" in capsys.readouterr().err
