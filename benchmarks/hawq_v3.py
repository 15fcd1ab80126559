"""The solver against the bit widths that HAWQ-V3's authors published (arXiv 2011.10680), from their own tables.

    python -m benchmarks.hawq_v3 --data ../shared --out results.jsonl

Their traces, rounding errors, sizes, bit operations and latencies of ResNet-18 and ResNet-50 make 18 problems: minimise
sum of trace * |dW|^2 over 4 and 8 bits, within one of three costs. 17 of their answers are optimal and must come out
exactly; the 18th is not, and must be beaten. Exits with 1 when that does not hold.
"""

from __future__ import annotations

import json
import math
import sys
import time
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contest import say
from benchmarks.harness import Environment, Record, append_records, environment
from quantkit.allocators._ilp import Limit, Solution, solve_choice

WIDTHS = (4, 8)
# Network, cost, share -> layers with 4 bits, counted from the second of the network: the first and the last are not
# part of the problem.
PUBLISHED: Mapping[tuple[str, str, float], tuple[int, ...]] = {
    ("resnet18", "size", 0.25): (14, 15, 16, 17, 18),
    ("resnet18", "size", 0.5): (15, 17, 18),
    ("resnet18", "size", 0.75): (13, 18),
    ("resnet18", "bops", 0.25): (3, 5, *range(7, 19)),
    ("resnet18", "bops", 0.5): (3, 8, *range(12, 19)),
    ("resnet18", "bops", 0.75): (8, 13, 15, 18),
    ("resnet18", "latency", 0.25): (3, 5, *range(7, 19)),
    ("resnet18", "latency", 0.5): (5, 8, 12, 13, 15, 17, 18),
    ("resnet18", "latency", 0.75): (8, 13, 15, 18),
    ("resnet50", "size", 0.25): (24, 28, 29, 31, 32, 34, 35, *range(37, 44), *range(45, 49), 50, 51),
    ("resnet50", "size", 0.5): (24, 31, 32, 37, 40, 43, 47, 48, 50, 51),
    ("resnet50", "size", 0.75): (43, 47, 50),
    ("resnet50", "bops", 0.25): (
        *(1, 4, 5, 8, 9, 11, 14, 15, 16, 17, 18, 19, 21, 22, 24),
        *range(27, 42),
        *(43, 47, 48, 50, 51),
    ),
    ("resnet50", "bops", 0.5): (8, 11, 15, 18, 19, 21, 24, 28, 29, 31, 32, 34, 35, 37, 38, 40, 43, 47, 50),
    ("resnet50", "bops", 0.75): (8, 21, 24, 31, 32, 34, 37, 40, 43),
    ("resnet50", "latency", 0.25): (
        *(5, 8, 9, 11, 14, 15, 16, 17, 18, 19, 21, 22, 23, 24, 26),
        *range(27, 39),
        *(40, 41, 43, 47, 48, 50, 51),
    ),
    ("resnet50", "latency", 0.5): (8, 9, 11, 18, 21, 24, 27, 28, 29, 31, 32, 34, 35, 37, 38, 40, 41, 43, 47, 50),
    ("resnet50", "latency", 0.75): (8, 11, 21, 24, 31, 37, 40, 43),
}
BEATEN = ("resnet50", "size", 0.25)


