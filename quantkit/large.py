"""Models whose float weights should not all be in memory: from when on a model is one, and what is done otherwise then.

The system maps a file's pages and drops them when memory is short, so weights stay in files: those of the original, of
the quantized layers, and of what is written. Sessions run on mapped weights and re-arrange none of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from quantkit.cache import Scratch, Store, default_folder
from quantkit.options import Options
from quantkit.runtime.ort import DeferredSession, Session, make_session
from quantkit.types import Target

LARGE = 1 << 30
"""Bytes of float weights."""
SINGLE_PASS = {"gptq.rounds": 0, "gptq.restarts": 0, "gptq.sweeps": 0}
HASTY = "a large model: gptq makes one pass only; for less loss in more time, --set gptq.rounds=3 and gptq.sweeps=100"


def is_large(targets: Iterable[Target]) -> bool:
    return float_bytes(targets) > LARGE


def float_bytes(targets: Iterable[Target]) -> int:
    """Of all weights that may be quantized; one that is read in two ways counts once."""
    return sum({target.weight: 4 * target.shape[0] * target.shape[1] for target in targets}.values())


def open_store(options: Options, targets: Iterable[Target]) -> Store:
    """Entries stay in the folder that the user named; a large model has a folder for its arrays in any case."""
    return Store(options.cache, make_scratch(options.cache) if is_large(targets) else None)


def hastened(options: Options) -> Options:
    """Settings with which a large model takes minutes, not hours, where the user did not give others."""
    if options.quantizer not in ("auto", "gptq"):
        return options
    return replace(options, settings={**SINGLE_PASS, **options.settings})


def reference_session(model: ir.Model, large: bool, threads: int) -> Session:
    """The float model; a large one only when it is really run, on the weights in its file.

    Raises:
        InputError: onnxruntime cannot load it.
    """
    if large:
        return DeferredSession(lambda: make_session(model, threads=threads, lean=True))
    return make_session(model, threads=threads)


def make_scratch(folder: Path | None) -> Scratch:
    """In the user's folder or the default one, which are rarely in memory as /tmp may be; else in /tmp."""
    with suppress(OSError):
        return Scratch(folder or default_folder())
    return Scratch(Path(tempfile.gettempdir()))
