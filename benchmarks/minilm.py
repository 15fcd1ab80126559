"""MiniLM-L6 sentence encoder on WikiText-2: cosine to the float embedding on 1000 sentences, size, speed.

python -m benchmarks.minilm --model minilm.onnx --tokenizer tokenizer_folder --data ../shared --out results.jsonl
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.contest import (
    Contest,
    Contestant,
    float_model,
    parser,
    run_contest,
    selected,
    with_onnxruntime,
    with_quantkit,
)
from benchmarks.data import TEST_SENTENCES, sentence_feeds, sentences, token_block, write_calibration_text
from quantkit.runtime.ort import make_session
from quantkit.types import Array, Feed


class Embedder:
    """How close the embeddings are to the float model's (which is evaluated first).

    Every sentence runs alone, so no padding and no neighbour changes what a dynamic scale sees.
    """

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self._feeds = feeds
        self._reference: Array | None = None

    def __call__(self, path: Path) -> dict[str, float]:
        session = make_session(path, threads=os.cpu_count() or 1)
        rows = [session.run(feed)["sentence_embedding"].reshape(-1) for feed in self._feeds]
        embeddings = np.stack(rows).astype(np.float64)
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
        if self._reference is None:
            self._reference = embeddings
        cosines = (embeddings * self._reference).sum(axis=1)
        same = nearest(embeddings) == nearest(self._reference)
        return {
            "cosine": float(cosines.mean()),
            "cosine 1 %": float(np.quantile(cosines, 0.01)),
            "same neighbour": float(same.mean()),
        }


def nearest(embeddings: Array) -> Array:
    """For each row, [samples, width] of unit length, the index of the most similar other row."""
    similarity = embeddings @ embeddings.T
    np.fill_diagonal(similarity, -np.inf)
    return np.asarray(similarity.argmax(axis=1))


def contestants(model: Path, calibration: Path, tokenizer: Path) -> list[Contestant]:
    calib = ("--calib", str(calibration), "--tokenizer", str(tokenizer))
    return [
        float_model(),
        with_onnxruntime("quantize_dynamic S8 per channel", "dynamic", model),
        with_onnxruntime("MatMulNBits 8 bits g128", "nbits", model, "--bits", "8", "--block-size", "128"),
        with_onnxruntime("MatMulNBits 4 bits g32", "nbits", model),
        with_onnxruntime("MatMulNBits 4 bits g32 and Gather", "nbits", model, "--gather"),
        with_quantkit("8 bits", model, *calib),
        with_quantkit("8 bits, weights only", model, *calib, "--activations", "none"),
        with_quantkit("8 bits, 0.55x of the time", model, *calib, "--max-latency", "0.55x"),
        with_quantkit("4 bits", model, *calib, "--avg-bits", "4"),
        with_quantkit("4 bits, weights only", model, *calib, "--avg-bits", "4", "--activations", "none"),
        with_quantkit("4 bits, 0.6x of the time", model, *calib, "--avg-bits", "4", "--max-latency", "0.6x"),
        with_quantkit("3 bits", model, *calib, "--avg-bits", "3"),
    ]


def main() -> None:
    arguments = parser("MiniLM-L6 on WikiText-2")
    arguments.add_argument("--model", type=Path, required=True, help="the exported sentence encoder")
    arguments.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json, or the folder that holds it")
    args = arguments.parse_args()
    feeds = sentence_feeds(sentences(args.data, "test", TEST_SENTENCES), args.tokenizer)
    contest = Contest(
        benchmark="minilm",
        model=args.model,
        evaluate=Embedder(feeds),
        feeds={"1x32": token_block(feeds, 1, 32), "8x64": token_block(feeds, 8, 64)},
        results=args.out,
        threads=args.threads,
        seconds=args.seconds,
        keep=args.keep,
    )
    with TemporaryDirectory(prefix="quantkit-benchmark-") as folder:
        calibration = write_calibration_text(args.data, Path(folder))
        run_contest(contest, selected(contestants(args.model, calibration, args.tokenizer), args))


if __name__ == "__main__":
    main()
