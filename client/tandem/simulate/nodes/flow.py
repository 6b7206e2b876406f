"""Load as rates: how many requests a pool of pods serves within its targets, without any of them.

A pod with n streams makes a step of `step(n)` seconds, the mean over steps with a prompt and
without; a stream takes as many steps as it has tokens, so n streams are

    rate(n) = n / (output tokens x step(n))

requests a second. Pods of a pool hold equally many streams, since the gateway balances what is
outstanding, so one that is f times as slow gets 1 / f of the others' requests. What exceeds the
rate at the largest n waits, as a fluid does, until it expires.

A request's time per token differs from the mean step: the number of streams moves while it runs (a
Poisson number, averaged over an exponential lifetime), and so does how many prompts it met. Both
are taken as normal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from tandem.simulate.engine_spec import EngineSpec

_LIFE: Final = 2 / math.e
"""Variance of a count averaged over a lifetime as long as its memory, over that of the count."""
_PARTS: Final = 24
"""Quantiles of the output length over which attainment is averaged."""


@dataclass(frozen=True)
class Demand:
    """What a pool is asked for, and what it promises."""

    requests_per_s: float
    prompt_tokens: float
    """Means of exponential lengths."""
    output_tokens: float
    ttft_s: float
    tpot_s: float
    expiry_s: float = 30.0
    crash_pause_s: float = 2.0
    """From a pod's death until its streams go on elsewhere."""


@dataclass(frozen=True)
class Pace:
    """The arithmetic of one pod at full speed."""

    spec: EngineSpec
    demand: Demand

    @cached_property
    def most_streams(self) -> float:
        """That fit."""
        tokens = self.demand.prompt_tokens + self.demand.output_tokens
        return min(float(self.spec.max_running), self.spec.capacity_tokens / tokens)

    def decode_s(self, streams: float) -> float:
        """A step without a prompt. A stream seen at random is twice as long as the mean, and has
        half of that behind it."""
        context = streams * (self.demand.prompt_tokens + self.demand.output_tokens)
        return self.spec.slowdown * self.spec.replica.decode_s(streams, context)

    def prompt_s(self, streams: float) -> float:
        """What a prompt adds to a step."""
        tokens = self.demand.prompt_tokens
        context = streams * (tokens + self.demand.output_tokens)
        mixed_s = self.spec.slowdown * self.spec.replica.step_s(
            prompt_tokens=tokens,
            prompt_pairs=tokens * tokens,
            prompt_context_tokens=tokens,
            decodes=streams,
            decode_context_tokens=context,
        )
        return mixed_s - self.decode_s(streams)

    def step_s(self, streams: float) -> float:
        """The mean: each stream brings a prompt every `output_tokens` steps."""
        prompts = streams / self.demand.output_tokens
        return self.decode_s(streams) + prompts * self.prompt_s(streams)

    def rate(self, streams: float) -> float:
        """Requests/s of a pod."""
        return streams / (self.demand.output_tokens * self.step_s(streams))

    def streams_at(self, requests_per_s: float) -> float:
        """That a pod holds at a rate; all that fit where it cannot keep up."""
        low, high = 0.0, self.most_streams
        if self.rate(high) <= requests_per_s:
            return high
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.rate(middle) < requests_per_s else (low, middle)
        return high

    def within(self, streams: float, factor: float, pods: int) -> float:
        """Share of a pod's requests whose mean time per token keeps the target."""
        if streams <= 0:
            return 1.0
        demand, width = self.demand, max(streams * 0.01, 0.01)
        slope = (self.step_s(streams + width) - self.step_s(streams)) / width
        met = streams / demand.output_tokens
        spread = slope * slope * _LIFE * streams / max(pods, 1)
        prompts = 2 * met * self.prompt_s(streams) ** 2
        room_s = demand.tpot_s / factor - self.step_s(streams)
        total = 0.0
        for part in range(_PARTS):
            tokens = -demand.output_tokens * math.log(1 - (part + 0.5) / _PARTS)
            sigma_s = math.sqrt(spread + prompts / max(tokens, 1.0))
            total += (1 + math.erf(room_s / (sigma_s * math.sqrt(2)))) / 2
        return total / _PARTS

    def largest_rate(self, share: float = 0.99, pods: int = 32) -> float:
        """Requests/s of a pod at which that share keeps the target."""
        low, high = 0.0, self.most_streams
        for _ in range(40):
            middle = (low + high) / 2
            kept = self.within(middle, 1.0, pods) >= share
            low, high = (middle, high) if kept else (low, middle)
        return self.rate(low)


