"""Small networks with every kind of weight, their allocation problems, and the divergence written out in torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from quantkit.allocators._derivatives import Derivatives
from quantkit.budget import Budget
from quantkit.divergence import LEAST, Divergence
from quantkit.graph.load import load_model
from quantkit.graph.targets import find_targets
from quantkit.graph.units import find_units
from quantkit.network import Network
from quantkit.quantizers.rtn import RTN
from quantkit.runtime.probe import Probe
from quantkit.types import AllocationProblem, Array, Measurement, QuantizedWeight, QuantSpec, Target
from tests.helpers.models import build, random

DENSE = """g (float[N,16] x, float[16,16] w1, float[16] b1, float[24,16] w2, float[24] b2) => (float[N,24] y) {
    a = MatMul(x, w1)
    b = Add(a, b1)
    h = Tanh(b)
    y = Gemm<transB=1,alpha=1.5>(h, w2, b2)
}"""
PROBABILITIES = DENSE.replace("y = Gemm", "z = Gemm").replace("}", "    y = Softmax<axis=1>(z)\n}")
VALUES = """g (float[N,16] x, float[16,24] w1) => (float[N,4,6] y) {
    shape = Constant<value_ints = [0, 4, 6]>()
    a = MatMul(x, w1)
    h = Sigmoid(a)
    y = Reshape(h, shape)
}"""
CONV = """g (float[N,8,5,5] x, float[16,4,3,3] w1, float[16] b1, float[16,3,2,2] w2, float[6,50] w3)
         => (float[N,50] y) {
    a = Conv<group=2,auto_pad="SAME_UPPER",strides=[2,2]>(x, w1, b1)
    h = Softplus(a)
    c = ConvTranspose<group=2,strides=[2,2]>(h, w2)
    t = Tanh(c)
    p = GlobalAveragePool(t)
    f = Flatten<axis=1>(p)
    y = MatMul(f, w3)
}"""
TIED = """g (int64[N,S] ids, float[40,8] table, float[8,40] w) => (float[N,S,40] y) {
    e = Gather(table, ids)
    n = MatMul(e, w)
    s = Softmax<axis=-1>(n)
    m = MatMul(s, table)
    t = Transpose<perm=[1,0]>(table)
    y = MatMul(m, t)
}"""
TWICE = """g (float[N,16] x, float[16,16] w) => (float[N,16] y) {
    a = MatMul(x, w)
    h = Tanh(a)
    y = MatMul(h, w)
}"""
RECURRENT = """g (float[N,5,16] x, float[16,16] v, float[1,64,16] w, float[1,64,16] r, float[16,20] u)
              => (float[N,20] y) {
    axes = Constant<value_ints = [0]>()
    t = Transpose<perm=[1,0,2]>(x)
    d = MatMul(t, v)
    all, last, cell = LSTM<hidden_size=16>(d, w, r)
    l = Squeeze(last, axes)
    y = MatMul(l, u)
}"""
INNER = """g (float[N,16] x, float[16,16] w, float[16,20] u) => (float[N,20] y) {
    most = ReduceMax<keepdims=0>(x)
    bound = Constant<value = float {1000.0}>()
    yes = Less(most, bound)
    h = If (yes) <
        then_branch = one () => (float[N,16] p) { p = MatMul(x, w) },
        else_branch = two () => (float[N,16] q) { q = Identity(x) }
    >
    t = Tanh(h)
    y = MatMul(t, u)
}"""
MIXED = """g (float[N,16] x, float[16,16] w, float[16,20] u) => (float[N,20] y) {
    a = MatMul(x, w)
    m = ReduceMean<keepdims=1>(a)
    h = Sub(a, m)
    t = Tanh(h)
    y = MatMul(t, u)
}"""
OUTPUTS = """g (float[N,16] x, float[16,16] w, float[16,20] u) => (float[N,20] y, float[N,4,4] v, int64[N] best) {
    shape = Constant<value_ints = [0, 4, 4]>()
    a = MatMul(x, w)
    h = Tanh(a)
    y = MatMul(h, u)
    v = Reshape(a, shape)
    best = ArgMax<axis=1,keepdims=0>(y)
}"""
NETWORKS: Mapping[str, tuple[str, Mapping[str, Sequence[int]]]] = {
    "dense": (DENSE, {"w1": (16, 16), "b1": (16,), "w2": (24, 16), "b2": (24,)}),
    "probabilities": (PROBABILITIES, {"w1": (16, 16), "b1": (16,), "w2": (24, 16), "b2": (24,)}),
    "values": (VALUES, {"w1": (16, 24)}),
    "conv": (CONV, {"w1": (16, 4, 3, 3), "b1": (16,), "w2": (16, 3, 2, 2), "w3": (6, 50)}),
    "tied": (TIED, {"table": (40, 8), "w": (8, 40)}),
    "twice": (TWICE, {"w": (16, 16)}),
    "recurrent": (RECURRENT, {"v": (16, 16), "w": (1, 64, 16), "r": (1, 64, 16), "u": (16, 20)}),
    "inner": (INNER, {"w": (16, 16), "u": (16, 20)}),
    "mixed": (MIXED, {"w": (16, 16), "u": (16, 20)}),
    "outputs": (OUTPUTS, {"w": (16, 16), "u": (16, 20)}),
}
INPUTS: Mapping[str, tuple[str, Sequence[int]]] = {
    "conv": ("x", (8, 5, 5)),
    "recurrent": ("x", (5, 16)),
    "tied": ("ids", (6,)),
}


def probe(name: str, batches: Sequence[int] = (4, 3)) -> Probe:
    """The network with random weights, on batches of these sizes."""
    text, shapes = NETWORKS[name]
    weights = {key: 2 * random(*shape) if len(shape) > 1 else random(*shape, 1)[:, 0] for key, shape in shapes.items()}
    model = load_model(build(text, weights)).model
    rng = np.random.default_rng(5)
    key, shape = INPUTS.get(name, ("x", (16,)))
    whole = rng.standard_normal((sum(batches), *shape)).astype(np.float32)
    values: Array = rng.integers(0, 40, whole.shape) if key == "ids" else whole
    parts = np.split(values, np.cumsum(batches)[:-1])
    return Probe(model, find_targets(model)[0], [{key: part} for part in parts])


def net(name: str, batches: Sequence[int] = (4, 3), **options: Any) -> Derivatives:
    """In float64, so that differences tell derivatives."""
    made = probe(name, batches)
    return Derivatives(made, list(made.targets), dtype=torch.float64, **options)


def problem(name: str, bits: Sequence[int] = (3, 4, 8), made: Probe | None = None, **changes: Any) -> AllocationProblem:
    """Plain rounding in groups of 8 inputs."""
    made = made or probe(name)
    fields: dict[str, Any] = {
        "targets": made.targets,
        "stats": {},
        "candidates": {key: tuple(QuantSpec(width, 8) for width in bits) for key in made.targets},
        "budget": Budget(avg_bits=4),
        "size": lambda target, spec: spec.bits * target.shape[0] * target.shape[1] // 8,
        "float_size": 10_000,
        "fixed_size": 100,
        "quantize": rounded,
        "evaluate": refuse,
        "units": find_units(made.targets),
        "network": Network(made, made, 1000),
    }
    return AllocationProblem(**{**fields, **changes})


def rounded(target: Target, spec: QuantSpec) -> QuantizedWeight:
    return RTN().quantize(target.load(), spec, None)


def refuse(chosen: Mapping[str, QuantSpec], name: str = "") -> Measurement:
    raise AssertionError("nothing is emitted here")


def loss(made: Derivatives, changes: Mapping[str, torch.Tensor]) -> float:
    """Nats of all samples by `quantkit.divergence`, in float64, with these changes of operands."""
    total = 0.0
    reference = [outputs(made, batch, {}) for batch in range(len(made.counts))]
    shapes = Divergence.of(reference)
    for batch, wanted in enumerate(reference):
        total += shapes.sum(wanted, outputs(made, batch, changes))
    return total


def outputs(made: Derivatives, batch: int, changes: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    """With these changes of operands."""
    feed = made.feed(batch)
    for name, change in changes.items():
        feed[f"weight:{name}"] = feed[f"weight:{name}"] + change
    with torch.no_grad():
        return {name: value.numpy() for name, value in made.module.run(feed).items()}


def direction(made: Derivatives, name: str, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng([seed, 3])
    return torch.from_numpy(0.1 * rng.standard_normal(tuple(made.operands[name].shape)))


def divergence(kind: str, energy: float, wanted: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """What `quantkit.divergence` computes for one output."""
    if kind == "values":
        return (got - wanted).square().sum() / (2 * energy)
    first, second = (item.reshape(len(item), -1) for item in (wanted, got))
    if kind == "probabilities":
        first, second = first.clamp(min=LEAST).log(), second.clamp(min=LEAST).log()
    first, second = torch.log_softmax(first, 1), torch.log_softmax(second, 1)
    return (first.exp() * (first - second)).sum()
