"""The quantizers of onnxruntime, one command each, with the same calibration data that quantkit gets.

python -m benchmarks.peers static MODEL OUT --calib SRC --preprocess cifar10
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.shape_inference import quant_pre_process

from quantkit.calibration.data import CalibrationData
from quantkit.calibration.request import CalibrationRequest
from quantkit.runtime.ort import make_session
from quantkit.types import Feed
from quantkit.verify import open_data, session_inputs

METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Calibration data as onnxruntime reads it."""

    def __init__(self, data: CalibrationData) -> None:
        self._data = data
        self._feeds: Iterator[Feed] | None = None  # opened late: its GPTQ copies the reader, which no generator allows

    def get_next(self) -> Feed | None:
        self._feeds = self._feeds or iter(self._data)
        return next(self._feeds, None)


def static(args: Namespace) -> None:
    """Unsigned 8-bit activations, signed 8-bit weights with a scale per channel, QDQ, after its own preprocessing."""
    request = CalibrationRequest(args.calib, preprocess=args.preprocess, tokenizer=args.tokenizer)
    data = open_data(request, session_inputs(make_session(args.model)))
    with TemporaryDirectory(prefix="quantkit-benchmark-") as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(args.model), str(prepared))
        quantize_static(
            str(prepared),
            str(args.out),
            Reader(data),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=METHODS[args.method],
        )


def dynamic(args: Namespace) -> None:
    """Signed 8-bit weights with a scale per channel; activations quantized at run time."""
    quantize_dynamic(str(args.model), str(args.out), per_channel=True, weight_type=QuantType.QInt8)


def nbits(args: Namespace) -> None:
    """MatMulNBits, round to nearest, asymmetric; Gather is quantized when asked for."""
    quantizer = MatMulNBitsQuantizer(
        str(args.model),
        bits=args.bits,
        block_size=args.block_size,
        is_symmetric=False,
        accuracy_level=4,
        op_types_to_quantize=("MatMul", "Gather") if args.gather else ("MatMul",),
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(args.out), use_external_data_format=False)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(required=True)
    for verb in (static, dynamic, nbits):
        sub = verbs.add_parser(verb.__name__, help=verb.__doc__)
        sub.add_argument("model", type=Path)
        sub.add_argument("out", type=Path)
        sub.set_defaults(verb=verb)
        if verb is static:
            sub.add_argument("--calib", required=True)
            sub.add_argument("--preprocess")
            sub.add_argument("--tokenizer")
            sub.add_argument("--method", choices=sorted(METHODS), default="minmax")
        if verb is nbits:
            sub.add_argument("--bits", type=int, default=4)
            sub.add_argument("--block-size", type=int, default=32)
            sub.add_argument("--gather", action="store_true")
    args = parser.parse_args()
    args.verb(args)


if __name__ == "__main__":
    main()
