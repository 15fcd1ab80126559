"""The figure that counts for the user: a metric on their own data, for the float model and for every candidate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from quantkit import metrics
from quantkit.calibration.data import CalibrationData, InputSpec
from quantkit.calibration.inputs import LABELS, label_spec
from quantkit.calibration.request import EvaluationRequest
from quantkit.errors import InputError
from quantkit.runtime.ort import Session, first_line
from quantkit.types import Array
from quantkit.userfunction import import_function
from quantkit.verify import open_data, session_inputs

PARTS = 20
"""Of the samples, for the jackknife: its own figure is then known to a sixth."""
LABELS_HINT = (
    "give an .npz file with 'labels' [samples, ...] beside the inputs, a folder of images with one sub-folder for each "
    "class, or MODULE:FUNCTION whose feeds hold 'labels'"
)
Outputs = Mapping[str, Array]
Score = Callable[[Outputs, Outputs, Outputs], float]


@dataclass(frozen=True)
class Evaluation:
    """A metric on a data set; higher is better.

    Attributes:
        data: the model's inputs, and `labels` where there are any.
        score: (outputs, float model's outputs, feeds) -> figure.
        reference: the float model.
        name: of the metric.
    """

    data: CalibrationData
    score: Score
    reference: Session
    name: str

    @cached_property
    def _float_outputs(self) -> Outputs:
        return self._run(self.reference)[0]

    @cached_property
    def float_score(self) -> float:
        return self.measure(self.reference)

    def measure(self, session: Session) -> float:
        """The metric of one model."""
        outputs, feeds = self._run(session)
        return self._figure(outputs, self._float_outputs, feeds)

    def _figure(self, outputs: Outputs, reference: Outputs, feeds: Outputs) -> float:
        try:
            figure = float(self.score(outputs, reference, feeds))
        except InputError as error:
            raise InputError(f"the metric {self.name} on {self.data.description}: {error}") from error
        except Exception as error:  # a user's function may raise anything
            if isinstance(error, KeyError) and error.args == (LABELS,) and LABELS not in feeds:
                raise InputError(
                    f"the metric {self.name} asks for feeds['{LABELS}'], and there are none in "
                    f"{self.data.description}: {LABELS_HINT}"
                ) from error
            raise InputError(f"the metric {self.name} failed on the model's outputs: {first_line(error)}") from error
        if not math.isfinite(figure):
            raise InputError(f"the metric {self.name} gave {figure} on the model's outputs; it must be a finite number")
        return figure

    def drop(self, session: Session) -> float:
        """How much worse than float, 0.01 = one point."""
        return self.float_score - self.measure(session)

    def drop_with_error(self, session: Session) -> tuple[float, float]:
        """`drop`, and its standard error over samples: both models see the same ones, so that only changes count.

        By the jackknife, parts of the samples being left out in turn; 0 where the metric cannot be taken of parts.
        """
        outputs, feeds = self._run(session)
        tables = (outputs, self._float_outputs, feeds)
        samples = {len(values) for table in tables for values in table.values()}
        drop = self.float_score - self._figure(*tables)
        if len(samples) != 1 or (count := samples.pop()) < 2:
            return drop, 0.0
        parts = np.arange(count) % min(PARTS, count)
        drops = []
        for part in range(min(PARTS, count)):
            ours, theirs, seen = ({name: values[parts != part] for name, values in table.items()} for table in tables)
            try:
                drops.append(self._figure(theirs, theirs, seen) - self._figure(ours, theirs, seen))
            except InputError:  # a user's function may want all samples at once
                return drop, 0.0
        return drop, math.sqrt((len(drops) - 1) * float(np.var(drops)))

    def _run(self, session: Session) -> tuple[Outputs, Outputs]:
        outputs, extras = [], []
        for feed in self.data:
            outputs.append(session.run({name: feed[name] for name in session.input_names}))
            extras.append(feed)
        return metrics.join(outputs), metrics.join(extras)


def needs_labels(metric: str) -> bool:
    """Whether there must be labels, a whole number for each sample; other metrics see those that there are."""
    return metric == "top1"


def open_evaluation(request: EvaluationRequest, reference: Session) -> Evaluation:
    """The evaluation with its data, read for the float model's inputs and, where there are or must be any, labels.

    Raises:
        InputError: the data do not fit, no such metric, or the function cannot be imported.
    """
    inputs: Sequence[InputSpec] = session_inputs(reference)
    if needs_labels(request.metric) and all(spec.name != LABELS for spec in inputs):
        inputs = [*inputs, label_spec(inputs)]
    data = open_data(request.data, inputs, labels=True)
    return Evaluation(data, _score(request.metric), reference, request.metric)


def _score(metric: str) -> Score:
    known: dict[str, Score] = {
        "top1": lambda outputs, reference, feeds: metrics.top1(_first(outputs), feeds[LABELS]),
        "agreement": lambda outputs, reference, feeds: _agreement(_first(reference), _first(outputs)),
        "cosine": lambda outputs, reference, feeds: metrics.cosine(_first(reference), _first(outputs)),
        "sqnr": lambda outputs, reference, feeds: metrics.sqnr(_first(reference), _first(outputs)),
    }
    if metric in known:
        return known[metric]
    if ":" not in metric:
        raise InputError(f"unknown metric {metric!r}; known: {', '.join(known)}, or module:function")
    function = import_function(metric, "metric")
    return lambda outputs, reference, feeds: function(outputs, feeds)


def agreement_error(reference: Outputs, measured: Outputs) -> float:
    """Standard error of the share of samples whose best class differs, else of 1 - cosine; of the worst output."""
    drops = []
    for name, wanted in reference.items():
        got = measured[name]
        if wanted.shape != got.shape or len(wanted) < 2 or not np.issubdtype(wanted.dtype, np.floating):
            continue
        first, second = metrics.class_scores(wanted), metrics.class_scores(got)
        if first is not None and second is not None:
            drops.append((first.argmax(axis=1) != second.argmax(axis=1)).astype(np.float64))
        else:
            pairs = zip(wanted, got, strict=True)
            drops.append(np.array([1 - metrics.cosine(one[None], other[None]) for one, other in pairs]))
    worst = max(drops, key=lambda values: float(values.mean()), default=np.zeros(1))
    error = float(worst.std()) / math.sqrt(len(worst))
    return error if math.isfinite(error) else 0.0


def _agreement(reference: Array, measured: Array) -> float:
    share = metrics.top1_agreement(reference, measured)
    if share is None:
        raise InputError("the first output holds no class scores; use cosine or sqnr")
    return share


def _first(outputs: Outputs) -> Array:
    return next(iter(outputs.values()))
