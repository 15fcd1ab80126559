"""The console report fits 80 columns, hides nothing silently, and shows model-given names literally."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from quantkit.commands._common import to_json
from quantkit.report.console import ErrorConsole, print_report, short_bytes, shorten
from quantkit.report.progress import ConsoleProgress, Progress, SilentProgress
from quantkit.report.types import Contender, Fidelity, LayerRow, Report, Timing


def layer(index: int, **changes: Any) -> LayerRow:
    row = LayerRow(
        name=f"/model/features/block{index}/conv/Conv_with_a_long_name",
        op="ConvTranspose",
        shape=(64, 576),
        bits=4,
        group_size=32,
        symmetric=False,
        form="matmulnbits",
        bytes_before=147_456,
        bytes_after=20_736,
        sqnr=20.0 + index,
        kernel="DynamicQuantizeMatMul",
        latency=0.5,
        reason="smallest within budget",
    )
    return replace(row, **changes)


def report(count: int = 3, **changes: Any) -> Report:
    base = Report(
        model="/data/models/a/rather/long/path/to/some/model.onnx",
        target="ort-cpu",
        layers=tuple(layer(index) for index in range(count)),
        untouched=(("/x/MatMul", "MatMul", "both inputs are computed"), ("n[bold]", "If", "weight is in [a] subgraph")),
        size_before=1_000_000,
        size_after=200_000,
        average_bits=4.25,
        stored_bits=4.75,
        fidelity=Fidelity(sqnr=31.5, cosine=0.9991, top1_agreement=0.985, parity=80.0, samples=64),
        timings=(Timing({"input": (1, 3, 224, 224)}, 10.0, 5.0),),
        contenders=(Contender("uniform 4", 210_000, 20.0, 0.6, False), Contender("measured", 200_000, 31.5, 0.5, True)),
        unmet=(),
        notes=("weights take 4 times as much memory at run time [approx]",),
        provenance={"quantkit.version": "0.1.0"},
    )
    return replace(base, **changes)


def shown(what: Report, *, width: int = 80, all_layers: bool = False) -> str:
    console = Console(file=StringIO(), width=width, markup=False, highlight=False)
    print_report(what, console, all_layers=all_layers)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_fits_80_columns_and_says_everything() -> None:
    text = shown(report(unmet=("size 200 kB is above the budget of 100 kB",)))
    assert max(map(len, text.splitlines())) <= 80
    for part in ("5.00x smaller", "4.25 (4.75 with scales)", "2.00x (10.000 > 5.000 ms) at input 1x3x224x224"):
        assert part in text
    for part in ("31.5 dB, cosine 0.99910, top-1 agreement 98.5% on 64 samples", "80.0 dB", "4 g32", "0.50x"):
        assert part in text
    for part in ("n[bold]", "weight is in [a] subgraph", "[approx]", "not met: size 200 kB is above", "ort-cpu"):
        assert part in text


def test_float_layers_show_their_reason() -> None:
    row = layer(0, bits=None, group_size=None, symmetric=None, form=None, sqnr=None, kernel="", reason="ignored")
    text = shown(report(layers=(row,), untouched=(), contenders=(), timings=(), fidelity=None, notes=()))
    assert "float" in text and "ignored" in text
    assert "not quantized" not in text and "candidates" not in text


def test_large_models_show_the_worst_layers_and_count_the_rest() -> None:
    big = report(count=100)
    text = shown(big)
    assert " 79.0 " in text and " 80.0  " not in text
    assert "40 layers with less error are not shown (--all-layers)" in " ".join(text.split())
    assert text.count("matmulnbits >") == 60
    assert shown(big, all_layers=True).count("matmulnbits >") == 100
    many = replace(big, untouched=tuple((f"n{index}", "If", "why") for index in range(30)))
    assert "18 more are not shown" in shown(many)
    assert "n29" in shown(many, all_layers=True)


def test_empty_model() -> None:
    text = shown(report(count=0, untouched=(), size_after=0, timings=(Timing({}, 0.0, 0.0),)))
    assert "empty" in text


def test_json_has_no_undefined_figures() -> None:
    odd = report(fidelity=Fidelity(float("inf"), float("nan"), None, 80.0, 1))
    data = json.loads(to_json(odd.to_dict()))
    assert data["fidelity"]["sqnr"] is None and data["fidelity"]["cosine"] is None
    assert data["timings"][0]["speedup"] == 2.0 and data["budget_met"] is True


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (20_736, "20.7 kB"), (999_600, "1 MB"), (5 * 10**12, "5000 GB")],
)
def test_short_bytes(count: int, text: str) -> None:
    assert short_bytes(count) == text


def test_shorten_keeps_both_ends() -> None:
    assert shorten("short", 10) == "short"
    cut = shorten("/model/features/0/conv/Conv", 12)
    assert len(cut) == 12 and cut.startswith("/mo") and cut.endswith("nv/Conv")


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(terminal: bool) -> None:
    console = Console(file=StringIO(), force_terminal=terminal, width=80)
    for progress in (ConsoleProgress(console), SilentProgress()):
        run_tasks(progress)
    assert isinstance(console.file, StringIO)
    assert ("calibrating" in console.file.getvalue()) is terminal


def run_tasks(progress: Progress) -> None:
    with progress.task("calibrating [x]", total=2) as advance:
        advance(1)
        with progress.task("inner") as step:
            step(1)
        advance(1)
    with pytest.raises(ValueError, match="stop"), progress.task("fails", total=1):
        raise ValueError("stop")


def test_progress_of_the_user_needs_no_base_class() -> None:
    class Counting:
        def __init__(self) -> None:
            self.total = 0

        @contextmanager
        def task(self, name: str, total: int | None = None) -> Iterator[Any]:
            def advance(count: int) -> None:
                self.total += count

            yield advance

    progress = Counting()
    run_tasks(progress)
    assert progress.total == 3


def test_error_console_survives_a_closed_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    console = ErrorConsole()
    replaced: list[tuple[int, int]] = []
    monkeypatch.setattr("quantkit.report.console.os.dup2", lambda old, new: replaced.append((old, new)))
    monkeypatch.setattr("quantkit.report.console.os.open", lambda *_: 99)
    monkeypatch.setattr(ErrorConsole, "file", property(lambda _: type("F", (), {"fileno": lambda self: 2})()))
    console.on_broken_pipe()
    assert console.quiet and replaced == [(99, 2)]
