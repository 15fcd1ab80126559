"""Trials on the disk: found by content, whole or not at all, and learnt from by other models."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from quantkit.errors import InputError
from quantkit.tuning.history import History, Trial, content_key, figure_of, open_history, trial_row

TRIAL = Trial({"plan": "auto", "bias": True}, 1000, 0.25, (0.125, 0.375), True, 20.5, 0.01, None, 1.5)


def row(model: str, trial: Trial, *features: float) -> dict[str, object]:
    return {"model": model, "columns": ["a", "b"], "features": list(features), "trial": trial_row(trial)}


def test_what_was_put_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    history = open_history(path)
    assert history.trial("k") is None and not path.exists()
    history.put("k", row("m", TRIAL, 1, 2))
    history.put("lost", row("m", replace(TRIAL, loss=math.inf, losses=(), complete=False, sqnr=None), 1, 2))
    again = open_history(path)
    assert again.trial("k") == TRIAL == history.trial("k")
    lost = again.trial("lost")
    assert lost is not None and lost.loss == math.inf and not lost.complete and lost.losses == ()
    assert len(path.read_bytes().splitlines()) == 2


@pytest.mark.parametrize("cut", [2, 10, 60])
def test_a_torn_line_is_left_out_and_the_next_one_is_whole(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "trials.jsonl"
    history = open_history(path)
    history.put("first", row("m", TRIAL, 1, 2))
    history.put("torn", row("m", TRIAL, 1, 2))
    path.write_bytes(path.read_bytes()[:-cut])
    again = open_history(path)
    assert again.trial("first") == TRIAL and again.trial("torn") is None
    again.put("next", row("m", TRIAL, 3, 4))
    last = open_history(path)
    assert set(last.rows) == {"first", "next"}


@pytest.mark.parametrize(
    "change", [lambda text: text.replace("0.25", "0.24"), lambda text: "[1]\n", lambda text: '{"sum": 1, "row": 2}\n']
)
def test_a_changed_line_is_left_out(tmp_path: Path, change: object) -> None:
    path = tmp_path / "trials.jsonl"
    open_history(path).put("k", row("m", TRIAL, 1, 2))
    path.write_text(change(path.read_text()))  # type: ignore[operator]
    assert open_history(path).rows == {}


def test_a_row_of_another_kind_is_no_trial() -> None:
    history = History(None, {"k": {"trial": {"size": "large"}}, "start": {"plans": {}}})
    assert history.trial("k") is None and history.trial("start") is None
    history.put("more", {"x": 1})
    assert history.get("more") == {"x": 1}


def test_a_folder_is_no_history(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"the history {tmp_path} is no file; give a folder to --history"):
        open_history(tmp_path)


def test_keys_depend_on_content_alone() -> None:
    assert content_key({"a": 1, "b": [1, 2]}) == content_key({"b": [1, 2], "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})


def test_others_are_complete_trials_of_other_models_with_the_same_columns() -> None:
    history = History(None)
    for index, loss in enumerate((0.1, 0.2, 0.4)):
        history.put(f"b{index}", row("b", replace(TRIAL, loss=loss), index, 1))
        history.put(f"mine{index}", row("mine", replace(TRIAL, loss=loss), index, 1))
    history.put("early", row("b", replace(TRIAL, complete=False), 9, 9))
    history.put("other columns", {**row("c", TRIAL, 1, 2), "columns": ["z"]})
    history.put("start", {"plans": {}})
    found = history.others("mine", ("a", "b"), "loss")
    assert found is not None
    assert found.features.tolist() == [[0, 1], [1, 1], [2, 1]]
    assert found.values == pytest.approx([-math.log(2), 0, math.log(2)])
    assert history.others("b", ("a", "b"), "loss") is not None
    assert history.others("mine", ("other",), "loss") is None


def test_figures() -> None:
    assert figure_of(TRIAL, "loss") == pytest.approx(math.log(0.25))
    assert figure_of(TRIAL, "size") == pytest.approx(math.log(1000))
    assert figure_of(TRIAL, "drop") == pytest.approx(1.0)
    assert figure_of(replace(TRIAL, drop=None), "drop") == math.inf
    assert figure_of(replace(TRIAL, loss=math.inf), "loss") == math.inf
    assert math.isfinite(figure_of(replace(TRIAL, loss=0.0), "loss"))


def test_rows_are_json() -> None:
    assert json.loads(json.dumps(trial_row(TRIAL)))["configuration"] == {"plan": "auto", "bias": True}
