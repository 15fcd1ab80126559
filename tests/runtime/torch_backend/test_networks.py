"""Whole networks: the same results as onnxruntime, Hessian-vector products, quantized files, CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from quantkit import demo
from quantkit.report.progress import SilentProgress
from quantkit.runtime.ort import make_session
from quantkit.runtime.torch_backend import TorchModule, to_torch
from tests.helpers import models

SEED = 1
RELATIVE = 1e-4

RESIDUAL = """g (float[N,3,8,8] x, float[8,3,3,3] w1, float[16,8,3,3] w2, float[16,16,3,3] w3, float[16,10] w4)
         => (float[N,10] y) {
    c1 = Conv<pads=[1,1,1,1]>(x, w1)
    t1 = Tanh(c1)
    c2 = Conv<pads=[1,1,1,1], strides=[2,2]>(t1, w2)
    t2 = Tanh(c2)
    c3 = Conv<auto_pad="SAME_UPPER">(t2, w3)
    s = Add(c3, t2)
    t3 = Sigmoid(s)
    p = GlobalAveragePool(t3)
    f = Flatten<axis=1>(p)
    y = MatMul(f, w4)
}"""


def residual() -> onnx.ModelProto:
    shapes = {"w1": (8, 3, 3, 3), "w2": (16, 8, 3, 3), "w3": (16, 16, 3, 3), "w4": (16, 10)}
    return models.build(RESIDUAL, {name: models.random(*shape, seed=SEED) for name, shape in shapes.items()})


def digits() -> onnx.ModelProto:
    import onnx_ir as ir

    return ir.to_proto(demo.to_onnx(demo.initial_weights(np.random.default_rng(SEED))))


def feed_of(module: TorchModule, batch: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    shapes = {"ids": (batch, 7), "x": (batch, 3, 8, 8)}
    feed = {}
    for name in module.input_names:
        if name == "ids":
            feed[name] = torch.randint(0, 50, shapes[name], generator=generator)
        else:
            feed[name] = torch.randn(shapes.get(name, (batch, 1, 8, 8)), generator=generator)
    return feed


NETWORKS = {"residual": residual, "cnn": models.cnn, "transformer block": models.block, "digits": digits}


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS.keys())
@pytest.mark.parametrize("batch", [1, 3])
def test_networks_agree_with_onnxruntime(build: Callable[[], onnx.ModelProto], batch: int) -> None:
    model = build()
    module = to_torch(model)
    feed = feed_of(module, batch)
    expected = make_session(_ir(model), threads=1).run({name: item.numpy() for name, item in feed.items()})
    found = module.run(feed)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert np.abs(found[name].numpy() - value).max() <= RELATIVE * np.abs(value).max()


def _ir(model: onnx.ModelProto) -> Any:
    import onnx_ir as ir

    return ir.from_proto(model)


def smooth_block() -> onnx.ModelProto:
    """The transformer block without kinks: finite differences must not step over any."""
    model = models.block()
    for node in model.graph.node:
        node.op_type = node.op_type.replace("Relu", "Gelu")
    return model


@pytest.mark.parametrize("build", [residual, smooth_block])
def test_hessian_vector_products_agree_with_finite_differences(build: Callable[[], onnx.ModelProto]) -> None:
    module = to_torch(build(), dtype=torch.float64).requires_grad_(True)
    feed = {key: item.double() if item.is_floating_point() else item for key, item in feed_of(module).items()}
    parameters = list(module.parameters())
    labels = module(**feed).detach().flatten(0, -2).argmax(dim=-1)  # the model's own answers
    generator = torch.Generator().manual_seed(SEED)

    def loss() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(module(**feed).flatten(0, -2), labels)

    directions = [torch.randn(item.shape, dtype=item.dtype, generator=generator) for item in parameters]

    def gradients(step: float) -> list[torch.Tensor]:
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=step)
        found = torch.autograd.grad(loss(), parameters)
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=-step)
        return list(found)

    first = torch.autograd.grad(loss(), parameters, create_graph=True)
    along = [(gradient * direction).sum() for gradient, direction in zip(first, directions, strict=True)]
    products = torch.autograd.grad(torch.stack(along).sum(), parameters)
    step = 1e-5
    ahead, behind = gradients(step), gradients(-step)
    for product, more, less in zip(products, ahead, behind, strict=True):
        difference = (more - less) / (2 * step)
        assert (product - difference).norm() <= 1e-5 * difference.norm()
    assert max(float(product.norm()) for product in products) > 1e-6


def test_trained_demo_model_gives_the_same_classes() -> None:
    images = demo.load_digits()
    weights = demo.train(images, progress=SilentProgress(), epochs=1)
    model = demo.to_onnx(weights)
    module = to_torch(model)
    data = images.test_images[:64]
    expected = next(iter(make_session(model, threads=1).run({module.input_names[0]: data}).values()))
    found = module(torch.from_numpy(data)).numpy()
    assert np.abs(found - expected).max() <= RELATIVE * np.abs(expected).max()


def test_half_precision_runs_and_stays_half() -> None:
    model = models.cnn()
    module = to_torch(model, dtype=torch.bfloat16)
    feed = feed_of(module)
    found = module(**{name: item.bfloat16() for name, item in feed.items()})
    assert found.dtype == torch.bfloat16
    reference = to_torch(model)(**feed)
    assert (found.float() - reference).norm() <= 0.05 * reference.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("name", NETWORKS)
def test_same_module_on_cuda_and_in_a_cuda_graph(name: str) -> None:
    module = to_torch(NETWORKS[name]())
    feed = feed_of(module)
    expected = module(**feed)
    module, moved = module.cuda(), {key: item.cuda() for key, item in feed.items()}
    with torch.no_grad():
        for _ in range(2):  # copies of shapes are made before the capture
            found = module(**moved)
        assert (found.cpu() - expected).abs().max() <= 1e-3 * expected.abs().max()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = module(**moved)
        graph.replay()
    assert torch.equal(captured, found)
