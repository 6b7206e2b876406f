"""What one look at a pool says: its load since the last look, its engines' steps, its pods.

Everything is summed over the pool's replicas. Work is in tokens: a request is no unit, since one
may cost a thousand times another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["prefill", "decode", "both"]
MOST = 1e24
"""No number that was measured is larger."""


@dataclass(frozen=True)
class StepSums:
    """Sums over engine steps, enough to fit seconds = a + b x prompt tokens + c x streams.

    `prompt` is a step's prompt tokens, `streams` the streams that got a token in it.
    """

    steps: float = 0.0
    seconds: float = 0.0
    prompt: float = 0.0
    streams: float = 0.0
    prompt_prompt: float = 0.0
    """Sum of prompt x prompt; the same for the following."""
    prompt_streams: float = 0.0
    streams_streams: float = 0.0
    seconds_prompt: float = 0.0
    seconds_streams: float = 0.0

    def __add__(self, other: StepSums) -> StepSums:
        return StepSums(*(a + b for a, b in zip(_fields(self), _fields(other), strict=True)))

    def scaled(self, factor: float) -> StepSums:
        """The same steps, counted `factor` times."""
        return StepSums(*(factor * value for value in _fields(self)))


NO_STEPS = StepSums()


def _fields(sums: StepSums) -> tuple[float, ...]:
    return (
        sums.steps,
        sums.seconds,
        sums.prompt,
        sums.streams,
        sums.prompt_prompt,
        sums.prompt_streams,
        sums.streams_streams,
        sums.seconds_prompt,
        sums.seconds_streams,
    )


def step(prompt_tokens: int, streams: int, seconds: float) -> StepSums:
    """The sums of one step."""
    p, s = float(prompt_tokens), float(streams)
    return StepSums(1.0, seconds, p, s, p * p, p * s, s * s, seconds * p, seconds * s)


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step, of each prompt token in it and of each stream in it."""

    base_s: float
    prompt_s: float
    stream_s: float


@dataclass(frozen=True)
class Load:
    """What the pool was asked and did during the window."""

    requests: float
    """That arrived."""
    prompt_tokens: float
    """Uncached prompt tokens that arrived for the pool to compute."""
    output_tokens: float
    """Generated, or for a prefill pool 0."""
    streams: float
    """Running streams, on average over the window (or at its end)."""
    queued_requests: float = 0.0
    """At the window's end, wherever they wait for this pool."""
    queued_tokens: float = 0.0
    """Uncached prompt tokens of the queued requests."""
    ttft_ms: float | None = None
    """At the policy's percentile, over the last minute or so; None where nothing was measured."""
    tpot_ms: float | None = None
    steps: StepSums = NO_STEPS
    """Of all the pool's engines during the window."""
    step_tokens: float = 0.0
    """Prompt tokens that an engine takes into one step at most; 0: not known."""
    kv_tokens: float = 0.0
    """Tokens of KV cache that live streams occupy, at the window's end."""
    kv_capacity_tokens: float = 0.0
    """Of one replica; 0: not known."""
    max_streams: float = 0.0
    """Streams that one replica runs at most; 0: not known."""


@dataclass(frozen=True)
class PoolWindow:
    """One look at a pool."""

    window_s: float
    """Since the look before."""
    size: int
    """Replicas that the pool is asked to have now: the live spec.replicas."""
    ready: int
    """Replicas that serve and do not drain."""
    starting_s: tuple[float, ...] = ()
    """Ages of the replicas that do not serve yet."""
    draining: int = 0
    """Replicas that leave; they still occupy their GPUs."""
    startup_s: tuple[float, ...] = ()
    """From creation to Ready, of the replicas that became Ready during the window."""
    load: Load | None = None
    """None: it could not be measured. No traffic is a Load of zeros."""
