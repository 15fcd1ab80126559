"""Models whose weights stay in files: the same answers, in memory that does not grow with the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import quantkit
from benchmarks.transformer import Shape, shape_of, write
from quantkit import large
from quantkit.errors import InputError
from quantkit.graph.load import load_model
from quantkit.graph.targets import find_targets
from quantkit.runtime.ort import DeferredSession, make_session
from tests.helpers import models

SMALL = Shape(width=64, blocks=2, vocabulary=300)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A decoder that counts as large, with its weights beside it; files of more than 40 kB get external data."""
    monkeypatch.setattr(large, "LARGE", 1000)
    monkeypatch.setattr("quantkit.graph.emit.PROTOBUF_LIMIT", 40_000)
    write(SMALL, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def ids(count: int = 20) -> dict[str, Any]:
    return {"ids": np.random.default_rng(0).integers(0, 300, (count, 12))}


def outputs(path: Path) -> Any:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, ids(4))[0]


def test_sizes_of_generated_models() -> None:
    shape = shape_of(10**9, 512)
    assert abs(4 * shape.parameters - 10**9) <= 4 * 12 * 512**2 / 2
    assert shape_of(1, 64) == Shape(64, 1)


def test_weights_alone_never_run_the_float_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the float model was loaded")

    monkeypatch.setattr(large, "make_session", never)
    result = quantkit.compress(model, bits=(4,), quantizer="rtn", cache=tmp_path / "c", group_size=32)
    assert {row.form for row in result.report.layers} == {"matmulnbits", "gather"}
    assert all(row.kernel in ("MatMulNBits", "GatherBlockQuantized", "Gather") for row in result.report.layers)
    assert result.report.fidelity is None and result.report.timings == ()
    assert not any("once loaded" in note for note in result.report.notes)  # as many bits as in the file
    result.save(tmp_path / "q.onnx")
    wanted, got = outputs(model), outputs(tmp_path / "q.onnx")
    assert 0.9 < float(np.vdot(wanted, got) / np.linalg.norm(wanted) / np.linalg.norm(got)) < 1


def test_large_and_small_agree(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.quick(monkeypatch)
    settings: dict[str, Any] = {"calibration": ids(), "bits": (4,), "quantizer": "gptq", "allocator": "uniform"}
    settings |= {"activations": "none", "inputs": "float", "cache": tmp_path / "c"}
    first = quantkit.compress(model, **settings)
    assert first.report.fidelity is not None and first.report.fidelity.parity > 35
    assert first.report.timings == () and first.files is not None
    monkeypatch.setattr(large, "LARGE", 1 << 40)
    second = quantkit.compress(model, **settings | {"cache": tmp_path / "d"})
    assert second.report.timings and second.files is None
    for name, layer in first.plan.layers.items():
        assert layer.spec is not None and second.plan.layers[name].spec == layer.spec
    if {name: layer.form for name, layer in first.plan.layers.items()} == {
        name: layer.form for name, layer in second.plan.layers.items()
    }:
        first.save(tmp_path / "a.onnx")
        second.save(tmp_path / "b.onnx")
        np.testing.assert_allclose(outputs(tmp_path / "a.onnx"), outputs(tmp_path / "b.onnx"), atol=1e-5)


def test_what_was_verified_is_what_is_saved(model: Path, tmp_path: Path) -> None:
    result = quantkit.compress(model, bits=(4,), quantizer="rtn", cache=tmp_path / "c")
    assert result.files is not None
    (made,) = result.files.folder.glob("*.data")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        result.save(tmp_path / name / "q.onnx")
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["q.onnx", "q.onnx.data"]
    first, second = (tmp_path / name / "q.onnx.data" for name in ("one", "two"))
    assert all(file.stat().st_nlink == 1 for file in (first, second, made))
    onnx.load(str(tmp_path / "one" / "q.onnx"))  # refuses data files with a second name
    assert first.read_bytes() == second.read_bytes() == made.read_bytes()
    assert (tmp_path / "one" / "q.onnx").read_bytes() == (tmp_path / "two" / "q.onnx").read_bytes()
    folder = result.files.folder
    del result
    assert not folder.exists() and first.exists()
    np.testing.assert_array_equal(outputs(tmp_path / "one" / "q.onnx"), outputs(tmp_path / "two" / "q.onnx"))


def test_same_inputs_same_bytes(model: Path, tmp_path: Path) -> None:
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        settings: dict[str, Any] = {"bits": (3,), "quantizer": "mse", "cache": tmp_path / f"cache {name}"}
        quantkit.compress(model, **settings).save(tmp_path / name / "q.onnx")
        made.append([(tmp_path / name / file).read_bytes() for file in ("q.onnx", "q.onnx.data")])
    assert made[0] == made[1]


def test_external_weights_begin_at_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "LARGE", 1000)
    monkeypatch.setattr("quantkit.graph.emit.PROTOBUF_LIMIT", 1000)
    write(Shape(width=1088, blocks=1, vocabulary=64), tmp_path / "m.onnx")
    quantkit.compress(tmp_path / "m.onnx", bits=(8,), quantizer="rtn", cache=tmp_path / "c").save(tmp_path / "q.onnx")
    model = onnx.load(str(tmp_path / "q.onnx"), load_external_data=False)
    places = [
        {entry.key: entry.value for entry in tensor.external_data}
        for tensor in model.graph.initializer
        if tensor.external_data
    ]
    sizes = {int(place["offset"]): int(place["length"]) for place in places}
    assert max(sizes.values()) > 1 << 20
    assert all(offset % 4096 == 0 for offset, length in sizes.items() if length > 1 << 20)


