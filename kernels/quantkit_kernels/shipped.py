"""What the rules of `config` compile to: the kernels with their arguments, for machine code without a GPU.

`python -m quantkit_kernels.shipped --arch 90` prints one line of JSON per compilation: its name, its instructions per
weight in the main loop (null where there is no such loop) and the fields of `aot.Resources`, but the loop.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from quantkit_kernels import aot, config
from quantkit_kernels.act8 import act8, round_rows
from quantkit_kernels.config import Case, Tile
from quantkit_kernels.dequant import dequant
from quantkit_kernels.gemm import gemm, sort_planes
from quantkit_kernels.mixed import mixed
from quantkit_kernels.skinny import skinny

TYPES = {"float16": "*fp16", "bfloat16": "*bf16"}
SIZE = 8192  # N and K of the cases


@dataclass(frozen=True)
class Compilation:
    """A kernel with the types and constants it is launched with.

    weights: codes that a pass of the main loop consumes in a program, 0 where the kernel has no product.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    tile: Tile
    weights: int


def compilations(arch: int, every: bool = False) -> Iterator[Compilation]:
    """The rules' choices for a large layer: every one, or those that stand for the rest (before 90, few)."""
    for bits in (2, 3, 4, 8):
        yield product(_case("skinny", bits, 128, 8), arch)
        if every or arch >= 90:
            yield from _of_width(bits, arch, every)
    yield product(_case("skinny", 4, 128, 16), arch)
    yield product(_case("gemm", 4, 128, 64), arch)
    yield mixed_product(_case("mixed", 0, 128, 8), arch)
    yield int8_product(_case("act8", 4, 128, 16), arch)
    if every or arch >= 90:
        yield product(_case("skinny", 4, 128, 32), arch)
        yield mixed_product(_case("mixed", 0, 128, 32), arch)
        yield int8_product(_case("act8", 8, 128, 512), arch)
        yield rows_of_floats(3)
        yield from preparations()


def _of_width(bits: int, arch: int, every: bool) -> Iterator[Compilation]:
    """Both types, small and large groups, few and many rows of x."""
    yield product(_case("skinny", bits, 128, 8, "bfloat16"), arch)
    for rows, group_size in ((8, 32), (16, 32), *(((16, 128),) if bits != 4 else ())):
        yield product(_case("skinny", bits, group_size, rows), arch)
    if every or bits in (3, 8):
        yield product(_case("skinny", bits, 64, 8), arch)
    if every or bits in (3, 4):
        yield product(_case("gemm", bits, 128, 512), arch)
    if every:
        for group_size in (0, 16, 64, 256):
            yield product(_case("skinny", bits, group_size, 16), arch)
        for group_size in (0, 16, 256):
            yield product(_case("skinny", bits, group_size, 8), arch)
        yield product(_case("skinny", bits, 128, 16, "bfloat16"), arch)
        yield product(_case("gemm", bits, 128, 512, "bfloat16"), arch)
        yield product(_case("gemm", bits, 32, 64), arch)
        if bits in (4, 8):
            yield int8_product(_case("act8", bits, 128, 64), arch)


def _case(kernel: str, bits: int, group_size: int, rows: int, dtype: str = "float16") -> Case:
    return Case(kernel, bits, group_size, SIZE, SIZE, rows, dtype)


def product(case: Case, arch: int) -> Compilation:
    """`skinny` or `gemm` for a case."""
    tile = config.rule(case, arch)
    skinny_case = case.kernel == "skinny"
    words, unroll, shared = (config.words_and_tiles if skinny_case else config.gemm_words)(case.bits, case.group_size)
    half = TYPES[case.dtype]
    pointers = {"x": {4: "*i64", 8: "*i32"}.get(case.bits, half), "w": "*i16", "sz": "*i32"}
    if not skinny_case:
        pointers["x"] = half
    sizes = ("M", "N", "K", *(("KX",) if skinny_case else ()), "swn", "sxm", "wide")
    constants = {"BITS": case.bits, "GS": case.group_size, "C": words, "U": unroll, "R": shared, "EVEN": True}
    weights = tile.BN * words * unroll * 16 // case.bits
    kernel = skinny if skinny_case else gemm
    return _compilation(case, kernel, pointers, sizes, constants, tile, weights)


