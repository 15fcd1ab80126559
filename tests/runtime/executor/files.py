"""Emitted files, run by an executor on the CPU: its operators there are the kernels' references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch

from quantkit import metrics
from quantkit.graph.emit import emit
from quantkit.graph.targets import find_targets
from quantkit.runtime.executor import Executor
from quantkit.runtime.ort import make_session
from quantkit.types import Feed, QuantSpec
from tests.emitters.conftest import KINDS, accepted, feed_of, plan, stack
from tests.runtime.torch_backend.test_compressed import exact

CPU = torch.device("cpu")


def file_of(form: str, kind: str, runtime: str, specs: Sequence[QuantSpec]) -> ir.Model:
    """Layer i, which makes y<i>, stored as specs[i] where the form takes it and float where not."""
    model = stack(KINDS[kind], len(specs))
    layers = accepted(form, runtime, find_targets(model)[0], specs)
    assert layers, "the form takes no layer"
    return emit(model, plan(model, layers, feed_of(KINDS[kind]), runtime)).model


def expected(model: ir.Model, feed: Feed) -> dict[str, Any]:
    """onnxruntime's results, without the rounding of activations that only its MatMulNBits does."""
    return make_session(exact(model), threads=1, optimize="none").run(feed)


def run(executor: Executor, feed: Feed) -> dict[str, Any]:
    found = executor.run(executor.placed({name: torch.from_numpy(item) for name, item in feed.items()}))
    return {name: item.numpy() for name, item in found.items()}


def decibels(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> float:
    """The least agreement of all outputs, whose shapes and types must be the same."""
    assert set(wanted) == set(found)
    for name, value in wanted.items():
        assert found[name].shape == value.shape and found[name].dtype == value.dtype, name
    return min(metrics.sqnr(value, found[name]) for name, value in wanted.items())
