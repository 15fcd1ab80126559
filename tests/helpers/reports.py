"""Reports with everything in them, of any number of layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from quantkit.report.types import (
    Accuracy,
    ActivationRow,
    Contender,
    DepthRow,
    Fidelity,
    FrontRow,
    LayerRow,
    Report,
    ScaleRow,
    SensitivityRow,
    Timing,
)

WIDTHS = (3, 4, 6, 8, None, 4.25)
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'{{ 7 * 7 }}"


def name_of(index: int) -> str:
    return f"/model/layers.{index // 7}/mlp/projection_{index}/MatMul"


def layer(index: int, name: str) -> LayerRow:
    bits = WIDTHS[index % len(WIDTHS)]
    return LayerRow(
        name=name,
        op="MatMul",
        shape=(64, 48 + index),
        bits=bits,
        group_size=None if bits is None else 32,
        symmetric=None if bits is None else False,
        form=None if bits is None else "qdq",
        bytes_before=4 * 64 * (48 + index),
        bytes_after=round((bits or 32) * 8 * (48 + index)),
        sqnr=None if bits is None else 12.0 + 3 * bits,
        kernel="QLinearMatMul" if bits else "MatMul",
        latency=None,
        reason="ignored" if bits is None else "smallest within the budget",
        time_share=1 / (2 + index),
    )


def example(count: int = 12, **changes: Any) -> Report:
    """A report of so many layers; `changes` replace its fields."""
    rng = np.random.default_rng(count)
    names = [name_of(index) for index in range(count)]
    base = Report(
        model="/data/models/example.onnx",
        target="ort-cpu",
        layers=tuple(layer(index, name) for index, name in enumerate(names)),
        untouched=(("/attention/MatMul", "MatMul", "both operands are activations"),),
        size_before=1_000_000,
        size_after=200_000,
        average_bits=4.25,
        stored_bits=4.75,
        fidelity=Fidelity(sqnr=31.5, cosine=0.9991, top1_agreement=0.985, parity=80.0, samples=64),
        timings=(Timing({"input": (1, 3, 8, 8)}, 10.0, 5.0), Timing({"input": (8, 3, 8, 8)}, 40.0, 16.0)),
        contenders=(
            Contender("uniform 4", 210_000, 20.0, 0.6, False, 0.3),
            Contender("8 bits", 400_000, 40.0, 0.7, False, 0.001),
            Contender("measured 4", 200_000, 31.5, 0.5, True, 0.02),
        ),
        unmet=(),
        notes=("weights take 4 times as much memory at run time",),
        provenance={"quantkit.model": "ab" * 32, "quantkit.versions": "quantkit=0.1.0"},
        scales=(ScaleRow("cle", names[0] if names else "x", tuple(names[1:2]), 3.5, ""),),
        sensitivities=tuple(
            SensitivityRow((name,), {bits: float(10 ** rng.uniform(-6, -1)) for bits in (3, 4, 8)}, 4, "measured")
            for name in names
        ),
        predicted=0.02,
        front=tuple(FrontRow(100_000 + 20_000 * step, 2.0 + step, 2.0**-step) for step in range(6)),
        budget={"avg_bits": 4.25},
        accuracy=Accuracy("top1", 0.7311, 0.7295, 800),
        depth=(
            *(DepthRow(f"{name}:0", name, 30.0 - index % 20, False) for index, name in enumerate(names)),
            DepthRow("logits", None, 18.0, True),
        ),
        activations=tuple(activation(f"{name}:in", name) for name in names),
        command="quantkit compress example.onnx --avg-bits 4.25 --report report.html",
    )
    return replace(base, **changes)


def activation(value: str, reader: str) -> ActivationRow:
    return ActivationRow(
        value, (reader,), -1.5, 9.0, -1.2, 6.0, 7.2 / 255, 42, 0.0004, tuple([0.02] * 30 + [0.04] * 10)
    )


def bare() -> Report:
    """What is left without data, of one layer."""
    row = replace(layer(1, "only"), sqnr=None, time_share=None)
    nothing: dict[str, Any] = dict.fromkeys(("fidelity", "accuracy", "predicted"))
    empty: dict[str, Any] = dict.fromkeys(
        ("untouched", "timings", "contenders", "notes", "scales", "sensitivities", "front", "depth", "activations"), ()
    )
    return example(0, layers=(row,), budget={}, command="", **nothing, **empty)


def hostile() -> Report:
    """Every text that a model or a user gives is an attack."""
    plain = example(6)
    layers = tuple(replace(row, name=f"{HOSTILE}{at}", reason=HOSTILE) for at, row in enumerate(plain.layers))
    return replace(
        plain,
        model=f"/data/{HOSTILE}",
        target=HOSTILE,
        layers=layers,
        untouched=((HOSTILE, HOSTILE, HOSTILE),),
        timings=tuple(replace(row, shapes={HOSTILE: (1, 2)}) for row in plain.timings),
        contenders=tuple(replace(row, name=HOSTILE) for row in plain.contenders),
        unmet=(HOSTILE,),
        notes=(HOSTILE,),
        provenance={HOSTILE: HOSTILE},
        scales=(ScaleRow(HOSTILE, HOSTILE, (HOSTILE,), None, HOSTILE),),
        sensitivities=tuple(SensitivityRow((row.name,), {4: 0.1}, 4, HOSTILE) for row in layers),
        accuracy=Accuracy(HOSTILE, 0.5, 0.4, 10),
        depth=tuple(DepthRow(HOSTILE, row.name, 20.0, False) for row in layers),
        activations=tuple(activation(HOSTILE, row.name) for row in layers),
        command=f"quantkit compress '{HOSTILE}'",
    )
