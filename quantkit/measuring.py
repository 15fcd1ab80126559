"""Run a candidate beside the float model: how far its outputs are off, and how fast it is."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

from quantkit.cache import Entry, content_key
from quantkit.candidate import LATENCY_DOUBT, TIMING_SECONDS, Candidate, Context
from quantkit.evaluation import agreement_error
from quantkit.feeds import shapes_in, typical_feed
from quantkit.runtime.ort import DeferredSession, Session, make_session, time_sessions, undisturbed_clock
from quantkit.types import Measurement
from quantkit.verify import compare, run_all

TIMING = 2
"""Raised when times are taken in another way, so that none of the older ones is believed."""


def measure(context: Context, candidate: Candidate) -> Measurement:
    """Run a candidate on the held-out samples, or on the user's evaluation data alone.

    Without held-out samples fidelity and time are not numbers, without either of the two the drop is infinite.
    """
    if context.held_out is None and context.evaluation is None:
        return Measurement(candidate.size, math.nan, math.inf, math.nan)
    threads, large = context.options.threads, context.large
    session = DeferredSession(lambda: make_session(candidate.emitted.model, threads=threads, lean=large))
    if context.held_out is None:
        assert context.evaluation is not None
        drop, error = context.evaluation.drop_with_error(session)
        return Measurement(candidate.size, math.nan, drop, math.nan, drop_error=error)
    found = _figures(context, candidate, session)
    if large:
        return found
    latency = relative_latency(context, candidate, session)
    if context.model_ms is not None:
        context.times.remember(candidate.chosen, latency * context.model_ms)
    return replace(found, latency=latency)


def _figures(context: Context, candidate: Candidate, session: Session) -> Measurement:
    """All but the time; remembered where only held-out samples speak: what a user's metric looks at is not known."""
    assert context.held_out is not None
    key = None
    if context.store.remembers and context.evaluation is None:
        parts = {"emitted": candidate.content, "outputs": context.held_out.outputs, "large": context.large}
        parts |= {"feeds": context.held_out.feeds, "threads": context.options.threads}
        key = content_key("measurement", parts)
        known = context.store.get(key)
        if known is not None:
            losses = tuple(known.facts["sample_losses"])
            # Stamps are no part of the content.
            return Measurement(**{**known.facts, "size": candidate.size, "sample_losses": losses})
    outputs = run_all(session, context.held_out.feeds)
    found = compare(context.held_out.outputs, outputs)
    if context.evaluation is not None:
        drop, error = context.evaluation.drop_with_error(session)
    else:
        drop = 1 - (found.cosine if found.top1_agreement is None else found.top1_agreement)
        error = agreement_error(context.held_out.outputs, outputs)
    reference = context.held_out.outputs
    loss = float(context.divergence.mean([reference], [outputs]))
    losses = tuple(context.divergence.each(reference, outputs).tolist())
    measured = Measurement(candidate.size, float(found.sqnr), float(drop), 1.0, loss, float(error), losses)
    if key is not None:
        context.store.put(key, Entry(facts=asdict(measured)))
    return measured


def relative_latency(context: Context, candidate: Candidate, session: Session, *, check: bool = False) -> float:
    """Measured beside the float model on the typical held-out feed; remembered by content, so runs repeat.

    Args:
        check: measure again, and believe the new figure when the remembered one is far off (a loaded machine).
    """
    assert context.held_out is not None
    feed = typical_feed(context.held_out.feeds)
    parts = {
        "emitted": candidate.content,
        "model": context.loaded.digest,
        "shapes": shapes_in(feed),
        "threads": context.options.threads,
        "timing": TIMING,
    }
    known, sessions = context.cache.get(parts), [context.held_out.session, session]
    clock = undisturbed_clock(context.options.threads)
    if known is None:
        known = time_sessions(sessions, feed, seconds=TIMING_SECONDS, clock=clock)
        known = context.cache.put(parts, known)
    elif check:
        fresh = time_sessions(sessions, feed, seconds=TIMING_SECONDS, clock=clock)
        if abs(math.log(fresh[1] / fresh[0] / (known[1] / known[0]))) > LATENCY_DOUBT:
            known = context.cache.put(parts, fresh, replace=True)
    return known[1] / known[0]
