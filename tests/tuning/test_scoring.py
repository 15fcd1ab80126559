"""Losses sample by sample, hopeless candidates, and the same result in any process."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from quantkit.divergence import Divergence
from quantkit.errors import InputError
from quantkit.metrics import join
from quantkit.runtime.ort import make_session
from quantkit.tuning.scoring import Exam, Score, expected_loss, hopeless, score, score_all
from tests.helpers import models

FEEDS = tuple({"x": models.random(4, 64, seed=seed)} for seed in range(6))


def product(noise: float) -> Any:
    """A product whose weight is off by so much."""
    weight = models.random(64, 64) + noise * models.random(64, 64, seed=1)
    return models.build(models.MATMUL, {"w": weight.astype(np.float32)})


def content(noise: float) -> bytes:
    return bytes(product(noise).SerializeToString())


@pytest.fixture
def exam() -> Exam:
    session = make_session(ir.from_proto(models.build(models.MATMUL, {"w": models.random(64, 64)})))
    outputs = tuple(session.run(feed) for feed in FEEDS)
    return Exam(FEEDS, outputs, Divergence.of([join(outputs)]), 1)


def test_the_mean_of_the_samples_is_the_divergence(exam: Exam) -> None:
    found = score(content(0.1), exam, None)
    session = make_session(ir.from_proto(product(0.1)))
    whole = exam.divergence.mean(exam.outputs, [session.run(feed) for feed in FEEDS])
    assert found.complete and len(found.losses) == 24
    assert found.losses.mean() == pytest.approx(whole, rel=1e-5)
    assert found.sqnr == pytest.approx(20, abs=2) and found.drop is not None
    exact = score(content(0.0), exam, None)
    assert exact.losses.tolist() == [0.0] * 24 and exact.drop is not None and exact.drop <= 1e-6


def test_a_hopeless_candidate_ends_early(exam: Exam) -> None:
    best = score(content(0.01), exam, None).losses
    bad = score(content(0.5), exam, best)
    assert not bad.complete and bad.sqnr is None and bad.drop is None and len(bad.losses) == 8
    full = score(content(0.5), exam, None)
    assert expected_loss(bad, best) == pytest.approx(full.losses.mean(), rel=0.3)
    better = score(content(0.005), exam, best)
    assert better.complete and expected_loss(better, best) == better.losses.mean()
    assert expected_loss(bad, None) == bad.losses.mean()


def test_what_counts_as_hopeless() -> None:
    rng = np.random.default_rng(0)
    best = rng.uniform(0.9, 1.1, 100)
    assert hopeless(best[:20] + 0.1, best)
    assert not hopeless(best[:20] + rng.normal(0, 0.5, 20), best)  # too noisy to tell
    assert not hopeless(best[:7] + 9.0, best)  # too few
    assert not hopeless(best + 9.0, best)  # all of them: it is measured already
    assert not hopeless(best[:20] + 9.0, None)
    assert hopeless(np.array([np.inf] * 10), best)


def test_a_good_candidate_is_rarely_taken_for_hopeless() -> None:
    """Equal to the best on average: at two standard errors some 2 % of single looks are wrong."""
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(1000):
        best = rng.gamma(1.0, 1.0, 200)
        wrong += hopeless(best[:50] + rng.normal(0, 0.2, 50), best)
    assert wrong < 50


def test_processes_change_nothing(exam: Exam) -> None:
    contents = [content(noise) for noise in (0.1, 0.2)]
    alone = score_all(contents, exam, None, workers=1, executor="local")
    together = score_all(contents, exam, None, workers=2, executor="local")
    for first, second in zip(alone, together, strict=True):
        assert np.array_equal(first.losses, second.losses) and first.sqnr == second.sqnr


def test_failures(exam: Exam) -> None:
    with pytest.raises(InputError, match="executor must be one of local, ray, got 'cloud'"):
        score_all([b""], exam, None, workers=1, executor="cloud")
    wrong = Exam(({"x": np.zeros((1, 3), np.float32)},), exam.outputs[:1], exam.divergence, 1)
    with pytest.raises(InputError, match="a candidate cannot be run on the held-out samples: "):
        score(content(0.0), wrong, None)


def test_expected_loss_where_the_best_lost_nothing() -> None:
    early = Score(np.array([1.0, 3.0]), False, None, None)
    assert expected_loss(early, np.array([0.0, 0.0, 1.0])) == 2.0
