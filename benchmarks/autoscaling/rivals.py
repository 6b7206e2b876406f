"""Other projects' policies, from their published rules, on the same windows that ours sees.

Each has one knob, searched on a printed grid; the rest are their documented defaults. None sees
output lengths or cache hits beforehand. Capacity profiles, where a policy needs them, are the exact
arithmetic of the simulated replica: better than any real profile.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from tandem.simulate.scalers import Choice
from tandem_operator.plan.scaling.window import Load, PoolWindow

TOLERANCE: Final = 0.1
STABILISE_S: Final = 300.0


@dataclass(frozen=True)
class Bounds:
    """Replicas of a pool, for every policy alike."""

    least: int
    most: int

    def clamp(self, target: int) -> int:
        return min(max(target, self.least), self.most)


class PoolRule(Protocol):
    """One pool's policy. None: the size stays."""

    def target(self, window: PoolWindow, now_s: float) -> int | None: ...


@dataclass
class PerPool:
    """A rule for each pool, within bounds."""

    rules: Mapping[str, PoolRule]
    bounds: Mapping[str, Bounds]

    def decide(self, windows: Mapping[str, PoolWindow], now_s: float) -> Mapping[str, Choice]:
        choices = {}
        for name, rule in self.rules.items():
            target = rule.target(windows[name], now_s)
            if target is not None:
                choices[name] = Choice(self.bounds[name].clamp(target), type(rule).__name__)
        return choices


@dataclass
class Hpa:
    """The Horizontal Pod Autoscaler on an average value per pod, with its default behaviour.

    desired = ceil(metric / target); within 10 % nothing; up by max(100 %, 4 pods) each 15 s; down
    to the largest recommendation of the last 300 s.
    """

    metric: Callable[[Load], float]
    per_replica: float
    every_s: float = 15.0
    _next_s: float = 0.0
    _wanted: deque[tuple[float, int]] = field(default_factory=deque)

    def target(self, window: PoolWindow, now_s: float) -> int | None:
        if now_s < self._next_s or window.load is None:
            return None
        self._next_s = now_s + self.every_s
        size = max(window.size, 1)
        value = self.metric(window.load)
        ratio = value / (self.per_replica * max(window.ready, 1))
        steady = abs(ratio - 1) <= TOLERANCE
        wanted = size if steady else max(1, math.ceil(value / self.per_replica - 1e-9))
        self._wanted.append((now_s, wanted))
        while self._wanted[0][0] < now_s - STABILISE_S:
            self._wanted.popleft()
        if wanted > size:
            return min(wanted, size + max(size, 4))
        return min(size, max(count for _, count in self._wanted))


def concurrency(load: Load) -> float:
    """Requests that a pool has in hand."""
    return load.streams + load.queued_requests


def queue_depth(load: Load) -> float:
    """Requests that wait."""
    return load.queued_requests


@dataclass
class SloLaw:
    """llm-d's SLO-aware law, for each pool its own latency.

    ratio = percentile / target, clamped to 2, its mean of 45 s; over 0.55 up, under 0.40 down, by
    ratio / band; up at most max(100 %, 4 pods) each 60 s and 8 at once, down one each 120 s after
    180 s under the band. Replicas that start are credited.
    """

    latency_ms: Callable[[Load], float | None]
    target_ms: float
    high: float = 0.55
    low: float = 0.40
    _ratios: deque[tuple[float, float]] = field(default_factory=deque)
    _next_s: float = 0.0
    _up_s: float = -1e9
    _down_s: float = -1e9
    _low_since_s: float | None = None

    def target(self, window: PoolWindow, now_s: float) -> int | None:
        if now_s < self._next_s or window.load is None:
            return None
        self._next_s = now_s + 15.0
        measured = self.latency_ms(window.load)
        ratio = 0.0 if measured is None else min(measured / self.target_ms, 2.0)
        self._ratios.append((now_s, ratio))
        while self._ratios[0][0] < now_s - 45.0:
            self._ratios.popleft()
        mean = sum(value for _, value in self._ratios) / len(self._ratios)
        size = max(window.size, 1)
        # In-flight credit: what starts already takes its share of the load.
        credited = mean * max(window.ready, 1) / size
        if credited > self.high:
            self._low_since_s = None
            if now_s - self._up_s < 60.0:
                return None
            self._up_s = now_s
            return min(math.ceil(size * credited / self.high), size + min(max(size, 4), 8))
        if mean >= self.low:
            self._low_since_s = None
            return None
        self._low_since_s = now_s if self._low_since_s is None else self._low_since_s
        if now_s - self._low_since_s < 180.0 or now_s - self._down_s < 120.0:
            return None
        self._down_s = now_s
        return max(size - 1, 1)


@dataclass
class IntervalForecast:
    """Dynamo's throughput planner: each 180 s the next interval is taken to be like the last one.

    replicas = ceil(rate / (profiled rate of a replica x use))
    """

    work: Callable[[PoolWindow], float]
    per_replica: float
    use: float
    every_s: float = 180.0
    _sum: float = 0.0
    _seconds: float = 0.0

    def target(self, window: PoolWindow, now_s: float) -> int | None:
        self._sum += self.work(window)
        self._seconds += window.window_s
        if self._seconds < self.every_s:
            return None
        rate = self._sum / self._seconds
        self._sum = self._seconds = 0.0
        return max(1, math.ceil(rate / (self.per_replica * self.use)))


@dataclass
class TokenVelocity:
    """TokenScale's core: tokens that arrive over the velocity at which a replica takes them.

    Each look, over the last 10 s; down only to the largest of the last 60 s. Its convertible
    decoders are not simulated.
    """

    work: Callable[[PoolWindow], float]
    per_replica: float
    use: float
    hold_s: float = 60.0
    _wanted: deque[tuple[float, int]] = field(default_factory=deque)

    def target(self, window: PoolWindow, now_s: float) -> int | None:
        if window.window_s <= 0:
            return None
        rate = self.work(window) / window.window_s
        wanted = max(1, math.ceil(rate / (self.per_replica * self.use)))
        self._wanted.append((now_s, wanted))
        while self._wanted[0][0] < now_s - self.hold_s:
            self._wanted.popleft()
        return max(count for _, count in self._wanted)


def prompt_work(window: PoolWindow) -> float:
    """Uncached prompt tokens that arrived."""
    return window.load.prompt_tokens if window.load else 0.0


def output_work(window: PoolWindow) -> float:
    """Tokens that were generated."""
    return window.load.output_tokens if window.load else 0.0
