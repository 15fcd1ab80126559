"""Where sliding windows lie: what convolutions and poolings share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.runtime.torch_backend._types import Node

AUTO_PADS = ("NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID")


def auto_pad(node: Node) -> str:
    """How pads are chosen; NOTSET = by the attribute `pads`."""
    chosen = str(node.get("auto_pad", "NOTSET"))
    if chosen not in AUTO_PADS:
        raise node.refuse(f"auto_pad {chosen!r} is none of {', '.join(AUTO_PADS)}")
    return chosen


def per_axis(node: Node, name: str, rank: int, default: int = 1) -> tuple[int, ...]:
    """One number for every spatial axis."""
    values = tuple(int(value) for value in node.get(name) or (default,) * rank)
    if len(values) != rank:
        raise node.refuse(f"{name} has {len(values)} values for {rank} spatial axes")
    return values


def explicit_pads(node: Node, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Pads before and after every axis; an automatic choice starts from none."""
    pads = tuple(int(pad) for pad in node.get("pads") or (0,) * (2 * rank))
    if len(pads) != 2 * rank:
        raise node.refuse(f"pads has {len(pads)} values for {rank} spatial axes")
    if auto_pad(node) != "NOTSET":
        pads = (0,) * (2 * rank)
    return pads[:rank], pads[rank:]


def same_pads(
    lengths: Sequence[int], extents: Sequence[int], strides: Sequence[int], upper: bool, lowest: int | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Pads that make ceil(length / stride) windows of these extents; the odd one after if `upper`, else before.

    Args:
        lowest: of both pads together. Where strides jump over elements poolings drop some on both sides (None),
            convolutions do not (0).
    """
    before, after = [], []
    for length, extent, stride in zip(lengths, extents, strides, strict=True):
        total = (-(-length // stride) - 1) * stride + extent - length
        total = total if lowest is None else max(lowest, total)
        # Towards zero, as onnxruntime halves negative ones.
        low = int(total / 2) if upper else int((total + 1) / 2)
        before.append(low)
        after.append(total - low)
    return tuple(before), tuple(after)


def flat_pads(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """As torch's pad takes them: last axis first."""
    return [pad for pair in zip(reversed(before), reversed(after), strict=True) for pad in pair]


@dataclass(frozen=True)
class Windows:
    """Windows of a pooling; one number per spatial axis.

    Attributes:
        kernel: elements of a window.
        before, after: pads where `auto` is NOTSET.
        auto: as ONNX names it.
        ceil: a last window may reach beyond the pads (never start there).
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    auto: str
    ceil: bool

    @property
    def extents(self) -> tuple[int, ...]:
        """From a window's first element to its last."""
        return tuple((size - 1) * step + 1 for size, step in zip(self.kernel, self.dilations, strict=True))

    @property
    def fixed(self) -> bool:
        """Whether the pads do not depend on the input."""
        return self.auto in ("NOTSET", "VALID")

    def torch_has(self, before: Sequence[int], after: Sequence[int]) -> bool:
        """Whether torch's poolings know these pads: as many on both sides, at most half a window."""
        return all(
            low == high and 0 <= low <= size // 2 for low, high, size in zip(before, after, self.kernel, strict=True)
        )

    def pads(self, lengths: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Before and after, as ONNX counts them."""
        if self.fixed:
            return self.before, self.after
        return same_pads(lengths, self.extents, self.strides, self.auto == "SAME_UPPER")

    def reach(self, lengths: Sequence[int], before: Sequence[int], after: Sequence[int]) -> list[int]:
        """Pads after every axis such that the windows end exactly where the padded input does; negative = unread."""
        found = []
        for length, low, high, extent, stride in zip(lengths, before, after, self.extents, self.strides, strict=True):
            room = length + low + high - extent
            count = (-(-room // stride) if self.ceil else room // stride) + 1
            if self.ceil and (count - 1) * stride >= length + low:
                count -= 1
            found.append((count - 1) * stride + extent - length - low)
        return found


def windows_of(node: Node) -> Windows:
    """From a pooling's attributes."""
    kernel = tuple(int(size) for size in node.get("kernel_shape"))
    rank = len(kernel)
    before, after = explicit_pads(node, rank)
    return Windows(
        kernel,
        per_axis(node, "strides", rank),
        per_axis(node, "dilations", rank),
        before,
        after,
        auto_pad(node),
        bool(node.get("ceil_mode", 0)),
    )
