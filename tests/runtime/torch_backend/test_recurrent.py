"""RNN, GRU and LSTM: like onnxruntime in the combinations that it runs; one result on both paths; derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from quantkit.errors import InputError
from quantkit.runtime.torch_backend import to_torch
from tests.runtime.torch_backend.single_node import Array, Case, by_onnxruntime, by_torch, check_derivatives

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
TIME, BATCH, INPUT, HIDDEN = 4, 3, 2, 5
LENGTHS = np.array([4, 2, 3], dtype=np.int32)


def layer(
    op: str,
    direction: str = "forward",
    *,
    given: Sequence[str] = ("bias",),
    size: Sequence[int] = (TIME, BATCH, INPUT, HIDDEN),
    outputs: int | Sequence[int] | None = None,
    label: str = "",
    opset: int = 21,
    **attributes: Any,
) -> Case:
    """A layer with some of the optional inputs: bias, lengths, states, peepholes."""
    time, batch, width, hidden = size
    generator = np.random.default_rng(len(label) + 7)
    directions, gates = 2 if direction == "bidirectional" else 1, GATES[op]

    def some(name: str, *shape: int) -> Array | None:
        return generator.normal(size=shape).astype(np.float32) * 0.5 if name in given else None

    state = (batch, directions, hidden) if attributes.get("layout") else (directions, batch, hidden)
    inputs: list[Any] = [
        generator.normal(size=(batch, time, width) if attributes.get("layout") else (time, batch, width)),
        generator.normal(size=(directions, gates * hidden, width)) * 0.5,
        generator.normal(size=(directions, gates * hidden, hidden)) * 0.5,
        some("bias", directions, 2 * gates * hidden),
        LENGTHS[:batch] if "lengths" in given else None,
        some("states", *state),
    ]
    if op == "LSTM":
        inputs += [some("states", *state), some("peepholes", directions, 3 * hidden)]
    inputs = [item.astype(np.float32) if item is not None and item.dtype.kind == "f" else item for item in inputs]
    attributes |= {"direction": direction, "hidden_size": hidden}
    name = "-".join([direction, *given, label])
    return Case(op, inputs, attributes, outputs or (3 if op == "LSTM" else 2), opset=opset, label=name)


DIRECTIONS = ("forward", "reverse", "bidirectional")
EVERYTHING = {
    "RNN": ("bias", "lengths", "states"),
    "GRU": ("bias", "lengths", "states"),
    "LSTM": ("bias", "lengths", "states", "peepholes"),
}
CASES = [
    *(layer(op, direction) for op in GATES for direction in DIRECTIONS),
    *(layer(op, direction, given=EVERYTHING[op]) for op in GATES for direction in DIRECTIONS),
    *(layer(op, "bidirectional", given=("states",)) for op in GATES),
    *(layer(op, "reverse", given=()) for op in GATES),
    *(layer("GRU", direction, linear_before_reset=1, given=("bias", "states")) for direction in DIRECTIONS),
    layer("GRU", linear_before_reset=1, given=("lengths",), label="linear"),
    layer("LSTM", clip=0.3, label="clip"),
    layer("LSTM", input_forget=1, given=("bias", "peepholes"), label="coupled"),
    layer("GRU", clip=0.2, label="clip"),
    layer("RNN", clip=0.2, label="clip"),
    layer("RNN", activations=["Relu"], label="relu"),
    layer("LSTM", activations=["HardSigmoid", "Softsign", "Tanh"], label="soft"),
    layer("LSTM", outputs=(0, 1, 0), label="last"),
    layer("LSTM", "reverse", outputs=(1, 0, 0), label="first"),
    layer(
        "GRU",
        "bidirectional",
        activations=["HardSigmoid", "LeakyRelu", "Sigmoid", "ScaledTanh"],
        activation_alpha=[0.3, 0.1, 0.7],
        activation_beta=[0.4, 1.2],
        label="numbers",
    ),
    layer("RNN", "bidirectional", activations=["Elu", "ThresholdedRelu"], activation_alpha=[0.5, 0.1], label="elu"),
    layer("RNN", activations=["Affine"], activation_alpha=[0.5], activation_beta=[0.1], label="affine"),
    layer("RNN", activations=["Softplus"], label="softplus"),
    layer("GRU", opset=7, label="7"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_like_onnxruntime(case: Case) -> None:
    expected, found = by_onnxruntime(case), by_torch(case)
    assert len(expected) == len(found)
    for wanted, got in zip(expected, found, strict=True):
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("op", GATES)
def test_fused_and_plain_paths_agree(op: str, direction: str) -> None:
    """The fused kernels run without gradients only."""
    extra = {"linear_before_reset": 1} if op == "GRU" else {}
    case = layer(op, direction, given=("bias", "states"), **extra)
    module = to_torch(case.model(), dtype=torch.float64)
    feeds = {name: torch.from_numpy(value).double() for name, value in case.feeds().items()}
    with torch.no_grad():
        fused = module.run(feeds)
    plain = module.run(feeds)
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", GATES)
def test_batch_first_is_the_same_layer(op: str) -> None:
    first = layer(op, "bidirectional", given=("bias", "states"), layout=1)
    inputs = [item.swapaxes(0, 1).copy() if place in (0, 5, 6) else item for place, item in enumerate(first.inputs[:7])]
    inputs = inputs[: len(first.inputs)]
    last = Case(op, inputs, {**first.attributes, "layout": 0}, first.outputs)
    Y, *states = by_torch(last)
    found = by_torch(first)
    np.testing.assert_allclose(found[0], Y.transpose(2, 0, 1, 3), rtol=1e-6, atol=1e-7)
    for got, state in zip(found[1:], states, strict=True):
        np.testing.assert_allclose(got, state.swapaxes(0, 1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("op", GATES)
def test_no_steps_leave_the_state(op: str) -> None:
    case = layer(op, given=("states",), size=(0, 2, 3, 2))
    found = by_torch(case)
    assert found[0].shape == (0, 1, 2, 2)
    np.testing.assert_array_equal(found[1], case.inputs[5])


SMALL = (3, 2, 2, 1)


@pytest.mark.parametrize(
    "case",
    [
        layer("RNN", "bidirectional", given=EVERYTHING["RNN"], size=SMALL),
        layer("GRU", "reverse", given=EVERYTHING["GRU"], size=SMALL),
        layer("GRU", linear_before_reset=1, size=SMALL),
        layer("LSTM", "reverse", given=EVERYTHING["LSTM"], size=SMALL),
        layer("LSTM", input_forget=1, given=(), size=SMALL, layout=1),
    ],
    ids=str,
)
def test_derivatives(case: Case) -> None:
    check_derivatives(case)


def test_refused_attributes() -> None:
    with pytest.raises(InputError, match=r"LSTM 'the_node': it does not know the activation 'Cosine'"):
        to_torch(layer("LSTM", activations=["Cosine", "Tanh", "Tanh"]).model())
    with pytest.raises(InputError, match=r"GRU 'the_node': it needs 4 activations, got 2"):
        to_torch(layer("GRU", "bidirectional", activations=["Sigmoid", "Tanh"]).model())
    with pytest.raises(InputError, match=r"direction 'up' is none of forward, reverse and bidirectional"):
        to_torch(layer("RNN", "up").model())
