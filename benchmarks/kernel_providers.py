"""Who multiplies by packed weights: quantkit's kernels and its peers, as far as they are installed.

A provider gets one matrix of codes and gives calls on as many copies of it as are asked for. `exact` says whether it
multiplies by the same numbers, so that its result can be checked; the others quantize on their own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn import functional

from benchmarks.kernel_cases import Weights

Call = Callable[[torch.Tensor], torch.Tensor]
"""x [M, K] -> [M, N]."""


@dataclass(frozen=True)
class Prepared:
    """A weight in a provider's form.

    Attributes:
        calls: one for each copy.
        num_bytes: that one call reads, without x.
        dtype: of x.
        exact: it multiplies by the numbers of the case.
    """

    calls: Sequence[Call]
    num_bytes: int
    dtype: torch.dtype
    exact: bool = True


@dataclass(frozen=True)
class Provider:
    """A contestant.

    Attributes:
        package: what must be installed; "" = nothing beside torch.
        accepts: whether it has this width, group and type.
        prepare: (weights, how many copies for that many bytes) -> the calls.
    """

    name: str
    package: str
    accepts: Callable[[Weights], bool]
    prepare: Callable[[Weights, Callable[[int], int]], Prepared]

    @property
    def installed(self) -> bool:
        return not self.package or find_spec(self.package) is not None


Copies = Callable[[int], int]


def _size(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _dense(weights: Weights, copies: Copies) -> Prepared:
    """The product in half precision, as torch.nn.Linear has its weight."""
    dtype = getattr(torch, weights.case.dtype)
    matrix = weights.dense(dtype)
    size = _size(matrix)
    made = [matrix, *(matrix.clone() for _ in range(copies(size) - 1))]
    return Prepared([lambda x, w=w: functional.linear(x, w) for w in made], size, dtype)  # type: ignore[misc]


def _quantkit(weights: Weights, copies: Copies) -> Prepared:
    from quantkit_kernels.ops import make_counters, nbits_linear

    case, counters = weights.case, make_counters(weights.codes.device)
    size = _size(weights.codes, weights.meta)

    def call(codes: torch.Tensor, meta: torch.Tensor) -> Call:
        return lambda x: nbits_linear(x, codes, meta, case.bits, case.group_size, None, "none", counters)

    calls = [call(weights.codes.clone(), weights.meta.clone()) for _ in range(copies(size))]
    return Prepared(calls, size, getattr(torch, case.dtype))


def _torch_int4(weights: Weights, copies: Copies) -> Prepared:
    """torch's own kernel: bfloat16, w = (q - 8) s + t with t = (8 - z) s."""
    codes, scales = weights.plain_codes(), weights.scales.float()
    nibbles = (codes[:, ::2] << 4) | codes[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(nibbles.contiguous(), 8)
    offsets = (8 - weights.zero_points.float()) * scales
    both = torch.stack([scales, offsets], -1).transpose(0, 1).contiguous().bfloat16()  # [G, N, 2]
    size, group = _size(packed, both), weights.case.group_size

    def call(matrix: torch.Tensor, grid: torch.Tensor) -> Call:
        return lambda x: torch.ops.aten._weight_int4pack_mm(x, matrix, group, grid)

    calls = [call(packed.clone(), both.clone()) for _ in range(copies(size))]
    return Prepared(calls, size, torch.bfloat16)


def _gemlite(weights: Weights, copies: Copies) -> Prepared:
    from gemlite.core import DType, GemLiteLinear

    case = weights.case
    kind = {"float16": DType.FP16, "bfloat16": DType.BF16}[case.dtype]
    dtype = getattr(torch, case.dtype)

    def make() -> Any:
        layer = GemLiteLinear(
            case.bits,
            group_size=case.group_size,
            in_features=case.K,
            out_features=case.N,
            input_dtype=kind,
            output_dtype=kind,
        )
        scales, points = (item.reshape(-1, 1).to(dtype) for item in (weights.scales, weights.zero_points))
        layer.pack(weights.plain_codes(), scales, points, None)
        return layer

    first = make()
    size = _held(first)
    return Prepared([first, *(make() for _ in range(copies(size) - 1))], size, dtype)


def _torchao(weights: Weights, copies: Copies) -> Prepared:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    linear = _linear(weights, torch.bfloat16)
    quantize_(linear, Int4WeightOnlyConfig(group_size=weights.case.group_size))
    size = weights.case.N * weights.case.K // 2 + 4 * weights.scales.numel()
    return _modules(linear, copies, size, torch.bfloat16)


def _hqq(weights: Weights, copies: Copies) -> Prepared:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    case, dtype = weights.case, getattr(torch, weights.case.dtype)
    config = BaseQuantizeConfig(nbits=case.bits, group_size=case.group_size)
    layer = HQQLinear(_linear(weights, dtype), config, compute_dtype=dtype, device="cuda")
    size = case.N * case.K * case.bits // 8 + 4 * weights.scales.numel()
    return _modules(layer, copies, size, dtype)


def _bitsandbytes(weights: Weights, copies: Copies) -> Prepared:
    from bitsandbytes.nn import Linear4bit

    case, dtype = weights.case, getattr(torch, weights.case.dtype)
    dense = _linear(weights, dtype)
    layer = Linear4bit(case.K, case.N, bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.load_state_dict(dense.state_dict())
    size = case.N * case.K // 2 + case.N * case.K // 64 * 4
    return _modules(layer.cuda(), copies, size, dtype)


def _linear(weights: Weights, dtype: torch.dtype) -> torch.nn.Linear:
    layer = torch.nn.Linear(weights.case.K, weights.case.N, bias=False, device="meta", dtype=dtype)
    layer.weight = torch.nn.Parameter(weights.dense(dtype), requires_grad=False)
    return layer


def _modules(layer: Any, copies: Copies, size: int, dtype: torch.dtype) -> Prepared:
    return Prepared([layer, *(copy.deepcopy(layer) for _ in range(copies(size) - 1))], size, dtype, exact=False)


def _held(layer: torch.nn.Module) -> int:
    return _size(*layer.parameters(), *layer.buffers())


def _four_bits(weights: Weights) -> bool:
    return weights.case.bits == 4 and weights.case.group_size in (32, 64, 128, 256)


PROVIDERS: Mapping[str, Provider] = {
    item.name: item
    for item in (
        Provider("cuBLAS", "", lambda weights: True, _dense),
        Provider("quantkit", "", lambda weights: True, _quantkit),
        Provider("torch int4", "", _four_bits, _torch_int4),
        Provider("gemlite", "gemlite", lambda weights: weights.case.bits in (2, 4, 8), _gemlite),
        Provider("torchao", "torchao", _four_bits, _torchao),
        Provider("hqq", "hqq", lambda weights: weights.case.bits in (2, 3, 4, 8), _hqq),
        Provider("bitsandbytes", "bitsandbytes", lambda weights: weights.case.bits == 4, _bitsandbytes),
    )
}
REFERENCE = "cuBLAS"
"""Whose time the others are compared with."""
