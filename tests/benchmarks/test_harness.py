"""The harness of the benchmarks: records, percentiles, kernels, isolated commands, tables."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from benchmarks import contest, report
from benchmarks.contest import OUT, Classifier, Contest, Contestant, float_model, run_contest
from benchmarks.data import Labelled
from benchmarks.harness import (
    MIN_ROUNDS,
    Environment,
    Record,
    Speed,
    append_records,
    count_kernels,
    environment,
    evaluate_classifier,
    file_size,
    read_records,
    run_isolated,
    speed_of,
    time_against_float,
)
from benchmarks.minilm import nearest

WHERE = Environment({"onnxruntime": "1.31.1"}, "a cpu, 2 cores", 1, "2026-01-02T03:04:05+00:00", "abc+")
CLASSES = 3


def make_model(path: Path, *, external: bool = False) -> Path:
    """x [batch, 4] -> Relu(x @ W) [batch, 3]; W's first three rows are the identity."""
    weight = ir.Value(name="w", const_value=ir.tensor(np.eye(4, CLASSES, dtype=np.float32)))
    x = ir.Value(name="x", shape=ir.Shape(["batch", 4]), type=ir.TensorType(ir.DataType.FLOAT))
    product = ir.node("MatMul", [x, weight])
    result = ir.node("Relu", [product.outputs[0]])
    output = result.outputs[0]
    output.name, output.shape, output.type = "y", ir.Shape(["batch", CLASSES]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [output], nodes=[product, result], initializers=[weight], opset_imports={"": 21}, name="g")
    model = ir.Model(graph, ir_version=10)
    if external:
        ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=0)
    else:
        ir.save(model, path)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model.onnx")


def full_record() -> Record:
    return Record(
        benchmark="resnet20",
        model="m.onnx",
        provider="quantkit",
        setting="4 bits",
        environment=WHERE,
        size_bytes=173_459,
        accuracy={"top-1": 0.8387, "cosine": 0.97216},
        speed=(Speed("1x32", 1.5, 1.4, 1.75, 0.6, 99),),
        kernels={"QLinearConv": 19, "Relu": 3, "Gemm": 1},
        peak_rss_mb=240.4,
        seconds=22.6,
        details={"stored_bits": 4.0421, "code_bytes": 140_000},
    )


def test_records_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    failed = Record("resnet20", "m.onnx", "onnxruntime", "percentile", WHERE, error="MemoryError")
    append_records(path, [full_record()])
    append_records(path, [failed])
    assert read_records(path) == [full_record(), failed]
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2


def test_undefined_figures_are_refused() -> None:
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        replace(full_record(), accuracy={"top-1": float("nan")}).to_json()


def test_speed_is_the_ratio_of_each_round() -> None:
    # Ratios 1, 2, 3, 4, 5, 6: the medians' ratio would be 3.5 / 1 as well, the percentiles tell the rounds apart.
    speed = speed_of("1x3", [1.0, 4.0, 3.0, 8.0, 5.0, 12.0], [1.0, 2.0, 1.0, 2.0, 1.0, 2.0])
    assert (speed.median, speed.p20, speed.p80) == pytest.approx((3.5, 2.0, 5.0), rel=1e-12)
    assert speed.milliseconds == pytest.approx(1500.0, rel=1e-12)
    assert (speed.shape, speed.rounds) == ("1x3", 6)


def test_timing_alternates(model: Path) -> None:
    feeds = {"1x4": {"x": np.ones((1, 4), np.float32)}, "9x4": {"x": np.ones((9, 4), np.float32)}}
    rows = time_against_float(model, [model, model], feeds, seconds=0.0)
    assert [[speed.shape for speed in row] for row in rows] == [["1x4", "9x4"]] * 2
    for row in rows:
        for speed in row:
            assert speed.rounds == MIN_ROUNDS
            assert 0 < speed.p20 <= speed.median <= speed.p80
            assert speed.milliseconds > 0


def test_kernels_of_the_optimised_graph(model: Path) -> None:
    assert count_kernels(model) == {"MatMul": 1, "Relu": 1}


def test_size_counts_external_data(tmp_path: Path) -> None:
    inline, split = make_model(tmp_path / "a.onnx"), make_model(tmp_path / "b.onnx", external=True)
    assert file_size(inline) == inline.stat().st_size
    assert file_size(split) == split.stat().st_size + (tmp_path / "b.onnx.data").stat().st_size > split.stat().st_size


def test_classifier_over_several_batches(model: Path) -> None:
    labels = np.arange(120) % CLASSES
    images = np.eye(4, dtype=np.float32)[labels]
    wrong = labels.copy()
    wrong[:30] = (wrong[:30] + 1) % CLASSES
    found = evaluate_classifier(model, images, wrong)
    assert found.top1 == 0.75
    assert found.predictions.tolist() == labels.tolist()


def test_nearest_leaves_out_the_row_itself() -> None:
    rows = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    assert nearest(rows).tolist() == [1, 0, 1]