def mixed_product(case: Case, arch: int) -> Compilation:
    """`mixed` with groups of every width; its widest loop is that of 3 bits, 256 codes long."""
    tile = config.rule(case, arch)
    pointers = {"x4": "*i64", "x2": "*i32", "x1": TYPES[case.dtype], **{f"w{bits}": "*i16" for bits in (2, 3, 4, 8)}}
    pointers |= {"sz": "*i32", "tab": "*i32"}
    counted = [f"{name}{bits}" for name in ("n", "sw") for bits in (2, 3, 4, 8)]
    shapes = config.mixed_shapes(case.group_size, (16, 16, 16, 16), case.K)
    constants: dict[str, Any] = {"GS": case.group_size, "R": shapes[0][2]}
    constants |= {f"S{bits}": shape for bits, shape in zip((2, 3, 4, 8), shapes, strict=True)}
    sizes = ("M", "N", "K", "kx4", "kx2", *counted, "sx4", "sx2", "sx1", "wide")
    return _compilation(case, mixed, pointers, sizes, constants, tile, tile.BN * 256)


def int8_product(case: Case, arch: int) -> Compilation:
    """`act8` for a case."""
    tile = config.rule(case, arch)
    words, unroll = config.bytes_and_tiles(case.bits, case.group_size)
    pointers = {"xq": "*i8", "xs": "*fp32", "sums": "*i32", "w": "*i8", "sz": "*i32"}
    constants = {"BITS": case.bits, "GS": case.group_size, "C": words, "U": unroll, "EVEN": True}
    sizes = ("M", "N", "K", "swb", "sxm", "wide")
    return _compilation(case, act8, pointers, sizes, constants, tile, tile.BN * words * unroll * 8 // case.bits)


def rows_of_floats(bits: int) -> Compilation:
    """`dequant`, as it looks up the rows of a table."""
    words = 16 * bits if bits < 4 else 8 * bits
    signature = {"ids": "*i64", "w": "*i16", "sz": "*i32", "o": "*fp16"}
    signature |= dict.fromkeys(("rows", "N", "K", "swn", "son", "wide"), "i32")
    constants = {"BITS": bits, "GS": 128, "C": words, "BN": 16, "WIDE": False, "IDS": True}
    return Compilation(f"dequant b{bits}", dequant, signature, constants, Tile(0, 16, 1, 4, 3), 0)


def preparations() -> Iterator[Compilation]:
    """The kernels that bring x into order."""
    signature = {"x": "*i16", "o": "*i16", **dict.fromkeys(("M", "K", "sxm", "som"), "i32")}
    yield Compilation("sort_planes", sort_planes, signature, {"P": 4, "C": 32, "BM": 8}, Tile(8, 0, 1, 4, 3), 0)
    signature = {"x": "*fp16", "xq": "*i8", "scales": "*fp32", "sums": "*i32", "static": "*fp32"}
    signature |= dict.fromkeys(("M", "K", "KP", "sxm"), "i32")
    constants = {"P": 2, "C": 64, "BLOCK": 4096, "STATIC": False, "WHOLE": False}
    yield Compilation("round_rows", round_rows, signature, constants, Tile(1, 0, 1, 4, 3), 0)


def _compilation(
    case: Case, kernel: Any, pointers: dict[str, str], sizes: tuple[str, ...], constants: dict[str, Any], tile: Tile,
    weights: int,
) -> Compilation:  # fmt: skip
    half = TYPES[case.dtype]
    signature = {**pointers, "bias": half, "o": half, "ws": "*fp32", "cnt": "*i32", **dict.fromkeys(sizes, "i32")}
    ending = {"WIDE": False, "HAS_BIAS": True, "ACT": "none", "ASM": True}
    fixed = {**constants, **ending, "BM": tile.BM, "BN": tile.BN, "SPLIT": tile.split}
    name = f"{case.kernel} b{case.bits} g{case.group_size} m{case.M} {case.dtype}"
    return Compilation(name, kernel, signature, fixed, tile, weights)


def measure(compilation: Compilation, arch: int) -> dict[str, Any]:
    """Compile and read the machine code; see the module for the fields."""
    tile = compilation.tile
    compiled = aot.compile_kernel(
        compilation.kernel, compilation.signature, compilation.constants, arch, tile.warps, tile.stages
    )
    found = aot.resources(compiled)
    per_weight = found.per_weight(compilation.weights, tile.warps) if compilation.weights else None
    fields = {key: value for key, value in asdict(found).items() if key != "loop"}
    return {"name": compilation.name, "warps": tile.warps, "per_weight": per_weight, **fields}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, choices=(80, 90), default=90)
    parser.add_argument("--every", action="store_true", help="not only those that stand for the rest")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th compilation, from the i-th")
    arguments = parser.parse_args()
    index, count = (int(number) for number in arguments.part.split("/"))
    for compilation in list(compilations(arguments.arch, arguments.every))[index::count]:
        print(json.dumps(measure(compilation, arguments.arch)), flush=True)


if __name__ == "__main__":
    main()