def test_gptq_of_a_large_model_is_a_single_pass_unless_asked_for_more(model: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"calibration": ids(), "bits": (4,), "inputs": "float", "cache": tmp_path}
    result = quantkit.compress(model, **settings)
    assert {key: result.plan.settings[key] for key in large.SINGLE_PASS} == large.SINGLE_PASS
    assert large.HASTY in result.report.notes
    asked = quantkit.compress(model, settings=dict.fromkeys(large.SINGLE_PASS, 1), **settings)
    assert {key: asked.plan.settings[key] for key in large.SINGLE_PASS} == dict.fromkeys(large.SINGLE_PASS, 1)
    assert large.HASTY not in asked.report.notes
    made_up = quantkit.compress(model, **{**settings, "calibration": None, "random_calibration": True})
    assert large.HASTY in made_up.report.notes
    plain = quantkit.compress(model, quantizer="mse", **settings)
    assert not set(large.SINGLE_PASS) & set(plain.plan.settings)
    again = quantkit.apply(model, result.plan, **{key: settings[key] for key in ("calibration", "cache")})
    result.save(tmp_path / "a.onnx")
    again.save(tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx.data").read_bytes() == (tmp_path / "b.onnx.data").read_bytes()


def test_a_weight_that_is_read_twice_counts_once() -> None:
    text = """g (int64[B] ids, float[300,64] t) => (float[B,300] y) {
        e = Gather(t, ids) r = Relu(e) k = Transpose<perm=[1,0]>(t) y = MatMul(r, k) }"""
    loaded = load_model(models.build(text, {"t": models.random(300, 64)}))
    targets, _ = find_targets(loaded.model)
    assert len(targets) == 2
    assert large.float_bytes(targets.values()) == 4 * 300 * 64


def test_a_folder_that_cannot_be_made_gives_way_to_the_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "tmp"))
    assert large.make_scratch(tmp_path / "file" / "folder").folder.parent == tmp_path / "tmp"


def test_a_deferred_session_is_made_once_and_only_when_asked() -> None:
    made: list[int] = []

    def make() -> Any:
        made.append(1)
        return make_session(load_model(models.matmul()).model)

    session = DeferredSession(make)
    assert made == []
    assert session.input_names == ("x",) and session.output_names == ("y",)
    assert session.run({"x": np.ones((2, 64), np.float32)})["y"].shape == (2, 64)
    assert made == [1]
    with pytest.raises(AttributeError, match="no_such_name"):
        session.no_such_name  # noqa: B018


@pytest.mark.parametrize("lean", [False, True])
def test_lean_sessions_compute_the_same(tmp_path: Path, lean: bool) -> None:
    write(SMALL, tmp_path / "m.onnx")
    wanted = outputs(tmp_path / "m.onnx")
    for source in (tmp_path / "m.onnx", ir.load(tmp_path / "m.onnx")):
        got = make_session(source, lean=lean).run(ids(4))["logits"]
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


PEAK = """
import sys, threading, time
from pathlib import Path
from quantkit import large
from quantkit.errors import InputError
large.LARGE = 1 << 20
import quantkit.graph.emit, quantkit.runtime.ort
quantkit.graph.emit.PROTOBUF_LIMIT = quantkit.runtime.ort.PROTOBUF_LIMIT = 1 << 20
quantkit.runtime.ort.OPTIMIZED_LIMIT = 2 << 20
peak = 0

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) / 1024

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.005)

threading.Thread(target=watch, daemon=True).start()
import quantkit
quantkit.compress(sys.argv[1], bits=(4,), quantizer="rtn", cache=Path(sys.argv[2])).save(sys.argv[3])
print(peak)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="tells memory on Linux only")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Four times the weights, 113 MB more: next to nothing more in memory (a float copy of one layer is 4 MB)."""
    peaks = []
    for blocks in (3, 12):
        path = tmp_path / f"{blocks}.onnx"
        write(Shape(width=512, blocks=blocks, vocabulary=512), path)
        command = [sys.executable, "-c", PEAK, str(path), str(tmp_path / "cache"), str(tmp_path / "q.onnx")]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        peaks.append(float(done.stdout))
    assert peaks[1] - peaks[0] < 30


def test_what_runs_the_model_again_and_again_is_refused(model: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"calibration": ids(8), "quantizer": "rtn", "cache": tmp_path}
    four = quantkit.Budget(avg_bits=4)
    for name in ("measured", "linearity", "interlayer", "hawq"):
        with pytest.raises(InputError, match=f"the allocator {name} runs the float model again and again"):
            quantkit.compress(model, allocator=name, budget=four, **settings)
    with pytest.raises(InputError, match="sensitivity runs the float model again and again"):
        quantkit.sensitivity(model, **settings)
    with pytest.raises(InputError, match="more than 1 GiB of weights is not timed: leave --max-latency out"):
        quantkit.compress(model, budget=quantkit.Budget(max_latency=0.5), **settings)
    result = quantkit.compress(model, budget=four, **settings)
    assert any("one width everywhere" in note for note in result.report.notes)
    mixed = quantkit.compress(model, budget=four, allocator="salience", **settings)
    assert {row.estimator for row in mixed.report.sensitivities} <= {"salience"}
    assert any(row.name.startswith("salience") for row in mixed.report.contenders)
