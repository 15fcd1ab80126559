"""Resize and Upsample: separable interpolation, one axis after the other; torch's own functions where they agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from quantkit.runtime.torch_backend._sampling import CUBIC, cubic, linear
from quantkit.runtime.torch_backend._types import Node, Op, Run, Table, ints

MODES = ("nearest", "linear", "cubic")
COORDINATES = (
    "half_pixel",
    "half_pixel_symmetric",
    "pytorch_half_pixel",
    "align_corners",
    "asymmetric",
    "tf_crop_and_resize",
    "tf_half_pixel_for_nn",
)
ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil", "simple")
POLICIES = ("stretch", "not_larger", "not_smaller")
TORCH_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
IMAGE_AXES = 2


@dataclass(frozen=True)
class Axis:
    """One axis to be resized.

    Attributes:
        length, size: before and after.
        scale: size / length before rounding.
        start, end: region of interest, as a share of the axis.
    """

    axis: int
    length: int
    size: int
    scale: float
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class Rule:
    """How to interpolate, all attributes of Resize but the sizes.

    Attributes:
        rounding: of nearest; "simple" is that of opset 10: up where the axis shrinks, else down.
        a: coefficient of the cubic kernel.
        exclude: pixels outside weigh nothing, instead of repeating the edge.
        fill: value of places outside the region of interest.
    """

    mode: str
    coordinates: str
    rounding: str
    a: float
    exclude: bool
    antialias: bool
    fill: float


def _rule(node: Node) -> Rule:
    rule = Rule(
        mode=str(node.get("mode", "nearest")),
        coordinates=str(node.get("coordinate_transformation_mode", "half_pixel")),
        rounding=str(node.get("nearest_mode", "round_prefer_floor")),
        a=float(node.get("cubic_coeff_a", CUBIC)),
        exclude=bool(node.get("exclude_outside", 0)),
        antialias=bool(node.get("antialias", 0)),
        fill=float(node.get("extrapolation_value", 0.0)),
    )
    checked = (("mode", rule.mode, MODES), ("coordinate_transformation_mode", rule.coordinates, COORDINATES))
    for name, value, known in (*checked, ("nearest_mode", rule.rounding, ROUNDINGS[:-1])):
        if value not in known:
            raise node.refuse(f"{name} {value!r} is none of {', '.join(known)}")
    return rule


def _old_rule(node: Node) -> Rule:
    """Upsample, and Resize of opset 10."""
    mode = str(node.get("mode", "nearest"))
    mode = "linear" if mode == "bilinear" else mode
    if mode not in MODES[:2]:
        raise node.refuse(f"mode {mode!r} is neither nearest nor linear")
    return Rule(mode, "asymmetric", "simple" if node.op == "Resize" else "floor", CUBIC, False, False, 0.0)


def _scaled(length: int, scale: float) -> int:
    """The product in float32, as shape inference and onnxruntime round it."""
    return math.floor(np.float32(length) * np.float32(scale))


def _resize(node: Node) -> Run:
    rule, axes = _rule(node), node.get("axes")
    policy = str(node.get("keep_aspect_ratio_policy", "stretch"))
    if policy not in POLICIES:
        raise node.refuse(f"keep_aspect_ratio_policy {policy!r} is none of {', '.join(POLICIES)}")

    def run(
        x: torch.Tensor,
        roi: torch.Tensor | None = None,
        scales: torch.Tensor | None = None,
        sizes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        chosen = [axis % x.ndim for axis in (range(x.ndim) if axes is None else axes)]
        if scales is not None and scales.numel():
            factors = [float(scale) for scale in scales.tolist()]
            targets = [_scaled(x.shape[axis], scale) for axis, scale in zip(chosen, factors, strict=True)]
        else:
            targets, factors = _targets([x.shape[axis] for axis in chosen], ints(sizes), policy)
        region = [0.0] * len(chosen) + [1.0] * len(chosen)
        if rule.coordinates == "tf_crop_and_resize" and roi is not None:
            region = [float(edge) for edge in roi.tolist()]
        ends = region[len(chosen) :]
        plan = [
            Axis(axis, x.shape[axis], size, scale, start, end)
            for axis, size, scale, start, end in zip(chosen, targets, factors, region, ends, strict=False)
        ]
        return resized(x, plan, rule)

    return run


def _targets(lengths: Sequence[int], sizes: Sequence[int], policy: str) -> tuple[list[int], list[float]]:
    """Sizes and scales; a policy other than stretch gives all axes the same scale."""
    scales = [size / length if length else 1.0 for size, length in zip(sizes, lengths, strict=True)]
    if policy == "stretch":
        return list(sizes), scales
    scale = min(scales) if policy == "not_larger" else max(scales)
    return [math.floor(length * scale + 0.5) for length in lengths], [scale] * len(lengths)


def _by_scales(node: Node) -> Run:
    """Resize 10 and Upsample 9: scales are an input."""
    rule = _old_rule(node)

    def run(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return _scaled_by(x, [float(scale) for scale in scales.tolist()], rule)

    return run


def _upsample_1(node: Node) -> Run:
    """Scales are attributes, those of opset 1 of height and width only."""
    rule, scales = _old_rule(node), node.get("scales")
    if scales is None:
        scales = (1.0, 1.0, node.get("height_scale", 1.0), node.get("width_scale", 1.0))
    factors = [float(scale) for scale in scales]
    return lambda x: _scaled_by(x, factors, rule)


def _scaled_by(x: torch.Tensor, scales: Sequence[float], rule: Rule) -> torch.Tensor:
    plan = [
        Axis(axis, length, _scaled(length, scale), scale)
        for axis, (length, scale) in enumerate(zip(x.shape, scales, strict=True))
    ]
    return resized(x, plan, rule)


def resized(x: torch.Tensor, plan: Sequence[Axis], rule: Rule) -> torch.Tensor:
    crops = rule.coordinates == "tf_crop_and_resize"
    work = [a for a in plan if a.size != a.length or a.scale != 1.0 or (crops and (a.start, a.end) != (0.0, 1.0))]
    if not work or not all(a.length for a in work):
        return x if not work else x.new_zeros([_size_of(plan, axis, size) for axis, size in enumerate(x.shape)])
    if rule.mode == "nearest" and not crops:
        return _nearest(x, work, rule)
    values = x if x.dtype.is_floating_point else x.double()
    quick = _by_torch(values, work, rule)
    y = values if quick is None else quick
    outside: torch.Tensor | None = None
    for a in work if quick is None else ():
        place = _places(a, rule, x.device, torch.float64)
        if rule.mode == "nearest":
            y = y.index_select(a.axis, _nearest_index(place, a, rule))
        else:
            y = _weighted(y, place, a, rule)
        if crops:
            beyond = ((place < 0) | (place > a.length - 1)).reshape(-1, *[1] * (x.ndim - 1 - a.axis))
            outside = beyond if outside is None else outside | beyond
    y = y if outside is None else y.masked_fill(outside, rule.fill)
    return y if x.dtype.is_floating_point else _as_integers(y, x.dtype)


def _size_of(plan: Sequence[Axis], axis: int, default: int) -> int:
    return next((a.size for a in plan if a.axis == axis), default)


def _as_integers(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    limits = torch.iinfo(dtype)
    return y.clamp(limits.min, limits.max).to(dtype)


def _by_torch(x: torch.Tensor, work: Sequence[Axis], rule: Rule) -> torch.Tensor | None:
    """torch's function of images for what it computes too, else None."""
    rank = x.ndim - 2
    if rank not in TORCH_LINEAR or any(a.axis < 2 for a in work) or rule.antialias:
        return None
    corners = rule.coordinates == "align_corners"
    halves = rule.coordinates == "half_pixel" or (
        rule.coordinates == "pytorch_half_pixel" and all(a.size > 1 for a in work)
    )
    # Where the size was rounded, the scale is another one than torch would take.
    if not (corners or halves) or any(abs(a.scale * a.length - a.size) > 1e-6 * a.size for a in work):
        return None
    if rule.mode == "cubic" and (rank != IMAGE_AXES or rule.exclude or rule.a != CUBIC):
        return None
    mode = TORCH_LINEAR[rank] if rule.mode == "linear" else "bicubic"
    sizes = [_size_of(work, axis, x.shape[axis]) for axis in range(2, x.ndim)]
    return functional.interpolate(x, size=sizes, mode=mode, align_corners=corners)


