"""Who allocates bits best: accuracy against average bits, and how well each estimator predicts random assignments.

python -m benchmarks.allocation --data ../shared --model resnet20 --out allocation.jsonl
python -m benchmarks.allocation --data ../shared --model minilm --minilm minilm.onnx --tokenizer FOLDER --out ...
python -m benchmarks.allocation --model resnet20 --estimators 3 --out estimators.jsonl

All allocators share one calibration, one set of quantized weights and one way of emitting, so that only the widths
differ. Losses are nats per sample on test data that no allocator saw. At whole bits everybody also has to stay within
the bytes of the uniform file; `slim`, asked once, goes by its estimate of them, and may be larger by a few nodes.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np

from benchmarks.contest import say
from benchmarks.data import (
    TEST_SENTENCES,
    cifar10_calibration,
    cifar10_test,
    imagenet_calibration,
    imagenet_test,
    sentence_feeds,
    sentences,
    write_calibration_text,
)
from benchmarks.harness import Environment, Record, append_records, environment, read_records
from quantkit import metrics
from quantkit.allocators._judge import assignments, judge
from quantkit.allocators._table import Estimator, joined, losses, scored, units_of, weights_of
from quantkit.allocators.auto import both_ends_wide
from quantkit.budget import Budget
from quantkit.calibration.request import CalibrationRequest
from quantkit.candidate import Candidate, Context, Recipe
from quantkit.divergence import Divergence
from quantkit.methods import make
from quantkit.options import make_options
from quantkit.pipeline import prepare
from quantkit.problem import Ledger, make_problem
from quantkit.report.plots import plot_curves
from quantkit.report.progress import SilentProgress
from quantkit.runtime.ort import make_session
from quantkit.runtime.probe import Probe
from quantkit.types import AllocationProblem, Allocator, Array, Feed, QuantSpec
from quantkit.verify import run_all

BITS = (2.5, 3.0, 3.5, 4.0, 5.0, 6.0)
RECIPE = "recipe"
"""First and last layer at 8 bits, all others as wide as still fits."""
ALLOCATORS = (
    *("uniform", RECIPE, "measured", "interlayer", "quadratic", "hawq", "fisher", "salience", "linearity", "slim"),
    "auto",
)
ESTIMATORS = ("measured", "quadratic", "hawq", "fisher", "salience", "linearity")
TRIES = 60
TRUTH_SAMPLES = 256
BATCH = 50


@dataclass(frozen=True)
class Study:
    """One network.

    Attributes:
        calibration: what quantizers and allocators see.
        feeds: test data.
        labels: classes of the test samples, None for embeddings.
        options: of the run.
    """

    name: str
    model: Path
    calibration: CalibrationRequest
    feeds: Sequence[Feed]
    labels: Array | None
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def reference(self) -> dict[str, Array]:
        """The float model's outputs on the test data."""
        return run_all(make_session(self.model, threads=2), self.feeds)

    def judge(self, candidate: Candidate) -> dict[str, float]:
        """Loss in nats, and what users look at, with its standard error."""
        outputs = run_all(make_session(candidate.emitted.model, threads=2), self.feeds)
        return figures(self.reference, outputs, self.labels)


def figures(reference: Mapping[str, Array], outputs: Mapping[str, Array], labels: Array | None) -> dict[str, float]:
    """Of one model on the test data."""
    found = {"nats": Divergence.of([reference]).mean([reference], [outputs])}
    (wanted,), (got,) = reference.values(), outputs.values()
    if labels is None:
        first, second = (item.reshape(len(item), -1).astype(np.float64) for item in (wanted, got))
        cosines = (first * second).sum(1) / (np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1))
        return {**found, "cosine": float(cosines.mean()), "cosine s.e.": float(cosines.std() / math.sqrt(len(cosines)))}
    top1 = metrics.top1(got, labels)
    return {
        **found,
        "top-1": top1,
        "top-1 s.e.": math.sqrt(top1 * (1 - top1) / len(labels)),
        "agreement": float(metrics.top1_agreement(wanted, got) or 0.0),
    }


def batches(name: str, images: Array) -> list[Feed]:
    return [{name: images[first : first + BATCH]} for first in range(0, len(images), BATCH)]


