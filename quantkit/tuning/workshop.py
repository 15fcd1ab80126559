"""From a configuration to an emitted model: what configurations share is made once and kept while it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from quantkit.allocators._table import Unit
from quantkit.budget import Budget
from quantkit.candidate import Candidate, Context, build
from quantkit.costs.size import layer_bytes
from quantkit.methods import make
from quantkit.options import Options
from quantkit.pipeline import Run, method_settings
from quantkit.problem import sizing_chooser, sizing_form
from quantkit.rescaling import Rescaled
from quantkit.tuning.recipes import (
    ACTIVATIONS,
    GROUP,
    INPUTS,
    QUANTIZER,
    TRANSFORM,
    label,
    options_of,
    recipe_of,
)
from quantkit.tuning.space import Configuration
from quantkit.tuning.widths import Widths
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
        widths: what configurations say of bits.
    """

    run: Run
    plain: Context
    bits: int
    widths: Widths
    budget: Budget
    rescaled: dict[str, tuple[Rescaled, Context]] = field(default_factory=dict)
    weights: dict[tuple[str, str], Weights] = field(default_factory=dict)
    fixed: dict[str, int] = field(default_factory=dict)
    _bytes: dict[tuple[str, str], list[list[int]]] = field(default_factory=dict)

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

    def specs(self, configuration: Configuration) -> dict[str, QuantSpec]:
        """Target name -> width."""
        chosen = self.widths.choice(configuration)
        return {
            name: QuantSpec(spec.bits)
            for unit, option in zip(self.widths.units, chosen, strict=True)
            for name, spec in unit.options[option].items()
        }

    def build(self, configuration: Configuration) -> tuple[Context, Candidate]:
        context = self.context(configuration)
        made = build(
            context,
            self.specs(configuration),
            recipe_of(configuration),
            name=label(configuration),
            max_latency=self.budget.max_latency,
        )
        return context, made

    def estimate(self, configuration: Configuration) -> int:
        """Bytes of the file, before it is made."""
        key = (str(configuration[ACTIVATIONS]), str(configuration[GROUP]))
        if key not in self._bytes:
            self._bytes[key] = unit_bytes(self.plain, self.widths.units, options_of(configuration, self.plain.options))
        chosen = self.widths.choice(configuration)
        layers = sum(row[option] for row, option in zip(self._bytes[key], chosen, strict=True))
        return layers + self.fixed.get(key[0], min(self.fixed.values(), default=0))

    def learn_size(self, configuration: Configuration, size: int) -> None:
        """What a real file shows of the bytes beside the layers."""
        kind = str(configuration[ACTIVATIONS])
        layers = self.estimate(configuration) - self.fixed.get(kind, min(self.fixed.values(), default=0))
        self.fixed[kind] = min(size - layers, self.fixed.get(kind, size - layers))


def unit_bytes(context: Context, units: Sequence[Unit], options: Options) -> list[list[int]]:
    """[units][options] bytes that layers take, with the activations and the group size of these options."""
    chooser, targets = sizing_chooser(replace(context, options=options)), context.targets
    forms = {name: sizing_form(chooser, name, context) for unit in units for name in unit.members}

    def stored(name: str, spec: QuantSpec) -> int:
        return layer_bytes(targets[name], chooser.spec(targets[name], spec.bits, forms[name]))

    return [[sum(stored(name, spec) for name, spec in option.items()) for option in unit.options] for unit in units]


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
