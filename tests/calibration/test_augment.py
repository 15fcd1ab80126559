"""Disturbed copies of token sequences."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from quantkit.calibration.augment import SHARES, Augmented, token_inputs
from quantkit.graph.load import load_model
from quantkit.graph.targets import find_targets
from tests.helpers import models

IDS = np.arange(200).reshape(4, 50) + 1000
MASK = np.ones((4, 50), np.int64)
MASK[1, 30:] = 0


def copies(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    feeds = [{"ids": IDS, "attention_mask": MASK, "x": np.zeros((4, 2))}]
    return [dict(feed) for feed in Augmented(feeds, {"ids": 700}, count, seed)]


def test_the_samples_come_first_and_unchanged() -> None:
    found = copies(2)
    assert len(found) == 3
    assert found[0]["ids"] is IDS
    assert [*copies(0)[0]] == ["ids", "attention_mask", "x"]


def test_a_share_of_the_tokens_is_replaced_within_the_vocabulary() -> None:
    for number, feed in enumerate(copies(3)[1:]):
        changed = feed["ids"] != IDS
        assert abs(changed[[0, 2, 3], 1:-1].mean() - SHARES[number]) < 0.12
        assert feed["ids"][changed].max() < 700
        assert feed["ids"].dtype == IDS.dtype
        assert feed["attention_mask"] is MASK


def test_ends_and_padding_stay() -> None:
    for feed in copies(3)[1:]:
        assert np.array_equal(feed["ids"][:, 0], IDS[:, 0])
        assert np.array_equal(feed["ids"][[0, 2, 3], -1], IDS[[0, 2, 3], -1])
        assert np.array_equal(feed["ids"][1, 29:], IDS[1, 29:])


def test_the_same_seed_gives_the_same_tokens_and_copies_differ() -> None:
    first, again, other = copies(2), copies(2), copies(2, seed=1)
    assert all(np.array_equal(a["ids"], b["ids"]) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[1]["ids"], first[2]["ids"])
    assert not np.array_equal(first[1]["ids"], other[1]["ids"])


def test_without_token_inputs_nothing_is_copied() -> None:
    assert len(list(Augmented([{"x": np.zeros(2)}], {}, 3, 0))) == 1


def test_token_inputs_are_those_that_look_up_rows() -> None:
    targets, _ = find_targets(load_model(ir.from_proto(models.block())).model)
    assert token_inputs(targets) == {"ids": 50}
    targets, _ = find_targets(load_model(ir.from_proto(models.cnn())).model)
    assert token_inputs(targets) == {}