@dataclass(frozen=True)
class _State:
    """What holds until the pool changes."""

    most_per_s: float
    streams: float
    """Of each pod."""
    within: float
    within_full: float
    """With every pod full, while requests wait."""


@dataclass
class Flow:
    """One pool's load from change to change."""

    pace: Pace
    offered: float = 0.0
    attained: float = 0.0
    interrupted: float = 0.0
    """Streams whose pod died."""
    backlog: float = 0.0
    """Requests that wait for room."""
    at_s: float = 0.0
    _states: dict[tuple[float, ...], _State] = field(default_factory=dict)

    def advance(self, now_s: float, factors: Mapping[str, float]) -> None:
        """Until now those pods served, so much slower than they should."""
        left_s, self.at_s = now_s - self.at_s, now_s
        if left_s <= 0:
            return
        state, demand = self._state(factors), self.pace.demand
        per_s, most = demand.requests_per_s, state.most_per_s
        self.offered += per_s * left_s
        if not self.backlog and per_s <= most:
            self.attained += per_s * left_s * state.within
            return
        surplus = per_s - most
        wait_most = demand.ttft_s * most
        kept_s = _under(wait_most, self.backlog, surplus, left_s)
        emptied_s = left_s if surplus >= 0 else min(left_s, self.backlog / -surplus)
        full_s = min(kept_s, emptied_s) if surplus >= 0 else kept_s - (left_s - emptied_s)
        self.attained += per_s * max(full_s, 0.0) * state.within_full
        self.attained += per_s * (left_s - emptied_s) * state.within
        longest = demand.expiry_s * (most or per_s)
        self.backlog = min(max(self.backlog + surplus * left_s, 0.0), longest)

    def crash(self, factors: Mapping[str, float]) -> None:
        """One of those pods died: short answers do not make up for the pause."""
        state, demand = self._state(factors), self.pace.demand
        streams = self.pace.most_streams if self.backlog else state.streams
        self.interrupted += streams
        slack_s = demand.tpot_s - self.pace.step_s(streams)
        if slack_s <= 0:
            return
        # A stream that runs at a random moment has a length of two exponentials.
        z = demand.crash_pause_s / slack_s / demand.output_tokens
        self.attained -= streams * state.within * (1 - math.exp(-z) * (1 + z))

    def _state(self, factors: Mapping[str, float]) -> _State:
        key = tuple(sorted(factors.values()))
        if key not in self._states:
            self._states[key] = self._solve(key)
        return self._states[key]

    def _solve(self, factors: tuple[float, ...]) -> _State:
        pace, pods = self.pace, len(factors)
        speed = sum(1 / factor for factor in factors)
        if not speed:
            return _State(0.0, 0.0, 0.0, 0.0)
        streams = pace.streams_at(pace.demand.requests_per_s / speed)

        def mean(count: float) -> float:
            kept = {f: pace.within(count, f, pods) for f in set(factors)}
            return sum(kept[f] / f for f in factors) / speed

        full = pace.most_streams
        return _State(speed * pace.rate(full), streams, mean(streams), mean(full))


def _under(limit: float, start: float, slope: float, length_s: float) -> float:
    """For how long a line that starts there is at most `limit`."""
    if slope == 0:
        return length_s if start <= limit else 0.0
    crosses_s = min(max((limit - start) / slope, 0.0), length_s)
    return crosses_s if slope > 0 else length_s - crosses_s
