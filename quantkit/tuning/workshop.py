"""From a configuration to an emitted model: what configurations share is made once and kept while it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from quantkit.allocators._table import Unit
from quantkit.budget import Budget
from quantkit.candidate import Candidate, Context, build
from quantkit.methods import make
from quantkit.pipeline import Run, method_settings
from quantkit.rescaling import Rescaled
from quantkit.tuning.recipes import (
    ACTIVATIONS,
    ALL,
    ENDS,
    FLOAT,
    GRANULARITY,
    GROUP,
    INPUTS,
    QUANTIZER,
    SAMPLES,
    TRANSFORM,
    options_of,
    recipe_of,
)
from quantkit.tuning.space import Configuration, Value
from quantkit.types import QuantizedWeight, QuantSpec

PARTS = (SAMPLES, TRANSFORM, QUANTIZER, GRANULARITY, INPUTS, ACTIVATIONS, GROUP)
KEPT = 3
"""Sets of quantized weights that are kept: those of the quantizers and transforms used last."""
Weights = dict[tuple[str, QuantSpec], QuantizedWeight]


@dataclass
class Workshop:
    """Contexts by what decides them.

    Attributes:
        run: model and data.
        plain: the context of the model as it is, with the run's own options.
        bits: width that transforms prepare for.
        units: layers that are decided together.
    """

    run: Run
    plain: Context
    bits: int
    units: tuple[Unit, ...]
    budget: Budget
    rescaled: dict[tuple[str, Value], tuple[Rescaled, Context]] = field(default_factory=dict)
    weights: dict[tuple[Value, ...], Weights] = field(default_factory=dict)

    def run_of(self, configuration: Configuration) -> Run:
        """The run, with as many samples to calibrate with as the configuration says."""
        data = self.run.data
        if configuration[SAMPLES] == ALL or data.calibration is None:
            return self.run
        count = int(configuration[SAMPLES])
        options = replace(self.run.options, calibration_size=count)
        return replace(self.run, options=options, data=replace(data, calibration=data.calibration.subset(count)))

    def transformed(self, configuration: Configuration) -> tuple[Rescaled, Context]:
        """The model after the configuration's transform, with everything collected from it."""
        name = str(configuration[TRANSFORM])
        key = (name, configuration[SAMPLES])
        if key not in self.rescaled:
            run = self.run_of(configuration)
            changed = run.original if name == "none" else run.rescaled(name.split(","), self.bits)
            plain = name == "none" and configuration[SAMPLES] == ALL
            self.rescaled[key] = (changed, self.plain if plain else run.context(changed))
        return self.rescaled[key]

    def context(self, configuration: Configuration) -> Context:
        """With the configuration's quantizer, activations and group size."""
        base = self.transformed(configuration)[1]
        options = options_of(configuration, base.options)
        key = tuple(configuration[name] for name in (TRANSFORM, SAMPLES, QUANTIZER, GRANULARITY))
        store = self.weights.pop(key, {})
        self.weights[key] = store  # used last
        while len(self.weights) > KEPT:
            del self.weights[next(iter(self.weights))]
        quantizer = make("quantizers", options.quantizer, method_settings(options, options.quantizer))
        made = replace(base, options=options, quantizer=quantizer, weights=store)
        made.__dict__["model_ms"] = self.plain.model_ms  # measured once for all
        return made

    def specs(self, configuration: Configuration, choice: Sequence[int]) -> dict[str, QuantSpec]:
        """Target name -> width; what stays float is left out."""
        kept = list(zip(self.units, choice, strict=True))
        if configuration[ENDS] == FLOAT:
            kept = kept[1:-1]
        return {name: QuantSpec(spec.bits) for unit, option in kept for name, spec in unit.options[option].items()}

    def build(self, configuration: Configuration, choice: Sequence[int], name: str) -> tuple[Context, Candidate]:
        """The model of a recipe with these widths."""
        context = self.context(configuration)
        specs, recipe = self.specs(configuration, choice), recipe_of(configuration)
        latency, operations = self.budget.max_latency, self.budget.max_bops
        return context, build(context, specs, recipe, name=name, max_latency=latency, max_bops=operations)


def identity(configuration: Configuration, specs: Mapping[str, QuantSpec]) -> dict[str, object]:
    """What makes a configuration's model: its recipe, and its bits whatever their plan is called."""
    recipe = {name: configuration[name] for name in PARTS}
    made = recipe_of(configuration)
    return {
        **recipe,
        "calibrator": made.calibrator,
        "scheme": made.scheme,
        "bias": made.bias_correction,
        "bits": {name: spec.bits for name, spec in sorted(specs.items())},
    }
