from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem.agent.quantity import milli, parse, whole


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("1", 1),
        (8, 8),
        ("500m", Fraction(1, 2)),
        ("1.5", Fraction(3, 2)),
        (".5", Fraction(1, 2)),
        ("2Gi", 2 * 1024**3),
        ("1Ei", 1024**6),
        ("1E", 10**18),
        ("1e3", 1000),
        ("12E2", 1200),
        ("100k", 100_000),
        ("250u", Fraction(1, 4000)),
        ("-1", -1),
    ],
)
def test_parse(text: str | int, value: Fraction | int) -> None:
    assert parse(text) == value


@pytest.mark.parametrize("text", ["", "Gi", "1 Gi", "1GiB", "one", "1.2.3", "0x10"])
def test_no_quantity(text: str) -> None:
    with pytest.raises(ValueError, match="is not a Kubernetes quantity"):
        parse(text)


def test_rounds_up() -> None:
    assert whole("1500m") == 2
    assert milli("1u") == 1
    assert milli("0.1") == 100


@given(st.integers(0, 10**12))
def test_milli_of_milli_is_exact(value: int) -> None:
    assert milli(f"{value}m") == value
