"""Run transforms: groups out of the graph, scales out of arrays, scales back into the graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from quantkit.budget import Budget
from quantkit.errors import InputError
from quantkit.forms import default_group_size, even_groups
from quantkit.graph.load import LoadedModel
from quantkit.graph.rescale import apply_scales
from quantkit.graph.scaling import INSERTED, Found, Group, find_groups
from quantkit.graph.targets import find_targets
from quantkit.methods import find, make, transform_names
from quantkit.options import Options
from quantkit.report.types import ScaleRow
from quantkit.transforms._problem import Indices, Reader, ScaleGroup, Source
from quantkit.types import Array, LayerStats, Plan, QuantSpec, Target, Transform

Statistics = Callable[[ir.Model, Mapping[str, Target], frozenset[str]], Mapping[str, LayerStats]]
UNCHANGED = "the transform leaves it as it is"


@dataclass(frozen=True)
class Rescaled:
    """A model that computes the same, with scales that suit quantization better.

    Attributes:
        loaded: the transformed model; size, digest and source are the original's.
        targets: the same layers, in the transformed model.
        names: transforms, in order.
        bits: the width that they prepared for.
        rows: for the report.
    """

    loaded: LoadedModel
    targets: Mapping[str, Target]
    names: tuple[str, ...] = ()
    bits: int = 8
    rows: tuple[ScaleRow, ...] = ()

    @property
    def changed(self) -> bool:
        return any(row.spread is not None for row in self.rows)

    def recorded(self, plan: Plan) -> Plan:
        """The plan with what it takes to rescale again."""
        kept = {key: value for key, value in plan.settings.items() if key not in ("transforms", "transform_bits")}
        if self.names:
            kept |= {"transforms": list(self.names), "transform_bits": self.bits}
        return Plan(plan.layers, plan.activations, kept)


def choices(options: Options, *, has_data: bool) -> tuple[tuple[str, ...], ...]:
    """The sequences of transforms to measure against each other; the first is the one to beat.

    Raises:
        InputError: an unknown transform.
    """
    names = transform_names(options.transform)
    if options.transform == "auto":
        return ((), *((name,) for name in find("transforms"))) if has_data else ((),)
    if options.transform is None and options.quantizer == "awq" and has_data:
        return (("awq",),)
    return (names,)


def planned(plan: Plan) -> tuple[tuple[str, ...], int]:
    """(names, width) that the plan was made with.

    Raises:
        InputError: they are of the wrong kind.
    """
    names, bits = plan.settings.get("transforms", []), plan.settings.get("transform_bits", 8)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"plan: settings: transforms must be a list of names, got {names!r}")
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise InputError(f"plan: settings: transform_bits must be a whole number from 1 to 8, got {bits!r}")
    return transform_names(",".join(names) if names else None), bits


def search_bits(budget: Budget, options: Options, float_size: int) -> int:
    """The width that layers will have on average, rounded down, as far as the budget tells; else the narrowest allowed.

    Transforms come before bits are allocated, and what they do matters most where codes are coarse.
    """
    limit = budget.max_bytes(float_size)
    if budget.avg_bits is not None:
        wanted = math.floor(budget.avg_bits)
    elif limit is not None:
        wanted = math.floor(32 * limit / float_size)
    else:
        wanted = min(options.bits or (8,))
    allowed = [bits for bits in options.bits or range(2, 9) if bits <= max(wanted, 2)]
    return max(allowed, default=min(options.bits or (2,)))


def rescale(
    loaded: LoadedModel,
    targets: Mapping[str, Target],
    names: Sequence[str],
    bits: int,
    options: Options,
    statistics: Statistics | None,
) -> Rescaled:
    """Apply transforms one after the other; each sees the model as the ones before left it.

    Args:
        loaded: the float model; not changed.
        targets: its layers.
        names: transforms.
        bits: width to prepare for.
        options: method settings and the group size.
        statistics: runs the calibration data through a model; None without data.

    Raises:
        InputError: a transform needs data and there is none.
    """
    model, rows = loaded.model, list[ScaleRow]()
    for name in names:
        prefix = f"{name}."
        settings = {key[len(prefix) :]: value for key, value in options.settings.items() if key.startswith(prefix)}
        method: Transform = make("transforms", name, settings)
        if method.stats and statistics is None:
            raise InputError(f"the transform {name} needs calibration data; give --calib")
        nodes = [str(use.node.name) for target in targets.values() for use in target.uses]
        found = find_groups(model, nodes if method.insert else ())
        groups = _views(found, targets, method, bits, options)
        if statistics is not None and method.stats:
            groups = _with_stats(groups, statistics, model, targets, method.stats)
        scales = method.scales(groups)
        rows += _rows(name, method, found, groups, scales, targets)
        if scales:
            model = apply_scales(model, found.groups, scales)
            targets = {key: target for key, target in find_targets(model)[0].items() if key in targets}
    return Rescaled(replace(loaded, model=model), targets, tuple(names), bits, tuple(rows))


def _views(
    found: Found, targets: Mapping[str, Target], method: Transform, bits: int, options: Options
) -> list[ScaleGroup]:
    """The groups all of whose quantized readers the method handles, as arrays."""
    views = []
    for group in found.groups:
        reading = [
            target for target in targets.values() if any(str(use.node.name) in group.readers for use in target.uses)
        ]
        if not reading or any(target.op not in method.readers for target in reading):
            continue
        readers = tuple(_reader(group, target, bits, options) for target in reading)
        source = _source(group, targets)
        views.append(ScaleGroup(group.name, group.kind, group.size, readers, source, group.normalised))
    return views


def _reader(group: Group, target: Target, bits: int, options: Options) -> Reader:
    use = next(use for use in target.uses if str(use.node.name) in group.readers)
    num_inputs = target.shape[1]
    channels = group.readers[str(use.node.name)].reshape(target.groups, -1)
    channels = np.repeat(channels, num_inputs // channels.shape[1], axis=1)  # a convolution reads each kh*kw times
    size = even_groups(num_inputs, default_group_size(bits)) if options.group_size is None else options.group_size
    by_row = target.op in ("Conv", "ConvTranspose")
    spec = QuantSpec(bits, -1 if by_row else size, symmetric=by_row)
    return Reader(target.name, target.op, channels, spec, target.load, None)


def _source(group: Group, targets: Mapping[str, Target]) -> Source | None:
    for target in targets.values():
        if group.kind == "layer" and [str(use.node.name) for use in target.uses] == [group.name]:
            rows: Indices = np.arange(group.size).repeat(target.shape[0] // group.size)
            return Source(target.name, rows, target.load)
    return None


def _with_stats(
    groups: Sequence[ScaleGroup],
    statistics: Statistics,
    model: ir.Model,
    targets: Mapping[str, Target],
    wanted: frozenset[str],
) -> list[ScaleGroup]:
    needed = {reader.name: targets[reader.name] for group in groups for reader in group.readers}
    if not needed:
        return []
    stats = statistics(model, needed, wanted)
    return [
        replace(group, readers=tuple(replace(reader, stats=stats.get(reader.name)) for reader in group.readers))
        for group in groups
    ]


def _rows(
    name: str,
    method: Transform,
    found: Found,
    groups: Sequence[ScaleGroup],
    scales: Mapping[str, Array],
    targets: Mapping[str, Target],
) -> list[ScaleRow]:
    """One row for each group, and one for each layer that the method could have scaled and that is in none."""
    rows = []
    for group in groups:
        layers = tuple(reader.name for reader in group.readers)
        if group.name not in scales:
            rows.append(ScaleRow(name, group.name, layers, None, UNCHANGED))
            continue
        spread = float(scales[group.name].max() / scales[group.name].min())
        inserted = "a Mul is inserted" if group.kind == INSERTED else ""
        rows.append(ScaleRow(name, group.name, layers, spread, inserted))
    grouped = {reader.name for group in groups for reader in group.readers}
    known = {node for group in found.groups for node in group.readers}
    for target in targets.values():
        if target.op in method.readers and target.name not in grouped:
            mixed = any(str(use.node.name) in known for use in target.uses)
            reason = "a layer beside it reads the same value and cannot be scaled" if mixed else found.reason(target)
            rows.append(ScaleRow(name, "", (target.name,), None, reason))
    return rows
