"""What one emitted model loses on held-out samples: a function of plain data, so that it runs in any process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime

from quantkit.divergence import Divergence, Outputs
from quantkit.errors import InputError
from quantkit.metrics import join
from quantkit.runtime.ort import session_options
from quantkit.types import Array, Feed
from quantkit.verify import compare

LEAST_SAMPLES = 8
"""Samples after which a trial may be called hopeless."""
CERTAIN = 2.0
"""Standard errors by which it must be behind the best one, sample by sample."""
EXECUTORS = ("local", "ray")


@dataclass(frozen=True)
class Exam:
    """What every candidate is measured on.

    Attributes:
        feeds: batches of held-out samples.
        outputs: of the float model, for each of them.
        divergence: how outputs are compared.
        threads: of onnxruntime.
    """

    feeds: tuple[Feed, ...]
    outputs: tuple[Outputs, ...]
    divergence: Divergence
    threads: int


@dataclass(frozen=True)
class Score:
    """What was found.

    Attributes:
        losses: [samples that were run] nats.
        complete: all were.
        sqnr: dB, None where not all were.
        drop: 1 - agreement of the answers with the float model's, or 1 - cosine of the outputs; None likewise.
    """

    losses: Array
    complete: bool
    sqnr: float | None
    drop: float | None


def score(content: bytes, exam: Exam, best: Array | None) -> Score:
    """Run a model batch by batch; end early once it is certain to lose more than the best one.

    Args:
        content: the serialised model.
        best: [samples] nats of the best complete trial so far.

    Raises:
        InputError: onnxruntime cannot load or run the model.
    """
    session = onnxruntime.InferenceSession(content, session_options(exam.threads), providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    losses: list[Array] = []
    found: list[Outputs] = []
    for number, (feed, wanted) in enumerate(zip(exam.feeds, exam.outputs, strict=True), 1):
        try:
            got = dict(zip(names, session.run(None, dict(feed)), strict=True))
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise InputError(f"a candidate cannot be run on the held-out samples: {error}") from error
        losses.append(exam.divergence.each(wanted, got))
        found.append(got)
        if number < len(exam.feeds) and hopeless(np.concatenate(losses), best):
            return Score(np.concatenate(losses), False, None, None)
    whole = compare(join(exam.outputs), join(found))
    alike = whole.cosine if whole.top1_agreement is None else whole.top1_agreement
    return Score(np.concatenate(losses), True, whole.sqnr, 1 - alike)


def hopeless(losses: Array, best: Array | None) -> bool:
    """Whether these samples alone show, pair by pair, that the mean over all cannot be the smaller one."""
    if best is None or len(losses) < LEAST_SAMPLES or len(losses) >= len(best):
        return False
    if not np.isfinite(losses).all():
        return True
    behind = losses - best[: len(losses)]
    return bool(behind.mean() > CERTAIN * behind.std(ddof=1) / np.sqrt(len(behind)))


def expected_loss(found: Score, best: Array | None) -> float:
    """Nats per sample of all samples; of a trial that ended early, as far ahead of the best as it was until then."""
    mean = float(found.losses.mean())
    if found.complete or best is None:
        return mean
    part = float(best[: len(found.losses)].mean())
    return mean * float(best.mean()) / part if part > 0 else mean


def score_all(contents: Sequence[bytes], exam: Exam, best: Array | None, *, workers: int, executor: str) -> list[Score]:
    """Several models at once: in this process, in processes of this machine, or on a Ray cluster.

    Raises:
        InputError: the executor is not installed, or there is none of that name.
    """
    if executor not in EXECUTORS:
        raise InputError(f"executor must be one of {', '.join(EXECUTORS)}, got {executor!r}")
    if executor == "local" and (workers == 1 or len(contents) == 1):
        return [score(content, exam, best) for content in contents]
    from joblib import Parallel, delayed, parallel_config

    backend = "loky"
    if executor == "ray":
        from ray.util.joblib import register_ray

        register_ray()
        backend = "ray"
    with parallel_config(backend=backend, n_jobs=workers or -1):
        found: list[Score] = Parallel()(delayed(score)(content, exam, best) for content in contents)
    return found
