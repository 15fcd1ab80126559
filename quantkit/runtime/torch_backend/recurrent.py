"""RNN, GRU and LSTM: every direction, activation, length and layout; torch's fused kernels where they can do it.

Names as in ONNX's documents: W [directions, gates * hidden, input], R [directions, gates * hidden, hidden],
B [directions, 2 * gates * hidden], X [time, batch, input], Y [time, directions, batch, hidden].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from quantkit.runtime.torch_backend._named import Activation, activations
from quantkit.runtime.torch_backend._types import Node, Op, Run, Table

State = tuple[torch.Tensor, ...]
"""(h,), or (h, c) of an LSTM: [batch, hidden] each."""
Cell = Callable[[torch.Tensor, State], State]
"""(W x_t and biases [batch, gates * hidden], state) -> next state."""

DEFAULT_ACTIVATIONS = {"RNN": ("Tanh",), "GRU": ("Sigmoid", "Tanh"), "LSTM": ("Sigmoid", "Tanh", "Tanh")}


@dataclass(frozen=True)
class Weights:
    """One direction. `peepholes` [3 * hidden] of an LSTM: input, output, forget gate."""

    recurrent: torch.Tensor
    recurrent_bias: torch.Tensor | None
    peepholes: torch.Tensor | None


@dataclass(frozen=True)
class Settings:
    """Attributes that the cells read."""

    op: str
    clip: float | None
    linear_before_reset: bool
    input_forget: bool

    def clipped(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.clip is None else x.clamp(-self.clip, self.clip)


def _rnn_cell(settings: Settings, weights: Weights, functions: Sequence[Activation]) -> Cell:
    (f,) = functions
    R = weights.recurrent.t()

    def step(x: torch.Tensor, state: State) -> State:
        return (f(settings.clipped(torch.addmm(x, state[0], R))),)

    return step


def _gru_cell(settings: Settings, weights: Weights, functions: Sequence[Activation]) -> Cell:
    """Gates: update z, reset r, hidden h."""
    f, g = functions
    hidden = weights.recurrent.shape[1]
    R_zr, R_h = weights.recurrent[: 2 * hidden].t(), weights.recurrent[2 * hidden :].t()
    bias = None if weights.recurrent_bias is None else weights.recurrent_bias[2 * hidden :]

    def step(x: torch.Tensor, state: State) -> State:
        h = state[0]
        z, r = f(settings.clipped(torch.addmm(x[:, : 2 * hidden], h, R_zr))).chunk(2, 1)
        inner = r * functional.linear(h, R_h.t(), bias) if settings.linear_before_reset else (r * h) @ R_h
        candidate = g(settings.clipped(x[:, 2 * hidden :] + inner))
        return ((1 - z) * candidate + z * h,)

    return step


def _lstm_cell(settings: Settings, weights: Weights, functions: Sequence[Activation]) -> Cell:
    """Gates: input i, output o, forget f, cell c."""
    f, g, h = functions
    R = weights.recurrent.t()
    peepholes = (None,) * 3 if weights.peepholes is None else weights.peepholes.chunk(3)

    def step(x: torch.Tensor, state: State) -> State:
        hidden, cell = state
        i, o, forget, c = torch.addmm(x, hidden, R).chunk(4, 1)
        i = f(settings.clipped(_peeped(i, cell, peepholes[0])))
        kept = 1 - i if settings.input_forget else f(settings.clipped(_peeped(forget, cell, peepholes[2])))
        cell = kept * cell + i * g(settings.clipped(c))
        o = f(settings.clipped(_peeped(o, cell, peepholes[1])))
        return o * h(cell), cell  # onnxruntime clips the gates, not the cell

    return step


def _peeped(gate: torch.Tensor, cell: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    return gate if weights is None else gate + weights * cell


CELLS = {"RNN": _rnn_cell, "GRU": _gru_cell, "LSTM": _lstm_cell}


def _swept(
    cell: Cell, inputs: torch.Tensor, state: State, backward: bool, lengths: torch.Tensor | None
) -> tuple[torch.Tensor, State]:
    """[time, batch, gates * hidden] -> ([time, batch, hidden], last state).

    With lengths, the steps beyond a sample's end leave its state alone and give zeros; a backward sweep thereby begins
    at the sample's own end.
    """
    outputs: list[torch.Tensor] = []
    for t in reversed(range(len(inputs))) if backward else range(len(inputs)):
        new = cell(inputs[t], state)
        if lengths is None:
            state = new
            outputs.append(new[0])
        else:
            alive = (lengths > t)[:, None]
            state = tuple(torch.where(alive, after, before) for after, before in zip(new, state, strict=True))
            outputs.append(torch.where(alive, new[0], 0))
    if backward:
        outputs.reverse()
    return torch.stack(outputs) if outputs else inputs.new_zeros(0, *state[0].shape), state


def _input_part(
    settings: Settings, X: torch.Tensor, W: torch.Tensor, B: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[time, batch, gates * hidden] of all steps at once, and the recurrent bias where the cell needs it alone."""
    if B is None:
        return functional.linear(X, W), None
    bias, recurrent_bias = B.chunk(2)
    if settings.op == "GRU" and settings.linear_before_reset:
        outer = 2 * len(bias) // 3
        return functional.linear(X, W, torch.cat([bias[:outer] + recurrent_bias[:outer], bias[outer:]])), recurrent_bias
    return functional.linear(X, W, bias + recurrent_bias), None


