"""A whole story in under a minute: train a small convolutional network, compress it, compare.

The network (3x3 convolution, 3x3 convolution, 2x2 max pooling, two dense layers) is trained on scikit-learn's
handwritten digits with plain numpy: gradients by hand, Adam, one fixed seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from quantkit.budget import Budget
from quantkit.files import write_text
from quantkit.methods import missing_extra
from quantkit.plan import plan_to_json
from quantkit.report.progress import Progress
from quantkit.types import FloatArray

Labels = npt.NDArray[np.int64]
Weights = dict[str, FloatArray]

CHANNELS = (16, 32)
HIDDEN = 128
CLASSES = 10
SIDE = 8
EPOCHS = 12
BATCH = 64
TEST_SHARE = 5
RUN_BATCH = 32


@dataclass(frozen=True)
class Digits:
    """Images [n, 1, 8, 8] in 0 to 1, labels [n]."""

    train_images: FloatArray
    train_labels: Labels
    test_images: FloatArray
    test_labels: Labels


@dataclass(frozen=True)
class DemoRow:
    """One model of the final table; accuracy on images that neither training nor calibration saw."""

    name: str
    size: int
    accuracy: float
    milliseconds: float
    unmet: tuple[str, ...]


def run_demo(folder: Path, *, progress: Progress) -> list[DemoRow]:
    """Train, compress to 8 and to 4 bits, measure; models and plans are written into the folder."""
    from quantkit.pipeline import compress
    from quantkit.runtime.ort import make_session, time_sessions

    digits = load_digits()
    weights = train(digits, progress=progress)
    paths = {"float32": folder / "digits.onnx"}
    ir.save(to_onnx(weights), paths["float32"])
    feeds = [{"image": digits.train_images[at : at + RUN_BATCH]} for at in range(0, 8 * RUN_BATCH, RUN_BATCH)]
    unmet: dict[str, tuple[str, ...]] = {}
    for bits in (8, 4):
        name = f"{bits} bits"
        paths[name] = folder / f"digits.{bits}bit.onnx"
        budget = Budget(avg_bits=float(bits))
        result = compress(paths["float32"], calibration=feeds, budget=budget, progress=progress)
        result.save(paths[name])
        write_text(folder / f"digits.{bits}bit.plan.json", plan_to_json(result.plan))
        unmet[name] = result.report.unmet
    sessions = [make_session(path) for path in paths.values()]
    times = time_sessions(sessions, {"image": digits.test_images[:RUN_BATCH]})
    rows = []
    for (name, path), session, milliseconds in zip(paths.items(), sessions, times, strict=True):
        scores = session.run({"image": digits.test_images})["scores"]
        accuracy = float(np.mean(scores.argmax(axis=1) == digits.test_labels))
        rows.append(DemoRow(name, path.stat().st_size, accuracy, milliseconds, unmet.get(name, ())))
    return rows


def load_digits() -> Digits:
    """scikit-learn's 1797 digits, every fifth one held out."""
    try:
        from sklearn.datasets import load_digits as load
    except ModuleNotFoundError as error:
        raise missing_extra(error) or error from error
    data = load()
    images = (data.data.reshape(-1, 1, SIDE, SIDE) / 16).astype(np.float32)
    labels = data.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(labels))
    test, rest = order[: len(order) // TEST_SHARE], order[len(order) // TEST_SHARE :]
    return Digits(images[rest], labels[rest], images[test], labels[test])


def train(digits: Digits, *, progress: Progress, epochs: int = EPOCHS, seed: int = 0) -> Weights:
    """Adam on the cross entropy, learning rate falling to zero."""
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    rng = np.random.default_rng(seed)
    weights = initial_weights(rng)
    moments = {name: (np.zeros_like(value), np.zeros_like(value)) for name, value in weights.items()}
    count = len(digits.train_labels)
    steps = epochs * (count // BATCH)
    step = 0
    # Matrices this small only lose by threads; one thread also gives the same bits on every machine of a kind.
    with threadpool_limits(limits=1), progress.task("training", total=epochs) as advance:
        for _ in range(epochs):
            order = rng.permutation(count)
            for at in range(0, count - BATCH + 1, BATCH):
                batch = order[at : at + BATCH]
                step += 1
                gradients = gradient(weights, digits.train_images[batch], digits.train_labels[batch])
                _adam(weights, gradients, moments, step, rate=2e-3 * (1 - step / (steps + 1)))
            advance(1)
    return weights


def initial_weights(rng: np.random.Generator) -> Weights:
    """He initialisation; convolutions [out, in, 3, 3], dense layers [in, out]."""
    first, second = CHANNELS
    flat = second * (SIDE // 2) ** 2
    shapes = {
        "conv1": (first, 1, 3, 3),
        "conv2": (second, first, 3, 3),
        "fc1": (flat, HIDDEN),
        "fc2": (HIDDEN, CLASSES),
    }
    weights: Weights = {}
    for name, shape in shapes.items():
        is_conv = len(shape) == 4
        inputs, outputs = (int(np.prod(shape[1:])), shape[0]) if is_conv else shape
        weights[name] = (rng.standard_normal(shape) * np.sqrt(2 / inputs)).astype(np.float32)
        weights[f"{name}.bias"] = np.zeros(outputs, np.float32)
    return weights


def gradient(weights: Weights, images: FloatArray, labels: Labels) -> Weights:
    """Gradient of the mean cross entropy: the network forwards, then the same steps backwards."""
    columns1 = _columns(images)
    hidden1 = np.maximum(_conv(columns1, weights, "conv1"), 0)
    columns2 = _columns(hidden1)
    hidden2 = np.maximum(_conv(columns2, weights, "conv2"), 0)
    blocks = _blocks(hidden2)
    pooled = blocks.max(axis=-1)
    flat = pooled.reshape(len(images), -1)
    hidden3 = np.maximum(flat @ weights["fc1"] + weights["fc1.bias"], 0)
    scores = hidden3 @ weights["fc2"] + weights["fc2.bias"]

    exps = np.exp(scores - scores.max(axis=1, keepdims=True))
    d_scores = exps / exps.sum(axis=1, keepdims=True)
    d_scores[np.arange(len(labels)), labels] -= 1
    d_scores /= len(labels)
    d_hidden3 = (d_scores @ weights["fc2"].T) * (hidden3 > 0)
    d_pooled = (d_hidden3 @ weights["fc1"].T).reshape(pooled.shape)
    is_max = (blocks == pooled[..., None]).astype(np.float32)  # equal maxima share what flows back
    d_hidden2 = _unblocks(d_pooled[..., None] * is_max / is_max.sum(axis=-1, keepdims=True)) * (hidden2 > 0)
    d_hidden1 = _uncolumns(_conv_input_gradient(d_hidden2, weights["conv2"])) * (hidden1 > 0)
    return {
        "conv1": _conv_weight_gradient(d_hidden1, columns1).reshape(weights["conv1"].shape),
        "conv1.bias": d_hidden1.sum(axis=(0, 2, 3)),
        "conv2": _conv_weight_gradient(d_hidden2, columns2).reshape(weights["conv2"].shape),
        "conv2.bias": d_hidden2.sum(axis=(0, 2, 3)),
        "fc1": flat.T @ d_hidden3,
        "fc1.bias": d_hidden3.sum(axis=0),
        "fc2": hidden3.T @ d_scores,
        "fc2.bias": d_scores.sum(axis=0),
    }


def to_onnx(weights: Mapping[str, FloatArray]) -> ir.Model:
    """The same network as an ONNX model: `image` [batch, 1, 8, 8] -> `scores` [batch, 10]."""
    values: dict[str, ir.Value] = {}
    nodes: list[ir.Node] = []

    def constant(name: str, array: npt.NDArray[Any]) -> ir.Value:
        values[name] = ir.val(name, const_value=ir.tensor(array, name=name))
        return values[name]

    def call(op: str, inputs: list[ir.Value], name: str, **attributes: Any) -> ir.Value:
        node = ir.node(op, inputs, attributes=attributes, name=name)
        node.outputs[0].name = f"{name}.output"
        nodes.append(node)
        return node.outputs[0]

    def layer(op: str, data: ir.Value, name: str, **attributes: Any) -> ir.Value:
        bias = constant(f"{name}.bias", weights[f"{name}.bias"])
        return call(op, [data, constant(f"{name}.weight", weights[name]), bias], name, **attributes)

    image = ir.val("image", dtype=ir.DataType.FLOAT, shape=["batch", 1, SIDE, SIDE])
    data = call("Relu", [layer("Conv", image, "conv1", pads=[1, 1, 1, 1])], "relu1")
    data = call("Relu", [layer("Conv", data, "conv2", pads=[1, 1, 1, 1])], "relu2")
    data = call("MaxPool", [data], "pool", kernel_shape=[2, 2], strides=[2, 2])
    data = call("Flatten", [data], "flatten", axis=1)
    data = call("Relu", [layer("Gemm", data, "fc1")], "relu3")
    scores = layer("Gemm", data, "fc2")
    scores.name, scores.dtype, scores.shape = "scores", ir.DataType.FLOAT, ir.Shape(["batch", CLASSES])
    graph = ir.Graph(
        [image], [scores], nodes=nodes, initializers=list(values.values()), opset_imports={"": 21}, name="digits"
    )
    return ir.Model(graph, ir_version=10, producer_name="quantkit demo")


def _adam(weights: Weights, gradients: Weights, moments: Mapping[str, tuple[Any, Any]], step: int, rate: float) -> None:
    """One Adam step (arXiv 1412.6980), in place: the weights are the trainer's own."""
    for name, slope in gradients.items():
        mean, square = moments[name]
        mean += 0.1 * (slope - mean)
        square += 0.001 * (slope * slope - square)
        unbiased = mean / np.float32(1 - 0.9**step)
        spread = np.sqrt(square / np.float32(1 - 0.999**step)) + np.float32(1e-8)
        weights[name] -= np.float32(rate) * unbiased / spread


def _columns(images: FloatArray) -> FloatArray:
    """[n, c, 8, 8] -> the 3x3 neighbourhood of every pixel, [n, c*9, 64]."""
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.stack([padded[:, :, y : y + SIDE, x : x + SIDE] for y in range(3) for x in range(3)], axis=2)
    return windows.reshape(len(images), -1, SIDE * SIDE)


def _uncolumns(columns: FloatArray) -> FloatArray:
    """The transpose of `_columns`: what flows back to each pixel, [n, c*9, 64] -> [n, c, 8, 8]."""
    windows = columns.reshape(len(columns), -1, 9, SIDE, SIDE)
    padded = np.zeros((*windows.shape[:2], SIDE + 2, SIDE + 2), np.float32)
    for at in range(9):
        y, x = divmod(at, 3)
        padded[:, :, y : y + SIDE, x : x + SIDE] += windows[:, :, at]
    return padded[:, :, 1:-1, 1:-1]


def _conv(columns: FloatArray, weights: Weights, name: str) -> FloatArray:
    kernel = weights[name]
    result = kernel.reshape(len(kernel), -1) @ columns + weights[f"{name}.bias"][:, None]  # [n, out, 64]
    return result.reshape(len(columns), -1, SIDE, SIDE)


def _conv_weight_gradient(d_output: FloatArray, columns: FloatArray) -> FloatArray:
    flat = d_output.reshape(len(d_output), -1, SIDE * SIDE)
    product: FloatArray = np.matmul(flat, columns.transpose(0, 2, 1)).sum(axis=0)
    return product


def _conv_input_gradient(d_output: FloatArray, kernel: FloatArray) -> FloatArray:
    flat = d_output.reshape(len(d_output), -1, SIDE * SIDE)
    product: FloatArray = kernel.reshape(len(kernel), -1).T @ flat
    return product


def _blocks(images: FloatArray) -> FloatArray:
    """[n, c, 8, 8] -> 2x2 blocks, [n, c, 4, 4, 4]."""
    half = SIDE // 2
    split = images.reshape(*images.shape[:2], half, 2, half, 2)
    return split.transpose(0, 1, 2, 4, 3, 5).reshape(*images.shape[:2], half, half, 4)


def _unblocks(blocks: FloatArray) -> FloatArray:
    """The inverse of `_blocks`."""
    half = SIDE // 2
    split = blocks.reshape(*blocks.shape[:4], 2, 2).transpose(0, 1, 2, 4, 3, 5)
    return split.reshape(*blocks.shape[:2], 2 * half, 2 * half)
