"""What can be told without a GPU: cases, weights, providers' results on the CPU, statistics, lines, exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import e2e, gpu, kernels, plots
from benchmarks.gpu import Ceilings, num_copies, statistics
from benchmarks.harness import Environment, Record, append_records, environment, read_records
from benchmarks.kernel_cases import Case, by_weight, cases, chunks, exact, random_input, random_weights, relative_error
from benchmarks.kernel_providers import PROVIDERS, REFERENCE, Prepared

WHERE = Environment({"torch": "2.11"}, "a cpu", 1, "2026-01-02T03:04:05+00:00", "abc", "a gpu, 132 processors")
LIMITS = Ceilings(4e12, 1e-6, 8e14)
CASE = Case(4, 512, 256, 4, 128, "float16")


def line(case: Case, provider: str, seconds: float, error: float | None = 1e-4, exactly: bool = True) -> Record:
    """Three rounds, a tenth apart."""
    prepared = Prepared([lambda x: x] * 5, case.N * case.K * case.bits // 8, torch.float16, exactly)
    times = [0.9 * seconds, seconds, 1.1 * seconds]
    return kernels.record_of(case, provider, prepared, times, [2e-5] * 3, error, LIMITS, WHERE)


def test_cases_are_all_combinations_with_one_weight_in_a_row() -> None:
    found = cases([(64, 256), (32, 512)], [1, 3], [4, 3], [128, -1], ["float16", "bfloat16"])
    assert len(found) == len(set(found)) == 2 * 2 * 2 * 2 * 2
    assert {case.group_size for case in found if case.K == 512} == {128, 512}
    batches = list(by_weight(found))
    assert [len(batch) for batch in batches] == [2] * 16
    assert all([case.M for case in batch] == [1, 3] for batch in batches)
    assert [case for batch in batches for case in batch] == found


def test_the_usual_cases() -> None:
    assert len(cases()) == 3 * 11 * 4
    assert {case.model for case in cases()} == {"4096x4096", "14336x4096", "28672x8192"}


@pytest.mark.parametrize(("columns", "group"), [(128, 128), (768, 512)])
def test_cases_that_would_need_filling(columns: int, group: int) -> None:
    message = f"K must be a multiple of 256 and of the group {group}, got {columns}"
    with pytest.raises(ValueError, match=message):
        cases([(64, columns)], groups=[group])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [64, 256])
def test_weights_are_random_and_the_same_for_all_rows(bits: int, group: int) -> None:
    case = Case(1, 96, 256, bits, group, "float16")
    weights, again = (random_weights(Case(m, 96, 256, bits, group, "float16"), "cpu") for m in (1, 9))
    assert torch.equal(weights.codes, again.codes) and torch.equal(weights.meta, again.meta)
    codes = weights.plain_codes()
    assert codes.shape == (96, 256) and set(codes.unique().tolist()) == set(range(1 << bits))
    spread = codes.float().reshape(96, -1, group) - weights.zero_points.float()[:, :, None]
    wanted = (spread * weights.scales.float()[:, :, None]).reshape(96, 256)
    assert torch.equal(weights.matrix(), wanted)
    assert torch.equal(weights.dense(torch.float16), wanted.half())
    assert weights.scales.unique().numel() > 50 and torch.isfinite(weights.scales).all()
    assert case.flops == 2 * 96 * 256 and case.activation_bytes == 2 * (96 + 256)


def test_exact_products_are_float64() -> None:
    weights, x = random_weights(CASE, "cpu"), random_input(CASE, "cpu")
    wanted = exact(x, weights)
    assert wanted.dtype == torch.float64
    np.testing.assert_allclose(wanted, x.double().numpy() @ weights.matrix().double().numpy().T, rtol=1e-12)
    assert [(part.start, part.stop) for part in chunks(9000)] == [(0, 4096), (4096, 8192), (8192, 9000)]


def test_relative_errors() -> None:
    wanted = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    assert relative_error(wanted.half(), wanted) == 0
    assert relative_error(torch.tensor([[3.0, 4.5]]), wanted) == pytest.approx(0.1)
    assert relative_error(torch.tensor([[torch.nan, 4.0]]), wanted) == float("inf")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ["cuBLAS", "quantkit"])
def test_providers_multiply_by_the_same_numbers(name: str, bits: int) -> None:
    case = Case(3, 64, 256, bits, 64, "float16")
    weights, x = random_weights(case, "cpu"), random_input(case, "cpu")
    prepared = PROVIDERS[name].prepare(weights, lambda size: 3)
    assert prepared.exact and prepared.dtype == torch.float16 and len(prepared.calls) == 3
    per_weight = 2 if name == "cuBLAS" else bits / 8 + 4 / 64
    assert prepared.num_bytes == 64 * 256 * per_weight
    for call in prepared.calls:
        assert relative_error(call(x), exact(x, weights)) < 2e-3


def test_copies_have_memory_of_their_own() -> None:
    case = Case(1, 64, 256, 4, 64, "float16")
    weights, x = random_weights(case, "cpu"), random_input(case, "cpu")
    first, second = PROVIDERS["quantkit"].prepare(weights, lambda size: 2).calls
    before = second(x)
    (cells,) = (
        cell.cell_contents
        for cell in first.__closure__  # type: ignore[attr-defined]
        if isinstance(cell.cell_contents, torch.Tensor) and cell.cell_contents.dtype == torch.int16
    )
    cells.zero_()
    assert not torch.equal(first(x), before) and torch.equal(second(x), before)


def test_who_takes_what() -> None:
    def takers(bits: int, group: int) -> set[str]:
        weights = random_weights(Case(1, 64, 512, bits, group, "float16"), "cpu")
        return {name for name, provider in PROVIDERS.items() if provider.accepts(weights)}

    assert takers(4, 128) == set(PROVIDERS)
    assert takers(4, 512) == {"cuBLAS", "quantkit", "gemlite", "hqq", "bitsandbytes"}
    assert takers(3, 128) == {"cuBLAS", "quantkit", "hqq"}
    assert PROVIDERS["quantkit"].installed and PROVIDERS[REFERENCE].installed


@pytest.mark.parametrize(
    ("size", "cache", "copies"), [(8 << 20, 60 << 20, 30), (1 << 30, 60 << 20, 3), (1 << 10, 60 << 20, 64), (0, 1, 4)]
)
def test_copies_are_larger_than_the_cache(size: int, cache: int, copies: int) -> None:
    assert num_copies(size, cache) == copies


def test_graphs_go_through_all_copies() -> None:
    assert [kernels.repeats(copies) for copies in (1, 3, 32, 40)] == [32, 11, 1, 1]


def test_statistics() -> None:
    found = statistics(list(range(101)))
    assert (found.p20, found.median, found.p80) == (20, 50, 80)


def test_a_line_of_results(tmp_path: Path) -> None:
    record = line(CASE, "quantkit", 1e-5)
    details = record.details
    moved = 512 * 256 // 2 + 2 * 4 * (512 + 256)
    assert (record.model, record.setting) == ("512x256", "W4 g128 float16 M=4")
    assert record.speed[0].median == pytest.approx(2.0) and record.speed[0].rounds == 3
    assert record.speed[0].p20 < 2 < record.speed[0].p80
    assert details["microseconds"] == pytest.approx(10)
    assert details["bytes per second"] == pytest.approx(moved / 1e-5)
    assert details["share of copy bandwidth"] == pytest.approx(moved / 1e-5 / 4e12)
    assert details["flops"] == pytest.approx(2 * 4 * 512 * 256 / 1e-5)
    assert (details["copies"], details["exact"], details["computed in"]) == (5, True, "float16")
    assert record.accuracy == {"error to float64": 1e-4}
    append_records(tmp_path / "r.jsonl", [record])
    assert read_records(tmp_path / "r.jsonl") == [record]
    assert kernels.line_of(record) == (
        "512x256 W4 g128 float16 M=4 quantkit: 10.00 us, 2.00x, 0 % of copy bandwidth, error 1.0e-04"
    )


@pytest.mark.parametrize("error", [0.5, float("inf"), float("nan")])
def test_wrong_results_have_no_speed(error: float) -> None:
    record = line(CASE, "gemlite", 1e-5, error)
    assert not record.speed and record.error.startswith("ValueError: its result is wrong by ")
    assert "failed: ValueError" in kernels.line_of(record)


def test_providers_that_quantize_themselves_have_no_error() -> None:
    assert line(CASE, "hqq", 1e-5, None, exactly=False).accuracy == {}


def test_old_lines_have_no_gpu(tmp_path: Path) -> None:
    values = line(CASE, "quantkit", 1e-5).to_json().replace(f', "gpu": "{WHERE.gpu}"', "")
    (tmp_path / "r.jsonl").write_text(values, encoding="utf-8")
    assert read_records(tmp_path / "r.jsonl")[0].environment.gpu == ""


def test_the_environment_leaves_out_what_is_not_there() -> None:
    found = environment(1, ("quantkit", "torch", "no_such_package"), "a gpu")
    assert set(found.versions) == {"quantkit", "torch"} and found.gpu == "a gpu"


@pytest.mark.parametrize(("main", "name"), [(kernels.main, "benchmarks.kernels"), (e2e.main, "benchmarks.e2e")])
def test_without_cuda(
    main: Any, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as leaving:
        main([])
    assert leaving.value.code == 2
    assert capsys.readouterr().err == f"{name} needs a CUDA device, and PyTorch finds none here\n"


def test_unknown_providers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        kernels.main(["--providers", "quantkit,nobody"])
    assert leaving.value.code == 2
    assert "there is no provider 'nobody'; there are cuBLAS, quantkit, torch int4" in capsys.readouterr().err


def test_numbers_on_the_command_line() -> None:
    assert gpu.parsed("1,2,-1") == [1, 2, -1]
    assert e2e._shapes("1x32,8x64") == [(1, 32), (8, 64)]


def test_every_provider_has_a_colour() -> None:
    assert set(plots.COLOURS) == set(PROVIDERS) and plots.REFERENCE == REFERENCE


@pytest.mark.gpu
def test_a_small_case_on_the_device(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    options = ["--shapes", "1024x1024", "--rows", "1,16", "--bits", "4,3", "--rounds", "3", "--out", str(out)]
    kernels.main(options)
    rows = [record for record in read_records(out) if record.provider in ("cuBLAS", "quantkit")]
    assert len(rows) == 2 * 2 * 2 and not any(record.error for record in rows)
    for record in rows:
        assert record.accuracy["error to float64"] < 2e-3
        assert 0 < record.details["microseconds"] < 1000
        assert record.environment.gpu
