"""Operators of onnxruntime's optimised files: fused products, activations and norms."""

from __future__ import annotations

import torch
from torch.nn import functional

from quantkit.runtime.torch_backend import convolution, indexing, padding, shape
from quantkit.runtime.torch_backend._named import Activation, activations
from quantkit.runtime.torch_backend._types import Node, Op, Run, Table, direct, ints

HALVES = (torch.float16, torch.bfloat16)


def _fused_mat_mul(node: Node) -> Run:
    alpha = float(node.get("alpha", 1.0))
    turns = [(bool(node.get(f"transBatch{side}", 0)), bool(node.get(f"trans{side}", 0))) for side in "AB"]

    def turned(x: torch.Tensor, batch: bool, matrix: bool) -> torch.Tensor:
        # The first axis becomes the rows; a vector has nothing to turn.
        x = x.movedim(0, -2) if batch and x.ndim > 2 else x
        return x.mT if matrix and x.ndim > 1 else x

    def run(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = turned(a, *turns[0]) @ turned(b, *turns[1])
        return product if alpha == 1 else alpha * product

    return run


def _fused_gemm(node: Node) -> Run:
    alpha, beta = float(node.get("alpha", 1.0)), float(node.get("beta", 1.0))
    turn_a, turn_b = bool(node.get("transA", 0)), bool(node.get("transB", 0))
    numbers = [[float(node.get(name))] if node.get(name) is not None else [] for name in ALPHA_BETA]
    activation = _optional(node, *numbers)

    def run(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        a, b = a.t() if turn_a else a, b.t() if turn_b else b
        return activation(alpha * (a @ b) if c is None else torch.addmm(c, a, b, beta=beta, alpha=alpha))

    return run


ALPHA_BETA = ("activation_alpha", "activation_beta")


def _fused_conv(node: Node) -> Run:
    """activation(Conv(x, w, b) + z)."""
    convert = max((version, op) for (name, version), op in convolution.TABLE.items() if name == "Conv")[1].convert
    conv = convert(node)
    numbers = [float(number) for number in node.get("activation_params") or ()]
    activation = _optional(node, numbers[:1], numbers[1:])

    def run(
        x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None, z: torch.Tensor | None = None
    ) -> torch.Tensor:
        y: torch.Tensor = conv(x, w, b)
        return activation(y if z is None else y + z)

    return run


def _optional(node: Node, alphas: list[float], betas: list[float]) -> Activation:
    name = node.get("activation")
    return activations(node, [name], alphas, betas)[0] if name else lambda x: x


def _rms(x: torch.Tensor, scale: torch.Tensor, first: int, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The axes from `first` on over the root of their mean square, computed in at least 32 bits; and 1 / that root."""
    wide = x.float() if x.dtype in HALVES else x
    inverse = torch.rsqrt(wide.square().mean(tuple(range(first % x.ndim, x.ndim)), keepdim=True) + epsilon)
    return (wide * inverse).to(x.dtype) * scale, inverse


def _simplified_layer_normalization(node: Node) -> Run:
    axis, epsilon, single = node.get("axis", -1), float(node.get("epsilon", 1e-5)), len(node.output_types) == 1

    def run(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        y, inverse = _rms(x, scale, axis, epsilon)
        return y if single else (y, inverse)

    return run


def _skip_simplified_layer_normalization(node: Node) -> Run:
    epsilon, single = float(node.get("epsilon", 1e-12)), len(node.output_types) == 1

    def run(
        x: torch.Tensor, skip: torch.Tensor, gamma: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor | None, ...]:
        total = x + skip if bias is None else x + skip + bias
        y = _rms(total, gamma, -1, epsilon)[0]
        return y if single else (y, None, None, total)

    return run


def _skip_layer_normalization(node: Node) -> Run:
    epsilon, single = float(node.get("epsilon", 1e-12)), len(node.output_types) == 1

    def run(
        x: torch.Tensor,
        skip: torch.Tensor,
        gamma: torch.Tensor,
        beta: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor | None, ...]:
        total = x + skip if bias is None else x + skip + bias
        y = functional.layer_norm(total, total.shape[-1:], gamma, beta, epsilon)
        return y if single else (y, None, None, total)

    return run


def _embed_layer_normalization(node: Node) -> Run:
    """Sum of word, position and segment embeddings, normalized; the number of unmasked tokens of every sample."""
    epsilon, outputs = float(node.get("epsilon", 1e-12)), len(node.output_types)

    def run(
        words: torch.Tensor,
        segments: torch.Tensor | None,
        word_table: torch.Tensor,
        position_table: torch.Tensor,
        segment_table: torch.Tensor | None,
        gamma: torch.Tensor,
        beta: torch.Tensor,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        total = word_table[words] + (
            position_table[: words.shape[1]] if positions is None else position_table[positions]
        )
        if segments is not None and segment_table is not None:
            total = total + segment_table[segments]
        y = functional.layer_norm(total, total.shape[-1:], gamma, beta, epsilon)
        if outputs == 1:
            return y
        count = words.new_zeros(len(words)) if mask is None else (mask != 0).sum(1)
        return y, count.to(torch.int32), total

    return run


def _fast_gelu(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return functional.gelu(x if bias is None else x + bias, approximate="tanh")


def _quick_gelu(node: Node) -> Run:
    alpha = float(node.get("alpha", 1.702))
    return lambda x: x * torch.sigmoid(alpha * x)


def _bias_add(x: torch.Tensor, bias: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    return x + bias + skip


def _distances(node: Node) -> Run:
    euclidean = str(node.get("metric", "sqeuclidean")) == "euclidean"

    def run(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        squares = (a[:, None] - b).square().sum(-1)
        return squares.sqrt() if euclidean else squares

    return run


TABLE: Table = {
    ("BiasAdd", 1): direct(_bias_add),
    ("BiasGelu", 1): direct(lambda x, bias: functional.gelu(x + bias)),
    ("CDist", 1): Op(_distances),
    ("EmbedLayerNormalization", 1): Op(_embed_layer_normalization),
    ("ExpandDims", 1): Op(lambda node: lambda x, axis: x.unsqueeze(ints(axis)[0]), host=(1,)),
    ("FastGelu", 1): direct(_fast_gelu),
    ("FusedConv", 1): Op(_fused_conv),
    ("FusedGemm", 1): Op(_fused_gemm),
    ("FusedMatMul", 1): Op(_fused_mat_mul),
    ("GatherND", 1): indexing.TABLE["GatherND", 11],
    ("Gelu", 1): direct(functional.gelu),
    ("Inverse", 1): direct(torch.linalg.inv),
    ("Pad", 1): padding.TABLE["Pad", 11],
    ("QuickGelu", 1): Op(_quick_gelu),
    ("Range", 1): shape.TABLE["Range", 11],
    ("SkipLayerNormalization", 1): Op(_skip_layer_normalization),
    ("SkipSimplifiedLayerNormalization", 1): Op(_skip_simplified_layer_normalization),
    ("TransposeMatMul", 1): Op(_fused_mat_mul),
    ("Trilu", 1): indexing.TABLE["Trilu", 14],
}

STANDARD: Table = {("SimplifiedLayerNormalization", 1): Op(_simplified_layer_normalization)}
"""Of the standard domain in onnxruntime's files, though ONNX has no such operator."""
