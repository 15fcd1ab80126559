"""Which channel every element of a value belongs to, followed through operators that let a scale pass.

Channels of a value are an integer array that broadcasts against it: size 1 along axes that all channels share.

    Conv          [batch, C, H, W]        channels [1, C, 1, 1]
    Linear        [batch, seq, 12 * 32]   channels [1, 1, 384]
    Reshape       [batch, seq, 12, 32]    channels [1, 1, 12, 32]
    Transpose     [batch, 12, seq, 32]    channels [1, 12, 1, 32]

An operator lets scales pass when f(x / s) = f(x) / s for s > 0 that differ by channel: it is positively homogeneous,
mixes no two channels, and every one of its results says which channel it belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from quantkit.graph._integer import clip_range
from quantkit.graph._trace import is_constant

Channels = npt.NDArray[np.int64]
Dim = int | str | None
"""A number, a symbol's name, or unknown."""
DEFAULT_DOMAINS = ("", "ai.onnx")


class BlockedError(Exception):
    """A scale cannot pass; the text says where and why."""


def label(node: ir.Node) -> str:
    return f"{node.op_type} '{node.name}'"


def pass_through(node: ir.Node, index: int, channels: Channels) -> list[tuple[ir.Value, Channels]]:
    """What the node makes of a value whose channels are known.

    Args:
        node: it.
        index: which of its inputs the value is.
        channels: of the value, one axis for each of its axes.

    Returns:
        Every result that carries the channels on, with them.

    Raises:
        BlockedError: no scale passes here.
    """
    step = _STEPS.get(node.op_type) if node.domain in DEFAULT_DOMAINS else None
    if step is None:
        raise BlockedError(f"{label(node)} lets no scale through")
    made = step(node, index, channels)
    results = made if isinstance(made, list) else [made]
    return list(zip(node.outputs, results, strict=False))


def lets_through(node: ir.Node) -> bool:
    """May a scale pass this kind of operator at all?"""
    return node.domain in DEFAULT_DOMAINS and node.op_type in _STEPS


def shape_of(value: ir.Value | None, node: ir.Node) -> tuple[Dim, ...]:
    """Its dimensions.

    Raises:
        BlockedError: the rank is unknown.
    """
    if value is None or value.shape is None:
        raise BlockedError(f"the shapes at {label(node)} are unknown")
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)


def aligned(channels: Channels, rank: int) -> Channels:
    """The channels with leading axes added, as broadcasting does."""
    return channels.reshape((1,) * (rank - channels.ndim) + channels.shape)


def numbers(node: ir.Node, name: str, index: int) -> list[int] | None:
    """A list of integers that is an attribute in old opsets and a constant input in new ones; None when absent.

    Raises:
        BlockedError: it is computed.
    """
    if name in node.attributes:
        return list(node.attributes[name].as_ints())
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return None
    if not is_constant(value) or value.const_value is None:
        raise BlockedError(f"{label(node)} computes its {name}")
    return [int(number) for number in value.const_value.numpy().reshape(-1)]


def _only_data(node: ir.Node, index: int) -> None:
    if index != 0:
        raise BlockedError(f"{label(node)} reads it as something else than data")


def _same(node: ir.Node, index: int, channels: Channels) -> Channels:
    _only_data(node, index)
    return channels


def _clip(node: ir.Node, index: int, channels: Channels) -> Channels:
    _only_data(node, index)
    if clip_range(node) != (0.0, float("inf")):
        raise BlockedError(f"{label(node)} has one bound for all channels")
    return channels


def _spatial(node: ir.Node, index: int, channels: Channels) -> Channels:
    """Pooling and resizing: channels lie on axis 1 (or 0), space behind."""
    _only_data(node, index)
    mode = "coordinate_transformation_mode"
    cuts = mode in node.attributes and node.attributes[mode].as_string() == "tf_crop_and_resize"
    if any(size != 1 for size in channels.shape[2:]) or cuts:
        raise BlockedError(f"{label(node)} mixes channels")
    if node.op_type == "Resize" and shape_of(node.outputs[0], node)[:2] != shape_of(node.inputs[0], node)[:2]:
        raise BlockedError(f"{label(node)} mixes channels")
    return channels


def _reduce(node: ir.Node, index: int, channels: Channels) -> Channels:
    """Mean, sum, maximum or minimum over axes that all channels share."""
    _only_data(node, index)
    given = numbers(node, "axes", 1)
    axes = tuple(axis % channels.ndim for axis in given) if given else tuple(range(channels.ndim))
    if any(channels.shape[axis] != 1 for axis in axes):
        raise BlockedError(f"{label(node)} mixes channels")
    keep = "keepdims" not in node.attributes or node.attributes["keepdims"].as_int() == 1
    return channels if keep else channels.squeeze(axes)


