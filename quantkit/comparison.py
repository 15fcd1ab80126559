"""`quantkit verify`: a quantized file against its float original, on data and, where wanted, by a metric."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantkit.calibration.data import CalibrationData
from quantkit.calibration.request import CalibrationRequest, EvaluationRequest
from quantkit.errors import InputError
from quantkit.evaluation import Evaluation, open_evaluation
from quantkit.graph.load import data_files
from quantkit.report.types import Accuracy, Timing
from quantkit.runtime.ort import Session, make_session
from quantkit.verify import (
    Comparison,
    compare,
    measure_timings,
    open_data,
    run_all,
    session_inputs,
)


@dataclass(frozen=True)
class FileComparison:
    """Two files on the same data.

    Attributes:
        fidelity: of the outputs.
        samples: number of them.
        size, reference_size: bytes on disk.
        timings: for the smallest and the largest batch.
        accuracy: by the metric that was asked for; None where there was none.
        drop_error: standard error over samples of what quantization costs by it, 0 where it is not known.
    """

    fidelity: Comparison
    samples: int
    size: int
    reference_size: int
    timings: tuple[Timing, ...]
    accuracy: Accuracy | None = None
    drop_error: float = 0.0


def compare_files(
    quantized: Path,
    reference: Path,
    *,
    calibration: CalibrationRequest | CalibrationData | None = None,
    evaluation: EvaluationRequest | None = None,
    threads: int = 1,
) -> FileComparison:
    """Run both files on the same data.

    Args:
        calibration: what outputs are compared on; None = the evaluation's samples.
        evaluation: a metric and its data.

    Raises:
        InputError: a file does not load, the two want different inputs or give different outputs, or there is no data.
    """
    first, second = make_session(reference, threads=threads), make_session(quantized, threads=threads)
    if first.input_names != second.input_names or set(first.output_names) != set(second.output_names):
        raise InputError(
            f"{quantized} and {reference} are not the same model: inputs {list(second.input_names)} and "
            f"{list(first.input_names)}, outputs {list(second.output_names)} and {list(first.output_names)}"
        )
    judge = None if evaluation is None else open_evaluation(evaluation, first)
    if calibration is not None:
        data = open_data(calibration, session_inputs(first))
    elif judge is not None:
        data = judge.data
    else:
        raise InputError("there is no data to compare the two models on; give calibration or evaluation data")
    feeds = [{name: feed[name] for name in first.input_names} for feed in data]
    outputs = run_all(first, feeds)
    fidelity = compare(outputs, run_all(second, feeds))
    accuracy, error = (None, 0.0) if judge is None else _judged(judge, second)
    return FileComparison(
        fidelity,
        data.samples,
        _size_on_disk(quantized),
        _size_on_disk(reference),
        measure_timings(first, second, feeds),
        accuracy,
        error,
    )


def _judged(judge: Evaluation, quantized: Session) -> tuple[Accuracy, float]:
    """The metric of both models, and the standard error of the difference."""
    drop, error = judge.drop_with_error(quantized)
    return Accuracy(judge.name, judge.float_score, judge.float_score - drop, judge.data.samples), error


def _size_on_disk(path: Path) -> int:
    """The file with the external data files that it names."""
    return path.stat().st_size + sum(file.stat().st_size for file in data_files(path))
