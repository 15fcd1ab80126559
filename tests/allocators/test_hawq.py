"""Traces within the intervals they state, eigenvalues against a dense solver, and what HAWQ makes of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from quantkit.allocators._derivatives import Derivatives
from quantkit.allocators._hutchinson import DOUBT, Draw, estimate, interval, looks
from quantkit.allocators._table import Scores, units_of
from quantkit.allocators.hawq import METHOD, Hawq, eigenvalues, traces
from quantkit.errors import InputError
from quantkit.report.progress import SilentProgress
from quantkit.types import Array
from tests.allocators import small

SEEDS = 200
SPECTRA = {
    "one eigenvalue": np.ones(1),
    "three": np.array([1.0, 0.3, 0.1]),
    "slowly falling": 1 / np.arange(1, 101),
    "flat": np.ones(40),
}


def figures(scores: Scores) -> list[float]:
    return [figure for row in scores.raw.values() for figure in row]


def symmetric(spectrum: Array, size: int = 100) -> Array:
    """A dense matrix with these eigenvalues."""
    basis = np.linalg.qr(np.random.default_rng(1).standard_normal((size, size)))[0][:, : len(spectrum)]
    return np.asarray((basis * spectrum) @ basis.T)


def quadratic_forms(matrices: Sequence[Array], seed: int, most: int) -> Draw:
    """v^T H v of each batch's matrix, with signs v."""
    rng = np.random.default_rng(seed)
    drawn = []
    for matrix in matrices:
        v = 2.0 * rng.integers(0, 2, (most, len(matrix))) - 1
        drawn.append(((v @ matrix) * v).sum(axis=1))
    return lambda names, which: {name: np.array(drawn)[:, which.start : which.stop] for name in names}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("batches", [1, 4])
def test_known_traces_lie_in_the_interval(name: str, batches: int) -> None:
    """In at least 95 % of 200 seeds, stopping included."""
    matrices = [(1 + batch) * symmetric(SPECTRA[name]) for batch in range(batches)]
    truth = sum(float(np.trace(matrix)) for matrix in matrices)
    found = [estimate(quadratic_forms(matrices, seed, 64), ["h"], 0.1, 64)["h"] for seed in range(SEEDS)]
    held = np.mean([abs(one.mean - truth) <= one.half_width for one in found])
    assert held >= 1 - DOUBT
    assert np.mean([one.mean for one in found]) == pytest.approx(truth, rel=0.05)
    assert all(one.within(0.1) or one.draws == 64 for one in found)


def test_diagonal_matrices_have_no_variance() -> None:
    found = estimate(quadratic_forms([np.diag(np.arange(30.0))], 0, 64), ["h"], 0.01, 64)["h"]
    assert (found.mean, found.half_width, found.draws) == (435.0, 0.0, 4)
    nothing = estimate(quadratic_forms([np.zeros((3, 3))], 0, 64), ["h"], 0.1, 64)["h"]
    assert (nothing.mean, nothing.half_width, nothing.draws) == (0.0, 0.0, 4)


def test_intervals_have_the_width_of_the_formula() -> None:
    """Variance of v^T H v: 2 (|H|_F^2 - sum of squared diagonals)."""
    matrix = symmetric(SPECTRA["slowly falling"])
    draws = quadratic_forms([matrix], 7, 4000)(["h"], range(4000))["h"]
    variance = 2 * (np.square(matrix).sum() - np.square(np.diagonal(matrix)).sum())
    assert interval(draws, DOUBT).half_width == pytest.approx(1.96 * np.sqrt(variance / 4000), rel=0.05)
    halves = interval(np.concatenate([draws[:, :2000], draws[:, 2000:]]), DOUBT)  # as of two batches, which add up
    assert halves.half_width == pytest.approx(2 * interval(draws, DOUBT).half_width, rel=0.05)
    assert halves.mean == pytest.approx(2 * draws.mean())


