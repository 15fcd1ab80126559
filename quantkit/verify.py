"""The parity gate: the written file, reloaded in its runtime, against the planner's simulation and the float model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from quantkit import metrics
from quantkit.calibration.data import CalibrationData, InputSpec, open_calibration
from quantkit.calibration.request import CalibrationRequest
from quantkit.errors import InputError, VerificationError
from quantkit.report.types import Timing
from quantkit.runtime.ort import Session, input_specs, time_sessions
from quantkit.types import Array, Feed

# Layers are compared one by one in `quantkit.parity`. Over the whole network the fused kernels round halves in their
# own way, and one flipped code travels: at worst the two differ as two independent roundings do, 3 dB more than one.
PARITY_DB = 40.0
PARITY_MARGIN_DB = 3.0
REPEATABLE_DB = 100.0
ORT_TYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True)
class Comparison:
    """Two models on the same held-out samples."""

    sqnr: float
    cosine: float
    top1_agreement: float | None


def session_inputs(session: Session) -> list[InputSpec]:
    """What the model wants to be fed.

    Raises:
        InputError: an input is no tensor of a plain type.
    """
    specs = []
    for name, (kind, shape) in input_specs(session).items():
        if kind not in ORT_TYPES:
            raise InputError(
                f"input {name!r} has the type {kind}, which calibration data cannot fill; "
                f"supported: {', '.join(ORT_TYPES)}"
            )
        specs.append(InputSpec(name, np.dtype(ORT_TYPES[kind]), shape))
    return specs


def run_all(session: Session, feeds: Iterable[Feed]) -> dict[str, Array]:
    """Outputs on all feeds, joined sample by sample."""
    batches = [session.run(feed) for feed in feeds]
    if not batches:
        raise InputError("the held-out data has no samples; give at least two calibration samples")
    return metrics.join(batches)


def compare(reference: Mapping[str, Array], measured: Mapping[str, Array]) -> Comparison:
    """The worst float output decides; models without float outputs are compared by equality."""
    rows = []
    for name, wanted in reference.items():
        got = measured[name]
        if wanted.shape != got.shape:
            return Comparison(-200.0, 0.0, None)
        if np.issubdtype(wanted.dtype, np.floating):
            wanted, got = _finite(wanted, got)
            if not (np.isfinite(wanted).all() and np.isfinite(got).all()):
                return Comparison(-200.0, 0.0, None)
            agreement = metrics.top1_agreement(wanted, got)
            rows.append((metrics.sqnr(wanted, got), metrics.cosine(wanted, got), agreement))
        elif wanted.dtype != object:
            equal = float((wanted == got).mean()) if wanted.size else 1.0
            rows.append((200.0 if equal == 1.0 else 10 * equal, equal, equal))
    agreements = [row[2] for row in rows if row[2] is not None]
    return Comparison(
        min((row[0] for row in rows), default=200.0),
        min((row[1] for row in rows), default=1.0),
        min(agreements) if agreements else None,
    )


def _finite(wanted: Array, got: Array) -> tuple[Array, Array]:
    """Both with zeros where the reference is NaN or infinite and the other is the same there."""
    odd = ~np.isfinite(wanted)
    same = odd & ((wanted == got) | (np.isnan(wanted) & np.isnan(got)))
    return (np.where(same, 0, wanted), np.where(same, 0, got)) if odd.any() else (wanted, got)


def check_parity(emitted: Mapping[str, Array], simulated: Mapping[str, Array], reference: Mapping[str, Array]) -> float:
    """SQNR in dB between what the runtime's kernels compute and what was planned.

    Raises:
        VerificationError: they differ by more than rounding: the runtime does not compute what the file says.
    """
    for name, value in emitted.items():
        real = np.issubdtype(value.dtype, np.floating)
        if real and not np.isfinite(value).all() and np.isfinite(reference[name]).all():
            raise VerificationError(f"the quantized model's output {name!r} is not finite; no file was written")
    for name, value in emitted.items():
        if value.ndim != simulated[name].ndim or value.dtype != simulated[name].dtype:
            wanted = f"{simulated[name].dtype} {list(simulated[name].shape)}"
            raise VerificationError(
                f"the quantized model's output {name!r} is {value.dtype} {list(value.shape)}, planned was {wanted}; "
                "no file was written"
            )
    gated = _gated(emitted, simulated)
    parity = compare({name: simulated[name] for name in gated}, emitted).sqnr
    planned = compare({name: reference[name] for name in gated}, simulated).sqnr
    needed = min(PARITY_DB, planned - PARITY_MARGIN_DB)
    if parity < needed:
        raise VerificationError(
            f"the emitted model differs from its simulation: {parity:.1f} dB, needed {needed:.1f} dB "
            f"(simulation against float: {planned:.1f} dB); no file was written"
        )
    return parity


def _gated(emitted: Mapping[str, Array], simulated: Mapping[str, Array]) -> list[str]:
    """Outputs that can only differ by rounding: floats whose shape does not depend on a rounded value.

    Indices and counts jump where two scores are near; their layers have been compared one by one.
    """
    return [
        name
        for name, value in emitted.items()
        if np.issubdtype(value.dtype, np.floating) and value.shape == simulated[name].shape
    ]


def check_repeatable(session: Session, feed: Feed) -> None:
    """Raises: InputError when the model computes something else each time, so that nothing can be compared."""
    if compare(run_all(session, [feed]), run_all(session, [feed])).sqnr < REPEATABLE_DB:
        raise InputError(
            "the model gives different outputs for the same input, so nothing can be compared; remove its random "
            "operators (RandomNormal, RandomUniform, Multinomial, Bernoulli, Dropout in training mode)"
        )


def measure_timings(
    reference: Session, quantized: Session, feeds: Sequence[Feed], *, seconds: float = 1.0
) -> tuple[Timing, ...]:
    """Medians for each distinct shape among the feeds (at most the smallest and the largest), alternating."""
    timings = []
    for feed in representative_feeds(feeds):
        first, second = time_sessions([reference, quantized], feed, seconds=seconds)
        timings.append(Timing({name: tuple(value.shape) for name, value in feed.items()}, first, second))
    return tuple(timings)


def representative_feeds(feeds: Sequence[Feed]) -> list[Feed]:
    """The smallest and the largest feed, by elements; one when all are alike."""
    ordered = sorted(feeds, key=lambda feed: sum(value.size for value in feed.values()))
    small, large = ordered[0], ordered[-1]
    same = all(small[name].shape == large[name].shape for name in small)
    return [large] if same else [small, large]


def open_data(
    calibration: CalibrationRequest | CalibrationData | object, inputs: Sequence[InputSpec], *, labels: bool = False
) -> CalibrationData:
    """Whatever the caller has, as calibration data for these inputs; with `labels`, also those beside them."""
    if isinstance(calibration, CalibrationData):
        return calibration
    if isinstance(calibration, CalibrationRequest):
        return open_calibration(
            calibration.source,
            inputs,
            preprocess=calibration.preprocess,
            tokenizer=calibration.tokenizer,
            batch_size=calibration.batch_size,
            max_samples=calibration.max_samples,
            labels=labels,
        )
    return open_calibration(calibration, inputs, labels=labels)
