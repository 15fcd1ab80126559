"""The contest of low widths: onnxruntime's functions as we call them, and how files that are not packed are counted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from benchmarks import weight_peers
from benchmarks.harness import Environment, Record
from benchmarks.lowbit import ROUNDED, STORED, as_stored, rounds
from quantkit.graph.load import load_model
from quantkit.quantizers.rtn import RTN
from quantkit.runtime.ort import make_session
from quantkit.types import QuantSpec

INPUTS, OUTPUTS, GROUP = 64, 64, 32
WHERE = Environment({}, "a cpu", 1, "2026-01-02T03:04:05+00:00", "abc")


def weight_of(seed: int = 0, inputs: int = INPUTS) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((OUTPUTS, inputs)).astype(np.float32)


def gram_of(inputs: int = INPUTS) -> np.ndarray:
    random = np.random.default_rng(1)
    rows = random.standard_normal((400, inputs)) @ random.standard_normal((inputs, inputs)) / 8
    return rows.T @ rows / len(rows)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two MatMuls with a Relu between them; its k_quant and GPTQ write odd numbers of groups wrongly."""
    first, second = (
        ir.Value(name=name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
        for name, array in (("w1", weight_of().T), ("w2", weight_of(2)))
    )
    x = ir.Value(name="x", shape=ir.Shape(["batch", INPUTS]), type=ir.TensorType(ir.DataType.FLOAT))
    one = ir.node("MatMul", [x, first], name="one")
    relu = ir.node("Relu", [one.outputs[0]], name="relu")
    two = ir.node("MatMul", [relu.outputs[0], second], name="two")
    output = two.outputs[0]
    output.name, output.shape, output.type = "y", ir.Shape(["batch", INPUTS]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [output], nodes=[one, relu, two], initializers=[first, second], opset_imports={"": 21})
    path = tmp_path / "model.onnx"
    ir.save(ir.Model(graph, ir_version=10), path)
    return path


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("method", ["rtn", "hqq", "k_quant"])
def test_functions_keep_to_the_codes_of_the_width(method: str, bits: int) -> None:
    weight = weight_of(inputs=80)  # the last group is shorter
    found = weight_peers.FAKES[method](weight, bits, GROUP, None)
    assert found.shape == weight.shape
    for start in range(0, 80, GROUP):
        for row in found[:, start : start + GROUP]:
            assert len(np.unique(row)) <= 2**bits
    assert np.abs(found - weight).mean() < np.abs(weight).mean() / 2 ** (bits - 1)


def test_round_to_nearest_is_what_ours_is_on_the_same_grid() -> None:
    weight = weight_of()
    ours = RTN().quantize(weight, QuantSpec(4, GROUP), None).dequantize()
    found = weight_peers.fake_rtn(weight, 4, GROUP, None)
    # Scales differ by float16's rounding, 2^-10, which moves few codes.
    assert np.mean(np.abs(found - ours) > 2e-2) < 0.03


def loss(weight: np.ndarray, found: np.ndarray, gram: np.ndarray) -> float:
    delta = found - weight
    return float(np.einsum("nk,kj,nj->", delta, gram, delta))


def test_gptq_of_onnxruntime_is_round_to_nearest() -> None:
    weight, gram = weight_of(), gram_of()
    kept = gram.copy()
    found = weight_peers.fake_gptq(weight, 3, GROUP, gram)
    np.testing.assert_allclose(found, weight_peers.fake_rtn(weight, 3, GROUP, None), atol=1e-6)
    np.testing.assert_array_equal(gram, kept)


def test_repaired_gptq_is_better_on_its_gram() -> None:
    weight, gram = weight_of(), gram_of()
    found = weight_peers.fake_gptq_repaired(weight, 3, GROUP, gram)
    assert loss(weight, found, gram) < 0.6 * loss(weight, weight_peers.fake_rtn(weight, 3, GROUP, None), gram)
    unrelated = weight_peers.fake_gptq_repaired(weight, 3, GROUP, np.eye(INPUTS))
    np.testing.assert_allclose(unrelated, weight_peers.fake_rtn(weight, 3, GROUP, None), atol=1e-6)


def test_fractions_give_the_first_matrices_the_wider_code(model: Path) -> None:
    targets = weight_peers.matrices(load_model(model).model)
    assert list(weight_peers.widths(targets, 2.5).values()) == [3, 2]
    assert list(weight_peers.widths(targets, 3.0).values()) == [3, 3]


def run(model: Path, out: Path, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.setattr("sys.argv", ["weight_peers", str(model), str(out), *arguments])
    weight_peers.main()
    return dict(json.loads(Path(f"{out}.json").read_text()))


@pytest.mark.parametrize("method", [name for name, widths in STORED.items() if widths])
def test_four_bit_files_run_and_tell_their_bits(
    method: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = tmp_path / "samples.npy"
    x = np.random.default_rng(3).standard_normal((40, INPUTS)).astype(np.float32)
    np.save(samples, x)
    common = ("--method", method, "--bits", "4", "--group-size", str(GROUP), "--calib", str(samples))
    packed = run(model, tmp_path / "packed.onnx", *common, monkeypatch=monkeypatch)
    zero = 32 if method == "hqq" else 4
    assert packed["stored_bits"] == pytest.approx(4 + (32 + zero) / GROUP)
    wanted = make_session(model).run({"x": x})["y"]
    for name in ("packed", "fake"):
        out = tmp_path / f"{name}.onnx"
        if name == "fake":
            run(model, out, *common, "--fake", monkeypatch=monkeypatch)
        found = make_session(out).run({"x": x})["y"]
        share = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert 0.01 < share < 0.25, name


def test_a_fraction_cannot_be_stored(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"stores whole bits, not 2\.5; use --fake"):
        run(
            model,
            tmp_path / "x.onnx",
            "--method",
            "rtn",
            "--bits",
            "2.5",
            "--group-size",
            "32",
            monkeypatch=monkeypatch,
        )


def test_rows_that_are_not_packed_get_the_bytes_of_their_codes() -> None:
    details = {"weights": 1000, "stored_bits": 3.0}
    record = Record("lowbit", "m", "onnxruntime", f"rtn 3 bits g32{ROUNDED}", WHERE, 5000, details=details)
    assert as_stored(record, 5000).size_bytes == 5000 - 4000 + 375
    packed = replace(record, setting="rtn 2 bits g32")
    assert as_stored(packed, 5000) == packed
    failed = replace(record, error="no file", size_bytes=None)
    assert as_stored(failed, 5000) == failed


def test_everybody_meets_ours_at_every_width() -> None:
    found = rounds(Path("m.onnx"), Path("c.txt"), Path("t"))
    assert len(found) == 9
    for contestants in found[:-1]:
        methods = {item.setting.split()[0] for item in contestants[2:]}
        assert set(STORED) - methods <= {"gptq"}
        assert [item.provider for item in contestants[:2]] == ["float", "quantkit"]
        width = contestants[1].setting
        assert all(width in item.setting for item in contestants[1:])
