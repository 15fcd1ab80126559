"""Second derivatives against differences and written-out Hessians, for every kind of weight and output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantkit.allocators import _inputs, _sites
from quantkit.allocators._derivatives import Derivatives, opened
from quantkit.allocators._heads import Head
from quantkit.allocators._table import Unit, units_of
from quantkit.divergence import Divergence
from quantkit.errors import InputError
from quantkit.graph.load import load_model
from quantkit.graph.targets import find_targets
from quantkit.runtime.probe import Probe
from quantkit.userfunction import import_function
from tests.allocators import small
from tests.helpers.models import build, random

UNEVEN = torch.tensor([[3.0, -1.0, 0.5, 0.0], [0.0, 8.0, -20.0, 1.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
OUTPUTS = {
    "logits": UNEVEN,
    "logits of one pixel": UNEVEN[:, :, None, None],
    "probabilities": torch.softmax(UNEVEN, 1),
    "probabilities with a zero": torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64),
    "values": UNEVEN.reshape(3, 2, 2),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_second_derivative_of_the_divergence(name: str) -> None:
    """The Hessian by autograd of the divergence written in torch, which equals the one in numpy."""
    y = OUTPUTS[name]
    output = Divergence.of([{"y": y.numpy()}]).outputs["y"]
    assert output.kind == name.split()[0]
    other = y + 0.01 * torch.sin(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape)
    nats = Divergence({"y": output}).sum({"y": y.numpy()}, {"y": other.numpy()})
    assert nats == pytest.approx(float(small.divergence(output.kind, output.energy, y, other)), rel=1e-9)

    head = Head.of(output, y)
    size = y.numel()
    by_torch = torch.autograd.functional.hessian(lambda x: small.divergence(output.kind, output.energy, y, x), y)
    if "zero" in name:  # the clamp's kink: changes of what counts as 0 are not seen
        by_torch[0, 2], by_torch[:, :, 0, 2] = 0, 0
    hessian = by_torch.reshape(size, size)
    basis = torch.eye(size, dtype=torch.float64)
    products = torch.stack([head.product(row.reshape(y.shape)).reshape(-1) for row in basis])
    assert torch.allclose(products, hessian, atol=1e-9, rtol=1e-9)
    curvatures = [head.curvature(row.reshape(y.shape)) for row in basis]
    assert np.allclose(curvatures, hessian.diagonal(), atol=1e-12) and min(curvatures) >= 0
    roots = torch.stack([head.root(row).reshape(-1) for row in basis])  # rows: columns of A
    assert torch.allclose(roots.T @ roots, hessian, atol=1e-9, rtol=1e-9)
    columns = torch.stack([head.column(index).reshape(-1) for index in range(head.columns)])
    assert head.columns * head.rows == size
    assert torch.allclose(columns.sum(0), head.root(torch.ones(size)).reshape(-1), atol=1e-12)


def test_outputs_that_are_not_finite_count_for_nothing() -> None:
    y = torch.tensor([[[1.0, float("nan")], [float("inf"), 2.0]]])
    head = Head.of(Divergence.of([{"y": y.numpy()}]).outputs["y"], y)
    energy = head.energy
    assert head.curvature(torch.ones_like(y)) == pytest.approx(2 / energy)
    assert torch.isfinite(head.product(torch.ones_like(y))).all()


@pytest.mark.parametrize("name", small.NETWORKS)
def test_curvatures_are_the_second_differences_of_the_loss(name: str) -> None:
    made = small.net(name)
    assert made.names
    for target in made.names:
        d = small.direction(made, target)
        exact = sum(made.run(batch).curvature({target: d}) for batch in range(len(made.counts)))
        step = 1e-3
        differences = (small.loss(made, {target: step * d}) + small.loss(made, {target: -step * d})) / step**2
        assert exact == pytest.approx(differences, rel=1e-3)
        assert exact > 0


def test_several_weights_change_together() -> None:
    made = small.net("dense")
    d = {name: small.direction(made, name, seed) for seed, name in enumerate(made.names)}
    both = made.run(0).curvature(d)
    pairs = [
        made.run(0).curvature({name: sign * d[name] for name, sign in zip(d, signs, strict=True)})
        for signs in [(1, 1), (1, -1)]
    ]
    alone = [made.run(0).curvature({name: d[name]}) for name in d]
    assert both == pytest.approx(pairs[0]) and sum(pairs) == pytest.approx(2 * sum(alone))


@pytest.mark.parametrize("name", ["dense", "tied", "outputs"])
def test_products_are_symmetric_positive_and_agree_with_curvatures(name: str) -> None:
    made = small.net(name)
    one = made.run(0)
    for target in made.names:
        first, second = small.direction(made, target, 1), small.direction(made, target, 2)
        left, right = one.product({target: first})[target], one.product({target: second})[target]
        assert float((second * left).sum()) == pytest.approx(float((first * right).sum()), rel=1e-9)
        assert float((first * left).sum()) == pytest.approx(one.curvature({target: first}), rel=1e-9)


@pytest.mark.parametrize("name", small.NETWORKS)
def test_output_gradients_times_output_errors(name: str) -> None:
    """All columns give the curvature itself, from layers alone."""
    made = small.net(name)
    sites = _sites.Sites.find(made)
    left_out = {"recurrent": ["W", "R"], "inner": ["w"], "mixed": ["w"]}
    uncovered = [target for target in made.names if target not in sites.of]
    assert len(uncovered) == len(left_out.get(name, []))
    units = [Unit(target, (target,), ({},)) for target in made.names]
    rng = np.random.default_rng(0)
    errors = [rng.standard_normal(made.probe.targets[target].shape).astype(np.float32) for target in made.names]
    changes = [
        _inputs.Change(index, 0, made.operands_of({target: error}))
        for index, (target, error) in enumerate(zip(made.names, errors, strict=True))
    ]
    for batch in range(len(made.counts)):
        one = made.run(batch, sites.values)
        columns = [one.column(index) for index in range(one.columns)]
        assert one.columns <= made.columns
        found = _sites.curvatures(made, sites, one, units, changes, columns)
        exact = [one.curvature(change.operands) for change in changes]
        assert found == pytest.approx(exact, rel=1e-6)


def test_samples_are_told_apart_along_the_axis_that_counts_them() -> None:
    made = small.net("recurrent")
    axes = {name: sites[0].axis for name, sites in _sites.Sites.find(made).of.items()}
    assert sorted(axes.values()) == [0, 1]  # the layer in front of the recurrent one has time first
    alone = small.net("mixed", (1, 1))
    assert set(_sites.Sites.find(alone).of) == set(alone.names)  # one sample mixes with no other


def test_a_weight_that_no_compared_output_depends_on() -> None:
    text = """g (float[N,16] x, float[16,16] w) => (float[N,16] y, int64[N] best) {
        a = MatMul(x, w)
        y = Relu(x)
        best = ArgMax<axis=1,keepdims=0>(a)
    }"""
    made = _custom(text, {"w": (16, 16)})
    (target,) = made.names
    one = made.run(0)
    d = small.direction(made, target)
    assert one.curvature({target: d}) == 0 and one.columns == 0
    assert not one.product({target: d})[target].any()
    assert _sites.Sites.find(made).of == {}


def _custom(text: str, shapes: Mapping[str, Any]) -> Derivatives:
    model = load_model(build(text, {name: random(*shape) for name, shape in shapes.items()})).model
    targets = find_targets(model)[0]
    return Derivatives(Probe(model, targets, [{"x": random(3, 16)}]), list(targets), dtype=torch.float64)


def test_a_loss_of_ones_own_gets_its_full_hessian() -> None:
    """A loss whose slope is not 0 at the float model: the network's own curvature counts too."""

    def function(outputs: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return outputs["y"].pow(3).sum(1).mean()

    made = small.net("dense", loss=function, loss_name="cubes")
    for target in made.names:
        d = small.direction(made, target)

        def total(step: float, target: str = target, d: torch.Tensor = d) -> float:
            return sum(
                float((small.outputs(made, batch, {target: step * d})["y"] ** 3).sum())
                for batch in range(len(made.counts))
            )

        step = 1e-3
        differences = (total(step) - 2 * total(0) + total(-step)) / step**2
        exact = sum(made.run(batch).curvature({target: d}) for batch in range(len(made.counts)))
        assert exact == pytest.approx(differences, rel=1e-3)


def test_the_divergence_as_a_loss_of_ones_own_is_the_same() -> None:
    """Gauss-Newton is the Hessian, not an approximation of it."""

    def function(outputs: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return small.divergence("logits", 1.0, reference["y"], outputs["y"]) / len(outputs["y"])

    own, made = small.net("dense", loss=function, loss_name="kl"), small.net("dense")
    for target in made.names:
        d = small.direction(made, target)
        assert own.run(0).curvature({target: d}) == pytest.approx(made.run(0).curvature({target: d}), rel=1e-9)
        first, second = own.run(0).product({target: d}), made.run(0).product({target: d})
        assert torch.allclose(first[target], second[target], rtol=1e-9, atol=1e-12)


def _raises(outputs: Any, reference: Any) -> torch.Tensor:
    raise KeyError("logits")


WRONG: list[tuple[Callable[..., Any], str]] = [
    (_raises, r"the loss 'm:f' failed on the model's outputs: 'logits'"),
    (lambda outputs, reference: 1.0, r"the loss 'm:f' must return one number .* a torch\.Tensor, got float"),
    (lambda outputs, reference: outputs["y"], r"must return one number .* got one of shape \[4, 24\]"),
    (
        lambda outputs, reference: reference["y"].sum(),
        r"must return one number .* got one that does not depend on them",
    ),
    (lambda outputs, reference: outputs["y"].sum() / 0, r"the loss 'm:f' gave -?inf on the float model's outputs"),
]


@pytest.mark.parametrize(("function", "message"), WRONG)
def test_losses_that_are_none(function: Callable[..., Any], message: str) -> None:
    made = small.net("dense", loss=function, loss_name="m:f")
    with pytest.raises(InputError, match=message):
        made.run(0).curvature({made.names[0]: small.direction(made, made.names[0])})


def test_losses_are_imported_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "losses_of_mine.py").write_text("def mine(outputs, reference): return 3\nnumber = 4\n")
    monkeypatch.chdir(tmp_path)
    assert import_function("losses_of_mine:mine", "loss")({}, {}) == 3
    with pytest.raises(InputError, match="the loss 'losses_of_mine:number' is no function but int"):
        import_function("losses_of_mine:number", "loss")
    with pytest.raises(InputError, match="the loss 'no_such:f' cannot be imported: No module named 'no_such'"):
        import_function("no_such:f", "loss")


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    made = small.probe("dense")
    with opened(made, list(made.targets), None, "") as inside:
        assert torch.get_num_threads() == made.threads and inside.samples == 7
    assert torch.get_num_threads() == before


def test_rounding_errors_come_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    made = small.problem("dense")
    units = units_of(made)
    whole = [entry for held in _inputs.portions(made, units) for entry in held]
    assert [(entry.unit, entry.option) for entry in whole] == [
        (unit, option) for unit in (0, 1) for option in (0, 1, 2)
    ]
    error = whole[0].errors[units[0].members[0]]
    target = made.targets[units[0].members[0]]
    assert np.array_equal(error, small.rounded(target, units[0].options[0][target.name]).dequantize() - target.load())
    monkeypatch.setattr(_inputs, "LIVE_BYTES", 2500)  # two of 1 KiB, one of 1.5 KiB
    sizes = [len(held) for held in _inputs.portions(made, units)]
    assert sizes == [2, 1, 1, 1, 1]
