"""The weight-only methods of onnxruntime: files where it stores a width, its own arithmetic in float32 where not.

python -m benchmarks.weight_peers MODEL OUT --method k_quant --bits 4 --group-size 32 --calib SRC --tokenizer FILE

It stores round-to-nearest and HQQ at 2, 4 and 8 bits, k_quant and GPTQ at 4. With `--fake`, its functions run on the
matrices and their results stay float32: any width. Between two whole numbers, the first matrices get the wider one.

Its GPTQ rounds to nearest: errors are to be carried along a row of the upper triangular factor of the inverse Gram, and
it reads a column, which is zero below the diagonal (`weight_only.gptq`). `gptq_repaired` is the algorithm as published
(arXiv 2210.17323) with its settings: minimum and maximum of each group of the weight, damping of 0.01, large inputs
first.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    GPTQWeightOnlyQuantConfig,
    HQQWeightOnlyQuantConfig,
    HQQWeightOnlyQuantizer,
    KQuantWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
    WeightOnlyQuantConfig,
)
from onnxruntime.quantization.neural_compressor import weight_only

from benchmarks.peers import Reader
from quantkit.calibration.collector import Request, Settings, collect
from quantkit.calibration.data import CalibrationData
from quantkit.calibration.request import CalibrationRequest
from quantkit.graph.load import load_model
from quantkit.graph.targets import find_targets
from quantkit.report.progress import SilentProgress
from quantkit.runtime.ort import make_session
from quantkit.types import Array, Target
from quantkit.verify import open_data, session_inputs

METHODS = ("rtn", "hqq", "k_quant", "gptq", "gptq_repaired")
DAMP = 0.01
SCALE_BITS = 32
MEMORY_LIMIT = 160 << 20


def stored(args: Namespace, data: CalibrationData | None) -> None:
    """The file that onnxruntime makes; activations are computed in float32 (accuracy level 0)."""
    if args.bits != int(args.bits):
        raise SystemExit(f"onnxruntime stores whole bits, not {args.bits}; use --fake")
    readers = [] if data is None else [Reader(data)]
    configs: dict[str, Callable[[], WeightOnlyQuantConfig]] = {
        "rtn": lambda: DefaultWeightOnlyQuantConfig(block_size=args.group_size, bits=int(args.bits)),
        "hqq": lambda: HQQWeightOnlyQuantConfig(block_size=args.group_size, bits=int(args.bits)),
        "k_quant": KQuantWeightOnlyQuantConfig,
        "gptq": lambda: GPTQWeightOnlyQuantConfig(*readers),
    }
    if args.method not in configs:
        raise SystemExit(f"onnxruntime has no {args.method}; use --fake")
    quantizer = MatMulNBitsQuantizer(
        str(args.model), bits=int(args.bits), block_size=args.group_size, algo_config=configs[args.method]()
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(args.out), use_external_data_format=False)


def fake(args: Namespace, data: CalibrationData | None) -> None:
    """The float model with every MatMul's weight rounded by one of onnxruntime's functions."""
    loaded = load_model(args.model)
    targets = matrices(loaded.model)
    grams: Mapping[str, Array] = {}
    if data is not None:
        found = collect(
            loaded.model,
            data,
            Request(targets, frozenset({"gram"}), {}),
            Settings(memory_limit=MEMORY_LIMIT, threads=1, seed=0),
            SilentProgress(),
        )
        grams = {name: item.gram[0] for name, item in found.stats.items() if item.gram is not None}
    for name, bits in widths(targets, args.bits).items():
        target = targets[name]
        rounded = FAKES[args.method](target.load(), bits, args.group_size, grams.get(name))
        operand = target.layout.to_operand(rounded.astype(np.float32))
        target.weight.const_value = ir.tensor(np.ascontiguousarray(operand), name=target.weight.name)
    ir.save(loaded.model, args.out)


def matrices(model: ir.Model) -> dict[str, Target]:
    """What onnxruntime quantizes: constant weights of MatMul."""
    return {name: target for name, target in find_targets(model)[0].items() if target.op == "MatMul"}


def widths(targets: Mapping[str, Target], average: float) -> dict[str, int]:
    """Whole bits for each matrix: the wider ones first, for the share of all weights that makes the average."""
    low = int(average)
    sizes = {name: target.shape[0] * target.shape[1] for name, target in targets.items()}
    wide, seen, found = (average - low) * sum(sizes.values()), 0, {}
    for name, size in sizes.items():
        found[name] = low + (seen + size <= wide)
        seen += size
    return found


def fake_rtn(weight: Array, bits: int, group_size: int, gram: Array | None) -> Array:
    """W[N, K] rounded to nearest, minimum and maximum of each group on the first and last code."""
    codes, scales, zeros = weight_only.quant_tensor(_padded(weight, group_size), bits, group_size, "asym", "uint")
    return _grouped(codes, scales, zeros, weight)


def fake_k_quant(weight: Array, bits: int, group_size: int, gram: Array | None) -> Array:
    """W[N, K] by the search of its k_quant."""
    with np.errstate(invalid="ignore", divide="ignore"):
        codes, scales, zeros = weight_only.quant_tensor_k_quant_cpu(_padded(weight, group_size), bits, group_size)
    return _grouped(codes, scales, zeros, weight)


def fake_hqq(weight: Array, bits: int, group_size: int, gram: Array | None) -> Array:
    """W[N, K] by its HQQ; zero points are not rounded."""
    import torch

    config = HQQWeightOnlyQuantConfig(block_size=group_size, bits=bits)
    codes, scales, zeros = HQQWeightOnlyQuantizer(config).quantize_internal(
        torch.from_numpy(weight), bits=bits, group_size=group_size
    )
    return _grouped(codes.numpy(), scales.numpy().reshape(-1, 1), zeros.numpy().reshape(-1, 1), weight)


def fake_gptq(weight: Array, bits: int, group_size: int, gram: Array | None) -> Array:
    """W[N, K] by its GPTQ on the Gram [K, K] of the layer's inputs, with its default settings; float weights."""
    assert gram is not None
    rounded = weight_only.gptq(weight.T.astype(np.float64), gram.copy(), num_bits=bits, group_size=group_size)
    return np.asarray(rounded).T


