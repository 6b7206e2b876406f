"""What breaks when: drawn beforehand, so that every policy meets the same faults."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import Final

from tandem.simulate.run import SimulationError

HOUR_S: Final = 3600.0


class Kind(StrEnum):
    """How a node fails."""

    DIES = "dies"
    """At once, with all that it computes."""
    DEGRADES = "degrades"
    """A condition says so, and it dies some time later."""
    STRAGGLES = "straggles"
    """It computes slowly and says nothing."""
    FLAPS = "flaps"
    """Its Ready comes and goes."""
    RACK = "rack"
    """All nodes of its rack die at once."""


SHARES: Final = {
    Kind.DIES: 0.45,
    Kind.DEGRADES: 0.25,
    Kind.STRAGGLES: 0.20,
    Kind.FLAPS: 0.09,
    Kind.RACK: 0.01,
}


@dataclass(frozen=True)
class Failure:
    """One, with everything about it that is left to chance."""

    at_s: float
    kind: Kind
    node: int
    factor: float
    """How much slower a straggler is."""
    warning_s: float
    """From the condition to the death of one that degrades."""
    repair_s: float
    """Until the machine is whole again, once it is dead or empty."""
    silences_s: tuple[tuple[float, float], ...] = ()
    """Of one that flaps: begin after `at_s`, and length."""


@dataclass(frozen=True)
class Hazard:
    """How often and how badly nodes fail."""

    failures_per_hour: float = 12.0
    """Of all nodes together."""
    repair_hours: float = 3.0
    """Mean; uniform from half to one and a half of it."""
    warning_s: float = 1800.0
    """Mean of an exponential."""
    slowest: float = 2.0
    """Stragglers' factor is uniform from 1.15 to this."""

    def __post_init__(self) -> None:
        """Raises SimulationError."""
        if not 0 <= self.failures_per_hour < math.inf:
            raise SimulationError(
                f"{self.failures_per_hour:g} failures an hour: give a number of at least 0"
            )
        if not 0 < self.repair_hours < math.inf:
            raise SimulationError(f"a repair of {self.repair_hours:g} h: give more than 0")


def draw_failures(hazard: Hazard, nodes: int, duration_s: float, seed: int) -> list[Failure]:
    """A Poisson process over all nodes, in order of time. The same seed gives the same list."""
    chance = Random(seed)
    failures: list[Failure] = []
    at_s = 0.0
    while hazard.failures_per_hour > 0:
        at_s += chance.expovariate(hazard.failures_per_hour / HOUR_S)
        if at_s >= duration_s:
            break
        kind = chance.choices(list(SHARES), list(SHARES.values()))[0]
        failures.append(
            Failure(
                at_s=at_s,
                kind=kind,
                node=chance.randrange(nodes),
                factor=chance.uniform(1.15, hazard.slowest),
                warning_s=chance.expovariate(1 / hazard.warning_s),
                repair_s=hazard.repair_hours * HOUR_S * chance.uniform(0.5, 1.5),
                silences_s=_silences(chance) if kind is Kind.FLAPS else (),
            )
        )
    return failures


def _silences(chance: Random) -> tuple[tuple[float, float], ...]:
    """For an hour."""
    silences, at_s = [], 0.0
    while at_s < HOUR_S:
        length_s = chance.uniform(20, 50)
        silences.append((at_s, length_s))
        at_s += length_s + chance.uniform(30, 90)
    return tuple(silences)
