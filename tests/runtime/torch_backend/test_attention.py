"""Attention operators: ONNX's by the suite and by derivatives, com.microsoft's like onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from quantkit.errors import InputError
from quantkit.runtime.torch_backend import to_torch
from tests.runtime.torch_backend.single_node import Array, Case, by_onnxruntime, by_torch, check_derivatives

MICROSOFT = "com.microsoft"
RNG = np.random.default_rng(13)
BATCH, LENGTH, HEADS, SIZE, PAST = 2, 3, 2, 4, 2
TOTAL = PAST + LENGTH
HIDDEN = HEADS * SIZE


def normal(*shape: int) -> Array:
    return RNG.normal(size=shape).astype(np.float32)


def integers(*rows: Any) -> Array:
    return np.array(rows, dtype=np.int32)


Q, K, V = normal(BATCH, LENGTH, HIDDEN), normal(BATCH, 5, HIDDEN), normal(BATCH, 5, 2 * HIDDEN)
OWN_K, OWN_V = normal(BATCH, LENGTH, HIDDEN), normal(BATCH, LENGTH, HIDDEN)
CACHE = normal(2, BATCH, HEADS, PAST, SIZE)
BIAS = normal(3 * HIDDEN)
WEIGHTS = normal(6, 3 * HIDDEN)
TOKENS = normal(BATCH, LENGTH, 6)


def multi_head(*inputs: Any, outputs: int = 1, label: str = "", **attributes: Any) -> Case:
    return Case(
        "MultiHeadAttention", inputs, {"num_heads": HEADS, **attributes}, outputs, domain=MICROSOFT, label=label
    )


def attention(*inputs: Any, outputs: int = 1, label: str = "", **attributes: Any) -> Case:
    settings = {"num_heads": HEADS, **attributes}
    return Case("Attention", [TOKENS, WEIGHTS, *inputs], settings, outputs, domain=MICROSOFT, label=label)


MICROSOFT_CASES = [
    multi_head(Q, K, V),
    multi_head(Q, K, V, normal(4 * HIDDEN), label="bias"),
    multi_head(Q, K, V, None, integers(5, 2), label="lengths"),
    multi_head(Q, K, V, None, integers([1, 1, 0, 1, 0], [0, 1, 1, 1, 1]), scale=0.3, label="mask"),
    multi_head(Q, K, V, None, RNG.integers(0, 2, (2, 3, 5)).astype(np.int32), label="square mask"),
    multi_head(Q, K, V, None, integers([0] * 5, [1] * 5), label="nothing to see"),
    multi_head(Q, K, V, None, integers([1, 1, 0, 1, 0], [0, 1, 1, 1, 1]), mask_filter_value=-2.0, label="weak mask"),
    multi_head(Q, K, V, None, None, normal(1, HEADS, 3, 5), label="scores"),
    multi_head(Q, OWN_K, OWN_V, BIAS, unidirectional=1, label="causal"),
    multi_head(Q, normal(BATCH, HEADS, 5, SIZE), normal(BATCH, HEADS, 5, SIZE), BIAS, label="projected"),
    multi_head(
        Q, OWN_K, OWN_V, BIAS, None, normal(BATCH, 1, LENGTH, TOTAL), *CACHE, outputs=3, unidirectional=1, label="past"
    ),
    multi_head(Q, OWN_K, OWN_V, None, integers([1, 0, 1, 1, 1], [1] * 5), None, *CACHE, outputs=3, label="past mask"),
    attention(BIAS),
    attention(BIAS, integers(3, 1), label="lengths"),
    attention(BIAS, integers(3, 2, 1, 0), label="ends and starts"),
    attention(BIAS, integers([1, 0, 1], [1, 1, 0]), unidirectional=1, label="mask"),
    attention(BIAS, RNG.integers(0, 2, (2, 3, 3)).astype(np.int32), label="square mask"),
    attention(BIAS, None, CACHE, unidirectional=1, outputs=2, label="past"),
    attention(BIAS, None, None, normal(1, 1, LENGTH, LENGTH), label="scores"),
    attention(BIAS, integers([0, 1, 1, 1, 1], [1, 1, 1, 1, 0]), CACHE, outputs=2, scale=0.2, label="past mask"),
    Case(
        "Attention",
        [TOKENS, normal(6, 2 * HIDDEN + 6), normal(2 * HIDDEN + 6)],
        {"num_heads": HEADS, "qkv_hidden_sizes": [HIDDEN, HIDDEN, 6]},
        domain=MICROSOFT,
        label="sizes",
    ),
]
ANGLES = RNG.uniform(0, 6, (16, SIZE // 2)).astype(np.float32)
COS, SIN = np.cos(ANGLES), np.sin(ANGLES)
POSITIONS = np.array([[3, 4, 5], [0, 9, 2]])


def rotary(x: Array, positions: Array, label: str, cut: int = SIZE // 2, **attributes: Any) -> Case:
    inputs = [x, positions, COS[:, :cut], SIN[:, :cut]]
    return Case("RotaryEmbedding", inputs, attributes, domain=MICROSOFT, label=label)


ROTARY_CASES = [
    rotary(Q, POSITIONS, "packed"),
    rotary(Q, np.array([4]), "offset", interleaved=1),
    rotary(normal(BATCH, HEADS, LENGTH, SIZE), POSITIONS, "heads"),
    rotary(Q, POSITIONS, "partly", cut=1, num_heads=HEADS, rotary_embedding_dim=2),
]


@pytest.mark.parametrize("case", [*MICROSOFT_CASES, *ROTARY_CASES], ids=str)
def test_like_onnxruntime(case: Case) -> None:
    expected, found = by_onnxruntime(case), by_torch(case)
    assert len(expected) == len(found)
    for wanted, got in zip(expected, found, strict=True):
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_packed_inputs_are_the_same() -> None:
    """onnxruntime runs these forms on other devices only."""
    q, k, v = normal(3, BATCH, LENGTH, HEADS, SIZE)
    expected = by_torch(multi_head(*(item.reshape(BATCH, LENGTH, HIDDEN) for item in (q, k, v)), BIAS))[0]
    packed = multi_head(np.stack([q, k, v], 3), None, None, BIAS)
    half = multi_head(q.reshape(BATCH, LENGTH, HIDDEN), np.stack([k, v], 3), None, BIAS)
    for case in (packed, half):
        np.testing.assert_allclose(by_torch(case)[0], expected, rtol=1e-6)
    zeros = by_torch(attention(np.zeros_like(BIAS)))[0]
    np.testing.assert_array_equal(by_torch(attention(None))[0], zeros)
    longest = RNG.integers(0, 2, (BATCH, 1, 6, 6)).astype(np.int32)
    expected = by_torch(attention(BIAS, longest[:, 0, PAST:TOTAL, :TOTAL].copy(), CACHE))[0]
    np.testing.assert_array_equal(by_torch(attention(BIAS, longest, CACHE))[0], expected)


def grouped(
    past: int, lengths: list[int], queries: int, *, packed: bool = False, room: int = 0, **settings: Any
) -> Case:
    """Four query heads in two groups; `settings` are attributes and inputs by name."""
    heads, groups, size, batch = 4, 2, 16, len(lengths)
    total = max(lengths)
    widths = [heads * size, groups * size, groups * size]
    tokens = [normal(batch, queries, width) for width in widths]
    extra = [settings.pop(name, None) for name in ("cos", "sin", "positions", "bias", "sink")]
    cache = [normal(batch, groups, past + room, size) for _ in range(2)]
    inputs = [np.concatenate(tokens, 2), None, None] if packed else tokens
    inputs += [*cache, np.array(lengths, dtype=np.int32) - 1, np.array(total, dtype=np.int32), *extra]
    while inputs[-1] is None:
        inputs.pop()
    attributes = {"num_heads": heads, "kv_num_heads": groups, **settings}
    return Case("GroupQueryAttention", inputs, attributes, 3, domain=MICROSOFT)


TABLE = RNG.uniform(0, 6, (16, 8)).astype(np.float32)
TURN = {"do_rotary": 1, "cos": np.cos(TABLE), "sin": np.sin(TABLE)}
GROUPED = {
    "prompt": grouped(0, [5, 5], 5),
    "prompt of two lengths": grouped(0, [5, 3], 5, **TURN),
    "prompt, packed": grouped(0, [4], 4, packed=True, **TURN),
    "prompt with room": grouped(0, [4, 4], 4, room=6, **TURN),
    "prompt, interleaved": grouped(0, [4], 4, rotary_interleaved=1, **TURN),
    "token": grouped(4, [5, 5], 1, **TURN),
    "token, two lengths": grouped(4, [5, 3], 1, room=3, **TURN),
    "token with positions": grouped(4, [5, 5], 1, positions=np.array([[4], [7]]), **TURN),
    "several tokens": grouped(4, [7], 3, **TURN),
    "window": grouped(0, [7, 7], 7, local_window_size=3),
    "window, token": grouped(6, [7, 7], 1, local_window_size=3, **TURN),
    "softcap": grouped(0, [4, 4], 4, softcap=2.0, scale=0.7),
    "smooth": grouped(0, [4, 4], 4, smooth_softmax=1),
    "sink": grouped(3, [4, 4], 1, sink=normal(4)),
    "bias": grouped(0, [4, 4], 4, bias=normal(1, 4, 4, 4)),
    "bias, token": grouped(3, [4, 4], 1, bias=normal(2, 1, 1, 4), softcap=3.0),
}


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_queries_like_onnxruntime(name: str) -> None:
    """Beyond a sample's own length nothing is defined."""
    case = GROUPED[name]
    expected, found = by_onnxruntime(case), by_torch(case)
    lengths, queries = case.inputs[5] + 1, case.inputs[0].shape[1]
    for sample, length in enumerate(lengths):
        own = min(queries, int(length))
        np.testing.assert_allclose(found[0][sample, :own], expected[0][sample, :own], rtol=1e-4, atol=1e-5)
        for got, wanted in zip(found[1:], expected[1:], strict=True):
            assert got.shape == wanted.shape
            np.testing.assert_allclose(got[sample, :, :length], wanted[sample, :, :length], rtol=1e-4, atol=1e-5)


