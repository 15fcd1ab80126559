"""Bytes of files before they are made: layers exactly, and what real files have shown of the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from quantkit.allocators._table import Unit
from quantkit.candidate import Context
from quantkit.costs.size import layer_bytes
from quantkit.problem import sizing_chooser, sizing_form
from quantkit.tuning.recipes import ACTIVATIONS, BIAS, ENDS, FLOAT, GROUP, INPUTS, TRANSFORM, options_of
from quantkit.tuning.space import Configuration
from quantkit.types import QuantSpec

FLOAT_BYTES = 4


@dataclass
class Sizes:
    """What files take.

    Attributes:
        context: of the plain model.
        rest: what decides them -> the most bytes beside the layers that a file has shown; "" = of any file. Too many
            cost a plan that would just have fitted, too few cost a trial.
    """

    context: Context
    units: tuple[Unit, ...]
    rest: dict[str, int] = field(default_factory=dict)
    _tables: dict[str, list[list[int]]] = field(default_factory=dict)

    def table(self, configuration: Configuration) -> list[list[int]]:
        """[units][options] bytes of layers with the configuration's activations and group size."""
        kind = f"{configuration[ACTIVATIONS]} {configuration[GROUP]}"
        if kind not in self._tables:
            context = replace(self.context, options=options_of(configuration, self.context.options))
            chooser, targets = sizing_chooser(context), context.targets
            forms = {name: sizing_form(chooser, name, context) for unit in self.units for name in unit.members}

            def stored(name: str, spec: QuantSpec) -> int:
                return layer_bytes(targets[name], chooser.spec(targets[name], spec.bits, forms[name]))

            self._tables[kind] = [
                [sum(stored(name, spec) for name, spec in option.items()) for option in unit.options]
                for unit in self.units
            ]
        return self._tables[kind]

    def beside(self, configuration: Configuration) -> int:
        """Bytes that are no layer's."""
        return self.rest.get(_kind(configuration), self.rest.get("", 0))

    def estimate(self, configuration: Configuration, choice: Sequence[int]) -> int:
        """Bytes of the file."""
        return self._layers(configuration, choice) + self.beside(configuration)

    def learn(self, configuration: Configuration, choice: Sequence[int], size: int) -> None:
        """A file with this choice takes so much."""
        rest = size - self._layers(configuration, choice)
        for kind in (_kind(configuration), ""):
            self.rest[kind] = max(rest, self.rest.get(kind, rest))

    def _layers(self, configuration: Configuration, choice: Sequence[int]) -> int:
        rows = [row[option] for row, option in zip(self.table(configuration), choice, strict=True)]
        if configuration[ENDS] == FLOAT:
            ends = {index: self.units[index] for index in (0, len(rows) - 1)}
            rows = [self._float(ends[index]) if index in ends else size for index, size in enumerate(rows)]
        return sum(rows)

    def _float(self, unit: Unit) -> int:
        return sum(FLOAT_BYTES * math.prod(self.context.targets[name].shape) for name in unit.members)


def _kind(configuration: Configuration) -> str:
    """Corrected biases, scales of activations and zero points of groups are bytes beside the codes."""
    return " ".join(str(configuration[name]) for name in (ACTIVATIONS, GROUP, INPUTS, BIAS, TRANSFORM))
