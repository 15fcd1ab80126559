"""MiniLM-L6 with weights of 2 to 5 bits, activations float: quantkit and the weight-only methods of onnxruntime.

python -m benchmarks.lowbit --model minilm.onnx --tokenizer FOLDER --data ../shared --out results.jsonl

Embeddings stay float, as onnxruntime leaves them, but for the plan of 5 bits everywhere. Methods that store no such
width run as functions, their results as float32 weights ("float32" in the setting): their bytes are then those that
codes, float32 scales and zero points would take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.contest import (
    OUT,
    Contest,
    Contestant,
    float_model,
    parser,
    run_contest,
    say,
    selected,
    with_quantkit,
)
from benchmarks.data import TEST_SENTENCES, sentence_feeds, sentences, write_calibration_text
from benchmarks.harness import Record, append_records
from benchmarks.minilm import Embedder
from quantkit.types import Feed

WIDTHS = ("4", "3", "2.5", "2")
GROUPS = ("32", "128")
STORED = {"rtn": ("2", "4"), "hqq": ("2", "4"), "k_quant": ("4",), "gptq": ("4",), "gptq_repaired": ()}
UNPACKABLE = {("k_quant", "128"), ("gptq", "128")}  # three groups a row: onnxruntime fails on odd numbers of them
ROUNDED = ", float32"
FLOAT_BYTES = 4


class OnceFloat(Embedder):
    """The float model opens every round; its figures are taken once."""

    def __init__(self, feeds: Sequence[Feed], model: Path) -> None:
        super().__init__(feeds)
        self._model = model
        self._float = super().__call__(model)

    def __call__(self, path: Path) -> dict[str, float]:
        return dict(self._float) if path == self._model else super().__call__(path)


def rounds(model: Path, calibration: Path, tokenizer: Path) -> list[list[Contestant]]:
    """Who is compared with whom: one round for each width and group size, and one of the small file."""
    calib = ("--calib", str(calibration), "--tokenizer", str(tokenizer))
    found = []
    for group in GROUPS:
        for bits in WIDTHS:
            ours = ("--avg-bits", bits, "--group-size", group, "--ignore", "re:node_embedding.*")
            allocator = "slim" if bits == "2.5" else "uniform"
            found.append(
                [
                    with_quantkit(
                        f"{bits} bits g{group}", model, *calib, *ours, "--activations", "none", "--allocator", allocator
                    ),
                    *_peers(bits, group, model, calib),
                ]
            )
    everywhere = ("--avg-bits", "5", "--group-size", "32", "--activations", "none", "--allocator", "uniform")
    found.append([with_quantkit("5 bits g32, embeddings too", model, *calib, *everywhere)])
    return [[float_model(), *each] for each in found]


def _peers(bits: str, group: str, model: Path, calib: tuple[str, ...]) -> list[Contestant]:
    found = []
    for method, widths in STORED.items():
        common = (str(model), OUT, "--method", method, "--bits", bits, "--group-size", group, *calib)
        name = f"{method} {bits} bits g{group}"
        if bits in widths and (method, group) not in UNPACKABLE:
            found.append(Contestant("onnxruntime", name, ("benchmarks.weight_peers", *common)))
        elif method != "gptq":  # it is round-to-nearest, see weight_peers
            maker = "plain" if method == "gptq_repaired" else "onnxruntime"
            found.append(Contestant(maker, f"{name}{ROUNDED}", ("benchmarks.weight_peers", *common, "--fake")))
    return found


def as_stored(record: Record, float_size: int) -> Record:
    """Rows whose weights are rounded but not packed get the bytes that they would take."""
    if record.error or not record.setting.endswith(ROUNDED):
        return record
    weights, bits = record.details["weights"], record.details["stored_bits"]
    return replace(record, size_bytes=round(float_size - weights * (FLOAT_BYTES - bits / 8)))


def main() -> None:
    arguments = parser("MiniLM-L6, weights only")
    arguments.add_argument("--model", type=Path, required=True, help="the exported sentence encoder")
    arguments.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json, or the folder that holds it")
    args = arguments.parse_args()
    feeds = sentence_feeds(sentences(args.data, "test", TEST_SENTENCES), args.tokenizer)
    evaluate = OnceFloat(feeds, args.model)
    with TemporaryDirectory(prefix="quantkit-benchmark-") as name:
        folder = Path(name)
        everyone = rounds(args.model, write_calibration_text(args.data, folder), args.tokenizer)
        known = [float_model(), *(item for contestants in everyone for item in contestants if item.command)]
        wanted = {item.setting for item in selected(known, args)}
        for number, contestants in enumerate(everyone):
            chosen = [item for item in contestants if not item.command or item.setting in wanted]
            if len(chosen) > 1:
                contest = Contest(
                    benchmark="lowbit",
                    model=args.model,
                    evaluate=evaluate,
                    feeds={},
                    results=folder / f"{number}.jsonl",
                    keep=args.keep,
                )
                records = run_contest(contest, chosen)
                append_records(args.out, [as_stored(record, args.model.stat().st_size) for record in records])
                say(f"lowbit: {len(records)} rows written")


if __name__ == "__main__":
    main()
