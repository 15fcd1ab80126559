"""The front of choices between the smallest file and the least loss, as plans to edit and apply."""

from __future__ import annotations

import json
from pathlib import Path

from quantkit.allocators._table import Point
from quantkit.errors import InputError
from quantkit.files import write_text
from quantkit.methods import find
from quantkit.plan import plan_to_json
from quantkit.result import Result
from quantkit.types import LayerPlan, Plan

INDEX = "front.json"
WITHOUT = ("slim", "uniform")
"""Allocators that compare no choices between smallest and best."""


def check_front(allocator: str, *, has_data: bool, has_plan: bool) -> None:
    """Before any work: whether a run can make a front at all.

    Raises:
        InputError: it cannot.
    """
    makers = [name for name in find("allocators") if name not in WITHOUT]
    if has_plan:
        raise InputError("--pareto writes what a search compares, and --plan leaves nothing to search; leave one out")
    if allocator not in makers:
        raise InputError(f"--pareto: the allocator {allocator} makes no front; choose from {', '.join(makers)}")
    if allocator == "auto" and not has_data:
        raise InputError(
            "--pareto: the allocator auto compares choices on data only; give --calib or --random-calibration, or "
            "--allocator salience, which needs none"
        )


def point_plan(result: Result, point: Point) -> Plan:
    """The point as a plan for `apply`: its widths; forms and activation ranges are chosen when it is applied."""
    layers = {name: LayerPlan(spec, None, "") for name, spec in point.specs.items()}
    others = {name: layer for name, layer in result.plan.layers.items() if name not in layers}
    return Plan({**layers, **others}, {}, dict(result.plan.settings))


def save_front(result: Result, folder: Path) -> None:
    """Write plan-01.json (the smallest), plan-02.json ... and an index with estimated sizes and predicted losses.

    Raises:
        InputError: the allocator made no front.
        OSError: the folder cannot be written.
    """
    points = result.allocation.front
    if not points and result.allocation.scores:
        raise InputError("there is no front to write: no choice of widths is within the budget")
    if not points:
        raise InputError(
            "there is no front to write: the allocator compared no choices; ask for them with front=True, data, and an "
            f"allocator other than {' and '.join(WITHOUT)}"
        )
    by = points[0].estimator or next(iter(result.allocation.scores), "")
    folder.mkdir(exist_ok=True)
    rows = []
    for number, point in enumerate(points, 1):
        name = f"plan-{number:02d}.json"
        write_text(folder / name, plan_to_json(point_plan(result, point)))
        figures = {"estimated_size": point.size, "average_bits": point.average_bits, "loss": point.loss}
        rows.append({"plan": name, **figures, "time": point.time})
    head = {"model": result.report.model, "estimator": by, "quantity": points[0].quantity, "nats": points[0].nats}
    write_text(folder / INDEX, json.dumps({**head, "points": rows}, indent=2) + "\n")
