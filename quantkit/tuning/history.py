"""The database of measured trials: one JSON line each, found again by content, shared by all models of a folder.

A line that was torn by a crash, or that was changed, is left out: its trial is measured again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.errors import InputError
from quantkit.tuning.search import Others
from quantkit.tuning.space import Configuration

FILE = "trials.jsonl"
KEY_LETTERS = 24
SUM_LETTERS = 12


@dataclass(frozen=True)
class Trial:
    """One configuration, emitted and measured.

    Attributes:
        size: bytes of the file.
        loss: nats per held-out sample; of `losses` where the trial was ended early.
        losses: of each sample that was run, in order.
        complete: all samples were run.
        sqnr: dB, None where the trial was ended early.
        drop: of the user's metric, None where it was not asked for.
        latency: time relative to float, None where it was not asked for.
        seconds: that it took.
    """

    configuration: Configuration
    size: int
    loss: float
    losses: tuple[float, ...]
    complete: bool
    sqnr: float | None
    drop: float | None
    latency: float | None
    seconds: float


def content_key(parts: Mapping[str, Any]) -> str:
    """The same for the same content, whatever its order."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:KEY_LETTERS]


@dataclass
class History:
    """Trials by content, in memory and in a file.

    Attributes:
        path: the file; made with the first trial. None = in memory only.
        rows: key -> line.
    """

    path: Path | None
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def get(self, key: str) -> dict[str, Any] | None:
        return self.rows.get(key)

    def trial(self, key: str) -> Trial | None:
        """The trial that was measured under this key."""
        row = self.rows.get(key)
        try:
            return None if row is None else _trial(row["trial"])
        except (KeyError, TypeError, ValueError):
            return None

    def put(self, key: str, row: Mapping[str, Any]) -> None:
        """Remember, and have it on the disk before going on.

        Raises:
            OSError: the file cannot be written.
        """
        self.rows[key] = dict(row)
        if self.path is None:
            return
        body = json.dumps({"key": key, **row}, sort_keys=True)
        line = json.dumps({"sum": _sum(body), "row": json.loads(body)}, sort_keys=True)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            end = os.lseek(handle, 0, os.SEEK_END)
            torn = end > 0 and os.pread(handle, 1, end - 1) != b"\n"
            os.write(handle, (b"\n" if torn else b"") + line.encode() + b"\n")
            os.fsync(handle)
        finally:
            os.close(handle)

    def others(self, owner: str, columns: Sequence[str], value: str) -> Others | None:
        """Complete trials of other models with the same features.

        Args:
            owner: digest of this model.
            columns: names of the features.
            value: `loss` (its logarithm), `size` (its logarithm) or `drop`.
        """
        models: dict[str, tuple[list[Any], list[float]]] = {}
        for key in sorted(self.rows):
            row = self.rows[key]
            if "trial" not in row or row.get("columns") != list(columns) or row.get("model") == owner:
                continue
            trial = self.trial(key)
            if trial is None or not trial.complete:
                continue
            figure = figure_of(trial, value)
            if math.isfinite(figure):
                features, values = models.setdefault(str(row["model"]), ([], []))
                features.append(row["features"])
                values.append(figure)
        return Others.of([(np.array(features, np.float64), np.array(values)) for features, values in models.values()])


def figure_of(trial: Trial, objective: str) -> float:
    """What a tuner makes small: logarithms of nats or bytes, points of the metric; infinite where it is not known."""
    if objective == "drop":
        return math.inf if trial.drop is None else 100 * trial.drop
    amount = trial.loss if objective == "loss" else float(trial.size)
    return math.log(max(amount, 1e-12)) if math.isfinite(amount) else math.inf


def open_history(path: Path | None) -> History:
    """The trials of a file; lines that do not hold are left out.

    Raises:
        InputError: the file is none that can be read.
    """
    if path is None or not path.exists():
        return History(path)
    if not path.is_file():
        raise InputError(f"the history {path} is no file; give a folder to --history, or a name that is free")
    rows = {}
    with path.open("rb") as file:
        for line in file:
            row = _checked(line)
            if row is not None:
                rows[str(row.pop("key"))] = row
    return History(path, rows)


def _checked(line: bytes) -> dict[str, Any] | None:
    try:
        stored = json.loads(line)
        row = stored["row"]
        good = isinstance(row, dict) and "key" in row and stored["sum"] == _sum(json.dumps(row, sort_keys=True))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return row if good else None


def _sum(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:SUM_LETTERS]


def trial_row(trial: Trial) -> dict[str, Any]:
    """Plain JSON values; what is not finite is text."""
    row = asdict(trial)
    row["configuration"] = dict(trial.configuration)
    row["loss"] = _number(trial.loss)
    row["losses"] = [_number(float(f"{loss:.6g}")) for loss in trial.losses]
    return row


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else "inf"


def _trial(row: Mapping[str, Any]) -> Trial:
    return Trial(
        dict(row["configuration"]),
        int(row["size"]),
        float(row["loss"]),
        tuple(float(loss) for loss in row["losses"]),
        bool(row["complete"]),
        row["sqnr"],
        row["drop"],
        row["latency"],
        float(row["seconds"]),
    )
