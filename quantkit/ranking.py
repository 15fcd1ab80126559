"""Which layer hurts: what every unit would lose at every width, by one or several estimators side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import onnx
import onnx_ir as ir

from quantkit.allocators._findings import UNJUDGED
from quantkit.allocators._judge import Verdict, assignments, judge, true_losses
from quantkit.allocators._table import Estimator, Scores, Unit, losses, scored, units_of
from quantkit.budget import Budget
from quantkit.candidate import Recipe
from quantkit.errors import InputError
from quantkit.methods import find, make
from quantkit.network import network_of
from quantkit.options import make_options
from quantkit.pipeline import prepare
from quantkit.problem import Ledger, make_problem
from quantkit.report.progress import Progress, SilentProgress
from quantkit.types import Allocator


@dataclass(frozen=True)
class UnitRow:
    """Layers that are decided together.

    Attributes:
        layers: names.
        op: operator of the first.
        weights: number of them.
        bits: width of each option, narrow to wide.
        losses: estimator -> loss of each option; in nats per sample where `nats` of the estimator says so.
    """

    layers: tuple[str, ...]
    op: str
    weights: int
    bits: tuple[int, ...]
    losses: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class EstimatorRow:
    """One estimator.

    Attributes:
        quantity: what its figures are.
        nats: whether they are nats per sample.
        rank, error, ratio: how well it predicted random assignments on held-out samples: rank correlation, typical
            factor minus 1, median of predicted over true (None for figures that are not nats). All None where none was
            tried, or too few that differ.
    """

    name: str
    quantity: str
    nats: bool
    rank: float | None
    error: float | None
    ratio: float | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Sensitivity:
    """The table behind `quantkit sensitivity`; rows in graph order."""

    model: str
    samples: int
    rows: tuple[UnitRow, ...]
    estimators: tuple[EstimatorRow, ...]

    def ranking(self, estimator: str, bits: int) -> list[UnitRow]:
        """The rows by what they lose at this width (or their next wider one), worst first."""
        return sorted(self.rows, key=lambda row: -loss_at(row, estimator, bits))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def loss_at(row: UnitRow, estimator: str, bits: int) -> float:
    """The loss at a width, or at the next wider one that the unit has, else at its widest."""
    places = [place for place, width in enumerate(row.bits) if width >= bits]
    return row.losses[estimator][places[0] if places else -1]


def estimator_names() -> list[str]:
    """Allocators that fill a table."""
    return [name for name in find("allocators") if hasattr(make("allocators", name, {}), "scores")]


def sensitivity(
    model: str | Path | onnx.ModelProto | ir.Model,
    *,
    calibration: object = None,
    estimators: Sequence[str] = ("measured",),
    tries: int = 0,
    progress: Progress | None = None,
    **settings: Any,
) -> Sensitivity:
    """What every layer would lose at every width.

    Args:
        model: file, protobuf or graph; never changed.
        calibration: anything that `compress` takes.
        estimators: names of allocators that fill a table, the one to rank by first.
        tries: random assignments on which the estimators are judged (0 = not).
        progress: where long steps are shown.
        **settings: fields of `quantkit.options.Options`.

    Raises:
        InputError: anything wrong with model, data or settings; an allocator that fills no table.
    """
    options = make_options(settings)
    made = {name: _estimator(name, options.settings) for name in dict.fromkeys(estimators)}
    if not made:
        raise InputError(f"sensitivity needs at least one estimator, such as {', '.join(estimator_names())}")
    if tries and tries < 3:
        raise InputError(f"tries must be 0 or at least 3, got {tries}")
    wanted = frozenset[str]().union(*(method.stats for method in made.values()))
    run = prepare(model, calibration, None, options, wanted, progress or SilentProgress())
    context = run.context(run.original)
    network = network_of(context.network, context.stats, "sensitivity")
    problem = make_problem(Ledger(context), Budget(), Recipe("minmax"), 0)
    units = units_of(problem)
    scores = {name: scored(problem, units, name, cast(Estimator, method)) for name, method in made.items()}
    verdicts: dict[str, Verdict] = {}
    if tries:
        choices = assignments(problem, units, tries)
        truth = true_losses(problem, units, choices)
        verdicts = {name: judge(units, found.raw, choices, truth) for name, found in scores.items()}
    tables = {name: losses(units, found.raw) for name, found in scores.items()}
    rows = tuple(_row(problem.targets, unit, index, tables) for index, unit in enumerate(units))
    samples = sum(len(next(iter(feed.values()))) for feed in network.calibration.feeds)
    summary = tuple(_summary(name, found, verdicts.get(name)) for name, found in scores.items())
    return Sensitivity(run.name, samples, rows, summary)


def _estimator(name: str, settings: Mapping[str, Any]) -> Allocator:
    own = {key.partition(".")[2]: value for key, value in settings.items() if key.startswith(f"{name}.")}
    method: Allocator = make("allocators", name, own)
    if not hasattr(method, "scores"):
        raise InputError(f"{name} fills no table of sensitivities; choose from {', '.join(estimator_names())}")
    return method


def _row(targets: Mapping[str, Any], unit: Unit, index: int, tables: Mapping[str, list[list[float]]]) -> UnitRow:
    return UnitRow(
        unit.members,
        targets[unit.members[0]].op,
        sum(math.prod(targets[name].shape) for name in unit.members),
        tuple(unit.bits(option) for option in range(len(unit.options))),
        {name: tuple(table[index]) for name, table in tables.items()},
    )


def _summary(name: str, found: Scores, verdict: Verdict | None) -> EstimatorRow:
    if verdict is None or not verdict.judged:
        notes = found.notes if verdict is None else (*found.notes, f"{UNJUDGED}: give other --bits or more --tries")
        return EstimatorRow(name, found.quantity, found.nats, None, None, None, notes)
    ratio = verdict.ratio if found.nats else None
    return EstimatorRow(name, found.quantity, found.nats, verdict.rank, math.expm1(verdict.error), ratio, found.notes)
