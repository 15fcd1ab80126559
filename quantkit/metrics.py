"""How well one model's outputs agree with another's, and with labels. All of it in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from quantkit.errors import InputError
from quantkit.types import Array

Outputs = Mapping[str, Array]


def sqnr(reference: Array, measured: Array) -> float:
    """Signal to quantization noise in dB: 10 log10(|r|^2 / |m - r|^2); 200 when equal."""
    signal = float(np.square(reference, dtype=np.float64).sum())
    noise = float(np.square(measured.astype(np.float64) - reference).sum())
    if noise == 0:
        return 200.0
    if not np.isfinite(noise) or signal == 0:
        return -200.0
    return float(np.clip(10 * np.log10(signal / noise), -200, 200))


def cosine(reference: Array, measured: Array) -> float:
    """Mean cosine similarity per sample (first axis)."""
    first = reference.reshape(len(reference), -1).astype(np.float64)
    second = measured.reshape(len(measured), -1).astype(np.float64)
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    products = (first * second).sum(axis=1)
    both_zero = ~first.any(axis=1) & ~second.any(axis=1)
    safe = np.where(norms > 0, norms, 1.0)
    return float(np.where(both_zero, 1.0, products / safe).mean())


def class_scores(output: Array) -> Array | None:
    """[samples, classes] when the output looks like class scores: two or more columns, not a unit-length embedding."""
    if not np.issubdtype(output.dtype, np.floating) or output.ndim < 2:
        return None
    sizes = [size for size in output.shape[1:] if size != 1]
    if len(sizes) != 1:
        return None
    scores = output.reshape(len(output), -1)
    norms = np.linalg.norm(scores.astype(np.float64), axis=1)
    return None if np.allclose(norms, 1.0, atol=1e-3) and (scores < 0).any() else scores


def top1_agreement(reference: Array, measured: Array) -> float | None:
    """Share of samples whose best class is the same; None when the output is no class scores."""
    first, second = class_scores(reference), class_scores(measured)
    if first is None or second is None:
        return None
    return float((first.argmax(axis=1) == second.argmax(axis=1)).mean())


def top1(scores: Array, labels: Array) -> float:
    """Share of samples whose best class is the label; scores [samples, classes(, 1, 1)].

    Raises:
        InputError: the output holds no class scores, labels are missing, or one is none of the classes.
    """
    if scores.ndim < 2 or len([size for size in scores.shape[1:] if size != 1]) != 1:
        raise InputError(f"top1 needs an output [samples, classes], got {list(scores.shape)}; give another metric")
    if labels.size != len(scores):
        raise InputError(f"top1 needs one label for each of {len(scores)} samples, got {labels.size}")
    table, wanted = scores.reshape(len(scores), -1), labels.reshape(-1)
    wrong = (wanted < 0) | (wanted >= table.shape[1])
    if wrong.any():
        place, count = int(wrong.argmax()), table.shape[1]
        raise InputError(
            f"the label {wanted[place]} of sample {place} is none of the {count} classes 0 to {count - 1} of the "
            "model's output; number labels from 0 (are they counted from 1?), in the order of the output's classes"
        )
    return float((table.argmax(axis=1) == wanted).mean())


def join(batches: Sequence[Outputs]) -> dict[str, Array]:
    """Outputs of several batches after each other, sample by sample; shapes that differ are flattened to one sample.

    Sequence outputs differ in length from batch to batch: such outputs become one long row of values.
    """
    joined: dict[str, Array] = {}
    for name in batches[0]:
        parts = [np.atleast_1d(batch[name]) for batch in batches]
        if len({part.shape[1:] for part in parts}) == 1:
            joined[name] = np.concatenate(parts)
        else:
            joined[name] = np.concatenate([part.reshape(-1) for part in parts])[None]
    return joined
