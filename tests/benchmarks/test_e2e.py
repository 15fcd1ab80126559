"""The block in ONNX and in torch computes the same; lines of results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from benchmarks import e2e, report
from benchmarks.e2e import Network, Side, agreement, records_of
from benchmarks.e2e_block import Block, block_model
from benchmarks.harness import read_records
from quantkit.runtime.executor import Executor
from quantkit.runtime.session import InferenceSession
from tests.benchmarks.test_kernels import WHERE


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_block_is_the_same_in_onnx_and_in_torch(bits: int) -> None:
    made = block_model(128, 256, bits, 32)
    onnx.checker.check_model(ir.to_proto(made.model))
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = Block(made).float()(x).numpy()
    (by_onnxruntime,) = InferenceSession(made.model, "cpu").run(None, {"x": x.numpy()})
    executor = Executor(made.model, torch.device("cpu"), torch.float32)
    assert agreement(by_onnxruntime, wanted) > (75 if bits == 4 else 30)  # onnxruntime may round the input of others
    assert agreement(executor.run(executor.placed({"x": x}))["y"].numpy(), wanted) > 75
    notes = [(layer.kernel, layer.note) for layer in executor.layers]
    assert sorted(notes) == [("nbits_linear", "")] * 6 + [("nbits_linear", "with silu")]


def test_the_blocks_width() -> None:
    with pytest.raises(ValueError, match="the width must be a multiple of 128, got 100"):
        block_model(100, 256, 4, 32)


def test_agreement() -> None:
    ones = np.ones(4, np.float32)
    assert agreement(ones, ones) == 200
    assert agreement(0.9 * ones, ones) == pytest.approx(20, abs=1e-4)


def test_lines_of_results() -> None:
    made = block_model(128, 256, 4, 32)
    network = Network("block", torch.nn.Identity, made.model, lambda batch, tokens: {}, "W4 g32")
    ones = np.ones(4, np.float32)
    plain, quantized = Side([2e-3] * 3, 9_000_000, 8_000_000, ones), Side([1e-3] * 3, 4_000_000, 2_000_000, 0.9 * ones)
    first, second = records_of(network, (8, 64), (plain, quantized), {"nbits_linear": 7}, WHERE)
    assert (first.provider, first.setting, first.size_bytes) == ("torch", "float16, 8x64", 8_000_000)
    assert (second.provider, second.setting, second.size_bytes) == ("quantkit", "W4 g32, 8x64", 2_000_000)
    assert (first.speed[0].median, second.speed[0].median) == (1.0, 2.0)
    assert second.details["tokens per second"] == pytest.approx(512_000)
    assert second.details["peak MB on the device"] == 4 and second.details["layers"] == {"nbits_linear": 7}
    assert first.accuracy == {} and second.accuracy["to float16 dB"] == pytest.approx(20, abs=1e-4)
    assert e2e.line_of(second).startswith("block W4 g32, 8x64 quantkit: 512000 tokens per second, 2.00x, 4 MB")


def test_tables() -> None:
    made = block_model(128, 256, 4, 32)
    network = Network("block", torch.nn.Identity, made.model, lambda batch, tokens: {}, "W4 g32")
    ones = np.ones(4, np.float32)
    sides = (Side([2e-3] * 3, 9_000_000, 8_000_000, ones), Side([1e-3] * 3, 4_000_000, 2_000_000, 0.9 * ones))
    assert report.render(records_of(network, (8, 64), sides, {}, WHERE)).splitlines()[2:6] == [
        "| network | made by | setting | tokens per second | speed | peak MB | weights MB | SQNR to float16 |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| block | torch | float16, 8x64 | 256,000 (256,000 to 256,000) | 1.00x (1.00 to 1.00) | 9 | 8 |  |",
        "| block | quantkit | W4 g32, 8x64 | 512,000 (512,000 to 512,000) | 2.00x (2.00 to 2.00) | 4 | 2 | 20.0 dB |",
    ]


@pytest.mark.gpu
def test_a_small_block_on_the_device(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    options = ["--width", "512", "--inner", "1024", "--bits", "4", "--shapes", "1x1,2x8", "--rounds", "3"]
    e2e.main([*options, "--out", str(out)])
    rows = read_records(out)
    assert [record.provider for record in rows] == ["torch", "quantkit"] * 2
    for record in rows[1::2]:
        assert record.accuracy["to float16 dB"] > 45
        assert record.size_bytes is not None and rows[0].size_bytes is not None
        assert record.size_bytes < rows[0].size_bytes / 3
