"""What is asked of a fleet: traffic, and how fast it must be answered."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tandem.plan.errors import PlanError


@dataclass(frozen=True)
class Load:
    """Requests of one shape, arriving by chance."""

    requests_per_s: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    """Of each prompt: already computed, in a cache tier."""
    prompt_cv: float = 1.0
    """Coefficient of variation of prompts' lengths; chat traces have about 1."""

    def __post_init__(self) -> None:
        if not 0 < self.requests_per_s < math.inf:
            raise PlanError(f"{self.requests_per_s:g} requests/s: give more than 0")
        if self.prompt_tokens < 1 or self.output_tokens < 1:
            raise PlanError("a request has at least one prompt token and one output token")
        if not 0 <= self.cached_tokens < self.prompt_tokens:
            raise PlanError(
                f"{self.cached_tokens} cached tokens of a prompt of {self.prompt_tokens}: at "
                "least one token is computed, so give less than the prompt"
            )
        if not 0 <= self.prompt_cv < math.inf:
            raise PlanError(f"a coefficient of variation of {self.prompt_cv:g}: give at least 0")

    @property
    def uncached_tokens(self) -> int:
        """Of each prompt."""
        return self.prompt_tokens - self.cached_tokens

    @property
    def mean_context_tokens(self) -> float:
        """Of a stream, over its life in the decode pool."""
        return self.prompt_tokens + self.output_tokens / 2

    @property
    def stream_tokens(self) -> int:
        """KV that a stream holds at its end."""
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True)
class Targets:
    """Latencies that a `quantile` of requests keep."""

    first_token_s: float
    output_token_s: float
    quantile: float = 0.95

    def __post_init__(self) -> None:
        if not (0 < self.first_token_s < math.inf and 0 < self.output_token_s < math.inf):
            raise PlanError("TTFT and TPOT targets must be above 0")
        if not 0.5 <= self.quantile < 1:
            raise PlanError(f"percentile {100 * self.quantile:g}: give 50 to 99.9")


@dataclass(frozen=True)
class Limits:
    """How the engine and the network are set up."""

    chunk_tokens: int = 2048
    """Of a prompt in one step (the engine's max_batch_tokens)."""
    max_running: int = 64
    """Streams that a replica computes together; the engine's own default."""
    handoff_bytes_per_s: float = 50e9
    """From a prefill to a decode replica; 50 GB/s is 400 Gbit/s."""

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1 or self.max_running < 1 or self.handoff_bytes_per_s <= 0:
            raise PlanError("chunk tokens, max running and handoff bandwidth must be above 0")
