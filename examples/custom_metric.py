"""A budget on a figure of your own: how much of a quantity the network still explains.

python examples/custom_metric.py [--tiny]

On the command line, in the folder of this file:
quantkit compress model.onnx --calib calib.npz --eval test.npz --metric custom_metric:explained --max-drop 2%
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx.parser

import quantkit

Arrays = Mapping[str, np.ndarray]
HIDDEN = 256
NETWORK = f"""<ir_version: 10, opset_import: ["": 21]>
net (float[N,32] x) => (float[N,1] y) <float[32,{HIDDEN}] w1, float[{HIDDEN},{HIDDEN}] w2, float[{HIDDEN},1] w3> {{
    [first] a = MatMul(x, w1)
    b = Relu(a)
    [second] c = MatMul(b, w2)
    d = Relu(c)
    [third] y = MatMul(d, w3)
}}"""


def truth(x: np.ndarray) -> np.ndarray:
    """[n, 1]: what the network is to tell from x [n, 32]."""
    return np.abs(x[:, :4]).sum(axis=1, keepdims=True)


def explained(outputs: Arrays, feeds: Arrays) -> float:
    """The metric: the share of the variance that is explained. Higher is better; quantkit counts the drop from float.

    Args:
        outputs: of the model that is judged, output name -> all samples.
        feeds: what it was given, input name -> all samples.
    """
    wanted = truth(feeds["x"])
    return float(1 - np.square(outputs["y"] - wanted).mean() / wanted.var())


def make(folder: Path) -> None:
    """Random hidden layers and a last one by least squares, and data that it was not fitted to."""
    rng = np.random.default_rng(0)
    w1 = rng.standard_normal((32, HIDDEN)) / np.sqrt(32)
    w2 = rng.standard_normal((HIDDEN, HIDDEN)) / np.sqrt(HIDDEN)
    x = rng.standard_normal((4000, 32))
    hidden = np.maximum(np.maximum(x @ w1, 0) @ w2, 0)
    w3 = np.linalg.solve(hidden.T @ hidden + np.eye(HIDDEN), hidden.T @ truth(x))
    model = onnx.parser.parse_model(NETWORK)
    for name, weight in (("w1", w1), ("w2", w2), ("w3", w3)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight.astype(np.float32), name))
    onnx.save(model, folder / "model.onnx")
    for name in ("calib", "test"):
        np.savez(folder / f"{name}.npz", x=rng.standard_normal((200, 32)).astype(np.float32))


def main() -> None:
    parser = argparse.ArgumentParser(description="a budget on a figure of your own")
    parser.add_argument("--tiny", action="store_true", help="one width for all layers, plain rounding")
    args = parser.parse_args()
    options = {"allocator": "uniform", "quantizer": "mse", "inputs": "float"} if args.tiny else {}  # the fast ones
    folder = Path(tempfile.mkdtemp(prefix="quantkit-metric-"))
    make(folder)
    evaluation = quantkit.EvaluationRequest(
        data=quantkit.CalibrationRequest(str(folder / "test.npz")), metric="custom_metric:explained"
    )
    result = quantkit.compress(
        folder / "model.onnx",
        calibration=folder / "calib.npz",
        evaluation=evaluation,
        budget=quantkit.Budget(max_drop=0.02),
        **options,
    )
    report = result.report
    print(f"{report.ratio:.2f}x smaller, {report.average_bits:.2f} bits per weight")
    for row in report.layers:
        print(f"{row.name:>8}: {row.bits} bits")
    print("no more than 0.02 is lost" if report.budget_met else f"not met: {report.unmet[0]}")


if __name__ == "__main__":
    main()
