"""Products of packed weights to be measured, and the weights themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from quantkit_kernels import reference

SHAPES = ((4096, 4096), (14336, 4096), (28672, 8192))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
BITS = (4, 8, 3, 2)
GROUPS = (128,)
DTYPES = ("float16",)
CHUNK = 4096
ROW_CODES = 256
"""K must be a multiple of this, so that any words are codes: nothing is filled up."""


@dataclass(frozen=True)
class Case:
    """x [M, K] times W [N, K]^T, W in codes of `bits` bits with one scale and zero point for `group_size` of them."""

    M: int
    N: int
    K: int
    bits: int
    group_size: int
    dtype: str

    @property
    def model(self) -> str:
        return f"{self.N}x{self.K}"

    @property
    def setting(self) -> str:
        return f"W{self.bits} g{self.group_size} {self.dtype} M={self.M}"

    @property
    def flops(self) -> int:
        return 2 * self.M * self.N * self.K

    @property
    def activation_bytes(self) -> int:
        """Of x and the result."""
        return 2 * self.M * (self.K + self.N)


def cases(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rows: Sequence[int] = ROWS,
    bits: Sequence[int] = BITS,
    groups: Sequence[int] = GROUPS,
    dtypes: Sequence[str] = DTYPES,
) -> list[Case]:
    """All combinations, those of one weight next to each other.

    Raises:
        ValueError: K that is no multiple of 256 or of a group.
    """
    for _, num_inputs in shapes:
        for group in groups:
            if num_inputs % ROW_CODES or (group > 0 and num_inputs % group):
                raise ValueError(f"K must be a multiple of {ROW_CODES} and of the group {group}, got {num_inputs}")
    return [
        Case(m, n, k, b, k if g == -1 else g, dtype)
        for n, k in shapes
        for dtype in dtypes
        for g in groups
        for b in bits
        for m in rows
    ]


def by_weight(found: Iterable[Case]) -> Iterator[list[Case]]:
    """Neighbours that differ in M alone."""
    batch: list[Case] = []
    for case in found:
        if batch and (case.N, case.K, case.bits, case.group_size, case.dtype) != _weight_of(batch[0]):
            yield batch
            batch = []
        batch.append(case)
    if batch:
        yield batch


def _weight_of(case: Case) -> tuple[int, int, int, int, str]:
    return case.N, case.K, case.bits, case.group_size, case.dtype


@dataclass(frozen=True)
class Weights:
    """One random matrix.

    Attributes:
        codes: int16 [N, words] as the kernels read them, any bits.
        scales, zero_points: float16 [N, G]; scales differ, zero points are whole.
        meta: int32 [G, N].
    """

    case: Case
    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor
    meta: torch.Tensor

    def plain_codes(self) -> torch.Tensor:
        """uint8 [N, K]."""
        return reference.unpack_codes(self.codes, self.case.bits)[:, : self.case.K]

    def matrix(self, rows: slice = slice(None)) -> torch.Tensor:
        """W[rows] float32, exact but for one rounding."""
        case = self.case
        return reference.dequantize(
            self.codes[rows], self.meta[:, rows].contiguous(), case.bits, case.group_size, case.K
        )

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """W [N, K] in half precision."""
        return torch.cat([self.matrix(part).to(dtype) for part in chunks(self.case.N)])


def random_weights(case: Case, device: str) -> Weights:
    """Random codes, scales and zero points, the same for every M."""
    generator = torch.Generator(device).manual_seed(case.N + 7 * case.K + 11 * case.bits + case.group_size)
    words = case.K * case.bits // 16
    codes = torch.randint(-(1 << 15), 1 << 15, (case.N, words), generator=generator, device=device, dtype=torch.int32)
    shape = (case.N, case.K // case.group_size)
    spread = (0.5 + torch.rand(shape, generator=generator, device=device)) / (1 << (case.bits - 1)) / case.K**0.5
    points = torch.randint(0, 1 << case.bits, shape, generator=generator, device=device)
    scales, zero_points = spread.half(), points.half()
    meta = (scales.view(torch.int16).int() & 0xFFFF) | (zero_points.view(torch.int16).int() << 16)
    return Weights(case, codes.to(torch.int16), scales, zero_points, meta.T.contiguous())


def random_input(case: Case, device: str) -> torch.Tensor:
    """x [M, K], normal."""
    generator = torch.Generator(device).manual_seed(case.M)
    return torch.randn(case.M, case.K, generator=generator, device=device).to(getattr(torch, case.dtype))


def chunks(num_rows: int) -> Iterator[slice]:
    for first in range(0, num_rows, CHUNK):
        yield slice(first, min(first + CHUNK, num_rows))


def exact(x: torch.Tensor, weights: Weights) -> torch.Tensor:
    """x W^T in float64."""
    wide = x.double()
    return torch.cat([wide @ weights.matrix(part).double().T for part in chunks(weights.case.N)], dim=1)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of what it should be; a number that is none is infinitely wrong."""
    error = float((found.double() - wanted).norm() / wanted.norm())
    return error if error == error else float("inf")
