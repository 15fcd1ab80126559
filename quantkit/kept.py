"""A quantizer whose results are kept: found again by later runs, and out of memory where models are large."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from quantkit.cache import Entry, Store, content_key
from quantkit.types import FloatArray, LayerStats, QuantizedWeight, QuantSpec, WeightQuantizer

KIND = "layer"


@dataclass(frozen=True)
class Kept:
    """Quantizes what the store does not know.

    Attributes:
        quantizer: does the work; a frozen dataclass whose fields decide, with what it is given, the result.
        store: where results go.
    """

    quantizer: WeightQuantizer
    store: Store

    @property
    def stats(self) -> frozenset[str]:
        return self.quantizer.stats

    def quantize(self, weight: FloatArray, spec: QuantSpec, stats: LayerStats | None) -> QuantizedWeight:
        if not self.store.remembers:
            made = self.quantizer.quantize(weight, spec, stats)
            if self.store.scratch is None:
                return made
            return _weight(
                Entry({name: self.store.spill(array) for name, array in _arrays(made).items()}, _facts(made))
            )
        seen = None if stats is None else {item.name: _plain(getattr(stats, item.name)) for item in fields(stats)}
        key = content_key(KIND, {"quantizer": self.quantizer, "spec": spec, "weight": weight, "stats": seen})
        known = self.store.get(key)
        if known is None:
            made = self.quantizer.quantize(weight, spec, stats)
            known = self.store.put(key, Entry(_arrays(made), _facts(made)))
        return _weight(known)


def kept(quantizer: WeightQuantizer, store: Store) -> WeightQuantizer:
    """The quantizer, with its results kept where the store has a place for them."""
    return Kept(quantizer, store) if store.remembers or store.scratch is not None else quantizer


def _plain(value: Any) -> Any:
    """Shapes count calibration batches: their keys are tuples."""
    return sorted(value.items()) if isinstance(value, Mapping) else value


def _arrays(weight: QuantizedWeight) -> dict[str, Any]:
    names = ("codes", "scales", "zero_points", "group_bits", "pre_scale")
    return {name: getattr(weight, name) for name in names if getattr(weight, name) is not None}


def _facts(weight: QuantizedWeight) -> dict[str, Any]:
    bits = weight.spec.group_bits
    return {**asdict(weight.spec), "group_bits": None if bits is None else [int(width) for width in bits]}


def _weight(entry: Entry) -> QuantizedWeight:
    facts = dict(entry.facts)
    bits = facts.pop("group_bits")
    spec = QuantSpec(**facts, group_bits=None if bits is None else tuple(bits))
    return QuantizedWeight(spec, **entry.arrays)
