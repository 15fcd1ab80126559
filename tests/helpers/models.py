"""Tiny models as ONNX text, their data, and the command line in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper

Array = npt.NDArray[Any]
CAPTURED: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 120}

MATMUL = "g (float[N,64] x, float[64,64] w) => (float[N,64] y) { y = MatMul(x, w) }"
CNN = """g (float[N,3,8,8] x, float[16,3,3,3] w1, float[16] b1, float[32,16,3,3] w2, float[32,10] w3)
         => (float[N,10] y) {
    c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
    r1 = Relu(c1)
    c2 = Conv<pads=[1,1,1,1]>(r1, w2)
    r2 = Relu(c2)
    p = GlobalAveragePool(r2)
    f = Flatten<axis=1>(p)
    y = MatMul(f, w3)
}"""
BLOCK = """g (int64[B,S] ids, float[50,64] table, float[64,64] wq, float[64,64] wk, float[64,64] wv, float[64,128] w1,
           float[128,64] w2, float[64] gain, float[64] shift) => (float[B,S,64] y) {
    e = Gather(table, ids)
    q = MatMul(e, wq)
    k = MatMul(e, wk)
    v = MatMul(e, wv)
    kt = Transpose<perm=[0,2,1]>(k)
    a = MatMul(q, kt)
    s = Softmax<axis=-1>(a)
    c = MatMul(s, v)
    r = Add(c, e)
    n = LayerNormalization<axis=-1>(r, gain, shift)
    h = MatMul(n, w1)
    hr = Relu(h)
    o = MatMul(hr, w2)
    y = Add(o, n)
}"""


def random(*shape: int, seed: int = 0) -> Array:
    """Normal numbers, scaled so that products keep their size."""
    rng = np.random.default_rng([seed, *shape])
    scaled: Array = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    return scaled.astype(np.float32)


def build(text: str, weights: Mapping[str, Array], *, opset: int = 21, ir: int = 10, domains: str = "") -> Any:
    """The graph, with the inputs named in `weights` as initializers (also inputs before IR version 4)."""
    model = onnx.parser.parse_model(f'<ir_version: {ir}, opset_import: ["": {opset}{domains}]> {text}')
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items())
    kept = [value for value in model.graph.input if ir < 4 or value.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    return model


def matmul(text: str = MATMUL, **options: Any) -> onnx.ModelProto:
    """The text's model with a random 64 x 64 weight `w`."""
    model: onnx.ModelProto = build(text, {"w": random(64, 64)}, **options)
    return model


def cnn() -> onnx.ModelProto:
    shapes = {"w1": (16, 3, 3, 3), "w2": (32, 16, 3, 3), "w3": (32, 10)}
    weights = {name: random(*shape) for name, shape in shapes.items()}
    model: onnx.ModelProto = build(CNN, {**weights, "b1": random(16, 1)[:, 0]})
    return model


def block() -> onnx.ModelProto:
    shapes = {"table": (50, 64), "wq": (64, 64), "wk": (64, 64), "wv": (64, 64), "w1": (64, 128), "w2": (128, 64)}
    weights = {name: random(*shape, seed=place) for place, (name, shape) in enumerate(shapes.items())}
    norm = {"gain": np.ones(64, np.float32), "shift": np.zeros(64, np.float32)}
    model: onnx.ModelProto = build(BLOCK, {**weights, **norm})
    return model


def images(count: int = 20) -> dict[str, Any]:
    return {"x": np.random.default_rng(1).standard_normal((count, 3, 8, 8)).astype(np.float32)}


def tokens(count: int = 20) -> dict[str, Any]:
    return {"ids": np.random.default_rng(1).integers(0, 50, (count, 6))}


def quantkit(folder: Path, *arguments: object, setup: str = "") -> subprocess.CompletedProcess[str]:
    """The command line, run in a folder, with its own home so that no measured times are shared."""
    return subprocess.run(command(*arguments, setup=setup), cwd=folder, env=environment(folder), **CAPTURED)


def command(*arguments: object, setup: str = "") -> list[str]:
    """`quantkit ARGUMENTS`; `setup` is code that runs first."""
    code = f"import sys\n{setup}\nfrom quantkit.cli import main\nsys.exit(main())"
    return [sys.executable, "-c", code, *map(str, arguments)]


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "HOME": str(folder), "COLUMNS": "80"}


# Measured times in a child process, instead of seconds of measuring: always as fast as float.
FAST = """
import quantkit.candidate, quantkit.costs.latency, quantkit.measuring, quantkit.verify
for module in (quantkit.candidate, quantkit.costs.latency, quantkit.measuring, quantkit.verify):
    module.time_sessions = lambda sessions, feed, **_: [1.0] * len(sessions)
"""


def quick(monkeypatch: pytest.MonkeyPatch, factor: float = 1.0) -> None:
    """The same in this process; quantized is `factor` times float."""
    times = lambda sessions, feed, **_: [1.0, *[factor] * (len(sessions) - 1)]  # noqa: E731
    for module in ("candidate", "costs.latency", "measuring", "verify"):
        monkeypatch.setattr(f"quantkit.{module}.time_sessions", times)
