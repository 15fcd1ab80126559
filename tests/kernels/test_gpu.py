"""On a GPU: inline assembly bit by bit, parity at the benchmark's shapes, repeatability, graphs. `pytest -m gpu`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from quantkit_kernels import (
    config,
    gather_nbits,
    int8_linear,
    launch,
    make_counters,
    mixed_linear,
    nbits_linear,
    reference,
)
from torch import Tensor

from tests.kernels.samples import WEIGHTS, activations, bias, mixed_sample, product, sample, tensor
from tests.kernels.words import Words, planes

pytestmark = pytest.mark.gpu

SHAPES = ((4096, 4096), (14336, 4096), (28672, 8192))
HALF = {torch.float16: 5e-4, torch.bfloat16: 4e-3}  # norm of the error over norm of the result
ROUNDED = {torch.float16: 8e-4, torch.bfloat16: 6e-3}  # where the weights are rounded, too


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_word(bits: int, dtype: torch.dtype) -> None:
    """All 65536 words and all planes at every zero point (every 17th for 8 bits): exact, with and without assembly."""
    every = Words.of(bits)
    stored = [tensor(every.words).cuda(), tensor(every.points).cuda()]
    for asm in (True, False):
        out = torch.full(every.exact.shape, float("nan"), device="cuda")
        kind = getattr(tl, str(dtype).split(".")[1])
        planes[(64, len(every.points))](*stored, out, BITS=bits, DT=kind, ASM=asm, BLOCK=1024)
        assert np.array_equal(out.cpu().numpy(), every.exact)


def large(bits: int, group_size: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Random words and meta on the GPU, and the weight float32."""
    generator = torch.Generator("cuda").manual_seed(bits * group_size)
    words = shape[1] * bits // 16
    codes = torch.randint(-32768, 32768, (shape[0], words), generator=generator, device="cuda", dtype=torch.int16)
    grid = (shape[1] // group_size, shape[0])
    scales = (torch.rand(grid, generator=generator, device="cuda") + 0.5).half().view(torch.int16).int() & 0xFFFF
    points = torch.randint(0, 1 << bits, grid, generator=generator, device="cuda").half().view(torch.int16).int()
    meta = scales | points << 16
    return codes, meta, reference.dequantize(codes, meta, bits, group_size, shape[1])


def relative(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_parity_at_the_shapes_of_the_benchmark(bits: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Every kernel that the number of rows can choose, against float64; results come from memory full of NaN."""
    codes, meta, weight = large(bits, 128, shape)
    for num_rows in (1, 2, 4, 8, 16, 17, 32, 64, 100, 256, 1100):
        x = torch.randn(num_rows, shape[1], device="cuda", generator=torch.Generator("cuda").manual_seed(1)).to(dtype)
        torch.full((64 << 20,), float("nan"), device="cuda")
        out = nbits_linear(x, codes, meta, bits, 128)
        limits = HALF if num_rows <= config.SKINNY_ROWS else ROUNDED
        assert relative(out, x.double() @ weight.double().T) < limits[dtype], num_rows


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [16, 32, 64, 256, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_parity_of_groups_and_ragged_shapes(bits: int, group_size: int, dtype: torch.dtype) -> None:
    """Scales that float16 does not hold among them; an epilogue; K and N that fill no tile."""
    sampled = sample(bits, group_size, (333, 1000), wide=group_size == 64)
    codes, meta = (part.cuda() for part in sampled.tensors())
    for num_rows in (1, 7, 13, 33, 70, 1100):
        x, offsets = activations(num_rows, 1000, dtype).cuda(), bias(333, dtype).cuda()
        out = nbits_linear(x, codes, meta, bits, sampled.packed.group_size, offsets)
        expected = torch.from_numpy(product(x, sampled.weight)).cuda() + offsets.double()
        limits = HALF if num_rows <= config.SKINNY_ROWS else ROUNDED
        assert relative(out, expected) < limits[dtype], num_rows
        for activation in ("relu", "gelu", "silu"):
            out = nbits_linear(x, codes, meta, bits, sampled.packed.group_size, offsets, activation)
            assert relative(out, reference.activate(expected, activation)) < limits[dtype] * 2, (num_rows, activation)


@pytest.mark.parametrize("kernel", ["skinny", "gemm"])
def test_split_sums_repeat_bit_for_bit(kernel: str) -> None:
    codes, meta, _ = large(4, 128, (4096, 4096))
    x = torch.randn(16, 4096, device="cuda").half()
    counters = make_counters("cuda")
    case = config.Case(kernel, 4, 128, 4096, 4096, 16, "float16")
    tile = replace(config.rule(case, 90), split=8)
    first = launch.nbits_linear(x, codes, meta, 4, 128, counters=counters, tile=tile, kernel=kernel)
    for _ in range(200):
        again = launch.nbits_linear(x, codes, meta, 4, 128, counters=counters, tile=tile, kernel=kernel)
        assert torch.equal(first, again)
    assert not counters.any()


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_mixed(group_size: int) -> None:
    group_bits = np.random.default_rng(0).choice([2, 3, 4, 8], 4096 // group_size)
    weight, dense = mixed_sample(group_bits, group_size, (1024, 4096))
    codes = [tensor(part).cuda() for part in weight.codes]
    meta, table = tensor(weight.meta).cuda(), tensor(weight.table).cuda()
    for num_rows in (1, 8, 16, 40, 300):
        x = activations(num_rows, 4096).cuda()
        out = mixed_linear(x, codes, meta, table, group_size)
        limit = HALF[torch.float16] if num_rows <= config.MIXED_ROWS else WEIGHTS
        assert relative(out, torch.from_numpy(product(x, dense)).cuda()) < limit


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 128), (8, 64), (8, -1)])
def test_int8(bits: int, group_size: int, static: bool) -> None:
    sampled = sample(bits, group_size, (1030, 2080))
    codes, meta = (part.cuda() for part in sampled.tensors())
    scale = torch.tensor(0.02, device="cuda") if static else None
    for num_rows in (1, 16, 40, 500):
        x = activations(num_rows, 2080).cuda()
        out = int8_linear(x, codes, meta, bits, sampled.packed.group_size, scale)
        rounded, scales = reference.quantize_rows(x, scale)
        expected = torch.from_numpy(product(rounded.double() * scales.double(), sampled.weight)).cuda()
        assert relative(out, expected) < HALF[torch.float16]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gather(bits: int) -> None:
    sampled = sample(bits, 64, (500, 384))
    codes, meta = (part.cuda() for part in sampled.tensors())
    ids = torch.randint(0, 500, (3, 17), device="cuda")
    rows = gather_nbits(ids, codes, meta, bits, 64, 384, torch.float16)
    assert torch.equal(rows, reference.dequantize(codes, meta, bits, 64, 384)[ids].half())


def test_graph_replays() -> None:
    """Captured once, replayed on new values, without a copy or a wait in between."""
    codes, meta, _ = large(4, 128, (4096, 4096))
    counters = make_counters("cuda")
    x = torch.randn(4, 4096, device="cuda").half()
    nbits_linear(x, codes, meta, 4, 128, None, "none", counters)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = nbits_linear(x, codes, meta, 4, 128, None, "none", counters)
    for _ in range(3):
        x.copy_(torch.randn(4, 4096, device="cuda"))
        graph.replay()
        assert torch.equal(out, nbits_linear(x, codes, meta, 4, 128, None, "none", counters))


def test_compiles_into_one_graph() -> None:
    codes, meta, _ = large(4, 128, (4096, 4096))
    x = torch.randn(4, 4096, device="cuda").half()

    def call(value: Tensor) -> Any:
        return torch.relu(nbits_linear(value, codes, meta, 4, 128))

    assert torch.equal(torch.compile(call, fullgraph=True)(x), call(x))