def study_of(args: Namespace, folder: Path) -> Study:
    """The network that --model names."""
    plain: dict[str, Any] = {"activations": "none"} if args.activations == "none" else {}
    plain |= {"cache": args.cache} if args.cache else {}
    plain |= {"quantizer": args.quantizer} if args.quantizer != "auto" else {}
    if args.model == "resnet20":
        test = cifar10_test(args.data)
        request = CalibrationRequest(cifar10_calibration(args.data), preprocess="cifar10")
        model = args.data / "models/resnet20_cifar10.onnx"
        return Study(args.model, model, request, batches("image", test.images), test.labels, plain)
    if args.model == "squeezenet":
        test = imagenet_test(args.data)
        request = CalibrationRequest(imagenet_calibration(args.data), preprocess="caffe")
        model = args.data / "models/squeezenet11_imagenet.onnx"
        return Study(args.model, model, request, batches("data_0", test.images), test.labels, plain)
    if args.minilm is None or args.tokenizer is None:
        raise SystemExit("the study of minilm needs --minilm FILE and --tokenizer FOLDER")
    request = CalibrationRequest(str(write_calibration_text(args.data, folder)), tokenizer=str(args.tokenizer))
    feeds = sentence_feeds(sentences(args.data, "test", TEST_SENTENCES), args.tokenizer)
    return Study(args.model, args.minilm, request, feeds, None, plain)


def context_of(study: Study, names: Sequence[str]) -> Context:
    """Calibrated for all of these allocators at once."""
    options = make_options({**study.options, "inputs": "float", "threads": 1})
    made = [make("allocators", name, {}) for name in names if name != RECIPE]
    wanted = frozenset[str]().union(*(method.stats for method in made))
    run = prepare(study.model, study.calibration, None, options, wanted, SilentProgress())
    return run.context(run.original)


def compare_allocators(
    study: Study, ledger: Ledger, names: Sequence[str], bits: Sequence[float], where: Environment
) -> Iterator[Record]:
    """Every allocator at every average."""
    context = ledger.context
    recipe = Recipe("mse" if context.histograms else "minmax")
    kind = kind_of(context.options.activations, context.options.quantizer)
    for average in bits:
        limit, fixed = None, 0
        for name in ("uniform", *(name for name in names if name != "uniform")):
            budget = Budget(avg_bits=average, max_size=limit)
            found = allocated(name, make_problem(ledger, budget, recipe, fixed))
            if found is None:
                say(f"{study.name}: no {name} within {average:g} bits")
                continue
            candidate = ledger.build(dict(found), recipe, name)
            if name == "uniform":
                layers = sum(
                    make_problem(ledger, budget, recipe, 0).size(context.targets[key], spec)
                    for key, spec in candidate.asked.items()
                )
                fixed, limit = max(candidate.size - layers, 0), candidate.size if average.is_integer() else None
            details = {"average_bits": _average(context, dict(found)), "asked": average, "allocator": name}
            predicted = getattr(found, "predicted", None)
            details |= {} if predicted is None else {"predicted": predicted}
            details |= {"notes": list(getattr(found, "notes", ()))}
            record = Record(
                f"allocation-{study.name}",
                study.model.name,
                "quantkit",
                f"{average:g} bits, {kind}, {name}",
                where,
                size_bytes=candidate.size,
                accuracy=study.judge(candidate),
                details=details,
            )
            shown = ", ".join(f"{key} {value:.4f}" for key, value in record.accuracy.items())
            say(f"{study.name} {record.setting}: {record.size_bytes} B, {shown}")
            yield record


def allocated(name: str, problem: AllocationProblem) -> Mapping[str, QuantSpec] | None:
    """Target name -> spec; None where the recipe does not fit."""
    if name == RECIPE:
        return both_ends_wide(problem, units_of(problem))
    return cast(Allocator, make("allocators", name, {})).allocate(problem)


def _average(context: Context, specs: Mapping[str, QuantSpec]) -> float:
    shapes = {name: context.targets[name].shape for name in specs}
    bits = sum(spec.average_bits(shapes[name][1]) * math.prod(shapes[name]) for name, spec in specs.items())
    return bits / sum(math.prod(shape) for shape in shapes.values())


