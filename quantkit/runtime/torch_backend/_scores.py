"""Scaled dot-product attention, the part that all attention operators share (https://arxiv.org/abs/1706.03762)."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

RAW, CAPPED, BIASED, PROBABILITIES = range(4)
"""What Attention's fourth output can hold: scores, after the soft cap, after the mask, after the softmax."""


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    softmax_dtype: torch.dtype | None = None,
    sink: torch.Tensor | None = None,
    stage: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One attention of every query head; keys and values are shared by groups of heads.

    Args:
        q: [batch, heads, queries, size].
        k: [batch, kv heads, keys, size].
        v: [batch, kv heads, keys, value size].
        bias: added to the scores, broadcasts to [batch, heads, queries, keys]; a row of -inf alone gives zeros.
        scale: of the scores; 1 / sqrt(size) by default.
        causal: query i sees keys 0 to i; only without a bias.
        softcap: scores become softcap * tanh(scores / softcap); 0 leaves them.
        softmax_dtype: to compute the softmax in.
        sink: [1, heads, 1, 1] score of a key without value.
        stage: which of the scores to return, too.

    Returns:
        [batch, heads, queries, value size], and [batch, heads, queries, keys] of the stage.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    k, v = _for_heads(k, q.shape[1]), _for_heads(v, q.shape[1])
    dead = None
    if bias is not None:
        # Rows without any key: an open mask keeps NaN out of values and derivatives, zeros come afterwards.
        dead = (bias == -math.inf).all(-1, keepdim=True)
        open_bias = torch.where(dead, 0, bias)
    plain = softcap == 0 and softmax_dtype is None and sink is None and stage is None
    # The fused kernels have no second derivative, and on the CPU they round float16 unlike ONNX's own definition.
    plain = plain and q.dtype == v.dtype and not (q.dtype == torch.float16 and q.device.type == "cpu")
    if plain and not torch.is_grad_enabled() and k.shape[2] > 0:
        mask = None if bias is None else open_bias
        y = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)
        return (y if dead is None else torch.where(dead, 0, y)), None
    if causal:
        allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        bias = open_bias = additive(allowed, q.dtype)
    # On both sides: half the exponent range for the product. ONNX rounds it to the type of the queries.
    root = torch.tensor(math.sqrt(scale), dtype=q.dtype)
    stages = [(q * root) @ (k * root).mT]
    scores = softcap * torch.tanh(stages[0] / softcap) if softcap else stages[0]
    stages += [scores, scores if bias is None or stage != BIASED else scores + bias]
    probabilities = _softmax(scores if bias is None else scores + open_bias, softmax_dtype, sink)
    if dead is not None:
        probabilities = torch.where(dead, 0, probabilities)
    stages.append(probabilities)
    return probabilities.to(v.dtype) @ v, None if stage is None else stages[stage].to(q.dtype)


def _softmax(scores: torch.Tensor, dtype: torch.dtype | None, sink: torch.Tensor | None) -> torch.Tensor:
    """In the wanted type; the sink takes its share and is left out."""
    kept = scores.dtype
    if sink is not None:
        scores = torch.cat([scores, sink.to(kept).expand(*scores.shape[:-1], 1)], -1)
    if kept == torch.float16 and dtype is None and scores.device.type == "cpu":
        powers = (
            scores - scores.detach().amax(-1, keepdim=True)
        ).exp()  # every step rounded, as ONNX's definition has it
        result = powers / powers.sum(-1, keepdim=True)
    else:
        result = torch.softmax(scores if dtype is None else scores.to(dtype), -1).to(kept)
    return result if sink is None else result[..., :-1]


def _for_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[batch, kv heads, ...] -> [batch, heads, ...], neighbours share one."""
    groups = x.shape[1]
    return x if groups == heads else x[:, :, None].expand(-1, -1, heads // groups, -1, -1).flatten(1, 2)


def additive(allowed: torch.Tensor, dtype: torch.dtype, closed: float = -math.inf) -> torch.Tensor:
    """0 where allowed, `closed` elsewhere."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, closed)


def to_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[batch, length, heads * size] -> [batch, heads, length, size]."""
    return torch.unflatten(x, 2, (heads, x.shape[2] // heads)).transpose(1, 2)


def from_heads(x: torch.Tensor) -> torch.Tensor:
    """[batch, heads, length, size] -> [batch, length, heads * size]."""
    return x.transpose(1, 2).flatten(2)


def window(
    queries: int, keys: int, offset: torch.Tensor | int, left: int, right: int, device: torch.device
) -> torch.Tensor:
    """Which keys each query sees: those from `left` before to `right` behind its own position; -1 = no bound.

    Args:
        offset: position of the first query: a number, or [batch].

    Returns:
        bool [queries, keys] or [batch, 1, queries, keys].
    """
    start = offset.reshape(-1, 1, 1, 1) if isinstance(offset, torch.Tensor) else offset
    ahead = torch.arange(keys, device=device) - (torch.arange(queries, device=device)[:, None] + start)
    allowed = torch.ones_like(ahead, dtype=torch.bool)
    if left >= 0:
        allowed = ahead >= -left
    return allowed & (ahead <= right) if right >= 0 else allowed


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotary position embedding (https://arxiv.org/abs/2104.09864).

    Args:
        x: [batch, heads, length, size].
        cos, sin: [batch or 1, length, half of the rotated size]; what is beyond twice that stays as it is.
        interleaved: pairs are neighbours, not halves.
    """
    size = 2 * cos.shape[-1]
    turning, rest = x[..., :size], x[..., size:]
    cos, sin = cos[:, None], sin[:, None]
    a, b = (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.chunk(2, -1)
    real, imaginary = cos * a - sin * b, sin * a + cos * b
    turned = torch.stack([real, imaginary], -1).flatten(-2) if interleaved else torch.cat([real, imaginary], -1)
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned
