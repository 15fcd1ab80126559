"""A network with every kind of layer, and its statistics written out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import numpy_helper

from quantkit.calibration import collector
from quantkit.calibration.collector import Collected, Request, Settings, collect
from quantkit.calibration.data import CalibrationData, open_calibration
from quantkit.calibration.rows import to_rows
from quantkit.graph.load import load_model
from quantkit.graph.targets import find_targets
from quantkit.report.progress import SilentProgress
from quantkit.runtime.ort import make_session
from quantkit.types import Array, Feed, LayerStats, Target
from quantkit.verify import session_inputs

EVERYTHING = frozenset({"abs_mean", "mean", "square_mean", "gram", "rows"})
PLENTY = 1 << 30
CNN = """g (float[N,3,8,8] x) => (float[N,M] y, float[N,16,8,8] r) {
    a = Conv<pads=[1,1,1,1]>(x, w1) r = Relu(a) b = Conv<group=2>(r, w2) c = Conv<group=2>(r, w3) d = Add(b, c)
    m = GlobalAveragePool(d) f = Flatten(m) y = Gemm(f, w4) }"""
SHAPES = {"w1": (16, 3, 3, 3), "w2": (16, 8, 3, 3), "w3": (16, 8, 3, 3), "w4": (16, 32)}


class Network:
    """A loaded model with its targets, and what collecting from it needs."""

    def __init__(self, text: str, shapes: Mapping[str, tuple[int, ...]], **constants: Array) -> None:
        proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {text}')
        rng = np.random.default_rng(0)
        arrays = {name: (rng.standard_normal(shape) / 4).astype(np.float32) for name, shape in shapes.items()}
        for name, array in {**arrays, **constants}.items():
            proto.graph.initializer.append(numpy_helper.from_array(array, name))
        self.model = load_model(proto).model
        self.targets: dict[str, Target] = find_targets(self.model)[0]

    def open(self, arrays: Mapping[str, Array], batch: int | None = None) -> CalibrationData:
        return open_calibration(dict(arrays), session_inputs(make_session(self.model)), batch_size=batch)

    def collect(
        self,
        data: CalibrationData,
        stats: frozenset[str] = EVERYTHING,
        histograms: Mapping[str, str] | None = None,
        limit: int = PLENTY,
        seed: int = 0,
    ) -> Collected:
        request = Request(self.targets, stats, histograms or {})
        return collect(self.model, data, request, Settings(limit, 1, seed), SilentProgress())

    def values(self, feed: Feed) -> dict[str, Array]:
        """Every float value of the main graph."""
        copy = self.model.clone()
        known = {str(value.name) for value in copy.graph.outputs}
        copy.graph.outputs.extend(value for node in copy.graph for value in node.outputs if value.name not in known)
        return {**feed, **make_session(copy).run(feed)}


def images(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((count, 3, 8, 8)).astype(np.float32)


def rows_of(target: Target, value: Array) -> Array:
    """[groups, T, K] of all positions."""
    names = ("pads", "strides", "dilations", "transA")
    attributes = {name: target.node.attributes[name].value for name in names if name in target.node.attributes}
    return to_rows(
        target.op,
        value,
        operand_shape=target.layout.operand_shape,
        groups=target.groups,
        attributes=attributes,
        limit=None,
        seed=0,
    )


def check(found: LayerStats, target: Target, value: Array) -> None:
    rows = rows_of(target, value).astype(np.float64)
    assert found.num_tokens == rows.shape[1]
    assert (found.low, found.high) == (value.min(), value.max())
    assert found.gram is not None and found.rows is not None
    assert found.mean is not None and found.abs_mean is not None and found.square_mean is not None
    np.testing.assert_allclose(found.mean, rows.mean(axis=1), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.abs_mean, np.abs(rows).mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found.square_mean, np.square(rows).mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found.gram, rows.transpose(0, 2, 1) @ rows / rows.shape[1], rtol=1e-4, atol=1e-5)
    seen = {row.astype(np.float32).tobytes() for row in rows[0]}
    assert all(row.tobytes() in seen for row in found.rows[0])
    assert found.rows.shape == (target.groups, min(rows.shape[1], collector.ROW_LIMIT), target.shape[1])


def equal(first: Collected, second: Collected, rtol: float = 0.0) -> None:
    assert first.stats.keys() == second.stats.keys() and first.histograms.keys() == second.histograms.keys()
    for name, layer in first.stats.items():
        for item in ("num_tokens", "low", "high", "abs_mean", "mean", "square_mean", "gram", "rows", "data_shapes"):
            one, other = getattr(layer, item), getattr(second.stats[name], item)
            if isinstance(one, np.ndarray):
                np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol)
            else:
                assert one == other
    for name, seen in first.histograms.items():
        np.testing.assert_array_equal(seen.counts, second.histograms[name].counts)
        np.testing.assert_array_equal(seen.edges, second.histograms[name].edges)
