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
    GROUP,
    INPUTS,
    QUANTIZER,
    TRANSFORM,
    options_of,
    recipe_of,
)
from quantkit.tuning.space import Configuration
from quantkit.types import QuantizedWeight, QuantSpec

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
    rescaled: dict[str, tuple[Rescaled, Context]] = field(default_factory=dict)
    weights: dict[tuple[str, str], Weights] = field(default_factory=dict)

    def transformed(self, name: str) -> tuple[Rescaled, Context]:
        """The model after a transform, with everything collected from it."""
        if name not in self.rescaled:
            if name == "none":
                self.rescaled[name] = (self.run.original, self.plain)
            else:
                changed = self.run.rescaled(name.split(","), self.bits)
                self.rescaled[name] = (changed, self.run.context(changed))
        return self.rescaled[name]

    def context(self, configuration: Configuration) -> Context:
        """With the configuration's quantizer, activations and group size."""
        transform = str(configuration[TRANSFORM])
        base = self.transformed(transform)[1]
        options = options_of(configuration, base.options)
        key = (transform, options.quantizer)
        store = self.weights.pop(key, {})
        self.weights[key] = store  # used last
        while len(self.weights) > KEPT:
            del self.weights[next(iter(self.weights))]
        quantizer = make("quantizers", options.quantizer, method_settings(options, options.quantizer))
        made = replace(base, options=options, quantizer=quantizer, weights=store)
        made.__dict__["model_ms"] = base.model_ms  # measured once for all
        return made

    def specs(self, choice: Sequence[int]) -> dict[str, QuantSpec]:
        """Target name -> width."""
        return {
            name: QuantSpec(spec.bits)
            for unit, option in zip(self.units, choice, strict=True)
            for name, spec in unit.options[option].items()
        }

    def build(self, configuration: Configuration, choice: Sequence[int], name: str) -> tuple[Context, Candidate]:
        """The model of a recipe with these widths."""
        context = self.context(configuration)
        specs, recipe = self.specs(choice), recipe_of(configuration)
        latency, operations = self.budget.max_latency, self.budget.max_bops
        return context, build(context, specs, recipe, name=name, max_latency=latency, max_bops=operations)


def identity(configuration: Configuration, specs: Mapping[str, QuantSpec]) -> dict[str, object]:
    """What makes a configuration's model: its recipe, and its bits whatever their plan is called."""
    recipe = {name: configuration[name] for name in (TRANSFORM, QUANTIZER, INPUTS, ACTIVATIONS, GROUP)}
    made = recipe_of(configuration)
    return {
        **recipe,
        "calibrator": made.calibrator,
        "scheme": made.scheme,
        "bias": made.bias_correction,
        "bits": {name: spec.bits for name, spec in sorted(specs.items())},
    }
