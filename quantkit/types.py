"""The central dataclasses and the three protocols. N = outputs, K = inputs of a weight matrix, G = groups along K."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from quantkit.errors import InputError
from quantkit.report.progress import Progress, SilentProgress

if TYPE_CHECKING:
    import onnx_ir as ir

    from quantkit.budget import Budget
    from quantkit.emitters._builder import Builder
    from quantkit.network import Network
    from quantkit.transforms._problem import ScaleGroup

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]
Feed = Mapping[str, Array]
"""One batch for the model: input name -> array whose first axis is the batch."""


@dataclass(frozen=True)
class QuantSpec:
    """How one layer is stored.

    Attributes:
        bits: width of a stored code, 1 to 8.
        group_size: inputs that share one scale; -1 = one scale per output row.
        symmetric: zero point fixed at the middle of the codes (not stored).
        act_bits: 8 = the layer computes with 8-bit integer activations; None = float activations.
        group_bits: width of every group along K where they differ (SliM-LLM, arXiv 2405.14917); `bits` is then what
            the layer was asked for. None: every group has `bits`.
    """

    bits: int
    group_size: int = 128
    symmetric: bool = False
    act_bits: int | None = None
    group_bits: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise InputError(f"bits must be 1 to 8, got {self.bits}")
        if self.group_size != -1 and self.group_size < 1:
            raise InputError(f"group_size must be -1 (one scale per row) or at least 1, got {self.group_size}")
        if self.act_bits not in (None, 8):
            raise InputError(f"act_bits must be 8 or None (float activations), got {self.act_bits}")
        if self.group_bits is not None and not (self.group_bits and all(1 <= bits <= 8 for bits in self.group_bits)):
            raise InputError(f"group_bits must name at least one width, each 1 to 8, got {list(self.group_bits)}")

    def widths(self, num_inputs: int) -> npt.NDArray[np.uint8]:
        """[G] bits of every group.

        Raises:
            InputError: group_bits has another length than the number of groups.
        """
        num_groups = self.num_groups(num_inputs)
        if self.group_bits is None:
            return np.full(num_groups, self.bits, dtype=np.uint8)
        if len(self.group_bits) != num_groups:
            wanted = f"one width for each of the {num_groups} groups of {num_inputs} inputs"
            raise InputError(f"group_bits must name {wanted}, got {len(self.group_bits)}")
        return np.array(self.group_bits, dtype=np.uint8)

    def average_bits(self, num_inputs: int) -> float:
        """Bits per weight, codes alone; a shorter last group counts by its columns."""
        bits = np.repeat(self.widths(num_inputs).astype(np.float64), self.group_width(num_inputs))
        return float(bits[:num_inputs].mean())

    def num_groups(self, num_inputs: int) -> int:
        """G for a matrix with K = num_inputs; the last group may be shorter than group_size."""
        return 1 if self.group_size == -1 else -(-num_inputs // self.group_size)

    def group_width(self, num_inputs: int) -> int:
        """Inputs per group (K itself when group_size is -1 or larger than K)."""
        return num_inputs if self.group_size == -1 else min(self.group_size, num_inputs)


@dataclass(frozen=True)
class Layout:
    """How a node's weight operand relates to W[N, K]: W = operand.reshape(view).transpose(perm).reshape(N, K).

    Attributes:
        operand_shape: shape of the operand as the node reads it.
        view: operand_shape, refined so that a transpose brings outputs first and inputs last.
        perm: permutation of view's axes.
    """

    operand_shape: tuple[int, ...]
    view: tuple[int, ...]
    perm: tuple[int, ...]

    def to_matrix(self, operand: Array, shape: tuple[int, int]) -> Array:
        return operand.reshape(self.view).transpose(self.perm).reshape(shape)

    def to_operand(self, matrix: Array) -> Array:
        permuted = matrix.reshape([self.view[axis] for axis in self.perm])
        return permuted.transpose(np.argsort(self.perm)).reshape(self.operand_shape)

    @property
    def is_identity(self) -> bool:
        """True when W's memory order is the operand's: only a reshape lies between them."""
        return self.perm == tuple(range(len(self.perm)))


@dataclass(frozen=True)
class Use:
    """One place that reads a weight: `node.inputs[weight_index]`; the activation is `node.inputs[data_index]`."""

    node: ir.Node
    weight_index: int
    data_index: int

    @property
    def data(self) -> ir.Value:
        value = self.node.inputs[self.data_index]
        assert value is not None
        return value


@dataclass(frozen=True)
class Target:
    """A weight that can be quantized, seen as W[N, K] whatever the operator stores.

    The one place that knows transB, [K, N], O-I-kh-kw: everything behind it sees matrices.

    Attributes:
        name: unique; what the plan and the report call this layer (the first using node's name).
        op: MatMul, Gemm, Conv, ConvTranspose, Gather, LSTM or GRU.
        uses: every node that reads the weight in this orientation (more than one: a shared weight).
        weight: the initializer at the root; layout operators between it and the nodes are in `layout`/`load`.
        shape: (N, K). Conv: N = output channels, K = I/groups*kh*kw. ConvTranspose: N = O*kh*kw, K = I/groups.
            Gather: N = rows of the table. LSTM/GRU: N = directions*gates*hidden.
        groups: convolution groups; rows [j*N/groups, (j+1)*N/groups) read the j-th slice of the input.
        layout: from the operand (as the node reads it) to W.
        path: the layout nodes (Transpose, Reshape, Identity, ...) from `weight` to the operand, in order.
    """

    name: str
    op: str
    uses: tuple[Use, ...]
    weight: ir.Value
    shape: tuple[int, int]
    groups: int
    layout: Layout
    path: tuple[ir.Node, ...] = ()

    @property
    def node(self) -> ir.Node:
        return self.uses[0].node

    def load(self) -> FloatArray:
        """W[N, K], float32, C-contiguous; a fresh array that the caller may change."""
        from quantkit.graph.targets import load_operand

        return np.array(self.layout.to_matrix(load_operand(self), self.shape), dtype=np.float32, order="C")


@dataclass(frozen=True)
class LayerStats:
    """What calibration saw at one layer's input. Fields that no method asked for are None.

    Attributes:
        num_tokens: rows seen (positions for Conv, tokens for MatMul, looked-up ids for Gather).
        low, high: smallest and largest value of the data input.
        abs_mean: [groups, K] mean |x|.
        mean: [groups, K] mean x.
        square_mean: [groups, K] mean x^2: the diagonal of `gram` without its K^2 memory.
        abs_max: [groups, K] largest |x|.
        gram: [groups, K, K] float64, X^T X / rows.
        rows: [groups, T, K] float32, a deterministic sample of the rows, T at most a few hundred.
        data_shapes: distinct shapes of the data input with how often each was seen.
    """

    num_tokens: int
    low: float
    high: float
    abs_mean: Array | None = None
    mean: Array | None = None
    square_mean: Array | None = None
    gram: Array | None = None
    rows: FloatArray | None = None
    data_shapes: Mapping[tuple[int, ...], int] = field(default_factory=dict)
    abs_max: Array | None = None


@dataclass(frozen=True)
class ActParams:
    """Static uint8 quantization of one activation: real = scale * (code - zero_point), codes 0 to 255."""

    scale: float
    zero_point: int

    @property
    def low(self) -> float:
        return self.scale * (0 - self.zero_point)

    @property
    def high(self) -> float:
        return self.scale * (255 - self.zero_point)


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized matrix; `dequantize()` is THE oracle that every emitter, kernel and cost is tested against.

    Attributes:
        spec: bits and grouping.
        codes: [N, K] uint8, each below 2**bits of its group.
        scales: [N, G] float32; group g covers inputs [g*width, (g+1)*width), the last group may be shorter.
        zero_points: [N, G] float32, multiples of 0.5 (a half only for mid-rise grids such as symmetric 1 bit).
        group_bits: [G] uint8; constant unless bit-width varies by group (SliM-LLM, arXiv 2405.14917).
        pre_scale: [K] float32 that the input was divided by before the codes were made (AWQ), or None.
    """

    spec: QuantSpec
    codes: npt.NDArray[np.uint8]
    scales: FloatArray
    zero_points: FloatArray
    group_bits: npt.NDArray[np.uint8]
    pre_scale: FloatArray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])

    def dequantize(self) -> FloatArray:
        """W[N, K] = scale * (code - zero_point), divided by pre_scale when there is one."""
        num_inputs = self.codes.shape[1]
        width = self.spec.group_width(num_inputs)
        grids = (self.scales, self.zero_points)
        scales, zero_points = (np.repeat(grid, width, axis=1)[:, :num_inputs] for grid in grids)
        weight = (self.codes.astype(np.float32) - zero_points) * scales
        return weight if self.pre_scale is None else weight / self.pre_scale


