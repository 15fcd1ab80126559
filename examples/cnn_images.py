"""A convolutional network on images: train it, compress it to several budgets, compare accuracy and bytes.

python examples/cnn_images.py [--tiny]      needs: pip install 'quantkit[torch,demo]'
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import quantkit


def data() -> tuple[np.ndarray, np.ndarray]:
    """1797 handwritten digits, [n, 1, 16, 16] in 0 to 1, and their labels."""
    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    return images.repeat(2, axis=2).repeat(2, axis=3)[order], digits.target.astype(np.int64)[order]


def network(width: int) -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    layers = [
        *block(1, width),
        *block(width, 2 * width),
        nn.MaxPool2d(2),
        *block(2 * width, 4 * width),
        nn.MaxPool2d(2),
    ]
    return nn.Sequential(
        *layers, *block(4 * width, 4 * width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)
    )


def train(model: nn.Module, images: np.ndarray, labels: np.ndarray, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()


def export(model: nn.Module, path: Path) -> None:
    """With a batch of any size, which calibration and timing make use of."""
    batch = torch.export.Dim("batch")
    model.eval()
    torch.onnx.export(
        model,
        (torch.zeros(2, 1, 16, 16),),
        path,
        input_names=["image"],
        output_names=["scores"],
        dynamic_shapes=({0: batch},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def accuracy(path: Path, images: np.ndarray, labels: np.ndarray) -> float:
    (scores,) = quantkit.InferenceSession(path, device="cpu").run(["scores"], {"image": images})
    return float((scores.argmax(axis=1) == labels).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a small network, one epoch, one budget")
    args = parser.parse_args()
    options = {"allocator": "uniform", "quantizer": "mse", "inputs": "float"} if args.tiny else {}  # the fast ones
    torch.manual_seed(0)
    images, labels = data()
    test_images, test_labels = images[1400:], labels[1400:]
    model = network(8 if args.tiny else 32)
    train(model, images[:1200], labels[:1200], 1 if args.tiny else 10)
    folder = Path(tempfile.mkdtemp(prefix="quantkit-cnn-"))
    export(model, folder / "float.onnx")
    print(f"{'':>10} {'bytes':>8} {'top-1':>7} {'speed':>6}")
    size, right = (folder / "float.onnx").stat().st_size, accuracy(folder / "float.onnx", test_images, test_labels)
    print(f"{'float':>10} {size:8} {right:7.2%}")
    calibration = {"image": images[1200 : 1240 if args.tiny else 1400]}  # neither trained on nor tested on
    for bits in [4] if args.tiny else [8, 4, 3, 2]:
        budget = quantkit.Budget(avg_bits=bits)
        result = quantkit.compress(folder / "float.onnx", calibration=calibration, budget=budget, **options)
        path = folder / f"{bits}bit.onnx"
        result.save(path)
        speed = result.report.timings[-1].speedup
        right = accuracy(path, test_images, test_labels)
        print(f"{f'{bits} bits':>10} {path.stat().st_size:8} {right:7.2%} {speed:5.2f}x")
    print(f"the models are in {folder}")


if __name__ == "__main__":
    main()
