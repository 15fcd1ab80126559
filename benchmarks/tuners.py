"""Tuners on tables of measured recipes: how many trials until the best one is found.

python -m benchmarks.tuners recorded --data ../shared --out results.jsonl     the authors' recorded trials of Quantune
python -m benchmarks.tuners own --tables benchmarks/results --out results.jsonl   our own tables (benchmarks.recipes)

Every tuner is run with many seeds on every network. "Transfer" learns from the complete tables of the other networks;
"cold" from nothing. Random search needs (n + 1) / (k + 1) trials on average to find one of k equally good recipes of n.
"""

from __future__ import annotations

import csv
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from joblib import Parallel, delayed

from benchmarks.contest import say
from benchmarks.harness import Record, append_records, environment
from quantkit.methods import make
from quantkit.tuning.search import Limits, Others, Outcome, State, Tuner, search
from quantkit.tuning.space import Dimension, Point, Space
from quantkit.types import Array

SEEDS = 50
RESAMPLES = 2000
FLOOR = 0.3  # points of accuracy: smaller losses are alike
STRUCTURE = ("nodes", "conv", "bn", "act", "skip", "dwc", "pwc", "size")
RECORDED = Space(
    (
        Dimension("precision", ("8", "mixed")),
        Dimension("profile", ("1", "1000", "10000"), ordered=True),
        Dimension("granularity", ("tensor", "channel")),
        Dimension("clipping", ("max", "KL")),
        Dimension("schema", ("asymmetric", "symmetric", "symmetric_unint", "symmetric_power")),
    )
)


@dataclass(frozen=True)
class Table:
    """All recipes of one network.

    Attributes:
        points: measured ones, of `space`.
        values: [points] what tuners make small.
        structure: [columns] features of the network.
        goal: values of at most this are the best.
    """

    name: str
    space: Space
    points: tuple[Point, ...]
    values: Array
    structure: Array
    goal: float

    def features(self, points: Sequence[Point]) -> Array:
        encoded = self.space.encode(points)
        return np.concatenate([encoded, np.tile(self.structure, (len(points), 1))], axis=1)

    @property
    def expected(self) -> float:
        """Trials of random search."""
        return (len(self.points) + 1) / (int((self.values <= self.goal).sum()) + 1)


@dataclass(frozen=True)
class Strategy:
    """A tuner with settings; `transfer` gives it the other networks' tables."""

    name: str
    tuner: str
    settings: Mapping[str, object]
    transfer: bool = False


STRATEGIES = (
    Strategy("random", "random", {}),
    Strategy("grid", "grid", {}),
    Strategy("genetic", "genetic", {}),
    Strategy("linear and pairs, cold", "additive", {}),
    Strategy("quantune, cold", "quantune", {}),
    Strategy("quantune, transfer", "quantune", {}, transfer=True),
    Strategy("quantune ei, transfer", "quantune", {"acquisition": "ei"}, transfer=True),
)


