"""What the command line knows about data before the model is open: the pipeline opens it with the model's inputs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CalibrationRequest:
    """Arguments of `open_calibration`, without the inputs.

    Attributes:
        source: `.npz`/`.npy` file, folder, text file or `module:function`, with `:KEY` or `@START:STOP:STEP` if wanted.
        preprocess: preset name or YAML/JSON file for images.
        tokenizer: `tokenizer.json` for text.
        batch_size: samples per feed (None = chosen by the reader).
        max_samples: stop after so many.
    """

    source: str
    preprocess: str | None = None
    tokenizer: str | None = None
    batch_size: int | None = None
    max_samples: int | None = None


@dataclass(frozen=True)
class EvaluationRequest:
    """Held-out data and the figure that counts on it.

    Attributes:
        data: read like calibration data; it may hold `labels` beside the model's inputs.
        metric: `top1`, `agreement`, `cosine`, `sqnr` or `module:function`.
    """

    data: CalibrationRequest
    metric: str