def _nearest(x: torch.Tensor, work: Sequence[Axis], rule: Rule) -> torch.Tensor:
    if _doubles(x, work, rule):
        return functional.interpolate(x, size=[2 * x.shape[2], 2 * x.shape[3]], mode="nearest")
    for a in work:
        # float32, as onnxruntime computes it: 3 / 0.6 is 5 and not just below.
        x = x.index_select(a.axis, _nearest_index(_places(a, rule, x.device, torch.float32), a, rule))
    return x


def _doubles(x: torch.Tensor, work: Sequence[Axis], rule: Rule) -> bool:
    """Images twice as high and wide, every pixel four times: what most networks ask for."""
    if x.ndim != IMAGE_AXES + 2 or not x.dtype.is_floating_point or [a.axis for a in work] != [2, 3]:
        return False
    down = rule.coordinates == "asymmetric" and rule.rounding in ("floor", "simple")
    halves = rule.coordinates in ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel")
    middle = halves and rule.rounding in ("round_prefer_floor", "round_prefer_ceil")
    return (down or middle) and all(a.scale == 2.0 and a.size == 2 * a.length for a in work)


def _places(a: Axis, rule: Rule, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """[size]: where in the input every output element lies, in pixels."""
    at = torch.arange(a.size, device=device, dtype=dtype)
    last = a.length - 1
    # The length before rounding.
    width = a.scale * a.length
    transform: dict[str, Callable[[], torch.Tensor]] = {
        "half_pixel": lambda: (at + 0.5) / a.scale - 0.5,
        "pytorch_half_pixel": lambda: (at + 0.5) / a.scale - 0.5 if a.size > 1 else at - 0.5,
        "half_pixel_symmetric": lambda: a.length / 2 * (1 - a.size / width) + (at + 0.5) / a.scale - 0.5,
        "align_corners": lambda: at * (last / (width - 1)) if width != 1 and a.size > 1 else at * 0,
        "asymmetric": lambda: at / a.scale,
        "tf_half_pixel_for_nn": lambda: (at + 0.5) / a.scale,
        "tf_crop_and_resize": lambda: (
            a.start * last + at * ((a.end - a.start) * last / (a.size - 1))
            if a.size > 1
            else at + (a.start + a.end) * last / 2
        ),
    }
    return transform[rule.coordinates]()


def _nearest_index(place: torch.Tensor, a: Axis, rule: Rule) -> torch.Tensor:
    rounding = rule.rounding
    if rounding == "simple":
        rounding = "ceil" if a.scale < 1 else "floor"
    if rounding == "floor":
        place = place.floor()
    elif rounding == "ceil":
        place = place.ceil()
    elif rounding == "round_prefer_floor":
        place = (place - 0.5).ceil()
    else:
        place = (place + 0.5).floor()
    return place.long().clamp(0, a.length - 1)


def _weighted(x: torch.Tensor, place: torch.Tensor, a: Axis, rule: Rule) -> torch.Tensor:
    """One gathered slice per element that the kernel covers."""
    stretch = min(a.scale, 1.0) if rule.antialias else 1.0
    reach = math.ceil((1 if rule.mode == "linear" else 2) / stretch)
    index = place.floor()[:, None] + torch.arange(1 - reach, reach + 1, device=x.device)
    distance = (index - place[:, None]) * stretch
    weight = linear(distance) if rule.mode == "linear" else cubic(distance, rule.a)
    if rule.exclude:
        weight = weight * ((index >= 0) & (index < a.length))
    if rule.exclude or rule.antialias:
        total = weight.sum(1, keepdim=True)
        weight = weight / total.masked_fill(total == 0, 1)
    index = index.clamp(0, a.length - 1).long()
    weight = weight.to(x.dtype)
    shape = (-1, *[1] * (x.ndim - 1 - a.axis))
    parts = [x.index_select(a.axis, index[:, tap]) * weight[:, tap].reshape(shape) for tap in range(2 * reach)]
    return sum(parts[1:], parts[0])


TABLE: Table = {
    ("Resize", 10): Op(_by_scales, host=(1,)),
    ("Resize", 11): Op(_resize, host=(1, 2, 3)),
    ("Upsample", 1): Op(_upsample_1),
    ("Upsample", 9): Op(_by_scales, host=(1,)),
}
