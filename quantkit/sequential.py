"""Quantize layer after layer, each on the inputs that the layers before it, already quantized, really produce.

Of a layer with inputs X (float model) and X~ (partly quantized model), rows [T, K], two things change:

    what it sees      G~ = X~^T X~ / T instead of X^T X / T
    what it aims at   W* = argmin |X W^T + D - X~ W*^T|^2 + lam |W* - W|^2 = W + (W E + F) (G~ + lam I)^-1
                      E = (X - X~)^T X~ / T, F = D^T X~ / T, D = the float model's residual branch minus ours

so a layer also undoes what earlier layers did to its input (as GPFQ, arXiv 2201.11113, and GPTAQ, arXiv 2504.02692,
aim) and to the branch that its output is added to. Values that are read further on lie on disk between two layers, so
each node runs once in either model, however deep they are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx_ir as ir
from threadpoolctl import threadpool_limits

from quantkit.calibration.augment import Augmented
from quantkit.calibration.collector import ROW_OPERATORS, padding_masks, row_key
from quantkit.calibration.cross import Cross, Read
from quantkit.calibration.data import CalibrationData
from quantkit.emitters._builder import Builder
from quantkit.emitters._simulate import simulate_weight
from quantkit.errors import InputError
from quantkit.graph._trace import is_constant, trace
from quantkit.graph.bias import correctable, shift_biases
from quantkit.graph.targets import find_targets
from quantkit.report.progress import Progress
from quantkit.runtime.spool import Spool
from quantkit.types import Array, Feed, FloatArray, LayerStats, QuantizedWeight, QuantSpec, Target, Use, WeightQuantizer

ADDED_OPERATORS = frozenset({"MatMul", "Gemm", "Conv"})  # whose output is rows @ W^T, nothing moved or recurrent
Effective = Callable[[Target, QuantizedWeight], FloatArray]


@dataclass(frozen=True)
class Settings:
    """How to walk.

    Attributes:
        threads: for onnxruntime.
        seed: of row sampling.
        trust: lam as a share of G~'s mean diagonal; a larger one keeps W* closer to W.
        aim: False keeps W* = W, so that only what a layer sees changes.
        residual: also make up for the branch that the layer's output is added to.
        bias: give every layer that has room for it a bias that keeps the mean of its output.
        lean: run on weights that stay in their file.
        folder: where values lie between two layers; None = among the system's temporary files.
    """

    threads: int = 1
    seed: int = 0
    trust: float = 0.1
    aim: bool = True
    residual: bool = True
    bias: bool = False
    lean: bool = False
    folder: Path | None = None

    def __post_init__(self) -> None:
        if not self.trust > 0:
            raise InputError(f"trust must be above 0, got {self.trust}")


@dataclass
class _Stage:
    """Layers that read the same values, which are there once the node at `position` has run (-1: from the start)."""

    position: int
    layers: dict[str, tuple[Read, ...]] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        reads = [read for reads in self.layers.values() for read in reads]
        return {name for read in reads for name in (read.data, read.branch) if name is not None}


@dataclass(frozen=True)
class Sequential:
    """What the walk made.

    Attributes:
        weights: target name -> quantized weight.
        shifts: target name -> [N] to add to its bias; only with `bias`.
    """

    weights: Mapping[str, QuantizedWeight]
    shifts: Mapping[str, FloatArray]


def quantize_sequentially(
    model: ir.Model,
    targets: Mapping[str, Target],
    specs: Mapping[str, QuantSpec],
    data: CalibrationData | Augmented,
    quantizer: WeightQuantizer,
    settings: Settings,
    progress: Progress,
    *,
    effective: Effective | None = None,
) -> Sequential:
    """A weight for every name in `specs`; other layers stay float.

    Layers that read no rows of the main graph (Gather, recurrent weights, bodies of If and Loop) are quantized first
    and without statistics; everything behind them then sees their error. Activations are float throughout.

    Args:
        model: where `targets` were found; not changed.
        effective: the float W[N, K] that the layer's form really multiplies with; None = `dequantize`.

    Raises:
        InputError: the data has no samples, or an activation is NaN or infinite.
    """
    copy = model.clone()
    builder, ours = Builder(copy, "portable"), find_targets(copy)[0]
    used: Effective = effective or (lambda _, weight: weight.dequantize())
    made: dict[str, QuantizedWeight] = {}
    shifts: dict[str, FloatArray] = {}

    def settle(name: str, weight: FloatArray, stats: LayerStats | None) -> None:
        with threadpool_limits(limits=1):  # as everywhere: faster for small products, and the same bits on all machines
            made[name] = quantizer.quantize(weight, replace(specs[name], act_bits=None), stats)
        simulate_weight(builder, ours[name], used(targets[name], made[name]))

    def keep_mean(name: str, item: Cross) -> None:
        if settings.bias and correctable(ours[name]):
            shifts[name] = item.mean_shift(
                name, targets[name].load(), used(targets[name], made[name]), settings.residual
            )
            shift_biases(ours, {name: shifts[name]}, builder.const)

    stages = _stages(model, {name: targets[name] for name in specs})
    walked = {name for stage in stages for name in stage.layers}
    for name in specs:
        if name not in walked:
            settle(name, targets[name].load(), None)
    with (
        tempfile.TemporaryDirectory(prefix="quantkit-", dir=settings.folder) as folder,
        progress.task("layers", len(walked)) as advance,
    ):
        walk = _Walk((model, copy), Path(folder), data, stages, settings)
        for stage in stages:
            for name, (weight, stats, item) in walk.visit(stage, targets, quantizer.stats).items():
                settle(name, weight, stats)
                keep_mean(name, item)
                advance(1)
    return Sequential({name: made[name] for name in specs}, shifts)


def _stages(model: ir.Model, targets: Mapping[str, Target]) -> list[_Stage]:
    """Layers that read rows of the main graph, by what they read, in the order in which that is there."""
    positions = {str(value.name): -1 for value in model.graph.inputs}
    for position, node in enumerate(model.graph):
        positions.update({str(value.name): position for value in node.outputs})
    stages: dict[tuple[str, ...], _Stage] = {}
    for name, target in targets.items():
        names = tuple(str(use.data.name) for use in target.uses)
        inner = any(use.node.graph is not model.graph or str(use.data.name) not in positions for use in target.uses)
        if target.op not in ROW_OPERATORS or name.endswith(".R") or inner:
            continue
        ready = max(positions[item] for item in names)
        early = {item for item, position in positions.items() if position <= ready}
        reads = tuple(Read(use, str(use.data.name), _branch(target.op, use, early)) for use in target.uses)
        stages.setdefault(names, _Stage(ready)).layers[name] = reads
    return sorted(stages.values(), key=lambda stage: stage.position)


def _branch(op: str, use: Use, early: Set[str]) -> str | None:
    """What an Add behind the node (and behind constants added on the way) adds to its output, if that is early."""
    value = use.node.outputs[0]
    while op in ADDED_OPERATORS and len(value.uses()) == 1 and not value.is_graph_output():
        node = next(iter(value.uses())).node
        if node.op_type != "Add" or node.domain not in ("", "ai.onnx") or node.graph is not use.node.graph:
            return None
        other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
        if other is None or not is_constant(trace(other).root):
            found = (
                other is not None and str(other.name) in early and (op != "Conv" or _alike(other, use.node.outputs[0]))
            )
            return str(other.name) if found and other is not None else None
        value = node.outputs[0]
    return None


def _alike(first: ir.Value, second: ir.Value) -> bool:
    """True where both shapes are known to be the same but for the batch: nothing is broadcast."""
    if first.shape is None or second.shape is None:
        return False
    sizes = [
        [size if isinstance(size, int) else size.value for size in shape[1:]] for shape in (first.shape, second.shape)
    ]
    return sizes[0] == sizes[1] and None not in sizes[0]


class _Walk:
    """Brings both models from cut to cut and adds up what the layers there need."""

    def __init__(
        self,
        models: Sequence[ir.Model],
        folder: Path,
        data: CalibrationData | Augmented,
        stages: Sequence[_Stage],
        settings: Settings,
    ) -> None:
        self._settings = settings
        self._masks: list[tuple[Array, ...]] = []
        # What a stage looks at must live until then.
        until = {name: stage.position + 1 for stage in stages for name in stage.names}
        self._spools = []
        for number, model in enumerate(models):
            feeds = self._noted(data) if number == 0 else iter(data)
            place, threads, lean = folder / str(number), settings.threads, settings.lean
            self._spools.append(Spool(model, place, feeds, threads=threads, until=until, lean=lean))
        if not self._masks:
            raise InputError(f"the calibration data holds no samples: {data.description}")

    def _noted(self, data: CalibrationData | Augmented) -> Iterator[Feed]:
        for feed in data:
            self._masks.append(padding_masks(feed))
            yield feed

    def visit(
        self, stage: _Stage, targets: Mapping[str, Target], wanted: Set[str]
    ) -> dict[str, tuple[FloatArray, LayerStats, Cross]]:
        """(W*, statistics, where they come from) of every layer of the stage."""
        sums: dict[tuple[object, ...], Cross] = {}
        for name, reads in stage.layers.items():
            fresh = Cross(targets[name], wanted, self._settings.seed)
            sums.setdefault(row_key(targets[name], [read.use for read in reads]), fresh).layers[name] = reads
        runs = [spool.values(stage.position, stage.names) for spool in self._spools]
        for number, (exact, ours) in enumerate(zip(*runs, strict=True)):
            for item in sums.values():
                item.add(exact, ours, self._masks[number], self._settings.seed + number)
        return {
            name: (self._aim(item, name, targets[name]), item.stats(), item)
            for item in sums.values()
            for name in item.layers
        }

    def _aim(self, item: Cross, name: str, target: Target) -> FloatArray:
        settings = self._settings
        return item.aim(name, target, settings.trust, residual=settings.residual) if settings.aim else target.load()
