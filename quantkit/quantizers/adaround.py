"""AdaRound: whether each weight is rounded up or down is learned, so that the layer's output errs least.

Adaptive Rounding (Nagel et al., arXiv 2004.10568). Between the two codes around a weight lies a soft one, floor + h(V),
with the rectified sigmoid h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1). Minimised over V by Adam is

    sum_n D_n H D_n^T / c_n  +  strength * sum (1 - |2 h - 1|^beta),    D = soft W - W,  H = X^T X / T

The first term is the paper's reconstruction error over all calibration rows, exactly and without storing any of them;
c_n, the mean of H_kk scale^2, makes it free of units. beta falls from 20 to 2 after a warm start without the second
term, which drives every h to 0 or 1. `learn_scales` moves the scales along (AdaQuant, arXiv 2006.10518).

It starts from the grid and next to the codes that `gptq` ends with, under the same damped H. The hard result gets a few
sweeps of coordinate descent; then each row is taken from whichever is best under the exact H, so no row is ever worse
than with `gptq`, `mse` or `rtn`. Without a Gram matrix this is the clip search of `mse`. Nothing is random.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from quantkit.errors import InputError
from quantkit.quantizers import _gram, _grid
from quantkit.quantizers._gram import Doubles
from quantkit.quantizers.gptq import GPTQ
from quantkit.types import Array, FloatArray, LayerStats, QuantizedWeight, QuantSpec, WeightQuantizer

if TYPE_CHECKING:
    import torch

ZETA, GAMMA = 1.1, -0.1  # the stretched sigmoid reaches 0 and 1 at finite V
SWEEPS = 8
CHECK_EVERY = 25
WEIGHTS_PER_STEP = 8
FEWEST_STEPS = 20
BATCH_WEIGHTS = 1 << 22  # weights learned at once: their optimizer's state stays below 100 MB


@dataclass(frozen=True)
class AdaRound:
    """Learned rounding.

    Attributes:
        iterations: Adam steps at most; a layer takes no more than one step for every 8 of its weights (at least 20).
        rate: Adam's learning rate for V.
        strength: weight of the term that makes codes whole.
        warm: share of the iterations without that term.
        beta_start, beta_end: its exponent after the warm start and at the end.
        damp: added to H's diagonal, as a share of its mean, here and in the `gptq` run that this starts from.
        learn_scales: learn the scales too.
        scale_rate: Adam's learning rate for the logarithm of a scale.
        double: compute in float64 instead of float32.
    """

    iterations: int = 500
    rate: float = 0.03
    strength: float = 1.0
    warm: float = 0.2
    beta_start: float = 20.0
    beta_end: float = 2.0
    damp: float = GPTQ.damp
    learn_scales: bool = False
    scale_rate: float = 1e-3
    double: bool = False

    stats: ClassVar[frozenset[str]] = frozenset({"gram", "square_mean"})

    def __post_init__(self) -> None:
        if not 1 <= self.iterations <= 1_000_000:
            raise InputError(f"adaround.iterations must be at least 1 and at most 1000000, got {self.iterations}")
        if self.rate <= 0:
            raise InputError(f"adaround.rate must be above 0, got {self.rate}")
        if self.strength <= 0:
            raise InputError(f"adaround.strength must be above 0, got {self.strength}")
        if not 0 <= self.warm < 1:
            raise InputError(f"adaround.warm must be at least 0 and below 1, got {self.warm}")
        if not self.beta_start >= self.beta_end > 1:
            raise InputError(
                f"adaround.beta_start must be at least adaround.beta_end, and that above 1, "
                f"got {self.beta_start} and {self.beta_end}"
            )
        if self.scale_rate <= 0:
            raise InputError(f"adaround.scale_rate must be above 0, got {self.scale_rate}")

    def quantize(self, weight: FloatArray, spec: QuantSpec, stats: LayerStats | None) -> QuantizedWeight:
        """Raises: InputError without torch, and for weights that are not finite."""
        start = GPTQ(damp=self.damp).quantize(weight, spec, stats)
        gram = _gram.usable_gram(stats, (weight.shape[0], weight.shape[1]))
        if gram is None:
            return start
        matrices = np.stack([_gram.damped(matrix, self.damp) for matrix in gram])
        torch = _torch()
        with torch.inference_mode(False), torch.enable_grad():  # whatever the caller has switched off
            learned = self._learn(weight, start, matrices, torch)
        if self.learn_scales:
            learned = _refitted(weight, learned, matrices)
        return _gram.best_rows(weight, gram, [start, learned, _descended(weight, learned, matrices)])

    def _learn(self, weight: FloatArray, start: QuantizedWeight, gram: Doubles, torch: Any) -> QuantizedWeight:
        """The rounding that Adam ends at, row batch by row batch: rows do not depend on each other."""
        codes, scales = start.codes.copy(), start.scales.copy()
        for rows, part in _batches(weight.shape, gram):
            piece = replace(start, codes=codes[rows], scales=scales[rows], zero_points=start.zero_points[rows])
            problem = _Problem(weight[rows], piece, part, torch.float64 if self.double else torch.float32, torch)
            codes[rows], factors = self._optimize(problem, torch)
            if self.learn_scales:
                scales[rows] = _grid.nearest_scales(piece.scales * factors, _is_half(start), piece.scales)
        return replace(start, codes=codes, scales=scales)

    def _optimize(self, problem: _Problem, torch: Any) -> tuple[Array, Doubles]:
        """(codes [n, K], factors [n, G] on the scales)."""
        value = problem.start_values().requires_grad_(True)
        factor = problem.log_factors().requires_grad_(self.learn_scales)
        learned = [{"params": [value], "lr": self.rate}]
        if self.learn_scales:
            learned.append({"params": [factor], "lr": self.scale_rate})
        optimizer = torch.optim.Adam(learned)
        steps = min(self.iterations, max(FEWEST_STEPS, problem.weights // WEIGHTS_PER_STEP))
        warm = int(self.warm * steps)
        for step in range(steps):
            optimizer.zero_grad()
            if self.learn_scales:
                optimizer.param_groups[1]["lr"] = self.scale_rate * (1 - step / steps)
            soft = _soft(value)
            loss = problem.error(soft, factor)
            if step >= warm:
                done = (step - warm) / max(steps - warm - 1, 1)
                # A cosine from beta_start to beta_end, as the authors anneal it.
                beta = self.beta_end + (self.beta_start - self.beta_end) * (0.5 + 0.5 * float(np.cos(np.pi * done)))
                loss = loss + self.strength * (1 - (2 * soft - 1).abs().pow(beta)).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if step > warm and step % CHECK_EVERY == 0 and _is_hard(soft):
                break
        return problem.result(_soft(value.detach()), factor.detach())


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise InputError("the quantizer adaround needs torch; run: pip install 'quantkit[torch]'") from error
    return torch


def _descended(weight: FloatArray, start: QuantizedWeight, gram: Doubles) -> QuantizedWeight:
    """After coordinate descent on the codes; the grid stays."""
    codes = start.codes.copy()
    columns = _gram.columns_of(start.spec, weight.shape[1], half=False)
    for group in range(gram.shape[0]):
        for rows in _gram.rows_of_group(weight.shape, gram.shape[0], group):
            state = _gram.open_rows(weight, start, rows, columns, gram[group])
            _gram.descend(gram[group], state, columns, SWEEPS)
            codes[rows] = state.codes.T.astype(np.uint8)
    return replace(start, codes=codes)


def _is_half(weight: QuantizedWeight) -> bool:
    """Scales that all are float16's must stay so."""
    with np.errstate(over="ignore"):
        return bool((weight.scales == weight.scales.astype(np.float16)).all())


