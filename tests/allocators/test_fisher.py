"""Sampled curvature: without bias, exact with as many probes as outputs, empirical with a loss of one's own."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from quantkit.allocators import _inputs, _sites
from quantkit.allocators._sites import Sites, curvatures
from quantkit.allocators._table import Scores, units_of
from quantkit.allocators.fisher import METHOD, Fisher
from quantkit.allocators.quadratic import Quadratic
from quantkit.errors import InputError
from tests.allocators import small


def figures(scores: Scores) -> list[float]:
    return [figure for row in scores.raw.values() for figure in row]


@pytest.mark.parametrize("name", small.NETWORKS)
def test_as_many_probes_as_outputs_leave_nothing_to_chance(name: str) -> None:
    made = small.problem(name)
    exact = Quadratic().scores(made, units_of(made))
    found = Fisher(probes=1000).scores(made, units_of(made))
    assert found.nats and found.quantity == "nats per sample"
    assert figures(found) == pytest.approx(figures(exact), rel=1e-4)


@pytest.mark.parametrize("name", ["dense", "probabilities", "values", "outputs"])
def test_the_mean_over_seeds_is_the_exact_figure(name: str) -> None:
    """400 random cotangents; each figure lies within four standard errors of its mean, and few probes scatter more."""
    made = small.problem(name, (4,))
    units, net = units_of(made), small.net(name)
    changes = [
        _inputs.Change(entry.unit, entry.option, net.operands_of(entry.errors))
        for entry in _inputs.entries(made, units)
    ]
    sites = Sites.find(net)
    one = net.run(0, sites.values)
    exact = np.array([one.curvature(change.operands) for change in changes])
    drawn = np.array(
        [curvatures(net, sites, one, units, changes, [one.random_root(seed, 0, 0)]) for seed in range(400)]
    )
    error = drawn.std(axis=0, ddof=1) / np.sqrt(len(drawn))
    assert (error > 0).all() and (error < 0.1 * exact).all()
    assert (np.abs(drawn.mean(axis=0) - exact) < 4 * error).all()
    several = [
        curvatures(net, sites, one, units, changes, [one.random_root(seed, 0, probe) for probe in range(16)], 1 / 16)
        for seed in range(50)
    ]
    assert (np.std(several, axis=0) < 0.4 * drawn.std(axis=0)).all()  # 1/4 in theory


def test_layers_without_a_linear_operator_are_exact() -> None:
    made = small.problem("recurrent")
    units = [unit for unit in units_of(made) if made.targets[unit.name].op == "LSTM"]
    assert sum(len(unit.members) for unit in units) == 2
    found, exact = Fisher(probes=1).scores(made, units), Quadratic().scores(made, units)
    assert figures(found) == pytest.approx(figures(exact), rel=1e-6)


def test_gradients_are_held_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    made = small.problem("conv")
    wanted = Fisher().scores(made, units_of(made))
    monkeypatch.setattr(_sites, "LIVE_BYTES", 1)
    assert figures(Fisher().scores(made, units_of(made))) == pytest.approx(figures(wanted), rel=1e-5)


def test_the_seed_decides() -> None:
    made = small.problem("dense")
    units = units_of(made)
    assert Fisher().scores(made, units) == Fisher().scores(made, units)
    other = small.problem("dense", made=made.network.calibration, seed=1)  # type: ignore[union-attr]
    assert Fisher().scores(made, units) != Fisher().scores(other, units)


LOSSES = """import torch
def nll(outputs, reference):
    return -torch.log_softmax(outputs['y'], 1)[:, 3].mean()
def kl(outputs, reference):
    first, second = (torch.log_softmax(item['y'], 1) for item in (reference, outputs))
    return (first.exp() * (first - second)).sum(1).mean()
"""


@pytest.mark.parametrize("name", ["dense", "recurrent", "inner"])
def test_a_loss_of_ones_own_is_squared_slope_by_slope(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half the square of what the loss of each sample changes by, by differences, layer by layer."""
    (tmp_path / "likelihoods.py").write_text(LOSSES)
    monkeypatch.chdir(tmp_path)
    made = small.problem(name)
    found = Fisher(loss="likelihoods:nll").scores(made, units_of(made))
    assert not found.nats and found.quantity == "half the squared slope of likelihoods:nll per sample"
    net = small.net(name)
    for unit in units_of(made):
        for option, figure in zip(unit.options, found.raw[unit.name], strict=True):
            total = 0.0
            errors = {
                member: small.rounded(made.targets[member], spec).dequantize() - made.targets[member].load()
                for member, spec in option.items()
            }
            for batch in range(len(net.counts)):
                ahead, behind = (
                    small.outputs(
                        net, batch, {member: step * error for member, error in net.operands_of(errors).items()}
                    )
                    for step in (1e-4, -1e-4)
                )
                total += np.square((_nll(ahead["y"]) - _nll(behind["y"])) / 2e-4).sum()
            assert figure == pytest.approx(total / 2 / net.samples, rel=1e-3)


def _nll(scores: small.Array) -> small.Array:
    return np.asarray(np.log(np.exp(scores).sum(axis=1)) - scores[:, 3])


def test_a_loss_without_slope_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "distances_only.py").write_text(LOSSES.replace("first.exp() * (first - second)", "(first - second)**2"))
    monkeypatch.chdir(tmp_path)
    made = small.problem("dense")
    sentence = "the gradient of the loss 'distances_only:kl' is zero at the float model, so it tells nothing"
    with pytest.raises(InputError, match=sentence):
        Fisher(loss="distances_only:kl").scores(made, units_of(made))


def test_leads_to_an_allocation() -> None:
    made = small.problem("tied")
    found = Fisher().allocate(made)
    assert set(found) == set(made.targets) and found.predicted is not None


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert METHOD is Fisher and Fisher().stats == frozenset()
    with pytest.raises(InputError, match=r"fisher\.probes must be at least 1, got 0"):
        Fisher(probes=0)
    with pytest.raises(InputError, match=r"fisher\.loss must be module:function, got ':f'"):
        Fisher(loss=":f")
    made = small.problem("dense", network=None)
    with pytest.raises(InputError, match="the allocator fisher needs calibration data: give --calib"):
        Fisher().scores(made, units_of(made))
    monkeypatch.delitem(sys.modules, "quantkit.allocators._derivatives", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    made = small.problem("dense")
    with pytest.raises(InputError, match=r"allocator 'fisher': this needs torch: pip install 'quantkit\[torch\]'"):
        Fisher().scores(made, units_of(made))
