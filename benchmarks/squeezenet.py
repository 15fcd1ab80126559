"""SqueezeNet 1.1 on ImageNet samples: top-1 and agreement on 800 images, size, speed, memory of each calibrator.

python -m benchmarks.squeezenet --data ../shared --out results.jsonl
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.contest import (
    Classifier,
    Contest,
    Contestant,
    float_model,
    parser,
    rounded,
    run_contest,
    selected,
    with_onnxruntime,
    with_quantkit,
)
from benchmarks.data import imagenet_calibration, imagenet_test
from quantkit.options import CALIBRATORS


def contestants(model: Path, data: Path) -> list[Contestant]:
    calib = ("--calib", imagenet_calibration(data), "--preprocess", "caffe")
    return [
        float_model(),
        *(
            with_onnxruntime(
                f"quantize_static U8S8 per channel, {name}", "static", model, *calib, "--method", name.replace("-", "")
            )
            for name in ("min-max", "entropy", "percentile")
        ),
        with_onnxruntime("quantize_dynamic S8 per channel", "dynamic", model),
        *(with_quantkit(f"8 bits, {name}", model, *calib, "--calibrator", name) for name in CALIBRATORS),
        *(with_quantkit(f"{bits} bits", model, *calib, "--avg-bits", bits) for bits in ("6", "5", "4", "3", "2")),
        *(
            with_quantkit(f"{bits} bits, weights only", model, *calib, "--avg-bits", bits, "--activations", "none")
            for bits in ("4", "3", "2")
        ),
        *rounded(model, calib),
    ]


def main() -> None:
    args = parser("SqueezeNet 1.1 on ImageNet samples").parse_args()
    model = args.data / "models/squeezenet11_imagenet.onnx"
    test = imagenet_test(args.data)
    contest = Contest(
        benchmark="squeezenet",
        model=model,
        evaluate=Classifier(test),
        feeds={"1x3x224x224": {"data_0": test.images[:1]}},
        results=args.out,
        threads=args.threads,
        seconds=args.seconds,
        keep=args.keep,
    )
    run_contest(contest, selected(contestants(model, args.data), args))


if __name__ == "__main__":
    main()
