"""Bytes of files before they are made, and what real files teach."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.allocators._table import units_of
from quantkit.budget import Budget
from quantkit.candidate import Context, Recipe, build
from quantkit.options import make_options
from quantkit.pipeline import prepare
from quantkit.problem import Ledger, make_problem
from quantkit.report.progress import SilentProgress
from quantkit.tuning.sizes import Sizes
from quantkit.tuning.space import Value
from quantkit.types import QuantSpec
from tests.helpers import models

PLAIN: dict[str, Value] = {
    "transform": "none",
    "quantizer": "rtn",
    "granularity": "channel",
    "inputs": "float",
    "bias": False,
    "activations": "8",
    "group size": "default",
    "ends": "planned",
}


@pytest.fixture
def sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sizes:
    models.quick(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))
    options = make_options({"activations": "8", "quantizer": "rtn"})
    run = prepare(models.cnn(), models.images(24), None, options, frozenset(), SilentProgress())
    context = run.context(run.original)
    units = units_of(make_problem(Ledger(context), Budget(), Recipe("minmax"), 0))
    return Sizes(context, units)


def real(context: Context, sizes: Sizes, choice: list[int]) -> int:
    """Of the file that is really made."""
    specs = {
        name: QuantSpec(spec.bits)
        for unit, option in zip(sizes.units, choice, strict=True)
        for name, spec in unit.options[option].items()
    }
    return build(context, specs, Recipe("minmax"), name="real").size


def test_one_file_teaches_the_others(sizes: Sizes) -> None:
    count = len(sizes.units)
    sizes.learn(PLAIN, [2] * count, real(sizes.context, sizes, [2] * count))
    for choice in ([0] * count, [6] * count, [0, 3, 6][:count]):
        wanted = real(sizes.context, sizes, choice)
        # every width brings functions of its own, which count in a file of 7 kB
        assert sizes.estimate(PLAIN, choice) == pytest.approx(wanted, rel=0.15)


def test_the_most_bytes_that_were_seen_count(sizes: Sizes) -> None:
    choice = [0] * len(sizes.units)
    layers = sizes.estimate(PLAIN, choice)
    sizes.learn(PLAIN, choice, layers + 500)
    sizes.learn(PLAIN, choice, layers + 300)
    assert sizes.estimate(PLAIN, choice) == layers + 500
    other = {**PLAIN, "inputs": "quantized"}
    assert sizes.estimate(other, choice) == layers + 500  # nothing was seen of it
    sizes.learn(other, choice, layers + 700)
    assert sizes.estimate(other, choice) == layers + 700 and sizes.estimate(PLAIN, choice) == layers + 500


def test_ends_in_float_take_four_bytes_a_weight(sizes: Sizes) -> None:
    choice = [0] * len(sizes.units)
    ends = {**PLAIN, "ends": "float"}
    rows = sizes.table(PLAIN)
    floats = 4 * (16 * 27 + 32 * 10)
    assert sizes.estimate(ends, choice) == sizes.estimate(PLAIN, choice) - rows[0][0] - rows[-1][0] + floats
