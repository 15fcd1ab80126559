"""The search space of `quantkit tune`: everything a run decides, restricted to what this model and target can use.

    samples       that calibrate: all, or a few
    transform     none, and each rescaling that finds something to scale
    quantizer     how weights are rounded
    granularity   rounding to nearest with one scale per group, or one for the whole layer
    inputs        weights rounded on the float model's values, or on what the quantized layers before produce
    bias          shifted by what rounding does to the outputs' means, or not
    activations   8-bit integers where possible, or float
    calibrator    how ranges of integer activations are taken
    scheme        how a range becomes scale and zero point
    group size    inputs per scale ("default" = what suits each form)
    ends          first and last unit as planned, or float
    plan, step N  bits, see `widths`

The authors' space of Quantune (arXiv 2202.05048) is part of it: calibration size, scheme, clipping, granularity, and
first and last layer in float.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from quantkit.candidate import CALIBRATION_METHODS, Recipe
from quantkit.options import Options
from quantkit.tuning.space import Configuration, Dimension, Point, Space, Value
from quantkit.tuning.widths import BASE, SHIFT, Widths, same_bits
from quantkit.types import FloatArray

TRANSFORM, QUANTIZER, INPUTS, BIAS = "transform", "quantizer", "inputs", "bias"
ACTIVATIONS, CALIBRATOR, SCHEME, GROUP = "activations", "calibrator", "scheme", "group size"
SAMPLES, GRANULARITY, ENDS = "samples", "granularity", "ends"
FLOAT, QUANTIZED, NONE, DEFAULT = "float", "quantized", "none", "default"
SCHEMES = ("asymmetric", "symmetric")
GROUPS = (DEFAULT, 32, 64, 128)
QUANTIZERS = ("auto", "mse", "rtn")
ALL, FEW = "all", 32
CHANNEL, TENSOR = "channel", "tensor"
PLANNED = "planned"
KNOWN: Mapping[str, tuple[Value, ...]] = {
    SAMPLES: (ALL, FEW),
    TRANSFORM: ("none", "cle", "awq", "smoothquant"),
    QUANTIZER: QUANTIZERS,
    GRANULARITY: (CHANNEL, TENSOR),
    INPUTS: (FLOAT, QUANTIZED),
    BIAS: (False, True),
    ACTIVATIONS: ("auto", "8", NONE),
    CALIBRATOR: CALIBRATION_METHODS,
    SCHEME: SCHEMES,
    GROUP: GROUPS,
    ENDS: (PLANNED, FLOAT),
}
"""Every value that has a column of its own among the features, whatever a model's space holds."""


@dataclass(frozen=True)
class Possible:
    """What this model and this run leave open.

    Attributes:
        transforms: names that change something, `none` first.
        static: integer layers with ranges from calibration, so that calibrators and schemes make a difference.
        biases: some layer has room for a correction.
        samples: that calibrate.
    """

    transforms: tuple[str, ...]
    static: bool
    biases: bool
    samples: int = 0


def recipe_dimensions(options: Options, possible: Possible) -> tuple[Dimension, ...]:
    """Dimensions beside the bits; what the user fixed has one value."""
    transforms = possible.transforms if options.transform in (None, "auto") else (str(options.transform),)
    activations = ("auto", NONE) if options.activations == "auto" else (options.activations,)
    calibrators = CALIBRATION_METHODS if options.calibrator == "auto" else (options.calibrator,)
    quantizers = QUANTIZERS if options.quantizer == "auto" else (options.quantizer,)
    found = {
        SAMPLES: (ALL, FEW) if possible.samples >= 2 * FEW and options.calibration_size == 0 else (ALL,),
        TRANSFORM: transforms,
        QUANTIZER: quantizers,
        GRANULARITY: (CHANNEL, TENSOR) if "rtn" in quantizers else (CHANNEL,),
        INPUTS: (FLOAT, QUANTIZED) if options.inputs == "auto" else (options.inputs,),
        BIAS: (False, True) if possible.biases else (False,),
        ACTIVATIONS: activations,
        CALIBRATOR: calibrators if possible.static else calibrators[:1],
        SCHEME: SCHEMES if possible.static else SCHEMES[:1],
        GROUP: GROUPS if options.group_size is None else (options.group_size,),
        ENDS: (PLANNED, FLOAT),
    }
    return tuple(Dimension(name, values) for name, values in found.items())