def fake_gptq_repaired(weight: Array, bits: int, group_size: int, gram: Array | None) -> Array:
    """W[N, K] by GPTQ: every input at its nearest code, its error made up for by the inputs still open."""
    assert gram is not None
    _, scales, zeros = weight_only.quant_tensor(_padded(weight, group_size), bits, group_size, "asym", "uint")
    scales, zeros = (item.astype(np.float64).reshape(len(weight), -1) for item in (scales, zeros))
    order = np.argsort(-np.diagonal(gram), kind="stable")
    damped = gram[np.ix_(order, order)] + DAMP * np.diagonal(gram).mean() * np.eye(len(gram))
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    open_, rounded = weight.T[order].astype(np.float64), np.empty(weight.T.shape)
    for step, place in enumerate(order):
        scale, zero = scales[:, place // group_size], zeros[:, place // group_size]
        rounded[place] = (np.clip(np.rint(open_[step] / scale) + zero, 0, 2**bits - 1) - zero) * scale
        missed = (open_[step] - rounded[place]) / factor[step, step]
        open_[step + 1 :] -= np.outer(factor[step, step + 1 :], missed)
    return rounded.T


def _padded(weight: Array, group_size: int) -> Array:
    """[N, K] with columns of zeros up to whole groups."""
    return np.pad(weight, ((0, 0), (0, -weight.shape[1] % group_size)))


def _grouped(codes: Array, scales: Array, zeros: Array, weight: Array) -> Array:
    """Values of codes, one group a row, in the shape of the weight [N, K]."""
    values = (codes.reshape(scales.size, -1).astype(np.float64) - zeros) * scales
    return values.reshape(weight.shape[0], -1)[:, : weight.shape[1]]


FAKES: Mapping[str, Callable[[Array, int, int, Array | None], Array]] = {
    "rtn": fake_rtn,
    "hqq": fake_hqq,
    "k_quant": fake_k_quant,
    "gptq": fake_gptq,
    "gptq_repaired": fake_gptq_repaired,
}


def report(args: Namespace) -> dict[str, object]:
    """What quantkit's report says about bits, for this file: float32 scales, zero points as wide as codes or float."""
    found = widths(matrices(load_model(args.model).model), args.bits)
    shapes = {name: target.shape for name, target in matrices(load_model(args.model).model).items()}
    sizes = {name: rows * inputs for name, (rows, inputs) in shapes.items()}
    groups = {name: rows * -(-inputs // args.group_size) for name, (rows, inputs) in shapes.items()}
    total = sum(sizes.values())
    codes = sum(bits * sizes[name] for name, bits in found.items())
    beside = sum((SCALE_BITS + (32 if args.method == "hqq" else bits)) * groups[name] for name, bits in found.items())
    return {
        "average_bits": codes / total,
        "stored_bits": (codes + beside) / total,
        "layers": [{"shape": list(shape), "form": "fake" if args.fake else "stored"} for shape in shapes.values()],
        "contenders": [],
        "unmet": [],
    }


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--bits", type=float, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--fake", action="store_true")
    parser.add_argument("--calib")
    parser.add_argument("--tokenizer")
    args = parser.parse_args()
    data = None
    if args.method.startswith("gptq"):
        request = CalibrationRequest(args.calib, tokenizer=args.tokenizer, batch_size=1)  # no padding in its Grams
        data = open_data(request, session_inputs(make_session(args.model)))
    (fake if args.fake else stored)(args, data)
    Path(f"{args.out}.json").write_text(json.dumps(report(args)), encoding="utf-8")


if __name__ == "__main__":
    main()
