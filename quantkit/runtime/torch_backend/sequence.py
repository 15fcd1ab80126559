"""Sequences are Python lists, optionals are their value or None; nothing is changed in place."""

from __future__ import annotations

import torch

from quantkit.runtime.torch_backend._types import Node, Op, Run, Table, Value, direct, ints

Tensors = list[torch.Tensor]


def _at(sequence: Tensors, position: torch.Tensor) -> torch.Tensor:
    return sequence[int(position)]


def _erase(sequence: Tensors, position: torch.Tensor | None = None) -> Tensors:
    place = (-1 if position is None else int(position)) % len(sequence)
    return [*sequence[:place], *sequence[place + 1 :]]


def _insert(sequence: Tensors, tensor: torch.Tensor, position: torch.Tensor | None = None) -> Tensors:
    place = len(sequence) if position is None else int(position)
    return [*sequence[:place], tensor, *sequence[place:]]


def _concat(node: Node) -> Run:
    axis, join = node.get("axis"), torch.stack if node.get("new_axis", 0) else torch.cat
    return lambda sequence: join(list(sequence), axis)


def _split(node: Node) -> Run:
    """Pieces of one length (a scalar) or of given lengths; without lengths single slices, with or without the axis."""
    axis, keep = node.get("axis", 0), bool(node.get("keepdims", 1))

    def run(x: torch.Tensor, split: torch.Tensor | None = None) -> Tensors:
        length = x.shape[axis]
        if split is None:
            return list(x.split_with_sizes([1] * length, axis) if keep else x.unbind(axis))
        step = int(split) if split.ndim == 0 else 0
        sizes = [min(step, length - start) for start in range(0, length, step)] if step else ints(split)
        return list(x.split_with_sizes(sizes, axis))

    return run


def _optional(node: Node) -> Run:
    return lambda value=None: value


def _element(node: Node) -> Run:
    return lambda value: value


def _has_element(value: Value = None) -> torch.Tensor:
    return torch.tensor(value is not None)


TABLE: Table = {
    ("ConcatFromSequence", 11): Op(_concat),
    ("Optional", 15): Op(_optional),
    ("OptionalGetElement", 15): Op(_element),
    ("OptionalHasElement", 15): Op(lambda node: _has_element, to_host=True),
    ("SequenceAt", 11): Op(lambda node: _at, host=(1,)),
    ("SequenceConstruct", 11): direct(lambda *tensors: list(tensors)),
    ("SequenceEmpty", 11): direct(list),
    ("SequenceErase", 11): Op(lambda node: _erase, host=(1,)),
    ("SequenceInsert", 11): Op(lambda node: _insert, host=(2,)),
    ("SequenceLength", 11): Op(lambda node: lambda sequence: torch.tensor(len(sequence)), to_host=True),
    ("SplitToSequence", 11): Op(_split, host=(1,)),
}
