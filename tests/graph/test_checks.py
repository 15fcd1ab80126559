"""Broken content: formats that are no ONNX, damaged files, impossible graphs and weights that are not finite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from quantkit.errors import InputError
from quantkit.graph.load import load_model

Build = Callable[..., onnx.ModelProto]

LINEAR = "g (float[n,16] x, float[16,32] w) => (float[n,32] y) { y = MatMul(x, w) }"
WEIGHT = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)


def refuse(model: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_model(model)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\x89HDF\r\n\x1a\n", r"an HDF5 file"),
        (b"GGUF\x03\0\0\0", "a GGUF file"),
        (b"\x80\x02}q\0.", "a Python pickle"),
        (b"\x1f\x8b\x08\0", "a gzip archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
        (b"\x14\0\0\0ORTM", "an ORT-format model"),
        (b"\x1c\0\0\0TFL3", "a TensorFlow Lite model"),
        (b"PK\x05\x06" + b"\0" * 18, "a zip archive"),
    ],
)
def test_other_formats(content: bytes, kind: str, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    refuse(tmp_path / "model.onnx", f"model.onnx is {kind}.*: give an ONNX model file")


def test_invalid_attributes(build: Build) -> None:
    model = build("g (float[2] x) => (float[2] y) { c = Constant<value_float=2.0>() y = Mul(x, c) }")
    model.graph.node[0].attribute[0].name = "worth"
    refuse(model, "the model is not a valid ONNX model: .*worth.*; export it again")


def test_damaged_files(tmp_path: Path, build: Build) -> None:
    """Whatever is in the file, it loads or is refused; nothing else is raised."""
    text = (
        "g (float[2,3,8,8] x, float[6,3,3,3] w, float[6] v, float[6,96] e) => (float y) { "
        "a = Conv<pads=[1,1,1,1]>(x, w) b = BatchNormalization(a, v, v, v, v) "
        "s = Constant<value_ints=[0,-1]>() c = GlobalAveragePool(b) "
        "d = Reshape(c, s) f = Gemm<alpha=0.5>(d, e) y = Softmax(f) }"
    )
    weights = {"w": np.ones((6, 3, 3, 3)), "v": np.ones(6), "e": np.ones((6, 96))}
    model = build(text, {name: array.astype(np.float32) for name, array in weights.items()}, opset=12)
    content, outcomes, path = model.SerializeToString(), [0, 0], tmp_path / "model.onnx"
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(content)
        damaged[rng.integers(0, 700)] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            load_model(path)
            outcomes[0] += 1
        except InputError:
            outcomes[1] += 1
    assert min(outcomes) > 20


def test_cycles(build: Build) -> None:
    model = build("g (float[2] x) => (float[2] y) { a = Add(x, x) y = Relu(a) }")
    model.graph.node[0].input[1] = "y"
    refuse(model, "the nodes of the model form a cycle")
    refuse(ir.from_proto(model), "the nodes of the model are not in order")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_are_finite(bad: float, build: Build) -> None:
    weight = WEIGHT.copy()
    weight[-1, -1] = bad
    refuse(build(LINEAR, {"w": weight}), "weight 'w' of the model, read by node 'MatMul/y', holds NaN or infinity")


def test_masks_may_be_infinite(build: Build) -> None:
    text = "g (float[16,32] x, float[16,32] w) => (float[16,32] y) { y = Add(x, w) }"
    assert load_model(build(text, {"w": np.full_like(WEIGHT, -np.inf)})).notes == ()