@dataclass(frozen=True)
class LayerPlan:
    """One layer's decision: `spec` None means it stays float, and `reason` says why (or why this form was taken)."""

    spec: QuantSpec | None
    form: str | None
    reason: str


@dataclass(frozen=True)
class Plan:
    """What to do with every target, and everything needed to do it again.

    Attributes:
        layers: target name -> decision; every target of the model appears.
        activations: value name -> static uint8 parameters, for layers of the form `qdq`.
        settings: allocator, quantizer, calibrator, seed, target ... as plain JSON values.
    """

    layers: Mapping[str, LayerPlan]
    activations: Mapping[str, ActParams]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Measurement:
    """A candidate plan, emitted and run in its target runtime on held-out samples.

    Attributes:
        size: bytes of the model file with its external data.
        sqnr: dB, outputs against the float model.
        drop: loss of the user's metric (or of agreement with the float model), 0.01 = one point.
        latency: time relative to float, measured alternately; below 1 is faster.
        loss: nats per sample, outputs against the float model's (`quantkit.divergence`); infinite without data.
        drop_error: standard error of `drop`, float and quantized taken sample by sample.
        sample_losses: nats of each sample, whose mean `loss` is; empty where they are not known.
    """

    size: int
    sqnr: float
    drop: float
    latency: float
    loss: float = math.inf
    drop_error: float = 0.0
    sample_losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class AllocationProblem:
    """Everything an allocator may look at. `quantize` and `evaluate` are plain functions; both are deterministic.

    Attributes:
        targets: name -> target, in graph order.
        stats: name -> what calibration saw (only what the methods asked for).
        candidates: name -> the specs that some form can really run, best fidelity first.
        size: (target, spec) -> bytes that the layer takes in the file, scales and zero points included.
        float_size, fixed_size: bytes of the original model, and of the file that no decision changes.
        quantize: (target, spec) -> the quantized weight.
        quantize_many: make many (target name, spec) at once, for `quantize` to find.
        evaluate: emit, run and score a whole assignment; the second argument, a name, is for the report.
        file_size: bytes of the file that an assignment really makes; None = estimates are all there is.
        units: name -> targets that share one decision, in graph order; empty = every target decides alone.
        bops: (target, spec or None for float) -> bit operations of one sample, in the form that has fewest.
        milliseconds: (target, spec or None for float) -> of the layer in its fastest form; None = not measured.
        model_ms: time of the float model at the same shapes; None = not measured.
        correction: measured time of a quantized model over what its layers' times predict.
        network: the float model with samples, to try changed weights on; None = there is no data.
        seed, progress: of everything random, and where long steps are shown.
        known: what allocators found out that no budget changes; kept from one problem of a run to the next.
        front: choices between smallest and best are wanted even where the budget leaves nothing to choose.
    """

    targets: Mapping[str, Target]
    stats: Mapping[str, LayerStats]
    candidates: Mapping[str, tuple[QuantSpec, ...]]
    budget: Budget
    size: Callable[[Target, QuantSpec], int]
    float_size: int
    fixed_size: int
    quantize: Callable[[Target, QuantSpec], QuantizedWeight]
    evaluate: Callable[..., Measurement]
    quantize_many: Callable[[Sequence[tuple[str, QuantSpec]]], None] = lambda wanted: None
    file_size: Callable[[Mapping[str, QuantSpec]], int] | None = None
    units: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    bops: Callable[[Target, QuantSpec | None], int] | None = None
    milliseconds: Callable[[Target, QuantSpec | None], float] | None = None
    model_ms: float | None = None
    correction: float = 1.0
    network: Network | None = None
    seed: int = 0
    progress: Progress = field(default_factory=SilentProgress)
    known: dict[str, Any] = field(default_factory=dict)
    front: bool = False


