"""Exact second order: against differences, by rows and by columns of the Jacobian, with and without torch."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from quantkit.allocators import _sites
from quantkit.allocators._table import Scores, units_of
from quantkit.allocators.measured import Measured
from quantkit.allocators.quadratic import METHOD, Quadratic
from quantkit.errors import InputError
from tests.allocators import small


def figures(scores: Scores) -> list[float]:
    return [figure for row in scores.raw.values() for figure in row]


@pytest.mark.parametrize("name", small.NETWORKS)
def test_derivatives_and_differences_agree(name: str) -> None:
    """Small steps: what is left is float32 and the fourth derivative."""
    made = small.problem(name)
    exact = Quadratic().scores(made, units_of(made))
    differences = Quadratic(gradient=False).scores(made, units_of(made))
    assert exact.nats and exact.quantity == "nats per sample" and exact.notes == differences.notes == ()
    assert figures(exact) == pytest.approx(figures(differences), rel=0.01)
    assert list(exact.raw) == [unit.name for unit in units_of(made)]


@pytest.mark.parametrize("name", ["dense", "conv", "tied"])
def test_small_errors_lose_what_is_predicted(name: str) -> None:
    made = small.problem(name, (7, 8))
    measured = Measured().scores(made, units_of(made))
    assert figures(Quadratic().scores(made, units_of(made))) == pytest.approx(figures(measured), rel=0.05)


@pytest.mark.parametrize("name", ["dense", "recurrent", "outputs"])
def test_few_outputs_are_taken_column_by_column(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same figures; which way is cheaper depends on the number of places in the table."""
    asked: list[int] = []
    plain = _sites.curvatures

    def counted(*arguments: object) -> list[float]:
        asked.append(1)
        return plain(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(_sites, "curvatures", counted)
    few, many = small.problem(name), small.problem(name, (2, 3, 4, 5, 6, 7, 8))
    columns = {"dense": 24, "recurrent": 20, "outputs": 36}[name]
    by_rows = Quadratic().scores(few, units_of(few))
    assert not asked
    wide = tuple(unit for unit in units_of(many) for _ in range(1 + columns // 7))  # enough places
    by_columns = Quadratic().scores(many, wide)
    assert asked
    for unit in units_of(few):
        wanted = [by_columns.raw[unit.name][option] for option in (1, 2, 6)]
        assert wanted == pytest.approx(by_rows.raw[unit.name], rel=1e-4)


def test_a_unit_of_several_layers_changes_as_a_whole() -> None:
    made = small.problem("dense", units={"both": tuple(small.problem("dense").targets)})
    (unit,) = units_of(made)
    assert len(unit.members) == 2
    together = Quadratic().scores(made, [unit])
    assert figures(together) == pytest.approx(figures(Quadratic(gradient=False).scores(made, [unit])), rel=0.01)


def test_without_torch_differences_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    made = small.problem("dense")
    wanted = Quadratic(gradient=False).scores(made, units_of(made))
    for module in [name for name in sys.modules if name.startswith("quantkit.allocators._derivatives")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "torch", None)
    found = Quadratic().scores(made, units_of(made))
    assert found.raw == wanted.raw
    assert found.notes == ("torch is not installed: differences instead of derivatives",)
    with pytest.raises(InputError, match=r"allocator 'quadratic': this needs torch: pip install 'quantkit\[torch\]'"):
        Quadratic(loss="math:sqrt").scores(made, units_of(made))


def test_losses_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def {}(outputs, reference): return {} * (outputs['y'] - reference['y']).square().sum(1).mean()\n"
    (tmp_path / "distances.py").write_text(source.format("near", 1) + source.format("far", -1))
    monkeypatch.chdir(tmp_path)
    made = small.problem("dense")
    found = Quadratic(loss="distances:near").scores(made, units_of(made))
    assert not found.nats and found.quantity == "distances:near per sample"
    last = units_of(made)[1]  # y is linear in its weight (alpha is in it): the distance can be written out
    (name,) = last.members
    probe = made.network.calibration  # type: ignore[union-attr]
    w1, w2 = (target.load().astype(np.float64) for target in made.targets.values())
    b1 = probe.model.graph.initializers["b1"].const_value.numpy()  # type: ignore[union-attr]
    hidden = np.tanh(np.concatenate([feed["x"] for feed in probe.feeds]) @ w1.T + b1)
    for option, figure in zip(last.options, found.raw[name], strict=True):
        error = small.rounded(made.targets[name], option[name]).dequantize() - w2
        assert figure == pytest.approx(np.square(hidden @ error.T).sum() / len(hidden), rel=1e-4)
    assert set(figures(Quadratic(loss="distances:far").scores(made, units_of(made)))) == {0.0}


def test_figures_repeat_and_lead_to_an_allocation() -> None:
    made = small.problem("conv")
    assert Quadratic().scores(made, units_of(made)) == Quadratic().scores(made, units_of(made))
    found = Quadratic().allocate(made)
    assert set(found) == set(made.targets) and found.predicted is not None
    bits = sum(spec.bits * np.prod(made.targets[name].shape) for name, spec in found.items())
    assert bits <= 4 * sum(np.prod(target.shape) for target in made.targets.values())


def test_settings() -> None:
    assert METHOD is Quadratic and Quadratic().stats == frozenset()
    with pytest.raises(InputError, match=r"quadratic\.step must be above 0 and at most 1, got 0"):
        Quadratic(step=0)
    with pytest.raises(InputError, match=r"quadratic\.loss must be module:function, got 'mse'"):
        Quadratic(loss="mse")
    with pytest.raises(InputError, match=r"quadratic\.loss needs gradients: leave quadratic\.gradient out"):
        Quadratic(loss="m:f", gradient=False)
    made = small.problem("dense", network=None)
    for method in (Quadratic(), Quadratic(gradient=False)):
        with pytest.raises(InputError, match="the allocator quadratic needs calibration data: give --calib"):
            method.scores(made, units_of(made))