def compare_estimators(
    study: Study, ledger: Ledger, names: Sequence[str], average: float, where: Environment
) -> list[Record]:
    """Rank correlation and predicted/true on random assignments; random and inverted figures as controls."""
    context = ledger.context
    problem = make_problem(ledger, Budget(avg_bits=average), Recipe("minmax"), 0)
    units = units_of(problem)
    raw = {name: scored(problem, units, name, cast(Estimator, make("allocators", name, {}))) for name in names}
    choices = assignments(problem, units, TRIES)
    samples = sum(len(next(iter(feed.values()))) for feed in study.feeds[:1])
    probe = Probe(context.loaded.model, context.targets, study.feeds[: max(TRUTH_SAMPLES // samples, 1)], threads=2)
    truth = np.array([probe.loss(weights_of(problem, joined(units, choice))) for choice in choices])
    rng = np.random.Generator(np.random.PCG64(0))
    tables = {
        name: {unit.name: tuple(row) for unit, row in zip(units, losses(units, found.raw), strict=True)}
        for name, found in raw.items()
    }
    first = tables[names[0]]
    tables["control: random"] = {
        unit: tuple(np.sort(rng.exponential(size=len(row)))[::-1]) for unit, row in first.items()
    }
    # Units that lose much are said to lose little, and the other way round; widths keep their order.
    tables["control: inverted"] = {unit: tuple(value / max(row) ** 2 for value in row) for unit, row in first.items()}
    records = []
    for name, table in tables.items():
        verdict = judge(units, table, choices, truth)
        accuracy = {"rank correlation": verdict.rank, "leave-one-out error": math.expm1(verdict.error)}
        if name in raw and raw[name].nats:
            accuracy["predicted/true"] = verdict.ratio
        details = {"assignments": len(choices), "average_bits": average, "median_nats": float(np.median(truth))}
        records.append(
            Record(
                f"estimators-{study.name}",
                study.model.name,
                "quantkit",
                f"{average:g} bits, {name}",
                where,
                accuracy=accuracy,
                details=details,
            )
        )
        say(f"{study.name} {name}: " + ", ".join(f"{key} {value:.3f}" for key, value in accuracy.items()))
    return records


def kind_of(activations: str, quantizer: str) -> str:
    kind = "weights only" if activations == "none" else "default activations"
    return kind if quantizer == "auto" else f"{kind} by {quantizer}"


def measured_before(args: Namespace) -> list[Record]:
    """The newest row of each setting in --drawn."""
    kind = kind_of(args.activations, args.quantizer)
    wanted = [
        record
        for record in read_records(args.drawn)
        if record.benchmark == f"allocation-{args.model}" and record.setting.split(", ")[1] == kind
    ]
    return list({record.setting: record for record in wanted}.values())


def plot(records: Sequence[Record], path: Path) -> None:
    """Nats against average bits, one curve for each allocator."""
    names = {str(record.details["allocator"]) for record in records}
    curves: dict[str, list[tuple[float, float]]] = {name: [] for name in ALLOCATORS if name in names}
    for record in records:
        name = str(record.details["allocator"])
        curves.setdefault(name, []).append((record.details["average_bits"], record.accuracy["nats"]))
    title = f"{records[0].benchmark}: {records[0].setting.split(', ')[1]}"
    plot_curves(curves, x="average bits", y="nats per test sample", title=title, path=path)


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared"), help="folder with models/ and data/")
    parser.add_argument("--model", choices=("resnet20", "squeezenet", "minilm"), required=True)
    parser.add_argument("--minilm", type=Path, help="the exported sentence encoder")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json, or the folder that holds it")
    parser.add_argument("--activations", choices=("auto", "none"), default="none")
    parser.add_argument("--quantizer", default="auto", help="who rounds (default: auto)")
    parser.add_argument("--out", type=Path, default=Path("results.jsonl"), help="file to append results to")
    parser.add_argument("--bits", default=",".join(map(str, BITS)), help="averages to compare allocators at")
    parser.add_argument("--allocators", default=",".join(ALLOCATORS), help="names, or nothing (default: %(default)s)")
    parser.add_argument("--estimators", default="", help="averages to judge the estimators at first (default: none)")
    parser.add_argument("--cache", type=Path, help="folder for quantized layers, which the next run finds again")
    parser.add_argument("--plot", type=Path, help="picture of the curves")
    parser.add_argument("--drawn", type=Path, help="results to draw with --plot, instead of measuring")
    args = parser.parse_args()
    if args.drawn is not None:
        plot(measured_before(args), args.plot)
        return
    where = environment(1)
    names = tuple(name for name in args.allocators.split(",") if name)
    judged, bits = ([float(item) for item in text.split(",") if item] for text in (args.estimators, args.bits))
    with TemporaryDirectory(prefix="quantkit-benchmark-") as folder:
        study = study_of(args, Path(folder))
        ledger = Ledger(context_of(study, (*names, *(ESTIMATORS if judged else ()))))
        for average in judged:
            append_records(args.out, compare_estimators(study, ledger, ESTIMATORS, average, where))
        records = []
        for record in compare_allocators(study, ledger, names, bits, where) if names else ():
            records.append(record)
            append_records(args.out, [record])  # what a run that is stopped has found stays
    if args.plot is not None and records:
        plot(records, args.plot)


if __name__ == "__main__":
    main()
