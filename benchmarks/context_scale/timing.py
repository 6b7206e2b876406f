"""How long something takes, over some runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Times:
    """In milliseconds."""

    best: float
    median: float
    longest: float


def times_of(seconds: Sequence[float]) -> Times:
    found = (min(seconds), statistics.median(seconds), max(seconds))
    return Times(*(round(1e3 * value, 3) for value in found))


def timed(work: Callable[[], object], runs: int = 1) -> list[float]:
    """Seconds of each run."""
    seconds = []
    for _ in range(runs):
        begun_s = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun_s)
    return seconds
