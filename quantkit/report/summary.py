"""The report in a few words: the headline figures, and whether what was asked for holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from quantkit.report.console import short_bytes
from quantkit.report.types import Report, Timing

EVEN = 0.05  # times that differ by less are called the same
LIMITS = (
    ("avg_bits", "at most {} bits per weight on average"),
    ("max_size", "a file of at most {}"),
    ("max_drop", "a loss of accuracy of at most {}"),
    ("max_latency", "at most {} times the float model's time"),
    ("max_bops", "at most {} bit operations"),
)


@dataclass(frozen=True)
class Card:
    """One headline figure.

    Attributes:
        figure: the large text.
        detail: before and after, or on what it was measured.
        part: after over before, 0 to 1, drawn as a bar; None = no bar.
        explained: for who reads such a figure for the first time.
    """

    title: str
    figure: str
    detail: str
    part: float | None
    explained: str


def cards(report: Report) -> list[Card]:
    """Size, accuracy, speed, bits, layers; unknown figures say what would make them known."""
    kept = sum(row.bits is None for row in report.layers)
    done = len(report.layers) - kept
    return [
        _size(report),
        _accuracy(report),
        _speed(report),
        Card(
            "Bits per weight",
            f"{report.average_bits:.2f}",
            f"from 32; {report.stored_bits:.2f} with scales",
            min(report.average_bits / 32, 1.0),
            "How much room each number of the layers takes, on average.",
        ),
        Card(
            "Layers quantized",
            f"{done} of {len(report.layers)}",
            "all of them" if not kept else f"{kept} left in float, reasons below",
            None,
            "A layer is a matrix product, a convolution, a lookup or a recurrent cell with weights.",
        ),
    ]


def sentence(report: Report) -> str:
    """The outcome in plain words."""
    name = PurePath(report.model).name
    parts = [f"{name} shrank from {short_bytes(report.size_before)} to {short_bytes(report.size_after)}."]
    if report.size_after > report.size_before:
        parts = [f"{name} grew from {short_bytes(report.size_before)} to {short_bytes(report.size_after)}."]
    found, accuracy = report.fidelity, report.accuracy
    if accuracy is not None:
        scores = f"{_score(accuracy.before)} to {_score(accuracy.after)}"
        parts.append(f"Its {accuracy.metric} went from {scores} on {accuracy.samples} evaluation samples.")
    if found is not None and found.top1_agreement is not None:
        parts.append(
            f"On {_count(found.samples, 'sample')} that it had not seen, it answers like the float model in "
            f"{found.top1_agreement:.1%} of cases."
        )
    elif found is not None:
        parts.append(
            f"On {_count(found.samples, 'sample')} that it had not seen, its outputs point the same way as the float "
            f"model's (cosine {found.cosine:.4f}, 1 is equal)."
        )
    else:
        parts.append("Without data nothing could be measured: accuracy and speed are not known.")
    timing = _largest(report)
    if timing is not None:
        parts.append(_pace(timing))
    return " ".join(parts)


def checks(report: Report) -> list[str]:
    """What was asked for, in words."""
    return [text.format(_limit(key, report.budget[key])) for key, text in LIMITS if key in report.budget]


def _limit(key: str, value: float | str) -> str:
    if isinstance(value, str):
        return f"{value} of the float model's"
    if key == "max_size":
        return short_bytes(int(value))
    if key == "max_drop":
        return f"{100 * value:g} percentage point{'' if value == 0.01 else 's'}"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _size(report: Report) -> Card:
    detail = f"{short_bytes(report.size_before)} \N{RIGHTWARDS ARROW} {short_bytes(report.size_after)}"
    part = report.size_after / report.size_before if report.size_before else None
    figure = f"{report.ratio:.1f}\N{MULTIPLICATION SIGN} smaller" if report.size_after else "empty"
    if part is not None and part > 1:
        figure = f"{part:.1f}\N{MULTIPLICATION SIGN} larger"
    return Card("Size of the file", figure, detail, None if part is None else min(part, 1.0), "What has to be shipped.")


def _accuracy(report: Report) -> Card:
    found, accuracy = report.fidelity, report.accuracy
    if accuracy is not None:
        detail = f"{_score(accuracy.before)} \N{RIGHTWARDS ARROW} {_score(accuracy.after)}"
        change = f"{100 * (accuracy.after - accuracy.before):+.2f} points" if _is_share(report) else detail
        return Card(f"Accuracy ({accuracy.metric})", change, detail, None, "Your metric on your evaluation data.")
    if found is None:
        return Card(
            "Accuracy", "not measured", "give calibration data: --calib", None, "Nothing was run on real inputs."
        )
    detail = f"cosine {found.cosine:.4f}, error {found.sqnr:.1f} dB, on {_count(found.samples, 'held-out sample')}"
    if found.top1_agreement is None:
        explained = "How alike the outputs of both models are: 1 is equal."
        return Card("Agreement with float", f"{found.cosine:.4f}", detail, None, explained)
    explained = "How often both models name the same class first."
    return Card("Agreement with float", f"{found.top1_agreement:.1%}", detail, None, explained)


def _speed(report: Report) -> Card:
    timing = _largest(report)
    if timing is None:
        return Card("Speed", "not measured", "give calibration data: --calib", None, "Nothing was timed.")
    ratio = timing.speedup
    figure = (
        f"{ratio:.2f}\N{MULTIPLICATION SIGN} faster" if ratio >= 1 else f"{1 / ratio:.2f}\N{MULTIPLICATION SIGN} slower"
    )
    detail = f"{timing.float_ms:.3g} ms \N{RIGHTWARDS ARROW} {timing.quantized_ms:.3g} ms for {_shapes(timing)}"
    part = min(timing.quantized_ms / timing.float_ms, 1.0)
    return Card("Speed", figure, detail, part, "Both models in turn, on the machine that made this report.")


def _largest(report: Report) -> Timing | None:
    """Of the largest shape, which is the last."""
    known = [timing for timing in report.timings if timing.quantized_ms > 0 and timing.float_ms > 0]
    return known[-1] if known else None


def _pace(timing: Timing) -> str:
    if abs(timing.speedup - 1) < EVEN:
        return "It is as fast as the float model."
    if timing.speedup > 1:
        return f"It runs {timing.speedup:.2f} times as fast."
    return f"It is slower: it takes {1 / timing.speedup:.2f} times as long."


def _is_share(report: Report) -> bool:
    known = report.accuracy
    return known is not None and known.metric in ("top1", "agreement")


def _score(value: float) -> str:
    return f"{value:.2%}" if 0 <= value <= 1 else f"{value:.4g}"


def _shapes(timing: Timing) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in timing.shapes.items())


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
