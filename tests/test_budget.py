"""Budget: texts, combined constraints, clear errors."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.budget import Budget, parse_bytes, parse_size
from quantkit.errors import InputError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1234", 1234),
        ("1234B", 1234),
        ("600kB", 600_000),
        ("12MB", 12_000_000),
        ("12 mb", 12_000_000),
        ("12MiB", 12 << 20),
        ("1.5GiB", 3 << 29),
        ("25%", Fraction(1, 4)),
        ("12.5%", Fraction(1, 8)),
        ("0.25x", Fraction(1, 4)),
        ("1e6", 1_000_000),
    ],
)
def test_sizes(text: str, expected: int | Fraction) -> None:
    size = parse_size(text, "max_size")
    assert size == expected
    assert type(size) is type(expected)


def test_parse_all() -> None:
    budget = Budget.parse(avg_bits="4.25", max_size="25%", max_drop="1%", max_latency="0.8x", max_bops="3.5G")
    assert budget == Budget(4.25, Fraction(1, 4), 0.01, 0.8, 3_500_000_000)
    assert Budget.parse(max_drop="0.01").max_drop == 0.01
    assert Budget.parse(max_latency="80%").max_latency == 0.8
    assert Budget.parse() == Budget()


def test_absolute_limits() -> None:
    assert Budget(max_size=Fraction(1, 4)).max_bytes(1000) == 250
    assert Budget(max_size=12).max_bytes(1000) == 12
    assert Budget().max_bytes(1000) is None
    assert Budget(max_bops=Fraction(1, 2)).max_bit_operations(10) == 5


def test_is_empty_and_to_dict() -> None:
    assert Budget().is_empty
    assert not Budget(max_drop=0.0).is_empty
    assert Budget(avg_bits=4.0, max_size=Fraction(1, 8)).to_dict() == {"avg_bits": 4.0, "max_size": "12.5%"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_size": "big"}, "max_size must be a positive number such as 1234, .* got 'big'"),
        ({"max_size": "12XB"}, "max_size: unknown unit 'xb' in '12XB'"),
        ({"max_size": "0.2"}, "max_size must be at least 1, got '0.2'.* write 25%"),
        ({"max_size": "0%"}, "max_size must be above 0"),
        ({"max_size": "-5MB"}, "max_size must be a positive number"),
        ({"max_size": "9" * 400}, "max_size must be a positive number"),
        ({"avg_bits": "nan"}, "avg_bits must be a positive number such as 4.25"),
        ({"avg_bits": "4%"}, "avg_bits: unknown unit '%'"),
        ({"avg_bits": "0"}, "avg_bits must be above 0 and at most 32"),
        ({"avg_bits": "33"}, "avg_bits must be above 0 and at most 32"),
        ({"max_drop": "1"}, "max_drop must be at least 0 and below 1"),
        ({"max_drop": "1x"}, "max_drop: unknown unit 'x'"),
        ({"max_latency": "0x"}, "max_latency must be above 0"),
        ({"max_latency": "3ms"}, "max_latency: unknown unit 'ms' in '3ms'; write something like 0.8x"),
    ],
)
def test_bad_texts(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Budget.parse(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_size": "25%"}, "max_size must be bytes .* Budget.parse"),
        ({"max_size": 0.25}, "max_size must be bytes .* share"),
        ({"max_size": True}, "max_size must be bytes"),
        ({"max_bops": 0}, "max_bops must be above 0, got 0"),
        ({"avg_bits": "4"}, "avg_bits must be a finite number, got '4'"),
        ({"avg_bits": float("nan")}, "avg_bits must be a finite number, got nan"),
        ({"max_latency": float("inf")}, "max_latency must be a finite number, got inf"),
        ({"max_drop": -0.1}, "max_drop must be at least 0"),
    ],
)
def test_bad_numbers(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Budget(**arguments)


def test_bytes_refuse_a_share() -> None:
    assert parse_bytes("1MiB", "--memory-limit") == 1 << 20
    with pytest.raises(InputError, match="--memory-limit must be a number of bytes such as 256MB, got '25%'"):
        parse_bytes("25%", "--memory-limit")


@given(st.text(max_size=12))
def test_any_text_is_a_budget_or_one_sentence(text: str) -> None:
    for field in ("avg_bits", "max_size", "max_drop", "max_latency", "max_bops"):
        try:
            Budget.parse(**{field: text})
        except InputError as error:
            assert field in str(error)
