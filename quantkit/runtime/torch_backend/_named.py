"""Activation functions that attributes name: of recurrent layers and of onnxruntime's fused operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from quantkit.runtime.torch_backend._types import Node

Activation = Callable[[torch.Tensor], torch.Tensor]

PLAIN: dict[str, Activation] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "softplus": functional.softplus,
    "softsign": functional.softsign,
    "tanh": torch.tanh,
}
WITH_ALPHA: dict[str, tuple[float, Callable[[torch.Tensor, float], torch.Tensor]]] = {
    "elu": (1.0, lambda x, alpha: functional.elu(x, alpha)),
    "leakyrelu": (0.01, lambda x, alpha: functional.leaky_relu(x, alpha)),
    "thresholdedrelu": (1.0, lambda x, alpha: torch.where(x > alpha, x, 0)),
}
WITH_BOTH: dict[str, tuple[float, float, Callable[[torch.Tensor, float, float], torch.Tensor]]] = {
    "affine": (1.0, 0.0, lambda x, alpha, beta: alpha * x + beta),
    "clip": (-3.4e38, 3.4e38, lambda x, alpha, beta: x.clamp(alpha, beta)),
    "hardsigmoid": (0.2, 0.5, lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1)),
    "scaledtanh": (1.0, 1.0, lambda x, alpha, beta: alpha * torch.tanh(beta * x)),
}


def activations(
    node: Node, names: Sequence[str], alphas: Sequence[float] = (), betas: Sequence[float] = ()
) -> list[Activation]:
    """One function per name; each takes the next alpha and beta if it has any."""
    next_alpha, next_beta = iter(alphas), iter(betas)
    found: list[Activation] = []
    for name in names:
        key = str(name).lower()
        if key in PLAIN:
            found.append(PLAIN[key])
        elif key in WITH_ALPHA:
            alpha, one = WITH_ALPHA[key]
            found.append(_bound(one, next(next_alpha, alpha)))
        elif key in WITH_BOTH:
            alpha, beta, two = WITH_BOTH[key]
            found.append(_bound(two, next(next_alpha, alpha), next(next_beta, beta)))
        else:
            raise node.refuse(f"it does not know the activation {str(name)!r}")
    return found


def _bound(function: Callable[..., torch.Tensor], *numbers: float) -> Activation:
    return lambda x: function(x, *numbers)