def _fused(
    op: str, X: torch.Tensor, W: torch.Tensor, R: torch.Tensor, B: torch.Tensor | None, states: State
) -> tuple[torch.Tensor, State]:
    """torch's kernel: [time, batch, directions * hidden] and the last states [directions, batch, hidden]."""
    hidden = R.shape[-1]
    parameters: list[torch.Tensor] = []
    for direction in range(len(W)):
        parameters += [_torch_order(op, W[direction], hidden), _torch_order(op, R[direction], hidden)]
        if B is not None:
            parameters += [_torch_order(op, part, hidden) for part in B[direction].chunk(2)]
    # has biases, layers, dropout, training, bidirectional, batch first
    options = (B is not None, 1, 0.0, False, len(W) == 2, False)
    if op == "LSTM":
        Y, h, c = torch.lstm(X, list(states), parameters, *options)
        return Y, (h, c)
    run = torch.gru if op == "GRU" else torch.rnn_tanh
    Y, h = run(X, states[0], parameters, *options)
    return Y, (h,)


def _torch_order(op: str, rows: torch.Tensor, hidden: int) -> torch.Tensor:
    """LSTM iofc -> ifco, GRU zrh -> rzh."""
    if op == "RNN":
        return rows
    parts = rows.split_with_sizes([hidden] * (len(rows) // hidden))
    order = (0, 2, 3, 1) if op == "LSTM" else (1, 0, 2)
    return torch.cat([parts[index] for index in order])


@dataclass(frozen=True)
class Layer:
    """What the attributes say.

    Attributes:
        backward: one entry per direction.
        functions: activations of each direction.
        plain: nothing that torch's kernels do not know.
    """

    settings: Settings
    backward: tuple[bool, ...]
    functions: tuple[tuple[Activation, ...], ...]
    plain: bool

    def sweep(
        self, X: torch.Tensor, tensors: Sequence[torch.Tensor | None], lengths: torch.Tensor | None, states: State
    ) -> tuple[torch.Tensor, State]:
        """[time, directions, batch, hidden] and the last states [directions, batch, hidden]."""
        W, R, B, P = tensors
        assert W is not None and R is not None
        ys, ends = [], []
        for d, backward in enumerate(self.backward):
            inputs, recurrent_bias = _input_part(self.settings, X, W[d], None if B is None else B[d])
            weights = Weights(R[d], recurrent_bias, None if P is None else P[d])
            cell = CELLS[self.settings.op](self.settings, weights, self.functions[d])
            y, end = _swept(cell, inputs, tuple(state[d] for state in states), backward, lengths)
            ys.append(y)
            ends.append(end)
        return torch.stack(ys, 1), tuple(torch.stack(part) for part in zip(*ends, strict=True))


def _layer(node: Node) -> Layer:
    op, direction = node.op, str(node.get("direction", "forward"))
    backward = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}.get(direction)
    if backward is None:
        raise node.refuse(f"direction {direction!r} is none of forward, reverse and bidirectional")
    default = DEFAULT_ACTIVATIONS[op] * len(backward)
    names = tuple(str(name) for name in node.get("activations") or default)
    if len(names) != len(default):
        raise node.refuse(f"it needs {len(default)} activations, got {len(names)}")
    functions = activations(node, names, node.get("activation_alpha") or (), node.get("activation_beta") or ())
    each = len(DEFAULT_ACTIVATIONS[op])
    settings = Settings(
        op, node.get("clip"), bool(node.get("linear_before_reset", 0)), bool(node.get("input_forget", 0))
    )
    usual = [name.lower() for name in names] == [name.lower() for name in default]
    plain = usual and settings.clip is None and not settings.input_forget
    plain = plain and (op != "GRU" or settings.linear_before_reset)
    parts = tuple(tuple(functions[d * each : (d + 1) * each]) for d in range(len(backward)))
    return Layer(settings, backward, parts, plain)


def _recurrent(node: Node) -> Run:
    layer, batch_first, outputs = _layer(node), bool(node.get("layout", 0)), len(node.output_types)
    op, directions = node.op, len(layer.backward)

    def run(
        X: torch.Tensor,
        W: torch.Tensor,
        R: torch.Tensor,
        B: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        h: torch.Tensor | None = None,
        c: torch.Tensor | None = None,
        P: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        X = X.transpose(0, 1) if batch_first else X
        states = _initial((h, c) if op == "LSTM" else (h,), X, R, batch_first)
        # The fused kernels have no second derivative everywhere.
        if layer.plain and lengths is None and P is None and len(X) and not torch.is_grad_enabled():
            flipped = layer.backward == (True,)
            Y, ends = _fused(op, X.flip(0) if flipped else X, W, R, B, states)
            Y = torch.unflatten(Y.flip(0) if flipped else Y, 2, (directions, -1)).transpose(1, 2)
        else:
            Y, ends = layer.sweep(X, (W, R, B, P), lengths, states)
        if batch_first:
            Y, ends = Y.permute(2, 0, 1, 3), tuple(end.transpose(0, 1) for end in ends)
        return Y if outputs == 1 else (Y, *ends)

    return run


def _initial(given: Sequence[torch.Tensor | None], X: torch.Tensor, R: torch.Tensor, batch_first: bool) -> State:
    """[directions, batch, hidden] each; zeros where absent."""
    states = []
    for state in given:
        if state is None:
            states.append(X.new_zeros(len(R), X.shape[1], R.shape[-1]))
        else:
            states.append(state.transpose(0, 1).contiguous() if batch_first else state)
    return tuple(states)


TABLE: Table = {("GRU", 1): Op(_recurrent), ("LSTM", 1): Op(_recurrent), ("RNN", 1): Op(_recurrent)}
