"""Calibration data in a text file: one sample per line, tokenized batch by batch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantkit.calibration.inputs import InputSpec, Samples, list_inputs
from quantkit.errors import InputError
from quantkit.types import Array, Feed

_HEADING = re.compile(r"=.*=")  # wikitext: " = Title = ", " = = Section = = "
LINE_BYTES = 1 << 20
"""A longer line is no text: even 64 long words take a few kilobytes."""
_BOM = b"\xef\xbb\xbf"
_ROLES = {
    "input_ids": "ids",
    "token_ids": "ids",
    "tokens": "ids",
    "ids": "ids",
    "attention_mask": "mask",
    "input_mask": "mask",
    "mask": "mask",
    "token_type_ids": "types",
    "segment_ids": "types",
    "position_ids": "positions",
}


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids.

    Attributes:
        encode: (lines, most tokens per line) -> for each line its ids and its token types.
        padding: the id that fills up short lines.
    """

    encode: Callable[[list[str], int], list[tuple[list[int], list[int]]]]
    padding: int


def text_samples(
    path: Path,
    inputs: Sequence[InputSpec],
    tokenizer: str | Path | None,
    *,
    min_words: int = 8,
    max_words: int = 64,
    max_length: int = 512,
) -> Samples:
    """Lines of min_words to max_words words, without headings (all non-blank lines when no line is like that).

    Batches are padded to their longest line, or to the model's sequence length where that is fixed.

    Args:
        path: UTF-8 text.
        inputs: input_ids and whatever else of attention_mask, token_type_ids, position_ids the model has.
        tokenizer: a tokenizer.json, a folder that holds one, or `byte`.
        min_words, max_words: which lines are samples.
        max_length: tokens after which a line is cut, where the model does not fix its sequence length.
    """
    roles = _find_roles(inputs, path)
    if tokenizer is None:
        raise InputError(f"{path} is text, which needs --tokenizer: a tokenizer.json, a folder that holds one, or byte")
    made = load_tokenizer(tokenizer)
    fixed = sorted({spec.shape[1] for spec in inputs if len(spec.shape) > 1 and isinstance(spec.shape[1], int)})
    if len(fixed) > 1:
        raise InputError(f"{path}: the model's inputs have different sequence lengths: {list_inputs(inputs)}")
    spans = _find_lines(path, min_words, max_words)

    def load(indices: Sequence[int]) -> Feed:
        lines = _read_lines(path, [spans[index] for index in indices])
        arrays = _pad(made.encode(lines, fixed[0] if fixed else max_length), made.padding, fixed[0] if fixed else None)
        return {name: arrays[role] for name, role in roles.items()}

    return Samples(str(path), len(spans), load)


def load_tokenizer(source: str | Path) -> Tokenizer:
    """`byte` is built in: the ids are the UTF-8 bytes, and 0 fills up."""
    if str(source) == "byte":
        return Tokenizer(lambda lines, most: [(_bytes(line, most), [0] * len(_bytes(line, most))) for line in lines], 0)
    path = Path(source) / "tokenizer.json" if Path(source).is_dir() else Path(source)
    if not path.is_file():
        raise InputError(f"tokenizer {path} does not exist; give a tokenizer.json, a folder that holds one, or byte")
    try:
        import tokenizers
    except ImportError as error:
        raise InputError(f"reading {path} needs tokenizers: pip install quantkit[text]") from error
    try:
        model = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise InputError(f"tokenizer {path} cannot be read: {error}") from error
    stored = model.padding  # as the file sets it; the padding itself is done here
    ids = (model.token_to_id(token) for token in ("[PAD]", "<pad>", "<|endoftext|>", "</s>"))
    padding = int(stored["pad_id"]) if stored else next((known for known in ids if known is not None), 0)
    model.no_padding()

    def encode(lines: list[str], most: int) -> list[tuple[list[int], list[int]]]:
        model.enable_truncation(most)
        return [(item.ids, item.type_ids) for item in model.encode_batch(lines)]

    return Tokenizer(encode, padding)


def _bytes(line: str, most: int) -> list[int]:
    return list(line.encode("utf-8")[:most])


def _find_roles(inputs: Sequence[InputSpec], path: Path) -> dict[str, str]:
    """Input name -> what fills it; a sole input takes the ids, whatever its name."""
    if len(inputs) == 1:
        return {inputs[0].name: _ROLES.get(_stem(inputs[0].name), "ids")}
    unknown = [spec.name for spec in inputs if _stem(spec.name) not in _ROLES]
    if unknown:
        raise InputError(
            f"{path}: text cannot fill input {', '.join(map(repr, unknown))}; it can fill {', '.join(_ROLES)}; "
            "give feeds instead: an .npz file or module:function"
        )
    return {spec.name: _ROLES[_stem(spec.name)] for spec in inputs}


def _stem(name: str) -> str:
    return name.removesuffix(":0").lower()  # TensorFlow exporters write input_ids:0


def _find_lines(path: Path, min_words: int, max_words: int) -> Array:
    """[samples, 2] int64: where each sample starts in the file, and its bytes."""
    fitting, non_blank, offset = [], [], 0
    with path.open("rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(LINE_BYTES + 1), b""), 1):
            if len(raw) > LINE_BYTES:
                raise InputError(f"{path}, line {number} is longer than {LINE_BYTES} bytes; give one sentence per line")
            try:
                line = raw.removeprefix(_BOM).decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise InputError(f"{path}, line {number} is not UTF-8 text: {error}") from error
            if line:
                non_blank.append((offset, len(raw)))
                if not _HEADING.fullmatch(line) and min_words <= len(line.split()) <= max_words:
                    fitting.append((offset, len(raw)))
            offset += len(raw)
    return np.array(fitting or non_blank, np.int64).reshape(-1, 2)


def _read_lines(path: Path, spans: Sequence[Array]) -> list[str]:
    lines = []
    with path.open("rb") as file:
        for start, length in spans:
            file.seek(int(start))
            lines.append(file.read(int(length)).removeprefix(_BOM).decode("utf-8").strip())
    return lines


def _pad(encoded: list[tuple[list[int], list[int]]], padding: int, length: int | None) -> Mapping[str, Array]:
    """[batch, length] int64 each; without a length the longest line sets it."""
    longest = length or max(1, *(len(ids) for ids, _ in encoded))
    shape = (len(encoded), longest)
    ids, mask, types = np.full(shape, padding, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for row, (line_ids, line_types) in enumerate(encoded):
        ids[row, : len(line_ids)] = line_ids
        mask[row, : len(line_ids)] = 1
        types[row, : len(line_types)] = line_types
    positions = np.broadcast_to(np.arange(longest, dtype=np.int64), shape)
    return {"ids": ids, "mask": mask, "types": types, "positions": positions}
