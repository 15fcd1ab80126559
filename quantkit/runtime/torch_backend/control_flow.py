"""If, Loop and Scan: Python control flow around compiled subgraphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from quantkit.runtime.torch_backend._types import Node, Op, Run, Table, Value, ints


def _results(values: Sequence[Value]) -> Value:
    return values[0] if len(values) == 1 else tuple(values)


def _if(node: Node) -> Run:
    then_branch, else_branch = node.body("then_branch"), node.body("else_branch")

    def run(condition: torch.Tensor, *captured: Value) -> Value:
        return _results((then_branch if bool(condition) else else_branch)([], captured))

    return run


def _stacked(values: Sequence[torch.Tensor], axis: int, dtype: torch.dtype) -> torch.Tensor:
    """One more axis; without any value nobody knows the others."""
    return torch.stack(list(values), axis) if values else torch.empty(0, dtype=dtype)


def _output_dtype(node: Node, position: int) -> torch.dtype:
    dtype = node.output_types[position] if position < len(node.output_types) else None
    return torch.float32 if dtype is None else node.dtypes(dtype)


def _loop(node: Node) -> Run:
    """The subgraph maps (iteration, condition, states) to (condition, states, one element of every scan output)."""
    body = node.body("body")

    def run(*args: Value) -> Value:
        count = len(args) - node.num_captured
        formal, captured = args[:count], args[count:]
        trips = formal[0] if count > 0 else None
        going = formal[1] if count > 1 else None
        endless, limit = going is None, None if trips is None else ints(trips)[0]
        states = list(formal[2:])
        scans: list[list[Value]] = [[] for _ in range(len(node.output_types) - len(states))]
        step = 0
        if endless:
            going = torch.tensor(True)
        # Without a condition what the body says of it is not even read: to look would wait for the device.
        while (limit is None or step < limit) and (endless or bool(going)):
            going, *rest = body([torch.tensor(step), going, *states], captured)
            states = rest[: len(states)]
            for scan, value in zip(scans, rest[len(states) :], strict=False):
                scan.append(value)
            step += 1
        first = len(states)
        stacked = [_stacked(scan, 0, _output_dtype(node, first + k)) for k, scan in enumerate(scans)]
        return _results([*states, *stacked])

    return run


def _scan(node: Node) -> Run:
    """Opset 9 and later: (states, scanned inputs) -> (states, stacked outputs), axes and directions by attributes."""
    scanned_count = int(node.get("num_scan_inputs"))
    iterate = _iteration(node, scanned_count, node.get("scan_input_directions"))

    def run(*args: Value) -> Value:
        count = len(args) - node.num_captured
        states, scanned = args[: count - scanned_count], args[count - scanned_count : count]
        axes = node.get("scan_input_axes") or [0] * scanned_count
        columns = [value.movedim(axis, 0) for value, axis in zip(scanned, axes, strict=True)]
        length = columns[0].shape[0]
        ends, lists = iterate(states, columns, length, args[count:])
        out_axes = node.get("scan_output_axes") or [0] * len(lists)
        backwards = node.get("scan_output_directions") or [0] * len(lists)
        outputs = []
        for k, (values, axis, backward) in enumerate(zip(lists, out_axes, backwards, strict=True)):
            outputs.append(_stacked(values[::-1] if backward else values, axis, _output_dtype(node, len(states) + k)))
        return _results([*ends, *outputs])

    return run


def _scan_8(node: Node) -> Run:
    """Opset 8: batch axis 0, scanned axis 1, and an own length for every sample; outputs beyond it are zero."""
    scanned_count = int(node.get("num_scan_inputs"))
    iterate = _iteration(node, scanned_count, node.get("directions"))

    def run(lengths: torch.Tensor | None, *args: Value) -> Value:
        count = len(args) - node.num_captured
        states, scanned = args[: count - scanned_count], args[count - scanned_count : count]
        batch, longest = scanned[0].shape[:2]
        steps = [longest] * batch if lengths is None else ints(lengths)
        rows = []
        for sample, length in enumerate(steps):
            own = [value[sample] for value in scanned]
            ends, lists = iterate([state[sample] for state in states], own, length, args[count:])
            for values in lists:
                values += [torch.zeros_like(values[0])] * (longest - length)
            rows.append([*ends, *(torch.stack(values) for values in lists)])
        return _results([torch.stack(column) for column in zip(*rows, strict=True)])

    return run


_Iteration = Callable[
    [Sequence[Value], Sequence[torch.Tensor], int, Sequence[Value]], tuple[list[Value], list[list[Value]]]
]


def _iteration(node: Node, scanned_count: int, directions: Sequence[int] | None) -> _Iteration:
    """(states, scanned inputs with the scanned axis first, length, captured) -> last states, lists of outputs."""
    body = node.body("body")
    backwards = directions or [0] * scanned_count

    def iterate(
        states: Sequence[Value], columns: Sequence[torch.Tensor], length: int, captured: Sequence[Value]
    ) -> tuple[list[Value], list[list[Value]]]:
        current = list(states)
        lists: list[list[Value]] = [[] for _ in range(len(node.output_types) - len(current))]
        for step in range(length):
            pairs = zip(columns, backwards, strict=True)
            elements = [column[length - 1 - step if backward else step] for column, backward in pairs]
            results = body([*current, *elements], captured)
            current = results[: len(current)]
            for values, value in zip(lists, results[len(current) :], strict=True):
                values.append(value)
        return current, lists

    return iterate


TABLE: Table = {
    ("If", 1): Op(_if, host=(0,)),
    ("Loop", 1): Op(_loop, host=(0, 1)),
    ("Scan", 8): Op(_scan_8, host=(0,)),
    ("Scan", 9): Op(_scan),
}
