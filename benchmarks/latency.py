"""Latency budgets: what is predicted before a model is emitted, against what is measured of it.

python -m benchmarks.latency --data ../shared --minilm minilm.onnx --tokenizer FOLDER --out latency.jsonl

Every budget is asked of the allocation. The forms and widths that it ends with are predicted from their layers' times
alone, and corrected by what one other model, 8 bits in the default forms, has shown (`predicted`: what the allocation
goes by). All emitted models of one network are then timed alternately with the float one. Layers are measured anew
unless --cache names a folder that was used before.
"""

from __future__ import annotations

import os
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.allocation import Study, study_of
from benchmarks.contest import say
from benchmarks.harness import Environment, Record, append_records, environment, time_against_float
from quantkit.allocation import allocate
from quantkit.allocators._table import impossible
from quantkit.budget import Budget
from quantkit.candidate import Candidate, Context, Recipe
from quantkit.costs.latency import STATIC_FORM, predicted_ms
from quantkit.feeds import typical_feed
from quantkit.graph.emit import save
from quantkit.methods import make
from quantkit.options import make_options
from quantkit.pipeline import prepare
from quantkit.problem import Ledger, make_problem
from quantkit.report.progress import SilentProgress

MODELS = ("resnet20", "squeezenet", "minilm")
BUDGETS = (0.9, 0.7, 0.5, 0.4)
SIZES = (None, Fraction(18, 100))
# Cheap ones: who fills the table and who rounds makes no difference to times.
METHODS = {"allocator": "salience", "quantizer": "rtn", "calibrator": "minmax", "inputs": "float"}
TARGET = 0.15
"""Median relative error that predictions are meant to stay within."""


@dataclass(frozen=True)
class Case:
    """A budget and what came of it.

    Attributes:
        alone, predicted: time relative to float, by layers alone, and corrected.
        notes: on what cannot be met.
    """

    budget: Budget
    candidate: Candidate
    alone: float
    predicted: float
    notes: tuple[str, ...]

    @property
    def setting(self) -> str:
        size = "" if self.budget.max_size is None else f", {float(self.budget.max_size):.0%} of the size"
        return f"at most {self.budget.max_latency:g}x{size}"


def context_of(study: Study, cache: Path) -> Context:
    """Calibrated, with its own measurements of layers."""
    options = make_options({**METHODS, "threads": 1, "cache": cache})
    statistics = make("allocators", METHODS["allocator"], {}).stats
    run = prepare(study.model, study.calibration, None, options, statistics, SilentProgress())
    return run.context(run.original)


def cases_of(context: Context, budgets: Sequence[Budget]) -> list[Case]:
    """Each budget allocated on its own; every run sees one measured model before it predicts, and so do predictions."""
    model_ms = context.model_ms
    assert model_ms is not None
    cases = []
    for budget in budgets:
        fresh = replace(context)  # nothing measured of whole models, but for figures on disk
        outcome = allocate(fresh, budget, SilentProgress())
        alone, predicted = predictions(fresh, outcome.candidate, model_ms)
        problem = make_problem(Ledger(fresh), budget, Recipe("minmax"), 0)
        cases.append(Case(budget, outcome.candidate, alone, predicted, impossible(problem)))
    return cases


def predictions(context: Context, candidate: Candidate, model_ms: float) -> tuple[float, float]:
    """Time relative to float, by layers alone, and corrected unless the correction is from this very model."""
    chosen, times = candidate.chosen, context.times
    alone = predicted_ms(model_ms, times.costs(chosen)) / model_ms
    static = frozenset(name for name, option in chosen.items() if option.form == STATIC_FORM)
    if static not in times.measured or times.measured[static][0] is chosen:
        return alone, alone
    return alone, times.predicted_ms(model_ms, chosen) / model_ms


