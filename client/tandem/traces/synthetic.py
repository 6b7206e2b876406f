"""Load of our own making, for those who have no trace: Poisson arrivals at a rate that may move."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from random import Random

from tandem.traces.rates import draw_tokens
from tandem.traces.trace import Trace, TraceError


class Kind(StrEnum):
    """How the rate moves."""

    POISSON = "poisson"
    """It does not."""
    DIURNAL = "diurnal"
    """A sine from the rate to the peak and back, once a day, or once in a shorter trace."""
    STEP = "step"
    """The peak in the middle third, the rate before and after."""


@dataclass(frozen=True)
class Synthetic:
    """What to make."""

    kind: Kind
    requests_per_s: float
    peak_per_s: float
    duration_s: float
    prompt_tokens: float
    """Mean."""
    output_tokens: float

    def __post_init__(self) -> None:
        if not 0 <= self.requests_per_s <= self.peak_per_s < math.inf:
            raise TraceError(
                f"a rate of {self.requests_per_s:g} and a peak of {self.peak_per_s:g} requests/s: "
                "the rate is at least 0, the peak at least the rate"
            )
        if not (self.peak_per_s > 0 and 0 < self.duration_s < math.inf):
            raise TraceError("a synthetic load needs a rate and a duration above 0")
        if not (self.prompt_tokens >= 1 and self.output_tokens >= 1):
            raise TraceError("a request has at least one prompt token and one output token")

    def rate(self, at_s: float) -> float:
        """Requests per second at a moment."""
        low, high = self.requests_per_s, self.peak_per_s
        if self.kind is Kind.DIURNAL:
            period_s = min(86_400.0, self.duration_s)
            return low + (high - low) * (1 - math.cos(2 * math.pi * at_s / period_s)) / 2
        if self.kind is Kind.STEP:
            third = self.duration_s / 3
            return high if third <= at_s < 2 * third else low
        return low


def make_trace(load: Synthetic, seed: int) -> Trace:
    """Poisson arrivals by thinning those at the peak rate; exponential lengths."""
    rng = Random(seed)
    most = load.requests_per_s if load.kind is Kind.POISSON else load.peak_per_s
    arrivals: list[float] = []
    prompts: list[int] = []
    outputs: list[int] = []
    at_s = 0.0
    while most > 0:
        at_s += rng.expovariate(most)
        if at_s >= load.duration_s:
            break
        if rng.random() * most < load.rate(at_s):
            arrivals.append(at_s)
            prompts.append(draw_tokens(load.prompt_tokens, rng))
            outputs.append(draw_tokens(load.output_tokens, rng))
    return Trace(
        name=str(load.kind),
        arrival_s=arrivals,
        prompt_tokens=prompts,
        output_tokens=outputs,
        duration_s=load.duration_s,
    )
