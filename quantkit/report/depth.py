"""How the error grows from the first layer to the last: values inside the quantized model against the float model's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from quantkit import metrics
from quantkit.report.types import DepthRow
from quantkit.runtime.ort import make_session
from quantkit.types import Array, Feed, Target

CLIPS = frozenset({"Relu", "Clip"})


def error_along_depth(
    reference: ir.Model, emitted: ir.Model, targets: Mapping[str, Target], feed: Feed, *, threads: int
) -> tuple[DepthRow, ...]:
    """The outputs of all layers of the main graph in its order, then the model's own; one run of each model.

    A value on the integer path is compared as its readers see it: behind the Relu that vanished into its range, and
    rounded. Values that only one of the two models has are left out, as are those that are not finite in float.

    Args:
        reference: the float model that `emitted` was made from; both with the same names of values.
        feed: a few samples.
    """
    made = _made(emitted)
    places: dict[str, str] = {}  # value of both models -> the layer whose output it is
    owners = {str(use.node.outputs[0].name): name for name, target in targets.items() for use in target.uses}
    for node in reference.graph:
        value = node.outputs[0]
        if value.name and str(value.name) in owners and (seen := _seen(value, made)) is not None:
            places.setdefault(str(seen.name), owners[str(value.name)])
    ends = [str(value.name) for value in reference.graph.outputs]
    grids = {name: grid for name in places if (grid := _grid(made[name])) is not None}
    wanted = _values(reference, places, feed, threads)
    got = _values(emitted, [grids[name].codes if name in grids else name for name in places], feed, threads)
    rows = []
    for name in dict.fromkeys([*places, *ends]):
        first, second = wanted[name], grids[name].real(got) if name in grids else got[name]
        if _comparable(first, second):
            rows.append(DepthRow(name, places.get(name), metrics.sqnr(first, second), name in ends))
    return tuple(rows)


def _comparable(first: object, second: object) -> bool:
    """Not so are sequences of tensors, integers, and what depends on rounding in its shape."""
    if not isinstance(first, np.ndarray) or not isinstance(second, np.ndarray):
        return False
    return first.shape == second.shape and first.dtype.kind == "f" and bool(np.isfinite(first).all())


@dataclass(frozen=True)
class Grid:
    """Codes of a value on the integer path.

    Attributes:
        codes: their name.
    """

    codes: str
    scale: Array
    zero_point: Array

    def real(self, values: Mapping[str, Array]) -> Array:
        codes = values[self.codes].astype(np.float32)
        return np.asarray((codes - self.zero_point.astype(np.float32)) * self.scale)


def _made(model: ir.Model) -> dict[str, ir.Value]:
    return {str(value.name): value for node in model.graph for value in node.outputs}


def _seen(value: ir.Value, made: Mapping[str, ir.Value]) -> ir.Value | None:
    """The value itself, or the one behind the Relu and Clip that the emitted model does without."""
    while str(value.name) not in made:
        uses = list(value.uses())
        if len(uses) != 1 or uses[0].node.op_type not in CLIPS or uses[0].node.graph is not value.graph:
            return None
        value = uses[0].node.outputs[0]
    return value


def _grid(value: ir.Value) -> Grid | None:
    """How the readers of a value see it, where they read it rounded."""
    for use in value.uses():
        if use.node.op_type == "QuantizeLinear" and len(use.node.inputs) > 2:
            scale, zero = (item.const_value if item is not None else None for item in use.node.inputs[1:3])
            if scale is not None and zero is not None:
                return Grid(str(use.node.outputs[0].name), scale.numpy(), zero.numpy())
    return None


def _values(model: ir.Model, names: Iterable[str], feed: Feed, threads: int) -> dict[str, Array]:
    """These values and the model's outputs, with constants folded and nothing fused."""
    copy = model.clone()
    values = _made(copy)
    outputs = {str(value.name) for value in copy.graph.outputs}
    for name in dict.fromkeys(names):
        if name not in outputs:
            codes = (node := values[name].producer()) is not None and node.op_type == "QuantizeLinear"
            values[name].type = ir.TensorType(ir.DataType.UINT8 if codes else ir.DataType.FLOAT)
            copy.graph.outputs.append(values[name])
    return make_session(copy, threads=threads, optimize="fold").run(feed)