def make_space(recipes: Sequence[Dimension], widths: Widths) -> Space:
    """All combinations; those that make the same model are one point."""
    dimensions = (*recipes, *widths.dimensions)
    return Space(dimensions, _Canonical(dimensions, same_bits(widths)))


@dataclass(frozen=True)
class _Canonical:
    """Settings that nothing reads are at their first value, and bits have the first of the names that give them."""

    dimensions: tuple[Dimension, ...]
    bits: Mapping[Point, Point]

    def __call__(self, point: Point) -> Point:
        places = {dimension.name: place for place, dimension in enumerate(self.dimensions)}
        values = list(point)
        chosen = {name: self.dimensions[place].values[point[place]] for name, place in places.items()}
        unread = []
        if chosen[ACTIVATIONS] == NONE:
            unread += [CALIBRATOR, SCHEME]
        if chosen[INPUTS] == QUANTIZED:
            unread.append(BIAS)
        if chosen[QUANTIZER] != "rtn":
            unread.append(GRANULARITY)
        for name in unread:
            values[places[name]] = 0
        first = len(point) - len(next(iter(self.bits)))
        return (*values[:first], *self.bits[tuple(values[first:])])


def recipe_of(configuration: Configuration) -> Recipe:
    return Recipe(
        str(configuration[CALIBRATOR]),
        bias_correction=bool(configuration[BIAS]),
        sequential=configuration[INPUTS] == QUANTIZED,
        scheme=str(configuration[SCHEME]),
    )


def options_of(configuration: Configuration, options: Options) -> Options:
    """The run's options with this configuration's."""
    group = configuration[GROUP]
    tensor = {"rtn.per_tensor": True} if configuration[GRANULARITY] == TENSOR else {}
    return replace(
        options,
        settings={**options.settings, **tensor},
        quantizer=str(configuration[QUANTIZER]),
        activations=str(configuration[ACTIVATIONS]),
        group_size=None if group == DEFAULT else int(group),
    )


def columns() -> tuple[str, ...]:
    """Names of what `features` gives."""
    return tuple(f"{name}={value}" for name, values in KNOWN.items() for value in values)


def features(configuration: Configuration) -> FloatArray:
    """[len(columns())] one for each known value of the recipe; values of the user's own have none."""
    return np.array(
        [float(configuration[name] == value) for name, values in KNOWN.items() for value in values], np.float32
    )


def label(configuration: Configuration) -> str:
    """Short, for tables: what differs from the plain recipe."""
    plain = {TRANSFORM: "none", QUANTIZER: "auto", GRANULARITY: CHANNEL, SCHEME: SCHEMES[0]}
    words = [str(configuration[BASE])]
    steps = [int(value) for name, value in configuration.items() if name.startswith(SHIFT)]
    if any(steps):
        words.append("".join({-1: "-", 0: "0", 1: "+"}[step] for step in steps))
    words += [str(configuration[name]) for name in plain if configuration[name] != plain[name]]
    if configuration[GROUP] != DEFAULT:
        words.append(f"g{configuration[GROUP]}")
    if configuration[INPUTS] == QUANTIZED:
        words.append("sequential")
    elif configuration[BIAS]:
        words.append("bias")
    words += ["ends float"] if configuration[ENDS] == FLOAT else []
    words += [f"{FEW} samples"] if configuration[SAMPLES] == FEW else []
    words.append("A float" if configuration[ACTIVATIONS] == NONE else str(configuration[CALIBRATOR]))
    return ", ".join(words)
