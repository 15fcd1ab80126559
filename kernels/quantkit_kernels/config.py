"""Which tile a kernel uses: a table of measured choices per device and Triton version, and rules where it has none.

A table is a JSON file `configs/<device>-triton<major.minor>.json`, written by `tune`: {key: {field: value}} with
`Case.key()` as key and the fields of `Tile`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SKINNY_ROWS = 32  # rows of x up to which `skinny` runs
MIXED_ROWS = 128  # rows up to which `mixed` beats dequantizing first
GEMM_ROWS = 1024  # rows up to which dequantizing within the product beats dequantizing first
SPLIT_ROWS = 256  # SPLIT * M at most: the workspace is SPLIT * M * N floats
PROGRAMS = 1056  # programs of one warp wanted in flight: 8 for each of the 132 processors of an H200
KERNELS = ("skinny", "gemm", "mixed", "act8")


@dataclass(frozen=True)
class Case:
    """What a choice depends on. group_size 0 = one scale per row; dtype "float16" or "bfloat16"; bits 0 = mixed."""

    kernel: str
    bits: int
    group_size: int
    N: int
    K: int
    M: int
    dtype: str

    def key(self) -> str:
        """M counts by the bucket it falls into."""
        bucket = next((batch for batch in BATCHES if self.M <= batch), BATCHES[-1])
        return f"{self.kernel} b{self.bits} g{self.group_size} n{self.N} k{self.K} m{bucket} {self.dtype}"


@dataclass(frozen=True)
class Tile:
    """BM rows of x times BN outputs per program, K in `split` parts; C words and U tiles per step as in `shape`."""

    BM: int
    BN: int
    split: int
    warps: int
    stages: int


def choose(case: Case, device: str, arch: int, triton_version: str) -> Tile:
    """The measured tile where there is one, else the rule's; arch: compute capability, 80 or 90."""
    stored = table(device, triton_version).get(case.key())
    return rule(case, arch) if stored is None else stored


@lru_cache(maxsize=8)
def table(device: str, triton_version: str) -> Mapping[str, Tile]:
    """The tiles measured on a device with a Triton version; empty where nobody measured."""
    path = table_path(device, triton_version)
    if not path.exists():
        return {}
    return {key: Tile(**fields) for key, fields in json.loads(path.read_text(encoding="utf-8")).items()}


def table_path(device: str, triton_version: str) -> Path:
    """Where the tiles of a device and a Triton version are kept."""
    name = re.sub(r"[^A-Za-z0-9]+", "_", device).strip("_")
    return CONFIGS / f"{name}-triton{'.'.join(triton_version.split('.')[:2])}.json"


def save(tiles: Mapping[str, Tile], path: Path) -> None:
    """Write a table."""
    path.parent.mkdir(exist_ok=True)
    text = json.dumps({key: asdict(tiles[key]) for key in sorted(tiles)}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def words_and_tiles(bits: int, group_size: int) -> tuple[int, int, int]:
    """(C, U, R): words per tile, tiles per step, groups per tile, for groups of `group_size` (0: one per row).

    A tile has 8 words at least; with 8 two planes make one tensor-core operand, and groups of fewer words share a tile.
    Steps of 2 and 3 bits are runs of 256 codes.
    """
    if bits < 4:
        return 16 * bits, 1, 1
    per_word = 16 // bits
    group_words = max(1, group_size // per_word) if group_size else 64
    words = min(max(group_words, 8), 32)
    shared = words // group_words if group_words < words else 1
    return words, max(1, 128 // (words * per_word)), shared


def gemm_words(bits: int, group_size: int) -> tuple[int, int, int]:
    """(C, U, R) for `gemm`, whose tiles hold as many groups as they like: steps of 128 codes, of 256 for 3 bits."""
    if bits < 4:
        return 16 if bits == 2 else 48, 1, 1
    words = 8 * bits
    return words, 1, 128 // group_size if 0 < group_size < 128 else 1


def mixed_shapes(group_size: int, counts: tuple[int, ...], num_inputs: int) -> tuple[tuple[int, int, int, bool], ...]:
    """(C, U, R, EVEN) for 2, 3, 4 and 8 bits with `counts` groups each; R is the same for all."""
    shared = words_and_tiles(4, group_size)[2]
    shapes = []
    for bits, count in zip((2, 3, 4, 8), counts, strict=True):
        words, unroll, _ = words_and_tiles(bits, group_size)
        if shared > 1 and bits >= 4:
            words = shared * group_size * bits // 16
            unroll = max(1, 128 // (shared * group_size))
        even = num_inputs % group_size == 0 and count * group_size % (words * unroll * 16 // bits) == 0
        shapes.append((words, unroll, shared, even))
    return tuple(shapes)


def bytes_and_tiles(bits: int, group_size: int) -> tuple[int, int]:
    """(C, U) for `act8`: bytes per tile, tiles per step, which take at least 128 codes."""
    per_byte = 8 // bits
    words = min(group_size or 128, 128) // per_byte
    return words, max(1, 128 // (words * per_byte))


def rule(case: Case, arch: int) -> Tile:
    """Tiles that the machine code speaks for: few instructions per weight, no spilled registers.

    arch: compute capability, 80 or 90; before 90 a tensor-core operand cannot stay in shared memory, and tiles are
    smaller.
    """
    if case.kernel == "gemm":
        stages = 2 if case.bits == 3 else 3
        tile = Tile(128 if case.M > 128 else 64, 128, 1, 4, stages) if arch >= 90 else Tile(64, 128, 1, 8, stages)
    elif case.kernel == "act8":
        tile = _act8_tile(case.M)
    elif case.M > 16:
        tile = Tile(32, 128, 1, 8 if case.bits == 3 and arch < 90 else 4, 3)
    elif case.kernel == "mixed":
        tile = Tile(8 if case.M <= 8 else 16, 64, 1, 2, 3)
    else:
        tile = _few_rows(case)
    return replace(tile, split=split(case, tile))


def _few_rows(case: Case) -> Tile:
    """64 outputs by one warp, as what x costs is shared by the most weights; by two where that takes many registers."""
    small = 0 < case.group_size <= 32
    tile = Tile(8 if case.M <= 8 else 16, 64, 1, 1, 4)
    if case.bits < 4:
        return replace(tile, warps=1 if case.group_size in (0, 256) and case.M <= 8 else 2, stages=3)
    if case.bits == 4:
        return replace(tile, stages=4 if case.M <= 8 else 2)
    return replace(tile, stages=2 if case.M <= 8 and (small or case.group_size == 64) else 3)


def _act8_tile(num_rows: int) -> Tile:
    if num_rows <= 16:
        return Tile(8 if num_rows <= 8 else 16, 64, 1, 2, 4)
    return Tile(32, 64, 1, 4, 3) if num_rows <= 32 else Tile(64, 128, 1, 8, 3)


def split(case: Case, tile: Tile) -> int:
    """Parts of K: enough programs to fill the device, none without two steps of 128, a workspace that stays small."""
    programs = -(-case.N // tile.BN) * -(-case.M // tile.BM)
    wanted = min(PROGRAMS // tile.warps // programs, max(1, SPLIT_ROWS // case.M), case.K // 256)
    parts = 1
    while 2 * parts <= wanted:
        parts *= 2
    return parts