def _factor(node: ir.Node, index: int, channels: Channels) -> Channels:
    """Mul by anything that does not carry the scale itself; Div by anything."""
    if node.op_type == "Div":
        _only_data(node, index)
    return aligned(channels, len(shape_of(node.outputs[0], node)))


def _transpose(node: ir.Node, index: int, channels: Channels) -> Channels:
    given = numbers(node, "perm", len(node.inputs))
    return channels.transpose(given if given is not None else tuple(reversed(range(channels.ndim))))


def _reshape(node: ir.Node, index: int, channels: Channels) -> Channels:
    _only_data(node, index)
    return reshaped(channels, shape_of(node.inputs[0], node), shape_of(node.outputs[0], node), node)


def reshaped(channels: Channels, before: Sequence[Dim], after: Sequence[Dim], node: ir.Node) -> Channels:
    """The channels of a reshaped value, whose dimensions may be symbols.

    From the right, both shapes are cut into blocks of equally many elements until all channels lie behind the cut:

        [batch, seq, 384] -> [batch, seq, 12, 32]     384 = 12 * 32
    """
    after = _named(before, after)
    first = next((axis for axis, size in enumerate(channels.shape) if size != 1), len(before))
    left, right = len(before), len(after)
    blocks: list[tuple[slice, slice]] = []
    while left > first:
        old, new = left, right
        left -= 1
        have: Dim = before[left]
        want: Dim = 1
        while have != want or have is None:
            if right > 0 and (want == 1 or (isinstance(have, int) and isinstance(want, int) and want < have)):
                right -= 1
                want = _times(want, after[right])
            elif left > 0 and isinstance(have, int) and isinstance(want, int) and have < want:
                left -= 1
                have = _times(have, before[left])
            else:
                raise BlockedError(f"{label(node)} re-arranges channels among dimensions of unknown size")
        blocks.append((slice(left, old), slice(right, new)))
    return _from_blocks(channels, before, after, blocks, right)


def _named(before: Sequence[Dim], after: Sequence[Dim]) -> list[Dim]:
    """The new dimensions; one that shape inference could not name (-1) gets the only name that is left for it.

    [B, 2, 2, S, 8] -> [B, 4, ?, 8]     B = B, 2 * 2 * 8 = 4 * 8, so ? = S
    """
    named = list(after)
    symbols = [dim for dim in before if not isinstance(dim, int)]
    unknown = []
    for axis, dim in enumerate(after):
        if isinstance(dim, int):
            continue
        if dim in symbols:
            symbols.remove(dim)
        else:
            unknown.append(axis)
    sizes = [math.prod(dim for dim in dims if isinstance(dim, int)) for dims in (before, after)]
    if len(symbols) == len(unknown) == 1 and sizes[0] == sizes[1]:
        named[unknown[0]] = symbols[0]
    return named


def _times(first: Dim, second: Dim) -> Dim:
    if first == 1:
        return second
    return first * second if isinstance(first, int) and isinstance(second, int) else None


def _from_blocks(
    channels: Channels,
    before: Sequence[Dim],
    after: Sequence[Dim],
    blocks: Sequence[tuple[slice, slice]],
    right: int,
) -> Channels:
    """Blocks come last first. A block without channels stays one axis of size 1 for each of its new dimensions."""
    wide: list[int] = [1] * channels.ndim
    target: list[int] = [1] * right
    for old, new in reversed(blocks):
        carries = any(channels.shape[axis] != 1 for axis in range(old.start, old.stop))
        for axis in range(old.start, old.stop):
            dim = before[axis]
            wide[axis] = dim if carries and isinstance(dim, int) else 1
        target += [dim if carries and isinstance(dim, int) else 1 for dim in after[new]]
    return np.broadcast_to(channels, wide).reshape(target)


def _expand(node: ir.Node, index: int, channels: Channels) -> Channels:
    _only_data(node, index)
    return aligned(channels, len(shape_of(node.outputs[0], node)))


def _split(node: ir.Node, index: int, channels: Channels) -> list[Channels]:
    _only_data(node, index)
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    axis %= channels.ndim
    if channels.shape[axis] == 1:
        return [channels] * len(node.outputs)
    sizes = [shape_of(value, node)[axis] for value in node.outputs]
    known = [size for size in sizes if isinstance(size, int)]
    if len(known) != len(sizes) or sum(known) != channels.shape[axis]:
        raise BlockedError(f"{label(node)} makes parts of unknown size")
    return np.split(channels, np.cumsum(known)[:-1], axis=axis)