def _refitted(weight: FloatArray, start: QuantizedWeight, gram: Doubles) -> QuantizedWeight:
    """The best scales of all groups of a row together, for its codes as they are: least squares under the Gram.

    With levels L = code - zero_point, row n's scales solve A s = b, A_gh = L_g H L_h^T and b_g = L_g H W^T, L_g being L
    with all inputs outside group g at zero. A scale that would not be positive stays as it was.
    """
    width = start.spec.group_width(weight.shape[1])
    levels = start.codes - _by_input(start.zero_points, width, weight.shape[1])
    scales = start.scales.astype(np.float64)
    for group in range(gram.shape[0]):
        for rows in _gram.rows_of_group(weight.shape, gram.shape[0], group):
            scales[rows] = _best_scales(weight[rows], levels[rows], scales[rows], gram[group], width)
    return replace(start, scales=_grid.nearest_scales(scales, _is_half(start), start.scales).astype(np.float32))


def _best_scales(weight: FloatArray, levels: Doubles, scales: Doubles, gram: Doubles, width: int) -> Doubles:
    """[n, G] the scales of `_refitted` for some rows of one Gram [K, K]."""
    first = np.arange(0, levels.shape[1], width)
    parts = [(levels[:, k : k + width] @ gram[k : k + width]) * levels for k in first]
    normal = np.stack([np.add.reduceat(part, first, axis=1) for part in parts], axis=1)
    wanted = np.add.reduceat((weight.astype(np.float64) @ gram) * levels, first, axis=1)
    # Groups of zeros, or groups that do the same, leave scales open: those stay near where they were.
    ridge = 1e-9 * np.trace(normal, axis1=1, axis2=2)[:, None, None] + np.finfo(np.float64).tiny
    normal += ridge * np.eye(len(first))
    found = np.linalg.solve(normal, (wanted + ridge[:, :, 0] * scales)[:, :, None])[:, :, 0]
    return np.where(found > 0, found, scales)


