"""What the compressed model may cost, as text (`25%`, `12MB`, `0.8x`) and as numbers."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from fractions import Fraction
from types import MappingProxyType
from typing import Any

from quantkit.errors import InputError

UNITS = MappingProxyType(
    {
        "": 1,
        "b": 1,
        "kb": 10**3,
        "mb": 10**6,
        "gb": 10**9,
        "kib": 1 << 10,
        "mib": 1 << 20,
        "gib": 1 << 30,
        "k": 10**3,
        "m": 10**6,
        "g": 10**9,
    }
)
# Few enough digits that no text overflows a float.
AMOUNT = r"[0-9]{1,18}(?:\.[0-9]{0,18})?(?:[eE][+-]?[0-9]{1,2})?|\.[0-9]{1,18}"
NUMBER = re.compile(rf"\s*({AMOUNT})\s*([A-Za-z%]*)\s*", re.ASCII)


@dataclass(frozen=True)
class Budget:
    """Constraints that all have to hold; None = no such constraint.

    Attributes:
        avg_bits: bits per weight over all target weights, floats counted as 32, codes only.
        max_size: of the file: bytes (int), or a share of the float file (Fraction).
        max_drop: loss of the metric, 0.01 = one point.
        max_latency: time relative to float, 0.8 = a fifth less.
        max_bops: bit operations of one inference: a count (int), or a share of the float model's (Fraction).
    """

    avg_bits: float | None = None
    max_size: int | Fraction | None = None
    max_drop: float | None = None
    max_latency: float | None = None
    max_bops: int | Fraction | None = None

    def __post_init__(self) -> None:
        _check_amount("max_size", self.max_size, "bytes (int) or a share of the float file (Fraction)")
        _check_amount("max_bops", self.max_bops, "a count (int) or a share of the float model's (Fraction)")
        for name, low, high in (("avg_bits", 0.0, 32.0), ("max_latency", 0.0, math.inf)):
            _check_number(name, getattr(self, name))
            value = getattr(self, name)
            if value is not None and not low < value <= high:
                limit = "" if high == math.inf else f" and at most {high:g}"
                raise InputError(f"{name} must be above {low:g}{limit}, got {value!r}")
        _check_number("max_drop", self.max_drop)
        if self.max_drop is not None and not 0 <= self.max_drop < 1:
            raise InputError(f"max_drop must be at least 0 and below 1 (0.01 = one point), got {self.max_drop!r}")

    @classmethod
    def parse(
        cls,
        *,
        avg_bits: str | None = None,
        max_size: str | None = None,
        max_drop: str | None = None,
        max_latency: str | None = None,
        max_bops: str | None = None,
    ) -> Budget:
        """From text as the command line takes it: `4.25`, `25%` or `12MB`, `1%`, `0.8x`, `25%` or `3.5G`."""
        return cls(
            avg_bits=None if avg_bits is None else parse_factor(avg_bits, "avg_bits", "4.25", units=("",)),
            max_size=None if max_size is None else parse_size(max_size, "max_size"),
            max_drop=None if max_drop is None else parse_factor(max_drop, "max_drop", "1% or 0.01", units=("", "%")),
            max_latency=(
                None
                if max_latency is None
                else parse_factor(max_latency, "max_latency", "0.8x or 80%", units=("", "x", "%"))
            ),
            max_bops=None if max_bops is None else parse_size(max_bops, "max_bops"),
        )

    @property
    def is_empty(self) -> bool:
        """True when nothing is constrained."""
        return all(getattr(self, item.name) is None for item in fields(self))

    def keeps(self, drop: float) -> bool:
        """Whether a loss of the metric is within `max_drop`."""
        return self.max_drop is None or drop <= self.max_drop

    def max_bytes(self, float_size: int) -> int | None:
        """`max_size` in bytes, for a float file of so many bytes."""
        return _absolute(self.max_size, float_size)

    def max_bit_operations(self, float_bops: int) -> int | None:
        """`max_bops` as a count, for a float model of so many bit operations."""
        return _absolute(self.max_bops, float_bops)

    def to_dict(self) -> dict[str, Any]:
        """The constraints that are set, as plain JSON values; shares as percent text."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {
            name: f"{float(value * 100):.12g}%" if isinstance(value, Fraction) else value
            for name, value in values.items()
            if value is not None
        }


def parse_size(text: str, what: str) -> int | Fraction:
    """`12MB` = 12 000 000, `12MiB` = 12 * 2**20, `1234` = bytes, `25%` and `0.25x` = a share (Fraction)."""
    amount, unit = _split(text, what, "1234, 600kB, 12MB, 12MiB or 25%")
    if unit == "%":
        return amount / 100
    if unit == "x":
        return amount
    if unit not in UNITS:
        raise InputError(f"{what}: unknown unit {unit!r} in {text!r}; write something like 1234, 600kB, 12MiB or 25%")
    count = int(amount * UNITS[unit])
    if count < 1:
        raise InputError(f"{what} must be at least 1, got {text!r}; for a share of the float model write 25%")
    return count


def parse_bytes(text: str, what: str) -> int:
    """A size that is not relative to anything."""
    size = parse_size(text, what)
    if isinstance(size, Fraction):
        raise InputError(f"{what} must be a number of bytes such as 256MB, got {text!r}")
    return size


def parse_factor(text: str, what: str, example: str, *, units: tuple[str, ...]) -> float:
    """`0.8`, and with the unit allowed `0.8x` or `80%`."""
    amount, unit = _split(text, what, example)
    if unit not in units:
        raise InputError(f"{what}: unknown unit {unit!r} in {text!r}; write something like {example}")
    return float(amount / 100 if unit == "%" else amount)


def _split(text: str, what: str, example: str) -> tuple[Fraction, str]:
    found = NUMBER.fullmatch(text)
    if found is None:
        raise InputError(f"{what} must be a positive number such as {example}, got {text!r}")
    return Fraction(found[1]), found[2].lower()


def _check_amount(name: str, value: object, wanted: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | Fraction):
        raise InputError(f"{name} must be {wanted}, got {value!r}; text such as '25%' goes through Budget.parse")
    if value <= 0:
        raise InputError(f"{name} must be above 0, got {value}")


def _check_number(name: str, value: object) -> None:
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
    ):
        raise InputError(f"{name} must be a finite number, got {value!r}; text goes through Budget.parse")


def _absolute(limit: int | Fraction | None, whole: int) -> int | None:
    return int(limit * whole) if isinstance(limit, Fraction) else limit
