"""Tiles: every rule fits its kernel, tables win over rules, buckets of M."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from quantkit_kernels import config
from quantkit_kernels.config import Case, Tile


@pytest.mark.parametrize("group_size", [0, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_tiles_hold_what_the_kernels_assume(bits: int, group_size: int) -> None:
    """Whole words, 8 at least, whole groups per tile or whole tiles per group; 2 and 3 bits come in runs."""
    if bits < 4:
        assert config.words_and_tiles(bits, group_size) == (256 * bits // 16, 1, 1)
        assert config.gemm_words(bits, group_size) == (16 if bits == 2 else 48, 1, 1)
        return
    per_word = 16 // bits
    words, unroll, shared = config.words_and_tiles(bits, group_size)
    tile = words * per_word
    assert words >= 8
    assert words & (words - 1) == 0
    if group_size:
        assert shared == max(1, tile // group_size)
        assert group_size <= tile or group_size % (tile * unroll) == 0
    words, unroll, shared = config.gemm_words(bits, group_size)
    assert words >= 16
    assert not group_size or shared * group_size == words * per_word or group_size % (words * per_word) == 0


@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256])
def test_mixed_shapes_share_their_copies_of_x(group_size: int) -> None:
    shapes = config.mixed_shapes(group_size, (3, 1, 2, 5), 11 * group_size)
    assert len({shape[2] for shape in shapes}) == 1
    for bits, (words, unroll, shared, even), count in zip((2, 3, 4, 8), shapes, (3, 1, 2, 5), strict=True):
        tile = words * 16 // bits
        if bits < 4:
            assert (tile, unroll) == (256, 1)
        else:
            assert tile == shared * group_size or (shared == 1 and group_size % (tile * unroll) == 0)
        assert even == (count * group_size % (tile * unroll) == 0)


@pytest.mark.parametrize("kernel", config.KERNELS)
@pytest.mark.parametrize("arch", [80, 90])
def test_rules(kernel: str, arch: int) -> None:
    """Powers of two, all rows covered by few tiles, a workspace that stays small."""
    for bits, rows, outputs in product((2, 3, 4, 8), (1, 5, 16, 17, 64, 100, 1000), (1, 300, 8192)):
        tile = config.rule(Case(kernel, bits, 128, outputs, 4096, rows, "float16"), arch)
        assert all(size & (size - 1) == 0 for size in (tile.BM, tile.BN, tile.split, tile.warps))
        assert tile.split == 1 or tile.split * rows <= config.SPLIT_ROWS
        assert tile.split * 256 <= 4096


def test_few_programs_are_split_and_many_are_not() -> None:
    assert config.rule(Case("skinny", 4, 128, 512, 4096, 1, "float16"), 90).split == 16
    assert config.rule(Case("skinny", 4, 128, 100_000, 4096, 1, "float16"), 90).split == 1


def test_a_measured_tile_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On its device and Triton version, for its bucket of rows; elsewhere the rule decides."""
    monkeypatch.setattr(config, "CONFIGS", tmp_path)
    config.table.cache_clear()
    case = Case("skinny", 4, 128, 4096, 4096, 3, "float16")
    measured = Tile(8, 32, 4, 2, 3)
    config.save({case.key(): measured}, config.table_path("NVIDIA H200", "3.9.0"))
    assert [path.name for path in tmp_path.iterdir()] == ["NVIDIA_H200-triton3.9.json"]
    assert config.choose(case, "NVIDIA H200", 90, "3.9.1") == measured
    assert config.choose(Case("skinny", 4, 128, 4096, 4096, 4, "float16"), "NVIDIA H200", 90, "3.9.1") == measured
    assert config.choose(case, "NVIDIA H200", 90, "3.6.0") == config.rule(case, 90)
    assert config.choose(case, "NVIDIA A100", 80, "3.9.0") == config.rule(case, 80)
    config.table.cache_clear()


def test_buckets() -> None:
    assert Case("gemm", 4, 0, 8, 16, 65, "bfloat16").key() == "gemm b4 g0 n8 k16 m128 bfloat16"
    assert Case("gemm", 4, 0, 8, 16, 5000, "float16").key() == "gemm b4 g0 n8 k16 m1024 float16"