def _soft(value: torch.Tensor) -> torch.Tensor:
    """h(V)."""
    return (value.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def _is_hard(soft: torch.Tensor) -> bool:
    return bool(((soft == 0) | (soft == 1)).all())


def _batches(shape: tuple[int, int], gram: Doubles) -> Iterator[tuple[slice, Doubles]]:
    """(rows, their Gram matrices): some rows of one matrix, or some convolution groups."""
    groups, rows_of_group = gram.shape[0], shape[0] // gram.shape[0]
    if groups == 1:
        for rows in _grid.row_chunks(shape, BATCH_WEIGHTS):
            yield rows, gram
        return
    step = max(1, BATCH_WEIGHTS // (rows_of_group * shape[1]))
    for first in range(0, groups, step):
        last = min(first + step, groups)
        yield slice(first * rows_of_group, last * rows_of_group), gram[first:last]


def _by_input(values: Array, width: int, num_inputs: int) -> Doubles:
    """[n, G] -> [n, K] float64: each group's value at its inputs."""
    return np.repeat(np.asarray(values, dtype=np.float64), width, axis=1)[:, :num_inputs]


class _Problem:
    """The tensors of one batch, [groups, n, K], in units that make all layers alike: row scales and the Gram's mean."""

    def __init__(self, weight: FloatArray, start: QuantizedWeight, gram: Doubles, dtype: Any, torch: Any) -> None:
        num_rows, num_inputs = weight.shape
        self._shape = (gram.shape[0], num_rows // gram.shape[0], num_inputs)
        self._torch, self._dtype, self._num_groups = torch, dtype, start.scales.shape[1]
        self.weights = weight.size
        width = start.spec.group_width(num_inputs)
        power = np.diagonal(gram, axis1=1, axis2=2).mean(axis=1)
        scales = _by_input(start.scales, width, num_inputs)
        zeros = _by_input(start.zero_points, width, num_inputs)
        unit = scales.max(axis=1, keepdims=True)
        places = weight.astype(np.float64) / scales + zeros
        # Between the start's code and the neighbour on the weight's side: the start may have left the nearest two.
        floors = np.clip(np.floor(places), start.codes.astype(np.float64) - 1, start.codes)
        tops = _by_input(2.0 ** start.group_bits[None].astype(np.float64) - 1, width, num_inputs)
        self._group_of_input = torch.arange(num_inputs) // width
        self._fractions = self._tensor(np.clip(places - floors, 0.01, 0.99))
        self._floors, self._zeros = self._tensor(floors), self._tensor(zeros)
        self._tops = self._tensor(np.broadcast_to(tops, weight.shape))
        self._scales = self._tensor(scales / unit)
        self._exact = self._tensor(weight.astype(np.float64) / unit)
        self._gram = torch.from_numpy(gram / power[:, None, None]).to(dtype)
        self._costs = (self._scales.square() * torch.diagonal(self._gram, dim1=1, dim2=2)[:, None]).mean(dim=2)

    def _tensor(self, values: Array) -> torch.Tensor:
        tensor: torch.Tensor = self._torch.from_numpy(np.array(values).reshape(self._shape)).to(self._dtype)
        return tensor

    def start_values(self) -> torch.Tensor:
        """V with h(V) = the weight's place between its two codes."""
        share = (self._fractions - GAMMA) / (ZETA - GAMMA)
        values: torch.Tensor = self._torch.log(share / (1 - share))
        return values

    def log_factors(self) -> torch.Tensor:
        factors: torch.Tensor = self._torch.zeros((*self._shape[:2], self._num_groups), dtype=self._dtype)
        return factors

    def error(self, soft: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """A number whose gradient is that of sum_n D_n H D_n^T / c_n, with one matrix product instead of two."""
        scales = self._scales * factor.exp()[:, :, self._group_of_input] if factor.requires_grad else self._scales
        codes = self._torch.minimum((self._floors + soft).clamp(min=0), self._tops)
        delta = scales * (codes - self._zeros) - self._exact
        slopes = 2 * (delta.detach() @ self._gram) / self._costs[:, :, None]
        total: torch.Tensor = (slopes * delta).sum()
        return total

    def result(self, soft: torch.Tensor, factor: torch.Tensor) -> tuple[Array, Doubles]:
        """(codes [n, K] uint8, factors [n, G] on the scales)."""
        codes = self._floors + (soft >= 0.5).to(self._dtype)
        codes = self._torch.minimum(codes.clamp(min=0), self._tops).reshape(-1, self._shape[2])
        factors = factor.exp().double().numpy().reshape(-1, self._num_groups)
        return codes.numpy().astype(np.uint8), factors


METHOD: type[WeightQuantizer] = AdaRound
