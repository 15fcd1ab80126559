"""Batches as the model reads them: how many samples, what shapes, and which one stands for all."""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.types import Feed


def samples_of(feed: Feed) -> int:
    return max((len(array) for array in feed.values() if array.ndim), default=1)


def typical_feed(feeds: Sequence[Feed]) -> Feed:
    """The feed of median size: what a latency budget is about."""
    ordered = sorted(feeds, key=lambda feed: sum(value.size for value in feed.values()))
    return ordered[len(ordered) // 2]


def shapes_in(feed: Feed) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in sorted(feed.items())}
