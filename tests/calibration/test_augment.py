"""Disturbed copies of token sequences."""

from __future__ import annotations

import numpy as np

from quantkit.calibration.augment import SHARES, Augmented, token_inputs
from quantkit.graph.load import load_model
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
    assert token_inputs(load_model(models.block()).model) == {"ids": 50}
    assert token_inputs(load_model(models.cnn()).model) == {}


def test_ids_that_are_converted_first_and_tables_that_are_no_vocabulary() -> None:
    text = """g (int32[B,S] ids, int64[B,S] token_type_ids, float[40,4] words, float[2,4] kinds) => (float[B,S,4] y) {
        wide = Cast<to=7>(ids)
        w = Gather(words, wide)
        k = Gather(kinds, token_type_ids)
        y = Add(w, k)
    }"""
    weights = {"words": models.random(40, 4), "kinds": models.random(2, 4)}
    assert token_inputs(load_model(models.build(text, weights)).model) == {"ids": 40}
