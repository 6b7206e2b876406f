"""Kubernetes quantities ("500m", "2Gi", "1e3") as exact integers, rounded up as the API does."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Final

_PATTERN: Final = re.compile(
    r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))([eE][+-]?[0-9]+|[numkMGTPE]?|[KMGTPE]i)"
)
_SUFFIXES: Final = {
    "": Fraction(1),
    "n": Fraction(1, 10**9),
    "u": Fraction(1, 10**6),
    "m": Fraction(1, 1000),
    **{suffix: Fraction(1000**power) for power, suffix in enumerate("kMGTPE", start=1)},
    **{f"{suffix}i": Fraction(1024**power) for power, suffix in enumerate("KMGTPE", start=1)},
}


def parse(text: str | int | float) -> Fraction:
    """The exact value.

    Raises:
        ValueError: not a quantity.
    """
    match = _PATTERN.fullmatch(str(text))
    if match is None:
        raise ValueError(f"{text!r} is not a Kubernetes quantity")
    number, suffix = match.groups()
    if suffix[:1] in ("e", "E") and len(suffix) > 1 and suffix != "Ei":
        return Fraction(f"{number}{suffix}")
    return Fraction(number) * _SUFFIXES[suffix]


def whole(text: str | int | float) -> int:
    """The value rounded up to an integer (bytes, pods, GPUs)."""
    return math.ceil(parse(text))


def milli(text: str | int | float) -> int:
    """The value in thousandths, rounded up (CPU)."""
    return math.ceil(parse(text) * 1000)
