"""What is known of a model: counts, sizes, the shape of its weights."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest

from quantkit.graph.targets import find_targets
from quantkit.tuning.features import STRUCTURE, structure
from tests.helpers import models


def figures(model: object) -> dict[str, float]:
    graph = ir.from_proto(model)  # type: ignore[arg-type]
    found = structure(graph, find_targets(graph)[0])
    assert found.dtype == np.float32 and len(found) == len(STRUCTURE) and np.isfinite(found).all()
    return dict(zip(STRUCTURE, found.tolist(), strict=True))


def test_a_convolutional_network() -> None:
    found = figures(models.cnn())
    weights = 16 * 27 + 32 * 144 + 320
    assert found["log weights"] == pytest.approx(math.log(weights))
    names = ("layers", "convolutions", "products", "depthwise", "pointwise", "activations", "depth")
    assert [found[name] for name in names] == [3, 2, 1, 0, 0, 2, 7]
    assert found["log median kurtosis"] == pytest.approx(math.log(3), abs=0.3)  # of normal numbers


def test_outliers_show() -> None:
    weight = models.random(64, 64)
    plain = figures(models.build(models.MATMUL, {"w": weight}))
    spoiled = weight.copy()
    spoiled[3, 4] = 50 * np.abs(weight).max()
    odd = figures(models.build(models.MATMUL, {"w": spoiled}))
    assert odd["log largest kurtosis"] > plain["log largest kurtosis"] + 3
    assert odd["log largest range"] > plain["log largest range"] + 1
    flat = figures(models.build(models.MATMUL, {"w": np.ones((64, 64), np.float32)}))
    assert flat["log largest kurtosis"] == pytest.approx(math.log(1e-3))


def test_a_transformer_block() -> None:
    found = figures(models.block())
    assert (found["products"], found["norms"], found["additions"]) == (5, 1, 2)
