"""com.microsoft attention operators, as onnxruntime computes them: Attention, MultiHeadAttention, GroupQueryAttention,
RotaryEmbedding."""

from __future__ import annotations

import torch
from torch.nn import functional

from quantkit.runtime.torch_backend._scores import additive, attend, from_heads, rotated, to_heads, window
from quantkit.runtime.torch_backend._types import Node, Op, Run, Table, ints
from quantkit.runtime.torch_backend.attention import score_bias

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _masked(
    mask: torch.Tensor | None,
    extra: torch.Tensor | None,
    shape: tuple[int, int, int],
    causal: bool,
    closed: float,
    q: torch.Tensor,
) -> torch.Tensor | None:
    """What is added to the scores.

    Args:
        mask: lengths [batch]; ends and starts [2 * batch]; lengths and sums of them [3 * batch + 2]; or non-zero for
            the keys to see: [batch, keys], [batch, queries, keys] or [batch, 1, longest, longest].
        extra: added besides.
        shape: batch, queries, keys.
        closed: what hides a key (not -inf: a query whose keys are all hidden sees them all alike).
        q: for its type.
    """
    batch, queries, keys = shape
    bias = extra
    if mask is not None:
        bias = additive(_seen(mask, batch, queries, keys), q.dtype, closed)
        bias = bias if extra is None else bias + extra
    if causal and queries > 1:
        bias = score_bias(bias, window(queries, keys, keys - queries, -1, 0, q.device), keys, q.dtype)
    return bias


def _seen(mask: torch.Tensor, batch: int, queries: int, keys: int) -> torch.Tensor:
    """bool, broadcasts to [batch, heads, queries, keys]."""
    if mask.ndim == 1:
        places = torch.arange(keys, device=mask.device)
        inside = places < mask[:batch].reshape(-1, 1, 1, 1)
        return inside & (places >= mask[batch:].reshape(-1, 1, 1, 1)) if len(mask) == 2 * batch else inside
    if mask.ndim == 2:
        return mask[:, None, None, :] != 0
    if mask.ndim == 3:
        return mask[:, None] != 0
    return mask[:, :, keys - queries : keys, :keys] != 0