def test_grouped_queries_both_ways() -> None:
    case = grouped(0, [4, 2], 4, causal=0)
    np.testing.assert_allclose(by_torch(case)[0], _both_ways(case), rtol=1e-4, atol=1e-5)


def _both_ways(case: Case) -> Array:
    """The definition, head by head."""
    q, k, v = case.inputs[:3]
    result = np.zeros_like(q)
    for sample, last in enumerate(case.inputs[5]):
        for head in range(4):
            mine, shared = slice(16 * head, 16 * head + 16), slice(16 * (head // 2), 16 * (head // 2) + 16)
            scores = q[sample, :, mine] @ k[sample, : last + 1, shared].T / np.sqrt(16)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            result[sample, :, mine] = weights / weights.sum(1, keepdims=True) @ v[sample, : last + 1, shared]
    return result


SMALL = [normal(1, 2, 4), normal(1, 3, 2), normal(1, 3, 2)]
WIDE = [normal(1, 2, 2, 2), normal(1, 1, 3, 2), normal(1, 1, 3, 2)]


def standard(*inputs: Any, outputs: int = 1, label: str = "", **attributes: Any) -> Case:
    return Case("Attention", inputs, attributes, outputs, opset=25, label=label)


DERIVED = [
    standard(*SMALL, q_num_heads=2, kv_num_heads=1, label="packed"),
    standard(*WIDE, is_causal=1, softcap=1.5, label="causal"),
    standard(*WIDE, normal(2, 3), outputs=4, qk_matmul_output_mode=2, label="float mask"),
    standard(*WIDE, np.array([[True, False, True], [False, False, False]]), label="dead row"),
    standard(*WIDE, None, normal(1, 1, 2, 2), normal(1, 1, 2, 2), outputs=3, is_causal=1, label="past"),
    standard(*WIDE, None, None, None, np.array([1]), is_causal=1, left_window_size=1, label="valid keys"),
    Case("RotaryEmbedding", [WIDE[0], normal(1, 2, 1), normal(1, 2, 1)], {"interleaved": 1}, opset=23),
    multi_head(normal(1, 2, 4), normal(1, 2, 4), normal(1, 2, 4), normal(12), integers([1, 0]), unidirectional=1),
    Case(
        "Attention", [normal(1, 2, 2), normal(2, 6), normal(6)], {"num_heads": 1}, domain=MICROSOFT, label="projected"
    ),
    Case(
        "GroupQueryAttention",
        [*normal(3, 1, 1, 4), *normal(2, 1, 1, 2, 4), integers(2), np.int32(3), COS, SIN],
        {"num_heads": 1, "kv_num_heads": 1, "do_rotary": 1},
        3,
        domain=MICROSOFT,
    ),
    Case("RotaryEmbedding", [normal(1, 2, 4), np.array([1]), COS[:4], SIN[:4]], domain=MICROSOFT, label="offset"),
]


@pytest.mark.parametrize("case", DERIVED, ids=str)
def test_derivatives(case: Case) -> None:
    check_derivatives(case)


@pytest.mark.parametrize("case", DERIVED, ids=str)
def test_fused_and_plain_paths_agree(case: Case) -> None:
    """The fused kernel runs without gradients only."""
    module = to_torch(case.model(), dtype=torch.float64)
    feeds = {name: torch.from_numpy(value) for name, value in case.feeds().items()}
    feeds = {name: value.double() if value.is_floating_point() else value for name, value in feeds.items()}
    with torch.no_grad():
        fused = module.run(feeds)
    for name, value in module.run(feeds).items():
        torch.testing.assert_close(fused[name], value, rtol=1e-12, atol=1e-12)
        assert bool(torch.isfinite(value).all()) or case.attributes.get("qk_matmul_output_mode")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (standard(*WIDE, left_window_size=-2), r"window sizes are -1 or more, got -2 and -1"),
        (multi_head(Q, K, V, outputs=4), r"it does not give the scores"),
        (attention(BIAS, do_rotary=1), r"it does not know do_rotary"),
        (attention(BIAS, past_present_share_buffer=1), r"it does not know past_present_share_buffer"),
        (grouped(0, [2], 2, qk_output=1), r"it does not know qk_output"),
        (grouped(0, [2], 2, k_quant_type="PER_TENSOR"), r"it does not know quantized caches"),
        (rotary(Q, POSITIONS, "", is_packed_batching=1), r"it does not know is_packed_batching"),
    ],
    ids=str,
)
def test_refused_attributes(case: Case, message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_torch(case.model())


def test_refused_inputs() -> None:
    shared = multi_head(Q, OWN_K, OWN_V, None, None, None, *CACHE, integers(2), label="buffer")
    with pytest.raises(InputError, match="it does not know caches in shared buffers"):
        by_torch(shared)
    case = grouped(0, [2], 2)
    scaled = Case(case.op, [*case.inputs, *[None] * 5, np.ones(1, np.float32)], case.attributes, domain=MICROSOFT)
    with pytest.raises(InputError, match="it knows no scales of caches and no norms of queries and keys"):
        by_torch(scaled)