def _slice(node: ir.Node, index: int, channels: Channels) -> Channels:
    _only_data(node, index)
    given = numbers(node, "axes", 3)
    axes = range(channels.ndim) if given is None else [axis % channels.ndim for axis in given]
    if all(channels.shape[axis] == 1 for axis in axes):
        return channels
    starts, ends = numbers(node, "starts", 1) or [], numbers(node, "ends", 2) or []
    steps = numbers(node, "steps", 4) or [1] * len(starts)
    cuts = [slice(None)] * channels.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if channels.shape[axis] != 1:
            if step < 0:
                raise BlockedError(f"{label(node)} reverses channels")
            cuts[axis] = slice(start, end, step)
    return channels[tuple(cuts)]


def _gather(node: ir.Node, index: int, channels: Channels) -> Channels:
    """Picking along an axis with constant indices (a fused q, k, v)."""
    _only_data(node, index)
    axis = (node.attributes["axis"].as_int() if "axis" in node.attributes else 0) % channels.ndim
    places = node.inputs[1]
    if places is None or not is_constant(places) or places.const_value is None:
        raise BlockedError(f"{label(node)} computes its indices")
    indices = places.const_value.numpy()
    if channels.shape[axis] == 1:
        indices = np.zeros((1,) * indices.ndim, np.int64)
    return np.take(channels, indices, axis=axis)


def _pad(node: ir.Node, index: int, channels: Channels) -> Channels:
    _only_data(node, index)
    pads, fill = numbers(node, "pads", 1) or [], node.inputs[2] if len(node.inputs) > 2 else None
    zero = fill is None or (fill.const_value is not None and not np.any(fill.const_value.numpy()))
    plain = len(pads) == 2 * channels.ndim and (len(node.inputs) < 4 or node.inputs[3] is None)
    widened = np.add(pads[: channels.ndim], pads[channels.ndim :]) if plain else np.ones(channels.ndim)
    if not zero or any(size != 1 and pad for size, pad in zip(channels.shape, widened, strict=True)):
        raise BlockedError(f"{label(node)} fills channels up")
    return channels


def _product(node: ir.Node, index: int, channels: Channels) -> Channels:
    """A product of two activations carries the channels that it does not sum over: of P @ V the columns of V."""
    summed = -1 if index == 0 else -2
    rank = len(shape_of(node.outputs[0], node))
    if channels.ndim < 2 or len(shape_of(node.inputs[1 - index], node)) < 2 or channels.shape[summed] != 1:
        raise BlockedError(f"{label(node)} sums over the channels")
    return aligned(channels, rank)


def _attention(node: ir.Node, index: int, channels: Channels) -> list[Channels]:
    """The operator Attention (opset 23), through v; each key-value head serves several query heads."""
    if index != 2:
        raise BlockedError(f"{label(node)} sums over the channels")
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        raise BlockedError(f"{label(node)} also returns its keys and values")
    if any(value is not None for value in node.inputs[4:6]):
        raise BlockedError(f"{label(node)} also reads earlier keys and values")
    if channels.ndim == 4:
        queries, keys = shape_of(node.inputs[0], node)[1], shape_of(node.inputs[2], node)[1]
        by_head = channels[0, :, 0, :] if channels.shape[2] == 1 else None
    else:
        queries, keys = (node.attributes[name].as_int() for name in ("q_num_heads", "kv_num_heads"))
        by_head = channels.reshape(keys, -1) if channels.shape[:2] == (1, 1) else None
    if by_head is None or not isinstance(queries, int) or not isinstance(keys, int) or channels.shape[0] != 1:
        raise BlockedError(f"{label(node)} has heads of unknown number")
    if channels.ndim == 4:
        repeated = np.repeat(by_head, queries // keys, axis=0) if by_head.shape[0] != 1 else by_head
        return [repeated[None, :, None, :]]
    return [np.repeat(by_head, queries // keys, axis=0).reshape(1, 1, -1)]


_Step = Callable[[ir.Node, int, Channels], "Channels | list[Channels]"]
_STEPS: Mapping[str, _Step] = {
    **dict.fromkeys(("Relu", "LeakyRelu", "PRelu", "Abs", "Identity", "Neg"), _same),
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool", "Resize"), _spatial),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"), _reduce),
    **dict.fromkeys(("Mul", "Div"), _factor),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    "Clip": _clip,
    "Transpose": _transpose,
    "Expand": _expand,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Pad": _pad,
    "MatMul": _product,
    "Attention": _attention,
}