def test_isolated_command_tells_memory_and_messages() -> None:
    held = 200 << 20
    done = run_isolated([sys.executable, "-c", f"import sys; x = b'1' * {held}; sys.exit('told\\npeak of it')"])
    small = run_isolated([sys.executable, "-c", "pass"])
    assert (done.status, done.last_line, small.status) == (1, "peak of it", 0)
    assert done.peak_rss_mb is not None and small.peak_rss_mb is not None
    assert held / 1e6 <= done.peak_rss_mb <= held / 1e6 + 60
    assert small.peak_rss_mb < 60


def test_memory_of_the_caller_does_not_count() -> None:
    ballast = np.ones(30_000_000)
    done = run_isolated([sys.executable, "-c", "pass"])
    assert done.peak_rss_mb is not None and done.peak_rss_mb < ballast.nbytes / 1e6 / 2


def test_memory_limit_and_signals() -> None:
    done = run_isolated([sys.executable, "-c", "x = b'1' * (2 << 30)"], memory_limit=1 << 30)
    assert (done.status, done.last_line) == (1, "MemoryError")
    killed = run_isolated([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    assert (killed.status, killed.last_line) == (137, "exit code 137")


def test_environment_is_complete() -> None:
    found = environment(3)
    assert found.threads == 3
    assert set(found.versions) == {"quantkit", "onnx", "onnxruntime", "numpy"}
    assert found.cpu.endswith("cores") and found.commit and found.date.endswith("+00:00")


def test_contest_records_everyone(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copier = tmp_path / "copier.py"
    copier.write_text("import shutil, sys; shutil.copy(sys.argv[1], sys.argv[2])", encoding="utf-8")
    monkeypatch.setattr(contest, "PYTHON", (sys.executable,))
    labels = np.arange(60) % CLASSES
    made = Contest(
        benchmark="tiny",
        model=model,
        evaluate=Classifier(Labelled(np.eye(4, dtype=np.float32)[labels], labels)),
        feeds={"1x4": {"x": np.ones((1, 4), np.float32)}},
        results=tmp_path / "results.jsonl",
        seconds=0.0,
    )
    copy = Contestant("quantkit", "copy", (str(copier), str(model), OUT))
    missing = Contestant("onnxruntime", "missing", (str(tmp_path / "absent.py"), OUT))
    records = run_contest(made, [float_model(), copy, missing])
    assert records == read_records(made.results)
    assert [(row.provider, row.size_bytes is None) for row in records] == [
        ("float", False),
        ("quantkit", False),
        ("onnxruntime", True),
    ]
    assert records[1].accuracy == {"top-1": 1.0, "agreement": 1.0}
    assert "No such file" in records[2].error
    assert len(records[1].speed) == 1 and not records[2].speed


def test_files_of_an_earlier_run_count_for_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copier = tmp_path / "copier.py"
    copier.write_text("import shutil, sys; shutil.copy(sys.argv[1], sys.argv[2])", encoding="utf-8")
    monkeypatch.setattr(contest, "PYTHON", (sys.executable,))
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "tiny-1.onnx.json").write_text("{", encoding="utf-8")
    (kept / "tiny-2.onnx").write_bytes(b"stale")
    (kept / "tiny-1.onnx.cache").mkdir()
    made = Contest("tiny", model, lambda path: {}, {}, tmp_path / "results.jsonl", seconds=0.0, keep=kept)
    copy = Contestant("onnxruntime", "copy", (str(copier), str(model), OUT))
    missing = Contestant("onnxruntime", "missing", (str(tmp_path / "absent.py"), OUT))
    _, first, second = run_contest(made, [float_model(), copy, missing])
    assert (first.details, first.error) == ({}, "")
    assert second.error and second.size_bytes is None
    assert not (kept / "tiny-1.onnx.cache").exists()


def test_report_shows_the_newest_of_each() -> None:
    old = replace(full_record(), accuracy={"top-1": 0.1, "cosine": 0.1})
    other = Record("resnet20", "m.onnx", "float", "float32", WHERE, size_bytes=1_144_756, accuracy={"top-1": 0.8736})
    failed = Record("resnet20", "m.onnx", "onnxruntime", "a | b", WHERE, error="MemoryError", seconds=9.0)
    text = report.render([old, other, full_record(), failed])
    assert text.splitlines() == [
        "### resnet20",
        "",
        "| made by | setting | top-1 | cosine | bytes | beside codes | bits with scales | speed 1x32 | operators run |"
        " peak MB | seconds |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| quantkit | 4 bits | 83.87 % | 0.9722 | 173,459 | 33,459 | 4.04 | 1.50x (1.40 to 1.75) |"
        " 19 QLinearConv, 1 Gemm | 240 | 23 |",
        "| float | float32 | 87.36 % |  | 1,144,756 |  |  |  |  |  |  |",
        "| onnxruntime | a \\| b |  |  |  |  |  |  | failed: MemoryError |  | 9 |",
        "",
        "onnxruntime 1.31.1; a cpu, 2 cores; 1 thread; 2026-01-02; commit abc+",
    ]


def test_report_leaves_empty_columns_out() -> None:
    header = report.render([Record("b", "m.onnx", "float", "float32", WHERE, size_bytes=5)]).splitlines()[2]
    assert header == "| made by | setting | bytes |"
