"""Attention and RotaryEmbedding of ONNX (opset 23 and later)."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from quantkit.runtime.torch_backend._scores import additive, attend, from_heads, rotated, to_heads, window
from quantkit.runtime.torch_backend._types import Node, Op, Run, Table


def _attention(node: Node) -> Run:
    q_heads, kv_heads = node.get("q_num_heads"), node.get("kv_num_heads")
    causal, scale = bool(node.get("is_causal", 0)), node.get("scale")
    left, right = node.get("left_window_size", -1), node.get("right_window_size", -1)
    if min(left, right) < -1:
        raise node.refuse(f"window sizes are -1 or more, got {left} and {right}")
    softcap = float(node.get("softcap", 0.0))
    softmax_dtype = node.dtype("softmax_precision") if node.get("softmax_precision") else None
    outputs = len(node.output_types)
    stage = int(node.get("qk_matmul_output_mode", 0)) if outputs > 3 else None

    def run(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None = None,
        past_key: torch.Tensor | None = None,
        past_value: torch.Tensor | None = None,
        valid: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor | None, ...]:
        packed = q.ndim == 3
        if packed:
            q, k, v = to_heads(q, q_heads), to_heads(k, kv_heads), to_heads(v, kv_heads)
        offset: torch.Tensor | int = 0 if valid is None else valid - q.shape[2]
        if past_key is not None and past_value is not None:
            offset = past_key.shape[2]
            k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
        top_left = causal and mask is None and valid is None and past_key is None and max(left, right) < 0
        allowed = None
        if not top_left and (causal or max(left, right) >= 0):
            bound = 0 if causal else right
            allowed = window(q.shape[2], k.shape[2], offset, left, bound, q.device)
        if valid is not None:
            inside = torch.arange(k.shape[2], device=q.device) < valid.reshape(-1, 1, 1, 1)
            allowed = inside if allowed is None else allowed & inside
        bias = score_bias(mask, allowed, k.shape[2], q.dtype)
        settings = {"scale": scale, "softcap": softcap, "softmax_dtype": softmax_dtype, "stage": stage}
        y, scores = attend(q, k, v, bias, causal=top_left, **settings)
        y = from_heads(y) if packed else y
        return y if outputs == 1 else (y, k, v, scores)

    return run


def score_bias(
    mask: torch.Tensor | None, allowed: torch.Tensor | None, keys: int, dtype: torch.dtype
) -> torch.Tensor | None:
    """What is added to the scores; a mask that is too short forbids the keys beyond it."""
    if mask is not None and mask.dtype == torch.bool:
        mask = functional.pad(mask, (0, keys - mask.shape[-1]), value=False)
        allowed = mask if allowed is None else mask & allowed
        mask = None
    if mask is None:
        return None if allowed is None else additive(allowed, dtype)
    mask = functional.pad(mask, (0, keys - mask.shape[-1]), value=-math.inf)
    return mask if allowed is None else torch.where(allowed, mask, -math.inf)


def _rotary_embedding(node: Node) -> Run:
    heads, size = node.get("num_heads", 0), node.get("rotary_embedding_dim", 0)
    interleaved = bool(node.get("interleaved", 0))

    def run(
        x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        split = to_heads(x, heads) if x.ndim == 3 else x
        if positions is not None:
            cos, sin = cos[positions], sin[positions]
        if size:
            cos, sin = cos[..., : size // 2], sin[..., : size // 2]
        y = rotated(split, cos, sin, interleaved)
        return from_heads(y) if x.ndim == 3 else y

    return run


TABLE: Table = {("Attention", 23): Op(_attention), ("RotaryEmbedding", 23): Op(_rotary_embedding)}
