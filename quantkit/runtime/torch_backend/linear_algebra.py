"""Matrix products, sums of products and determinants."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from quantkit.runtime.torch_backend._types import Node, Op, Run, Table

# torch has no determinants of these.
HALVES = (torch.float16, torch.bfloat16)


def _matmul(node: Node) -> Run:
    kind = node.input_types[0]
    if kind is None or kind.is_floating_point():
        return torch.matmul
    return lambda a, b: _integer(torch.matmul, a, b)


def _integer(product: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """CUDA has no integer products: float64 is exact as long as the sums stay below 2**53."""
    if not tensors[0].is_cuda:
        return product(*tensors)
    return product(*(item.double() for item in tensors)).to(tensors[0].dtype)


def _gemm(node: Node) -> Run:
    """alpha A B + beta C; the ordinary linear layer is one call without a scaling."""
    alpha, beta = _number(node.get("alpha", 1.0)), _number(node.get("beta", 1.0))
    trans_a, trans_b = bool(node.get("transA", 0)), bool(node.get("transB", 0))
    kind = node.input_types[0]
    integer = kind is not None and not kind.is_floating_point()
    if integer and not (isinstance(alpha, int) and isinstance(beta, int)):
        raise node.refuse(f"alpha {alpha} and beta {beta} of an integer product must be whole numbers")

    def general(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        a, b = a.t() if trans_a else a, b.t() if trans_b else b
        if c is None:
            product = torch.mm(a, b)
            return product if alpha == 1 else product * alpha
        return torch.addmm(c, a, b, beta=beta, alpha=alpha)

    def linear(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        return functional.linear(a, b if trans_b else b.t(), c)

    if integer:
        return lambda a, b, *c: _integer(general, a, b, *(item for item in c if item is not None))
    return linear if alpha == 1 and beta == 1 and not trans_a else general


def _number(value: float) -> float | int:
    """Whole numbers as int: torch scales integers by nothing else."""
    return int(value) if float(value).is_integer() else float(value)


def _einsum(node: Node) -> Run:
    equation = str(node.get("equation"))
    kind = node.input_types[0]
    if kind is None or kind.is_floating_point():
        return lambda *tensors: torch.einsum(equation, *tensors)
    return lambda *tensors: _integer(lambda *items: torch.einsum(equation, *items), *tensors)


def _det(x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.linalg.det(x.float() if x.dtype in HALVES else x)
    return found.to(x.dtype)


TABLE: Table = {
    ("Det", 11): Op(lambda node: _det),
    ("Einsum", 12): Op(_einsum),
    ("Gemm", 1): Op(_gemm),
    ("MatMul", 1): Op(_matmul),
}