@dataclass(frozen=True)
class Problem:
    """One network and one cost; layers that read the same input share a width.

    Attributes:
        units: layers decided together.
        losses: [units][widths] trace * |dW|^2.
        costs: [units][widths].
        limit: a share of the way from 4 bits everywhere to 8 bits everywhere.
    """

    units: Sequence[tuple[int, ...]]
    losses: Sequence[Sequence[float]]
    costs: Sequence[Sequence[float]]
    limit: float

    @classmethod
    def of(cls, table: Mapping[str, Any], cost: str, share: float) -> Problem:
        partner: dict[int, int] = dict(table["ties"])
        tied = set(partner.values())
        units = [(i, partner[i]) if i in partner else (i,) for i in range(len(table["parameters"])) if i not in tied]
        trace = table["Hutchinson_trace"]
        layers = [
            [trace[i] * table[f"delta_weights_{bits}bit_square"][i] for bits in WIDTHS] for i in range(len(trace))
        ]
        costs = layer_costs(table, cost)
        narrow, wide = (math.fsum(row[index] for row in costs) for index in range(len(WIDTHS)))
        return cls(units, _merged(units, layers), _merged(units, costs), narrow + share * (wide - narrow))

    def choice(self, narrow: Sequence[int]) -> list[int]:
        """The options of a set of 4-bit layers."""
        return [0 if unit[0] in narrow else 1 for unit in self.units]

    def narrow(self, choice: Sequence[int]) -> tuple[int, ...]:
        """The 4-bit layers of a choice."""
        return tuple(sorted(i for unit, pick in zip(self.units, choice, strict=True) for i in unit if pick == 0))

    def figures(self, choice: Sequence[int]) -> tuple[float, float]:
        """Loss and cost."""
        loss, cost = (
            math.fsum(row[pick] for row, pick in zip(table, choice, strict=True)) for table in (self.losses, self.costs)
        )
        return loss, cost


def layer_costs(table: Mapping[str, Any], cost: str) -> list[list[float]]:
    """[layers][widths]: megabytes, 10^9 bit operations / 64, milliseconds."""
    if cost == "size":
        return [[count * bits / 8 for bits in WIDTHS] for count in table["parameters"]]
    if cost == "bops":
        return [[count / 64, count / 16] for count in table["bops"]]
    return [list(pair) for pair in zip(table["latency_int4"], table["latency_int8"], strict=True)]


def _merged(units: Sequence[tuple[int, ...]], layers: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[math.fsum(layers[i][width] for i in unit) for width in range(len(WIDTHS))] for unit in units]


def verdict(key: tuple[str, str, float], problem: Problem, found: Solution | None) -> str:
    """`same`, `better`, or what is wrong."""
    if found is None:
        return "WRONG: nothing found"
    (loss, cost), (published, _) = problem.figures(found.choice), problem.figures(problem.choice(PUBLISHED[key]))
    if cost > problem.limit:
        return "WRONG: over the limit"
    if key == BEATEN:
        return "better" if loss < published else "WRONG: not better"
    return "same" if problem.narrow(found.choice) == PUBLISHED[key] else "WRONG: another choice"


def solve(tables: Mapping[str, Any], key: tuple[str, str, float], where: Environment) -> Record:
    """One of the 18 problems."""
    network, cost, share = key
    problem = Problem.of(tables[network], cost, share)
    start = time.perf_counter()
    found = solve_choice(problem.losses, [Limit(problem.costs, problem.limit)])
    seconds = time.perf_counter() - start
    said = verdict(key, problem, found)
    published = problem.figures(problem.choice(PUBLISHED[key]))
    loss, used = (math.nan, math.nan) if found is None else problem.figures(found.choice)
    narrow = () if found is None else problem.narrow(found.choice)
    say(
        f"{network} {cost:7} {share:.2f}: {said:6} loss {loss:.6f} (published {published[0]:.6f}), "
        f"cost {used:.4f} of {problem.limit:.4f} (published {published[1]:.4f}), {len(narrow)} layers at 4 bits"
    )
    return Record(
        "hawq-v3",
        network,
        "quantkit",
        f"{network}, {cost}, share {share:g}",
        where,
        accuracy={} if found is None else {"loss": loss, "published loss": published[0]},
        details={"cost": used, "limit": problem.limit, "4 bits": narrow, "seconds": seconds} if found else {},
        error=said if said.startswith("WRONG") else "",
    )


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared"), help="folder with data/hawq_v3_ilp.json")
    parser.add_argument("--out", type=Path, default=Path("results.jsonl"), help="file to append results to")
    args = parser.parse_args()
    tables = json.loads((args.data / "data/hawq_v3_ilp.json").read_text(encoding="utf-8"))
    where = environment(1)
    records = [solve(tables, key, where) for key in PUBLISHED]
    append_records(args.out, records)
    wrong = [record for record in records if record.error]
    say(f"{len(records) - len(wrong)} of {len(records)} as expected")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
