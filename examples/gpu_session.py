"""One file, two machines: onnxruntime runs it on the CPU, torch and Triton kernels on a GPU.

python examples/gpu_session.py [--tiny]      on a GPU: pip install 'quantkit[gpu]'
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnx.parser

import quantkit

NETWORK = """<ir_version: 10, opset_import: ["": 21]>
block (float[N,{width}] x) => (float[N,{width}] y) <float[{width},{inner}] up, float[{inner},{width}] down> {{
    [up] a = MatMul(x, up)
    b = Gelu(a)
    [down] c = MatMul(b, down)
    y = Add(c, x)
}}"""


def make(width: int) -> onnx.ModelProto:
    """A block of a transformer, with random weights."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(NETWORK.format(width=width, inner=4 * width))
    for name, shape in (("up", (width, 4 * width)), ("down", (4 * width, width))):
        weight = (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    return model


def milliseconds(session: quantkit.InferenceSession, feed: dict[str, np.ndarray]) -> float:
    """Best of ten, inputs and outputs on the host."""
    times = []
    for _ in range(10):
        start = time.perf_counter()
        session.run(None, feed)
        times.append(1000 * (time.perf_counter() - start))
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a small block")
    args = parser.parse_args()
    width = 128 if args.tiny else 1024
    model = make(width)
    # Weights of 4 bits that stay packed: at one row at a time, reading weights is what takes the time.
    result = quantkit.compress(model, budget=quantkit.Budget(avg_bits=4), activations="none", quantizer="mse")
    path = Path(tempfile.mkdtemp(prefix="quantkit-gpu-")) / "block.onnx"
    result.save(path)
    session = quantkit.InferenceSession(path, device="auto")
    if session.device == "cpu":
        print("there is no GPU that the kernels run on, so onnxruntime runs the file on the CPU")
    for layer in session.layers:
        print(layer)
    feed = {"x": np.random.default_rng(1).standard_normal((1, width)).astype(np.float32)}
    (found,) = session.run(["y"], feed)
    (wanted,) = quantkit.InferenceSession(path, device="cpu").run(["y"], feed)
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    print(f"{session.device}: {milliseconds(session, feed):.3f} ms, {error:.1e} from the CPU's result")
    print(f"{result.report.ratio:.1f}x smaller than float, {path}")


if __name__ == "__main__":
    main()