def records_of(
    study: Study, context: Context, cases: Sequence[Case], seconds: float, where: Environment
) -> list[Record]:
    """All models timed in turn with the float one."""
    assert context.held_out is not None
    feed = typical_feed(context.held_out.feeds)
    shape = " ".join("x".join(map(str, value.shape)) for value in feed.values())
    records = []
    with TemporaryDirectory(prefix="quantkit-benchmark-") as folder:
        paths: dict[str, Path] = {}  # budgets may end with one and the same model
        for case in cases:
            if case.candidate.content not in paths:
                paths[case.candidate.content] = Path(folder) / f"{len(paths)}.onnx"
                save(case.candidate.emitted.model, paths[case.candidate.content])
        before = os.getloadavg()[0]
        speeds = time_against_float(study.model, list(paths.values()), {shape: feed}, seconds=seconds)
        load = {"load before": before, "load after": os.getloadavg()[0]}
    for case in cases:
        speed = speeds[list(paths).index(case.candidate.content)]
        measured = 1 / speed[0].median
        records.append(
            Record(
                f"latency-{study.name}",
                study.model.name,
                "quantkit",
                case.setting,
                where,
                size_bytes=case.candidate.size,
                accuracy=errors_of(case, measured),
                speed=speed,
                details={**case.budget.to_dict(), **forms_of(case.candidate), **load, "notes": list(case.notes)},
            )
        )
    return records


def errors_of(case: Case, measured: float) -> dict[str, float]:
    """Times relative to float, and how far predictions are off, as shares of what was measured."""
    return {
        "predicted": case.predicted,
        "measured": measured,
        "error": abs(case.predicted / measured - 1),
        "error of layers alone": abs(case.alone / measured - 1),
        "budget kept": float(measured <= (case.budget.max_latency or np.inf)),
    }


def forms_of(candidate: Candidate) -> dict[str, Any]:
    """Form -> layers, and the average width."""
    forms: dict[str, int] = {}
    for option in candidate.chosen.values():
        forms[option.form] = forms.get(option.form, 0) + 1
    bits = [option.spec.bits for option in candidate.chosen.values()]
    return {"forms": dict(sorted(forms.items())), "mean bits of layers": float(np.mean(bits))}


def wait_until_quiet(most: float, patience: float) -> None:
    """Until the load of the last minute is below `most`, but no longer than `patience` seconds."""
    start = time.monotonic()
    while os.getloadavg()[0] >= most and time.monotonic() - start < patience:
        time.sleep(5)


def summary(records: Sequence[Record]) -> str:
    errors = [record.accuracy["error"] for record in records]
    alone = [record.accuracy["error of layers alone"] for record in records]
    kept = sum(record.accuracy["budget kept"] for record in records)
    return (
        f"{records[0].benchmark}: median error {np.median(errors):.1%}, worst {max(errors):.1%} "
        f"(layers alone {np.median(alone):.1%}), {kept:.0f} of {len(records)} budgets kept"
    )


def budgets_of(args: Namespace) -> list[Budget]:
    factors = [float(item) for item in args.budgets.split(",")]
    return [Budget(max_latency=factor, max_size=size) for size in SIZES for factor in factors]


def measure(study: Study, args: Namespace, cache: Path, where: Environment) -> list[Record]:
    context = context_of(study, cache)
    wait_until_quiet(args.load, args.patience)
    cases = cases_of(context, budgets_of(args))
    wait_until_quiet(args.load, args.patience)
    return records_of(study, context, cases, args.seconds, where)


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared"), help="folder with models/ and data/")
    parser.add_argument("--models", default=",".join(MODELS), help="networks, separated by commas")
    parser.add_argument("--minilm", type=Path, help="the exported sentence encoder")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json, or the folder that holds it")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)), help="times relative to float")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing for each network")
    parser.add_argument("--load", type=float, default=1.5, help="wait for a load below this")
    parser.add_argument("--patience", type=float, default=120.0, help="most seconds to wait, twice for each network")
    parser.add_argument("--cache", type=Path, help="folder of layers' times, to use them again")
    parser.add_argument("--out", type=Path, default=Path("results.jsonl"), help="file to append results to")
    args = parser.parse_args()
    where = environment(1)
    with TemporaryDirectory(prefix="quantkit-benchmark-") as folder:
        for name in args.models.split(","):
            settings: Mapping[str, Any] = {**vars(args), "model": name, "activations": "auto", "quantizer": "auto"}
            study = study_of(Namespace(**settings), Path(folder))
            records = measure(study, args, args.cache or Path(folder), where)
            append_records(args.out, records)
            for record in records:
                shown = ", ".join(f"{key} {value:.3f}" for key, value in record.accuracy.items())
                say(f"{study.name} {record.setting}: {record.size_bytes} B, {shown}, {record.details['forms']}")
            say(summary(records))


if __name__ == "__main__":
    main()