def _attention(node: Node) -> Run:
    heads, causal = int(node.get("num_heads")), bool(node.get("unidirectional", 0))
    scale, closed = node.get("scale") or None, float(node.get("mask_filter_value", -10000.0))
    sizes, outputs = node.get("qkv_hidden_sizes"), len(node.output_types)
    for name in ("do_rotary", "past_present_share_buffer"):
        if node.get(name, 0):
            raise node.refuse(f"it does not know {name}")

    def run(
        x: torch.Tensor,
        weights: torch.Tensor,
        bias: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        past: torch.Tensor | None = None,
        extra: torch.Tensor | None = None,
        length: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        projected = x @ weights if bias is None else x @ weights + bias
        parts = projected.split_with_sizes([int(s) for s in sizes], 2) if sizes else projected.chunk(3, 2)
        q, k, v = (to_heads(part, heads) for part in parts)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        shape = (q.shape[0], q.shape[2], k.shape[2])
        y = from_heads(attend(q, k, v, _masked(mask, extra, shape, causal, closed, q), scale=scale)[0])
        return y if outputs == 1 else (y, torch.stack([k, v]))

    return run


def _multi_head_attention(node: Node) -> Run:
    heads, causal = int(node.get("num_heads")), bool(node.get("unidirectional", 0))
    scale, closed = node.get("scale"), float(node.get("mask_filter_value", -10000.0))
    scale, outputs = scale or None, len(node.output_types)  # a scale of 0 is the default, too
    if outputs > 3:
        raise node.refuse("it does not give the scores")

    def run(
        query: torch.Tensor,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        extra: torch.Tensor | None = None,
        past_key: torch.Tensor | None = None,
        past_value: torch.Tensor | None = None,
        *buffers: torch.Tensor | None,
    ) -> torch.Tensor | tuple[torch.Tensor | None, ...]:
        if any(item is not None for item in buffers):
            raise node.refuse("it does not know caches in shared buffers")
        q, k, v = _unpacked(query, key, value, heads)
        if bias is not None:
            q, k, v = _with_bias(q, k, v, bias, projected=key is None or key.ndim != 4)
        if past_key is not None and past_value is not None:
            k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
        shape = (q.shape[0], q.shape[2], k.shape[2])
        total = _masked(mask, extra, shape, causal, closed, q)
        y = from_heads(attend(q, k, v, total, scale=scale)[0])
        return y if outputs == 1 else (y, k, v)

    return run


def _unpacked(query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None, heads: int) -> Tensors:
    """[batch, heads, length, size] each, from one, two or three tensors."""
    if query.ndim == 5:  # [batch, length, heads, 3, size]
        q, k, v = (part.transpose(1, 2) for part in query.unbind(3))
        return q, k, v
    assert key is not None
    q = to_heads(query, heads)
    if key.ndim == 5:  # [batch, length, heads, 2, size]
        k, v = (part.transpose(1, 2) for part in key.unbind(3))
        return q, k, v
    assert value is not None
    return (q, key, value) if key.ndim == 4 else (q, to_heads(key, heads), to_heads(value, heads))


def _with_bias(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, projected: bool) -> Tensors:
    """The biases of the input projections; keys and values that come from a cache have theirs already."""
    heads, size = q.shape[1], q.shape[3]
    b_q, b_k, b_v = bias.split_with_sizes([heads * size, heads * size, len(bias) - 2 * heads * size])
    q = q + b_q.reshape(heads, 1, size)
    return (q, k + b_k.reshape(heads, 1, size), v + b_v.reshape(heads, 1, -1)) if projected else (q, k, v)


def _group_query_attention(node: Node) -> Run:
    heads, groups = int(node.get("num_heads")), int(node.get("kv_num_heads"))
    scale, softcap = node.get("scale") or None, float(node.get("softcap", 0.0))
    rotary, interleaved = bool(node.get("do_rotary", 0)), bool(node.get("rotary_interleaved", 0))
    causal, local = bool(node.get("causal", 1)), int(node.get("local_window_size", -1))
    smooth, outputs = node.get("smooth_softmax", 0) == 1, len(node.output_types)
    for name in ("kv_cache_bit_width", "qk_output", "sliding_window_cache"):
        if node.get(name, 0):
            raise node.refuse(f"it does not know {name}")
    if any(str(node.get(name, "NONE")) != "NONE" for name in ("k_quant_type", "v_quant_type")):
        raise node.refuse("it does not know quantized caches")

    def run(
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        past_key: torch.Tensor | None,
        past_value: torch.Tensor | None,
        last: torch.Tensor,
        total: torch.Tensor,
        cos: torch.Tensor | None = None,
        sin: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        extra: torch.Tensor | None = None,
        sink: torch.Tensor | None = None,
        *others: torch.Tensor | None,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        if any(item is not None for item in others):
            raise node.refuse("it knows no scales of caches and no norms of queries and keys")
        if key is None or value is None:
            size = query.shape[2] // (heads + 2 * groups)
            query, key, value = query.split_with_sizes([heads * size, groups * size, groups * size], 2)
        q, k, v = to_heads(query, heads), to_heads(key, groups), to_heads(value, groups)
        queries, (keys,) = q.shape[2], ints(total)
        prompt = queries == keys
        # Where the new tokens of every sample begin: behind what its cache holds.
        start = torch.zeros_like(last) if prompt else last + 1 - queries
        places = start.reshape(-1, 1).long() + torch.arange(queries, device=q.device)
        if rotary and cos is not None and sin is not None:
            turned = places if positions is None else positions
            q = rotated(q, cos[turned], sin[turned], interleaved)
            k = rotated(k, cos[turned], sin[turned], interleaved)
        k, v = _written(k, past_key, places, keys), _written(v, past_value, places, keys)
        plain = prompt and causal and local < 0 and extra is None
        allowed = None
        if causal and not plain:
            allowed = window(queries, keys, start, local - 1 if local > 0 else -1, 0, q.device)
        elif not causal:
            allowed = torch.arange(keys, device=q.device) <= last.reshape(-1, 1, 1, 1)
        bias = score_bias(extra, allowed, keys, q.dtype)
        weight = torch.zeros(heads, dtype=q.dtype, device=q.device) if sink is None and smooth else sink
        weight = None if weight is None else weight.reshape(1, -1, 1, 1)
        seen_k, seen_v = k[:, :, :keys], v[:, :, :keys]
        y, _ = attend(q, seen_k, seen_v, bias, scale=scale, causal=plain, softcap=softcap, sink=weight)
        return from_heads(y) if outputs == 1 else (from_heads(y), k, v)

    return run


def _written(new: torch.Tensor, past: torch.Tensor | None, places: torch.Tensor, keys: int) -> torch.Tensor:
    """[batch, groups, longest, size]: the cache, long enough, with the new tokens at their places [batch, queries]."""
    if past is None:
        return new
    room = functional.pad(past, (0, 0, 0, max(0, keys - past.shape[2])))
    return room.scatter(2, places[:, None, :, None].expand(new.shape), new)


def _rotary_embedding(node: Node) -> Run:
    heads, interleaved = int(node.get("num_heads", 0)), bool(node.get("interleaved", 0))
    if node.get("is_packed_batching", 0):
        raise node.refuse("it does not know is_packed_batching")
    scale = float(node.get("scale", 1.0))

    def run(x: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        split = x if x.ndim == 4 else to_heads(x, heads or x.shape[2] // (2 * cos.shape[1]))
        if positions.ndim == 1:  # of the first token
            positions = (positions + torch.arange(split.shape[2], device=x.device))[None]
        y = rotated(split, cos[positions], sin[positions], interleaved)
        return scale * (y if x.ndim == 4 else from_heads(y)) if scale != 1 else (y if x.ndim == 4 else from_heads(y))

    return run


TABLE: Table = {
    ("Attention", 1): Op(_attention),
    ("GroupQueryAttention", 1): Op(_group_query_attention, host=(6,)),
    ("MultiHeadAttention", 1): Op(_multi_head_attention),
    ("RotaryEmbedding", 1): Op(_rotary_embedding),
}