def test_drawing_ends_name_by_name() -> None:
    asked: list[tuple[tuple[str, ...], int]] = []

    def draw(names: Sequence[str], which: range) -> dict[str, Array]:
        asked.append((tuple(names), len(which)))
        rng = np.random.default_rng(which.start)
        noise = {"still": 0.0, "calm": 0.1, "wild": 5.0}
        return {name: 1 + noise[name] * rng.standard_normal((1, len(which))) for name in names}

    done: list[int] = []
    found = estimate(draw, ["still", "calm", "wild"], 0.1, 20, done.append)
    assert asked[0] == (("still", "calm", "wild"), 4) and asked[-1][0] == ("wild",)
    assert sum(count for names, count in asked if "wild" in names) == 20 == found["wild"].draws
    assert found["still"].draws == 4 < found["calm"].draws + 1 and sum(done) == 3
    assert not found["wild"].within(0.1) and found["calm"].within(0.1)


def test_looks_double() -> None:
    assert looks(64) == [4, 8, 16, 32, 64] and looks(20) == [4, 8, 16, 20] and looks(4) == [4]


def hessian(made: Derivatives, target: str) -> torch.Tensor:
    """The target's block, per sample, row by row."""
    shape = made.operands[target].shape
    total = torch.zeros(shape.numel(), shape.numel(), dtype=torch.float64)
    for batch in range(len(made.counts)):
        one = made.run(batch)
        rows = torch.eye(shape.numel(), dtype=torch.float64)
        total += torch.stack([one.product({target: row.reshape(shape)})[target].reshape(-1) for row in rows])
    return total / made.samples


@pytest.mark.parametrize("name", ["dense", "values", "outputs"])
def test_traces_and_eigenvalues_of_networks(name: str) -> None:
    made = small.net(name)
    found = traces(made, 0.1, 128, 0, SilentProgress())
    largest, unsettled = eigenvalues(made, 500, 0, SilentProgress())
    assert unsettled == 0
    for target in made.names:
        block = hessian(made, target)
        assert torch.allclose(block, block.T, atol=1e-10)
        spectrum = torch.linalg.eigvalsh(block)
        assert float(spectrum[0]) > -1e-10  # Gauss-Newton
        assert abs(found[target].mean - float(block.trace())) <= found[target].half_width
        assert found[target].half_width <= 0.3 * found[target].mean
        assert largest[target] == pytest.approx(float(spectrum[-1]), rel=0.02)  # they lie close together


def test_traces_of_a_network_lie_in_their_intervals() -> None:
    """95 % of 200 seeds, layer by layer."""
    made = small.net("dense", (8,))
    one = made.run(0)
    rows = [one.pull(_single(one.heads["y"].shape, index), list(made.operands.values())) for index in range(8 * 24)]
    jacobians = {
        target: torch.stack([row[place].reshape(-1) for row in rows]).numpy() for place, target in enumerate(made.names)
    }
    truth = {target: float(hessian(made, target).trace()) for target in made.names}

    def draw_of(seed: int) -> Draw:
        roots = np.array([one.random_root(seed, 0, probe)["y"].reshape(-1).numpy() for probe in range(32)])
        squares = {target: np.square(roots @ jacobian).sum(axis=1) / 8 for target, jacobian in jacobians.items()}
        return lambda names, which: {name: squares[name][None, which.start : which.stop] for name in names}

    found = [estimate(draw_of(seed), made.names, 0.1, 32) for seed in range(SEEDS)]
    for target in made.names:
        held = [abs(each[target].mean - truth[target]) <= each[target].half_width for each in found]
        assert np.mean(held) >= 1 - DOUBT
    for seed in (0, 3):  # and this is what the allocator draws
        real = traces(made, 0.1, 32, seed, SilentProgress())
        for target in made.names:
            assert real[target].draws == found[seed][target].draws
            assert real[target].mean == pytest.approx(found[seed][target].mean, rel=1e-9)


def _single(shape: Sequence[int], index: int) -> dict[str, torch.Tensor]:
    flat = torch.zeros(int(np.prod(shape)), dtype=torch.float64)
    flat[index] = 1
    return {"y": flat.reshape(tuple(shape))}


def test_scores_are_mean_trace_times_squared_error() -> None:
    made = small.problem("dense")
    found = Hawq().scores(made, units_of(made))
    assert not found.nats and found.quantity == "mean Hessian trace x squared error"
    net = small.net("dense")
    for unit in units_of(made):
        (name,) = unit.members
        mean = float(hessian(net, name).trace()) / net.operands[name].numel()
        for option, figure in zip(unit.options, found.raw[unit.name], strict=True):
            error = small.rounded(made.targets[name], option[name]).dequantize() - made.targets[name].load()
            assert figure == pytest.approx(mean * np.square(error).sum(), rel=0.25)
    rough = Hawq(probes=4, tolerance=0.001).scores(made, units_of(made))
    assert len(rough.notes) == 1
    assert rough.notes[0].startswith("2 of 2 Hessian traces are not known to 0.1 % after 4 probes, but to ")


def test_the_first_version_takes_eigenvalues() -> None:
    made = small.problem("dense")
    found = Hawq(order="v1").scores(made, units_of(made))
    assert found.quantity == "largest eigenvalue x squared error" and not found.nats
    net = small.net("dense")
    largest, _ = eigenvalues(net, 100, 0, SilentProgress())
    for unit in units_of(made):
        (name,) = unit.members
        error = small.rounded(made.targets[name], unit.options[0][name]).dequantize() - made.targets[name].load()
        assert found.raw[unit.name][0] == pytest.approx(largest[name] * np.square(error).sum(), rel=0.01)
    short = Hawq(order="v1", iterations=1).scores(made, units_of(made))
    assert short.notes == ("2 of 2 largest eigenvalues had not settled to 1 % after 1 iterations",)
    assert all(0 < low < high for low, high in zip(figures(short), figures(found), strict=True))


LOSSES = """import torch
def kl(outputs, reference):
    first, second = (torch.log_softmax(item['y'], 1) for item in (reference, outputs))
    return (first.exp() * (first - second)).sum(1).mean()
def downwards(outputs, reference):
    return -(outputs['y'] - reference['y']).square().sum(1).mean()
"""


def test_losses_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By signs at the weights: the divergence has the same trace that way; negative curvature counts as 0."""
    (tmp_path / "curved.py").write_text(LOSSES)
    monkeypatch.chdir(tmp_path)
    made = small.problem("dense")
    own = Hawq(loss="curved:kl").scores(made, units_of(made))
    assert figures(own) == pytest.approx(figures(Hawq().scores(made, units_of(made))), rel=0.3)
    assert set(figures(Hawq(loss="curved:downwards").scores(made, units_of(made)))) == {0.0}
    assert set(figures(Hawq(loss="curved:downwards", order="v1").scores(made, units_of(made)))) == {0.0}


@pytest.mark.parametrize("order", ["v2", "v1"])
def test_the_seed_decides(order: str) -> None:
    made = small.problem("dense")
    method = Hawq(order=order, probes=8, iterations=3)  # type: ignore[arg-type]
    first = method.scores(made, units_of(made))
    assert method.scores(made, units_of(made)) == first
    other = small.problem("dense", seed=1)
    assert method.scores(other, units_of(other)).raw != first.raw


def test_leads_to_an_allocation() -> None:
    made = small.problem("conv")
    found = Hawq(probes=8).allocate(made)
    assert set(found) == set(made.targets) and found.predicted is None
    assert found.notes == found.scores["hawq"].notes


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert METHOD is Hawq and Hawq().stats == frozenset()
    with pytest.raises(InputError, match=r"hawq\.tolerance must be above 0, got 0"):
        Hawq(tolerance=0)
    with pytest.raises(InputError, match=r"hawq\.probes must be at least 4, got 3"):
        Hawq(probes=3)
    with pytest.raises(InputError, match=r"hawq\.order must be v2 or v1, got 'v4'"):
        Hawq(order="v4")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"hawq\.iterations must be at least 1, got 0"):
        Hawq(iterations=0)
    with pytest.raises(InputError, match=r"hawq\.loss must be module:function, got 'mse:'"):
        Hawq(loss="mse:")
    made = small.problem("dense", network=None)
    with pytest.raises(InputError, match="the allocator hawq needs calibration data: give --calib"):
        Hawq().scores(made, units_of(made))
    monkeypatch.delitem(sys.modules, "quantkit.allocators._derivatives", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    made = small.problem("dense")
    with pytest.raises(InputError, match=r"allocator 'hawq': this needs torch: pip install 'quantkit\[torch\]'"):
        Hawq().scores(made, units_of(made))