def recorded(data: Path) -> list[Table]:
    """The authors' tables: log of the points of accuracy lost against float."""
    with (data / "quantune_fp32.csv").open(encoding="utf-8") as file:
        floats = {row["model"]: float(row["accuracy"]) for row in csv.DictReader(file)}
    with (data / "quantune_recorded.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    tables = []
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        points = tuple(RECORDED.point({item.name: row[item.name] for item in RECORDED.dimensions}) for row in own)
        accuracy = np.array([float(row["accuracy"]) for row in own])
        structure = np.array([float(own[0][column]) for column in STRUCTURE])
        tables.append(Table(name, RECORDED, points, logs(floats[name] - accuracy), structure, 0.0))
        # The exact best: what is better than float counts by its accuracy, too.
        best = accuracy == accuracy.max()
        values = tables[-1].values - 1e-6 * best
        tables[-1] = replace(tables[-1], values=values, goal=float(values[best].max()))
    return tables


def logs(points: Array) -> Array:
    return np.log(np.maximum(points, 0.0) + FLOOR)


def trials_to_best(table: Table, others: Sequence[Table], strategy: Strategy, seed: int) -> int:
    known = dict(zip(table.points, table.values, strict=True))
    state = State(
        space=table.space,
        points=(),
        outcomes=(),
        features=table.features,
        allowed=known.__contains__,
        others=Others.of([(other.features(other.points), other.values) for other in others])
        if strategy.transfer
        else None,
        seed=seed,
    )
    tuner: Tuner = make("tuners", strategy.tuner, strategy.settings)
    limits = Limits(trials=len(known), enough=table.goal)
    return len(search(state, tuner, lambda points: [Outcome(known[point]) for point in points], limits).points)


def interval(counts: Array, rng: np.random.Generator) -> tuple[float, float]:
    """95 % of the mean over networks and seeds: [networks, seeds], seeds drawn again."""
    drawn = rng.integers(0, counts.shape[1], size=(RESAMPLES, counts.shape[1]))
    low, high = np.quantile(counts[:, drawn].mean(axis=(0, 2)), [0.025, 0.975])
    return float(low), float(high)


def run(tables: Sequence[Table], strategies: Sequence[Strategy], seeds: int, jobs: int) -> list[dict[str, object]]:
    """One row for each strategy."""
    expected = float(np.mean([table.expected for table in tables]))
    rows = []
    for strategy in strategies:
        tasks = [
            delayed(trials_to_best)(table, [other for other in tables if other is not table], strategy, seed)
            for table in tables
            for seed in range(seeds)
        ]
        counts = np.array(Parallel(n_jobs=jobs)(tasks), np.float64).reshape(len(tables), seeds)
        low, high = interval(counts, np.random.default_rng(0))
        rows.append(
            {
                "strategy": strategy.name,
                "trials": {table.name: float(mean) for table, mean in zip(tables, counts.mean(axis=1), strict=True)},
                "mean": float(counts.mean()),
                "low": low,
                "high": high,
                "ratio": float(counts.mean()) / expected,
                "random": expected,
                "seeds": seeds,
            }
        )
        each = " ".join(f"{mean:.1f}" for mean in counts.mean(axis=1))
        share = counts.mean() / expected
        say(f"{strategy.name:26} {counts.mean():6.2f} trials [{low:.2f}, {high:.2f}], {share:.3f} x random: {each}")
    return rows


def own(folder: Path, measure: str, close: float) -> list[Table]:
    """Our tables `recipes-NETWORK.jsonl`: one line for each recipe, the first one says what the network is."""
    tables = []
    for path in sorted(folder.glob("recipes-*.jsonl")):
        head, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        space = Space(
            tuple(Dimension(item["name"], tuple(item["values"]), item["ordered"]) for item in head["dimensions"])
        )
        points = tuple(space.point(row["recipe"]) for row in rows)
        if measure == "loss":
            values = np.log([row["loss"] for row in rows])
            goal = float(values.min())
        else:
            lost = 100 * (head["float_top1"] - np.array([row["top1"] for row in rows]))
            values = np.arcsinh(lost / FLOOR)  # a logarithm of what is lost, a line where a recipe is better than float
            goal = float(values[lost <= lost.min() + close].max())
        tables.append(Table(head["network"], space, points, values, np.array(head["structure"], np.float64), goal))
    return tables


def main() -> None:
    made = ArgumentParser(description="trials that tuners need")
    made.add_argument("tables", choices=("recorded", "own"))
    made.add_argument("--data", type=Path, default=Path("../shared"), help="folder with data/")
    made.add_argument("--tables", dest="folder", type=Path, default=Path("benchmarks/results"))
    made.add_argument("--measure", choices=("top1", "loss"), default="top1", help="what tuners see, of our tables")
    made.add_argument("--close", type=float, default=0.1, help="points of accuracy from the best that are good enough")
    made.add_argument("--seeds", type=int, default=SEEDS)
    made.add_argument("--jobs", type=int, default=2)
    made.add_argument("--only", action="append", help="strategies whose name contains this")
    made.add_argument("--out", type=Path, default=Path("results.jsonl"))
    args = made.parse_args()
    tables = recorded(args.data / "data") if args.tables == "recorded" else own(args.folder, args.measure, args.close)
    chosen = [item for item in STRATEGIES if any(text in item.name for text in args.only or [""])]
    rows = run(tables, chosen, args.seeds, args.jobs)
    append_records(args.out, [_record(args, row) for row in rows])


def _record(args: Namespace, row: Mapping[str, object]) -> Record:
    name = f"{args.tables}{', ' + args.measure if args.tables == 'own' else ''}: {row['strategy']}"
    return Record("tuners", "tables", "quantkit", name, environment(1), details=dict(row))


if __name__ == "__main__":
    main()
