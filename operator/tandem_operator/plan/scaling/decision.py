"""What the law answers: a size, why, and the numbers that led to it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from tandem_operator.plan.scaling.state import ScalingState


class ScaleReason(StrEnum):
    """Why a pool should have the size that was decided."""

    WITHIN_BAND = "WithinBand"
    """The load fits the size, and not a smaller one by enough."""
    LOAD_OVER_BAND = "LoadOverBand"
    LOAD_UNDER_BAND = "LoadUnderBand"
    FORECAST = "Forecast"
    """The load that is likely within a start-up time does not fit."""
    LATENCY_OVER_TARGET = "LatencyOverTarget"
    """The percentile is over its target although the load should fit."""
    HELD = "Held"
    """A smaller size would do now, but not for long enough yet."""
    IDLE = "Idle"
    """No request for the policy's idle time: zero."""
    NO_TRAFFIC = "NoTraffic"
    """Load zero: the smallest size."""
    WAKE = "Wake"
    """Requests wait for a pool that has no replica."""
    NO_DATA = "NoData"
    """The load could not be measured: the size stays."""
    NOT_LEARNED = "NotLearned"
    """No step has been seen yet, so what a replica can do is not known: the size stays."""
    OUT_OF_BOUNDS = "OutOfBounds"
    """The size is brought between minReplicas and maxReplicas."""
    SCHEDULE = "Schedule"
    """Likewise, by the bounds of a schedule."""
    BUDGET = "Budget"
    """The GPU budget leaves no more."""


@dataclass(frozen=True)
class Numbers:
    """The inputs and steps of a decision, for people: replicas as fractions, milliseconds."""

    demand: float = 0.0
    """Prompt tokens per second (prefill) or streams (decode, both)."""
    capacity: float = 0.0
    """Of one replica in the same unit, after feedback's trim; 0: not learned."""
    need: float = 0.0
    """Replicas that the load takes at full use."""
    growth: float = 1.0
    """The need that is provided for, over the need."""
    likely: float = 0.0
    """The need that is provided for: what is likely a start-up time from now."""
    held: float = 0.0
    """The largest forecast need within the hold time."""
    latency_ms: float | None = None
    target_ms: float = 0.0
    startup_s: float = 0.0
    ready: int = 0
    starting: int = 0
    limited_by: str = ""
    """`maxReplicas`, `minReplicas`, `step` or `budget`, where that cut the size."""
    min_replicas: int = 0
    """The bounds that hold now."""
    max_replicas: int = 0
    schedule: str = ""
    """The schedule that set the bound which cut the size, else one whose bounds hold."""


@dataclass(frozen=True)
class Decision:
    """The size that a pool should have."""

    target: int
    reason: ScaleReason
    numbers: Numbers
    state: ScalingState
    """To be given to the next call."""
