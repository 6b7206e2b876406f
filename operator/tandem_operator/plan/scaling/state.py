"""What the law remembers of a pool: numbers only, a few hundred bytes, kept in the Pool's status.

Times are Unix seconds, so that another process may go on from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tandem_operator.plan.scaling.window import NO_STEPS, StepCost, StepSums


@dataclass(frozen=True)
class Sample:
    """The pool's need at some time, in replicas."""

    at_s: float
    need: float


class Seen(NamedTuple):
    """Past moments of one kind that were followed, a start-up time later, by about this need."""

    kind: int
    """By their own need (forecast.level)."""
    followed: float
    """In replicas, their mean."""
    moments: float
    """How many, older ones counted less."""


@dataclass(frozen=True)
class ScalingState:
    """Of one pool; the initial value is that of a pool never looked at."""

    steps: StepSums = NO_STEPS
    """Past steps, older ones counted less."""
    cost: StepCost | None = None
    """Of a step, as last learned."""
    startup_s: float | None = None
    """As measured, smoothed."""
    arrivals: tuple[tuple[float, float], ...] = ()
    """(seconds, work) of the last windows, oldest first."""
    stream_seconds: float = 0.0
    """That streams ran for, older ones counted less."""
    streams_ended: float = 0.0
    """How many ended meanwhile."""
    inside: float = -1.0
    """Streams that ran or waited at the last look; below 0: there was none."""
    held: tuple[Sample, ...] = ()
    """Needs that later ones have not exceeded: strictly falling, oldest first."""
    past: tuple[Sample, ...] = ()
    """The largest need of each eighth of a start-up time, from which forecasts are learned."""
    seen: tuple[Seen, ...] = ()
    """What followed on which moments."""
    trim: float = 1.0
    """Share of the learned capacity with which the target was kept: feedback's correction."""
    trimmed_s: float | None = None
    """When feedback last looked."""
    ready: int = -1
    ready_since_s: float | None = None
    """When the number of ready replicas last changed."""
    last_in_s: float | None = None
    last_load_s: float | None = None
    """When there last was any request."""
