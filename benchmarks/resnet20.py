"""ResNet-20 on CIFAR-10: top-1 on 10 000 images, file size, speed against float.

python -m benchmarks.resnet20 --data ../shared --out results.jsonl
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
from benchmarks.data import cifar10_calibration, cifar10_test


def contestants(model: Path, data: Path) -> list[Contestant]:
    calib = ("--calib", cifar10_calibration(data), "--preprocess", "cifar10")
    return [
        float_model(),
        with_onnxruntime("quantize_static U8S8 per channel, min-max", "static", model, *calib),
        with_quantkit("8 bits", model, *calib),
        *(with_quantkit(f"{bits} bits", model, *calib, "--avg-bits", bits) for bits in ("6", "5", "4", "3", "2")),
        *(
            with_quantkit(f"{bits} bits, weights only", model, *calib, "--avg-bits", bits, "--activations", "none")
            for bits in ("4", "3", "2")
        ),
        *rounded(model, calib),
    ]


def main() -> None:
    args = parser("ResNet-20 on CIFAR-10").parse_args()
    model = args.data / "models/resnet20_cifar10.onnx"
    test = cifar10_test(args.data)
    contest = Contest(
        benchmark="resnet20",
        model=model,
        evaluate=Classifier(test),
        feeds={"1x3x32x32": {"image": test.images[:1]}},
        results=args.out,
        threads=args.threads,
        seconds=args.seconds,
        keep=args.keep,
    )
    run_contest(contest, selected(contestants(model, args.data), args))


if __name__ == "__main__":
    main()
