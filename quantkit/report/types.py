"""What a run reports, as plain data: the console table, report.json and report.html are views of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerRow:
    """One target. `bits` None = it stayed float, and `reason` says why.

    Attributes:
        shape: (N, K).
        bits: average over the weights where groups have different widths.
        sqnr: dB, this layer's output against float on calibration rows (None without calibration).
        kernel: operator that the runtime really runs for it, read from the optimised graph ("" = folded away).
        form: how it is written (`qdq`, `dynamic`, `matmulnbits`, `gather`, `packed`).
        latency: measured time of this layer alone relative to float (None = not measured).
        time_share: of the quantized model's time, spent in this layer's kernel, 0 to 1 (None = not measured).
    """

    name: str
    op: str
    shape: tuple[int, int]
    bits: float | None
    group_size: int | None
    symmetric: bool | None
    form: str | None
    bytes_before: int
    bytes_after: int
    sqnr: float | None
    kernel: str
    latency: float | None
    reason: str
    time_share: float | None = None


@dataclass(frozen=True)
class Timing:
    """Median milliseconds for one input shape, float and quantized alternating in one process."""

    shapes: Mapping[str, tuple[int, ...]]
    float_ms: float
    quantized_ms: float

    @property
    def speedup(self) -> float:
        return self.float_ms / self.quantized_ms


@dataclass(frozen=True)
class Fidelity:
    """Emitted model against the float model on held-out samples, all outputs together (worst output when several).

    Calibration did not see these samples; the choice between calibrators and forms did.

    Attributes:
        sqnr: dB.
        cosine: mean cosine similarity per sample.
        top1_agreement: share of samples with the same arg-max (None when no output looks like class scores).
        parity: dB, emitted model against the planner's simulation of it.
        samples: held-out samples used.
    """

    sqnr: float
    cosine: float
    top1_agreement: float | None
    parity: float
    samples: int


@dataclass(frozen=True)
class Accuracy:
    """The user's metric on the user's evaluation data; higher is better.

    Attributes:
        samples: how many there are.
    """

    metric: str
    before: float
    after: float
    samples: int


@dataclass(frozen=True)
class DepthRow:
    """One value inside the emitted model against the float model's, everything before it being quantized too.

    Attributes:
        name: of the value, the same in both models.
        layer: whose output it is; None for an output of the model that no layer makes.
        sqnr: dB.
        output: it is an output of the model.
    """

    name: str
    layer: str | None
    sqnr: float
    output: bool


@dataclass(frozen=True)
class ActivationRow:
    """Values that share one static scale and zero point: real = scale * (code - zero_point), codes 0 to 255.

    Attributes:
        name: of the value, or of the first of several.
        layers: that read it as integers.
        least, greatest: what calibration saw; None where the range came from a plan.
        low, high: what the codes reach; beyond it values are clipped.
        clipped: share of what calibration saw that lies outside, 0 to 1.
        shares: [B] of what calibration saw, in B equal bins from least to greatest.
    """

    name: str
    layers: tuple[str, ...]
    least: float | None
    greatest: float | None
    low: float
    high: float
    scale: float
    zero_point: int
    clipped: float | None
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Contender:
    """A candidate that was emitted and measured.

    Attributes:
        chosen: marks the one that was kept.
        loss: nats per sample against the float model.
        predicted: what the estimator expected of it, activations float; None where there is none that speaks in nats.
    """

    name: str
    size: int
    sqnr: float
    latency: float
    chosen: bool
    loss: float = math.inf
    predicted: float | None = None


@dataclass(frozen=True)
class ScaleRow:
    """Layers that a transform rescaled together, or one that it could not.

    Attributes:
        transform: its name.
        source: the node that takes the division; for an inserted Mul, the value behind which it stands.
        layers: names of the layers that are multiplied.
        spread: largest scale over the smallest; None when nothing was scaled.
        reason: why nothing was scaled; for an inserted Mul, that there is one.
    """

    transform: str
    source: str
    layers: tuple[str, ...]
    spread: float | None
    reason: str


@dataclass(frozen=True)
class SensitivityRow:
    """What layers that are decided together would lose at each width.

    Attributes:
        losses: width -> loss.
        bits: the width that they got; None where their groups differ.
        estimator: whose figures these are.
        quantity: what they are.
        nats: whether they are in nats per sample.
    """

    layers: tuple[str, ...]
    losses: Mapping[int, float]
    bits: int | None
    estimator: str
    quantity: str = "nats per sample"
    nats: bool = True


@dataclass(frozen=True)
class FrontRow:
    """One choice between the smallest file and the least loss.

    Attributes:
        estimated_size: bytes of the file, without the nodes that a mixture of widths brings.
        average_bits: of codes alone.
        loss: predicted.
        estimator: who predicted it.
        quantity: what it is.
        nats: whether it is in nats per sample.
        time: of the float model's, predicted; None where no budget asked for times.
    """

    estimated_size: int
    average_bits: float
    loss: float
    estimator: str = ""
    quantity: str = "nats per sample"
    nats: bool = True
    time: float | None = None


@dataclass(frozen=True)
class Report:
    """Everything a run found out.

    Attributes:
        untouched: (node name, op type, reason) of weights-bearing nodes that are no targets.
        average_bits: bits per weight over all target weights, floats counted as 32, codes only.
        stored_bits: the same with scales and zero points.
        budget_met: False when the budget or the accuracy asked for was not reached (exit code 1).
        unmet: the sentences that say which.
        scales: what transforms rescaled, and what they could not.
        notes: things the user should know (folding, slower than float, memory at run time ...).
        provenance: hashes and versions, as in the model's metadata_props.
        sensitivities: of every unit, in graph order; empty where no estimator was asked.
        predicted: nats per sample that the estimator expected of the plan that was kept, activations float.
        front: choices from the smallest to the least loss.
        budget: the constraints that were asked for, as `Budget.to_dict` says them.
        accuracy: None where there is no evaluation data.
        depth: in graph order; empty without data, and for models with more than 1 GiB of weights.
        activations: of the static integer layers.
        command: the line that repeats the run: of the shell, or else of Python.
    """

    model: str
    target: str
    layers: tuple[LayerRow, ...]
    untouched: tuple[tuple[str, str, str], ...]
    size_before: int
    size_after: int
    average_bits: float
    stored_bits: float
    fidelity: Fidelity | None
    timings: tuple[Timing, ...]
    contenders: tuple[Contender, ...]
    unmet: tuple[str, ...]
    notes: tuple[str, ...]
    provenance: Mapping[str, str]
    scales: tuple[ScaleRow, ...] = ()
    sensitivities: tuple[SensitivityRow, ...] = ()
    predicted: float | None = None
    front: tuple[FrontRow, ...] = ()
    budget: Mapping[str, float | str] = field(default_factory=dict)
    accuracy: Accuracy | None = None
    depth: tuple[DepthRow, ...] = ()
    activations: tuple[ActivationRow, ...] = ()
    command: str = ""

    @property
    def budget_met(self) -> bool:
        return not self.unmet

    @property
    def ratio(self) -> float:
        return self.size_before / self.size_after

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: documented names, no NaN (an undefined figure is null)."""
        data = asdict(self)
        data["ratio"] = self.ratio
        data["budget_met"] = self.budget_met
        for row, timing in zip(data["timings"], self.timings, strict=True):
            row["speedup"] = timing.speedup
        return data
