"""What is told of batches."""

from __future__ import annotations

import numpy as np

from quantkit.feeds import samples_of, shapes_in, typical_feed


def test_the_longest_first_axis_counts_samples() -> None:
    assert samples_of({"x": np.zeros((5, 2)), "scale": np.float32(1)}) == 5  # type: ignore[dict-item]
    assert samples_of({"scale": np.zeros(())}) == 1 and samples_of({}) == 1


def test_the_typical_feed_is_of_median_size() -> None:
    feeds = [{"x": np.zeros((1, size))} for size in (9, 1, 4, 7)]
    assert typical_feed(feeds) is feeds[3]
    assert typical_feed(feeds[:3]) is feeds[2] and typical_feed(feeds[:1]) is feeds[0]


def test_shapes_by_name() -> None:
    assert list(shapes_in({"b": np.zeros((2, 3)), "a": np.zeros(4)}).items()) == [("a", [4]), ("b", [2, 3])]
