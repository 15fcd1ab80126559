"""The front of choices between the smallest file and the least loss, as plans to edit and apply."""

from __future__ import annotations

import json
from pathlib import Path

from quantkit.allocators._table import Point
from quantkit.errors import InputError
from quantkit.files import write_text
from quantkit.plan import plan_to_json
from quantkit.result import Result
from quantkit.types import LayerPlan, Plan

INDEX = "front.json"


def point_plan(result: Result, point: Point) -> Plan:
    """The point as a plan for `apply`: its widths; forms and activation ranges are chosen when it is applied."""
    layers = {name: LayerPlan(spec, None, "") for name, spec in point.specs.items()}
    others = {name: layer for name, layer in result.plan.layers.items() if name not in layers}
    return Plan({**layers, **others}, {}, dict(result.plan.settings))


def save_front(result: Result, folder: Path) -> None:
    """Write plan-01.json (the smallest), plan-02.json ... and an index with sizes and predicted losses.

    Raises:
        InputError: the allocator made no front.
        OSError: the folder cannot be written.
    """
    points = result.allocation.front
    if not points:
        raise InputError(
            "there is no front to write: the allocator compared no widths; give --calib, a budget such as --avg-bits 4 "
            "that 8 bits exceed, and an allocator other than uniform"
        )
    folder.mkdir(exist_ok=True)
    rows = []
    for number, point in enumerate(points, 1):
        name = f"plan-{number:02d}.json"
        write_text(folder / name, plan_to_json(point_plan(result, point)))
        rows.append({"plan": name, "size": point.size, "average_bits": point.average_bits, "loss": point.loss})
    write_text(folder / INDEX, json.dumps({"model": result.report.model, "points": rows}, indent=2) + "\n")
