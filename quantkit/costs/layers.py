"""The time that each layer of one network takes on the samples of one feed, in any form, and all of them together.

    predicted = correction * (model - sum of float layers + sum of layers in their forms)

The correction is what no layer alone shows: pooling, Add and Concat that run on integers, conversions at the borders of
integer regions, fusions that come and go with the forms. It is taken from one measured model with the same integer
layers. A factor carries over to other forms better than a number of milliseconds would: on MiniLM, whose models take
0.33 to 0.89 of the float one's time, it stays within 0.88 to 0.94, while the milliseconds differ threefold.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from quantkit.costs.latency import (
    STATIC_FORM,
    Cost,
    LatencyCache,
    is_product,
    layer_cost,
    node_cost,
    predicted_ms,
    typical_shape,
)
from quantkit.forms import Option, typical_rows
from quantkit.types import LayerStats, QuantSpec, Target


@dataclass(frozen=True)
class LayerTimes:
    """Where layers are looked up, or measured.

    Attributes:
        targets: of the network.
        stats: target name -> the shapes that calibration saw.
        calibrated: samples of the whole calibration data; None = the shapes are those of the feed.
        samples: of the feed that times are asked for.
        runtime, threads: as for `layer_cost`.
        measured: names of static integer layers -> a whole model with these, and its milliseconds.
        asked: what `cost` has answered: budgets ask for the same figures again and again.
    """

    targets: Mapping[str, Target]
    stats: Mapping[str, LayerStats]
    calibrated: int | None
    samples: int
    cache: LatencyCache
    runtime: str
    threads: int
    measured: dict[frozenset[str], tuple[Mapping[str, Option], float]] = field(default_factory=dict)
    asked: dict[tuple[Target, QuantSpec, str, int], tuple[float, float]] = field(default_factory=dict)

    def cost(self, target: Target, spec: QuantSpec, form: str, rows: int) -> tuple[float, float]:
        """(float ms, form ms) of all uses of a layer; zeros where its shapes are not known.

        Args:
            rows: at which a matrix product is measured; other layers are at their typical shape.
        """
        key = (target, spec, form, rows)
        if key not in self.asked:
            self.asked[key] = self._cost(target, spec, form, rows)
        return self.asked[key]

    def _cost(self, target: Target, spec: QuantSpec, form: str, rows: int) -> tuple[float, float]:
        if spec.group_bits is not None:  # the kernel is that of the widest group
            spec = replace(spec, bits=max(spec.group_bits), group_bits=None)
        stats = self.stats.get(target.name)
        if is_product(target, form):
            found = layer_cost(target, spec, form, rows, cache=self.cache, runtime=self.runtime, threads=self.threads)
            # Layers are measured at a power of two of rows and answer for the rows that the data really has.
            real = median_rows(stats) * self._cut / rows
        else:
            shape = typical_shape(target, stats, self._cut)
            if shape is None:
                return 0.0, 0.0
            found = node_cost(target, spec, form, shape, cache=self.cache, runtime=self.runtime, threads=self.threads)
            real = 1.0
        real *= len(target.uses)
        return found.float_ms * real, found.form_ms * real

    def remember(self, chosen: Mapping[str, Option], milliseconds: float) -> None:
        """A whole model's time; the first one with the same static layers stays."""
        static = frozenset(name for name, option in chosen.items() if option.form == STATIC_FORM)
        self.measured.setdefault(static, (chosen, milliseconds))

    def correction(self, model_ms: float, static: Iterable[str]) -> float:
        """Measured over predicted time of a model with these static layers; 1 where none was measured."""
        known = self.measured.get(frozenset(static))
        if known is None:
            return 1.0
        alone = predicted_ms(model_ms, self.costs(known[0]))
        return known[1] / alone if alone > 0 else 1.0

    def predicted_ms(self, model_ms: float, chosen: Mapping[str, Option]) -> float:
        """Milliseconds of a model with these forms, from the float model's."""
        static = [name for name, option in chosen.items() if option.form == STATIC_FORM]
        return predicted_ms(model_ms, self.costs(chosen)) * self.correction(model_ms, static)

    def costs(self, chosen: Mapping[str, Option]) -> list[Cost]:
        """Of each layer in its form."""
        found = []
        for name, option in chosen.items():
            rows = typical_rows(self.stats.get(name))
            found.append(Cost(*self.cost(self.targets[name], option.spec, option.form, rows)))
        return found

    @cached_property
    def _cut(self) -> float:
        """Samples of the feed over those of one calibration run: batches are cut there to save memory."""
        seen = [(self.targets[name], stats.data_shapes) for name, stats in self.stats.items() if stats.data_shapes]
        if self.calibrated is None or not seen:
            return 1.0
        target, shapes = seen[0]
        return self.samples * sum(shapes.values()) / len(target.uses) / self.calibrated


def median_rows(stats: LayerStats | None) -> float:
    """Rows of one run of a matrix product: the median over the calibration batches."""
    if stats is None or not stats.data_shapes:
        return 1.0
    rows = [math.prod(shape[:-1]) for shape, count in stats.data_shapes.items() for _ in range(count)]
    return max(float(np.median(rows)), 1.0)
