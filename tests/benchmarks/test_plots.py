"""Tables and plots of the kernels, from rows made here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import plots, report
from benchmarks.harness import Record, append_records
from benchmarks.kernel_cases import Case
from benchmarks.kernels import failure
from tests.benchmarks.test_kernels import WHERE, line

PNG = b"\x89PNG\r\n\x1a\n"


def rows() -> list[Record]:
    """Two providers beside half precision, which is a row for each width; one failure as well."""
    found = []
    for m in (1, 16):
        for bits in (4, 3):
            case = Case(m, 512, 256, bits, 128, "float16")
            found += [line(case, "cuBLAS", 2e-5), line(case, "quantkit", 1e-5 * m)]
        found.append(line(Case(m, 512, 256, 4, 64, "float16"), "gemlite", 1.6e-5))
    broken = RuntimeError("no kernel\nfor this")
    return [*found, failure(Case(16, 512, 256, 4, 128, "float16"), "torch int4", broken, WHERE)]


def test_lines_hold_one_provider_width_and_group_by_rows_of_x() -> None:
    lines = plots.lines_of(plots.measured(rows()), "512x256", "float16")
    assert list(lines) == [("cuBLAS", 16, 0), ("quantkit", 4, 128), ("quantkit", 3, 128), ("gemlite", 4, 64)]
    assert all([record.details["M"] for record in line_] == [1, 16] for line_ in lines.values())
    assert [plots.label_of(key) for key in lines][:2] == ["cuBLAS", "quantkit W4 g128"]


def test_the_newest_row_counts() -> None:
    case = Case(1, 512, 256, 4, 128, "float16")
    (found,) = plots.measured([line(case, "quantkit", 1e-5), line(case, "quantkit", 3e-5)])
    assert found.details["microseconds"] == pytest.approx(30)
    assert plots.measured([Record("resnet20", "m", "quantkit", "", WHERE)]) == []


def test_tables() -> None:
    text = report.render(rows())
    lines = text.splitlines()
    assert lines[:6] == [
        "### kernels",
        "",
        "512x256, float16: speed over cuBLAS (share of copy bandwidth)",
        "",
        "| made by | codes | M=1 | M=16 |",
        "| --- | --- | ---: | ---: |",
    ]
    assert lines[6] == "| cuBLAS |  | 20.0 us (0 %) | 20.0 us (0 %) |"
    assert lines[7] == "| quantkit | W4 g128 | 2.00x (0 %) | 0.12x (0 %) |"
    assert lines[9] == "| gemlite | W4 g64 | 1.25x (0 %) | 1.25x (0 %) |"
    assert "- 512x256 W4 g128 float16 M=16, torch int4: RuntimeError: no kernel for this" in lines
    assert lines[-1] == "torch 2.11; a cpu; a gpu, 132 processors; 1 thread; 2026-01-02; commit abc"


def test_plots(tmp_path: Path) -> None:
    made = plots.draw(rows(), tmp_path / "plots")
    assert [path.name for path in made] == [
        f"{kind}-512x256-float16.png" for kind in ("speed", "bandwidth", "roofline")
    ]
    first = [path.read_bytes() for path in made]
    assert all(data.startswith(PNG) and len(data) > 5000 for data in first)
    assert len(set(first)) == len(first)
    assert [path.read_bytes() for path in plots.draw(rows(), tmp_path / "again")] == first  # bit for bit


def test_every_weight_and_type_has_its_own_plots(tmp_path: Path) -> None:
    kinds = [Case(1, n, 256, 4, 128, dtype) for n, dtype in ((512, "float16"), (512, "bfloat16"), (64, "float16"))]
    assert plots.models_of([line(case, "quantkit", 1e-5) for case in kinds]) == [
        ("512x256", "float16"),
        ("512x256", "bfloat16"),
        ("64x256", "float16"),
    ]


def test_report_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    append_records(tmp_path / "r.jsonl", rows())
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "r.jsonl"), "--plots", str(tmp_path / "p")])
    report.main()
    assert f"![speed-512x256-float16]({tmp_path / 'p' / 'speed-512x256-float16.png'})" in capsys.readouterr().out
    one = [record for record in rows() if record.provider == "quantkit"][:1]
    append_records(tmp_path / "one.jsonl", one)
    plots.main([str(tmp_path / "one.jsonl"), "--folder", str(tmp_path / "q")])
    assert len(capsys.readouterr().out.splitlines()) == len(list((tmp_path / "q").iterdir())) == 3


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    append_records(tmp_path / "r.jsonl", rows())
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as leaving:
        plots.main([str(tmp_path / "r.jsonl"), "--folder", str(tmp_path)])
    assert leaving.value.code == 2
    assert capsys.readouterr().err.startswith("plots need matplotlib")
