"""Everything a user may set on a run, beside the model, the data and the budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from quantkit.errors import InputError

RUNTIMES = ("ort-cpu", "portable")
ACTIVATIONS = ("auto", "8", "none")
CALIBRATORS = ("auto", "minmax", "percentile", "entropy", "mse")
INPUTS = ("auto", "float", "quantized")


@dataclass(frozen=True)
class Options:
    """How to compress; every field has the default that the command line has.

    Attributes:
        bits: widths the allocator may choose from; None = every width the target runs.
        activations: `8` = integer activations wherever possible, `none` = weights only, `auto` = by measurement.
        allocator, quantizer: method file names (`uniform`, `rtn`, `mse`, ...) or `auto`.
        transform: rescaling before quantization: `none`, `auto` (by measurement), or names such as `cle,smoothquant`
            in order; None = `awq` for the quantizer `awq`, else `none`.
        calibrator: how activation ranges are taken from histograms; `auto` measures all of them.
        inputs: what a layer is quantized on: `float` = its inputs in the float model, `quantized` = what the layers
            before it, already quantized, really produce, `auto` = the latter below 8 bits where that measurably
            helps and the model is not large (more than 1 GiB of weights).
        augment: disturbed copies of every calibration text that `quantized` inputs are taken from too.
        group_size: inputs per scale; None = 32 up to 4 bits, 128 above, one per row for integer convolutions.
        target: the runtime to emit for, `ort-cpu` or `portable` (standard operators only).
        ignore: layer names, or `re:` patterns, that stay float.
        settings: method settings, `{"mse.steps": 40}`.
        random_calibration: allow made-up inputs when no data is given.
        seed: of everything random.
        cache: folder for finished work, which a later run with the same model, data and settings finds again, and for
            measured latencies; None = work is not kept, and latencies are in the user's cache folder.
        memory_limit: bytes that calibration may hold at once.
        holdout: percentage of the calibration samples that only measure.
        calibration_size: of the others, so many are used (0 = all).
        threads: onnxruntime threads for timing and calibration (0 = onnxruntime's choice).
        workers: processes that quantize layers (0 = one for each core); results do not depend on it.
        front: make the choices between smallest and best even where the budget leaves nothing to choose.
    """

    bits: tuple[int, ...] | None = None
    activations: str = "auto"
    allocator: str = "auto"
    quantizer: str = "auto"
    transform: str | None = None
    calibrator: str = "auto"
    inputs: str = "auto"
    augment: int = 1
    group_size: int | None = None
    target: str = "ort-cpu"
    ignore: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    random_calibration: bool = False
    seed: int = 0
    cache: Path | None = None
    memory_limit: int = 160 << 20
    holdout: int = 20
    calibration_size: int = 0
    threads: int = 1
    workers: int = 0
    front: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.cache, str):
            object.__setattr__(self, "cache", Path(self.cache))
        if isinstance(self.bits, int):
            object.__setattr__(self, "bits", (self.bits,))
        if self.transform is not None and not isinstance(self.transform, str):
            raise InputError(f"transform must be none, auto or names such as cle,awq, got {self.transform!r}")
        for name in ("seed", "threads", "workers", "memory_limit", "augment", "holdout", "calibration_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise InputError(f"{name} must be a whole number, got {value!r}")
        if self.bits is not None and not all(isinstance(width, int) for width in self.bits):
            raise InputError(f"bits must be widths from 1 to 8, got {list(self.bits)}")
        if self.seed < 0:
            raise InputError(f"seed must be 0 or more, got {self.seed}")
        _one_of("activations", self.activations, ACTIVATIONS)
        _one_of("calibrator", self.calibrator, CALIBRATORS)
        _one_of("inputs", self.inputs, INPUTS)
        _one_of("target", self.target, RUNTIMES)
        wrong = [width for width in self.bits or () if not 1 <= width <= 8]
        if wrong or self.bits == ():
            raise InputError(f"bits must be widths from 1 to 8, got {list(self.bits or ())}")
        if not 0 <= self.augment <= 100:
            raise InputError(f"augment must be at least 0 and at most 100, got {self.augment}")
        if not 1 <= self.holdout <= 90:
            raise InputError(f"holdout must be at least 1 and at most 90 (percent of the samples), got {self.holdout}")
        if self.memory_limit < 1 << 20:
            raise InputError(f"memory limit must be at least 1MB, got {self.memory_limit} bytes")
        for name, count in (
            ("threads", self.threads),
            ("workers", self.workers),
            ("calibration_size", self.calibration_size),
        ):
            if count < 0:
                raise InputError(f"{name} must be 0 or more, got {count}")


def make_options(values: Mapping[str, Any]) -> Options:
    """Options from keyword arguments; an unknown one is an error that lists the known ones."""
    known = [item.name for item in fields(Options)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise InputError(f"unknown option {', '.join(unknown)}; known options: {', '.join(known)}")
    return Options(**values)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
