"""Requests made from measured rates: their times and lengths are drawn, not measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

from tandem.traces.trace import Trace, TraceError

RATE_COLUMNS: Final = (
    "window_start_s", "requests_per_s", "mean_input_tokens", "mean_output_tokens",
)  # fmt: skip
_MOST_REQUESTS: Final = 5_000_000


@dataclass(frozen=True)
class Window:
    """A stretch of constant rate, until the next one begins."""

    start_s: float
    requests_per_s: float
    prompt_tokens: float
    """Mean."""
    output_tokens: float


def from_rates(name: str, windows: Sequence[Window], rng: Random, share: float = 1.0) -> Trace:
    """Poisson arrivals at `share` of the rates, lengths exponential with the means.

    Raises TraceError.
    """
    if len(windows) < 2:
        raise TraceError(f"{name} has {len(windows)} windows: at least 2 say how long one is")
    lasts_s = windows[1].start_s - windows[0].start_s
    ends = [*(w.start_s for w in windows[1:]), windows[-1].start_s + lasts_s]
    expected = share * sum(
        w.requests_per_s * (end - w.start_s) for w, end in zip(windows, ends, strict=True)
    )
    if expected > _MOST_REQUESTS:
        raise TraceError(
            f"{name} asks for {expected:,.0f} requests: take a share of at most "
            f"{share * _MOST_REQUESTS / expected:.2g} (--rate-share)"
        )
    first_s = windows[0].start_s
    arrivals: list[float] = []
    prompts: list[int] = []
    outputs: list[int] = []
    for window, end in zip(windows, ends, strict=True):
        rate, at_s = share * window.requests_per_s, window.start_s
        while rate > 0:
            at_s += rng.expovariate(rate)
            if at_s >= end:
                break
            arrivals.append(at_s - first_s)
            prompts.append(draw_tokens(window.prompt_tokens, rng))
            outputs.append(draw_tokens(window.output_tokens, rng))
    if not arrivals:
        raise TraceError(f"{name} makes no request: its rates are 0, or the share is too small")
    return Trace(
        name=name,
        arrival_s=arrivals,
        prompt_tokens=prompts,
        output_tokens=outputs,
        duration_s=ends[-1] - first_s,
        notes=("arrivals and lengths drawn from rates",),
    )


def draw_tokens(mean: float, rng: Random) -> int:
    """An exponential length of at least one token."""
    return max(1, round(rng.expovariate(1 / mean))) if mean > 0 else 1