class WeightQuantizer(Protocol):
    """W[N, K] -> codes. Sees arrays only; inputs are read-only."""

    @property
    def stats(self) -> frozenset[str]:
        """Names of the LayerStats fields it reads (`gram`, `abs_mean`, ...); it must work when they are None."""

    def quantize(self, weight: FloatArray, spec: QuantSpec, stats: LayerStats | None) -> QuantizedWeight: ...


class Transform(Protocol):
    """Chooses scales with which the float model computes the same and is easier to quantize; sees arrays only."""

    @property
    def stats(self) -> frozenset[str]:
        """Names of the LayerStats fields it reads; without any it needs no data."""

    @property
    def readers(self) -> frozenset[str]:
        """Operators whose inputs it scales."""

    @property
    def insert(self) -> bool:
        """Whether matrix products that nothing can scale get a Mul in front."""

    def scales(self, groups: Sequence[ScaleGroup]) -> Mapping[str, Array]:
        """Group name -> [size] positive numbers; a group that is left out stays as it is."""


class Allocator(Protocol):
    """Chooses a spec for every target within the budget; a target left out stays float."""

    @property
    def stats(self) -> frozenset[str]: ...

    def allocate(self, problem: AllocationProblem) -> Mapping[str, QuantSpec]: ...


class Emitter(Protocol):
    """Writes one quantized weight into the graph in one form, and says exactly what that form computes."""

    def refuse(self, target: Target, spec: QuantSpec, runtime: str) -> str | None:
        """Why this form cannot hold the layer on this runtime, or None when it can."""

    def effective_weight(self, weight: QuantizedWeight) -> FloatArray:
        """The float W[N, K] that the emitted form multiplies with (the oracle, or its int8 requantization)."""

    def fake_quantize(self, rows: FloatArray, weight: QuantizedWeight, act: ActParams | None) -> FloatArray:
        """What the form's arithmetic makes of input rows [T, K] before multiplying; the rows themselves if float."""

    def simulate(self, builder: Builder, target: Target, weight: QuantizedWeight) -> None:
        """Replace every use by float operators that compute what the form promises, for any batch."""

    def emit(self, builder: Builder, target: Target, weight: QuantizedWeight) -> None:
        """Replace every use of the target."""


class CalibrationSource(Protocol):
    """A re-iterable stream of feeds."""

    def __iter__(self) -> Iterator[Feed]: ...
