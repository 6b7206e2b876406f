"""What one stream did and when: the source of its usage, trace and metrics.

Times are seconds on one monotonic clock, given by the caller.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from tandem_runtime.frontend.backend import Route
from tandem_runtime.protocol import GenerateEvent, Handoff


@dataclass
class StreamRecord:
    model: str
    fleet: str
    arrived_s: float
    tenant: str = ""
    context: str = ""
    """Id of the named context that the prompt began with."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    replayed_tokens: int = 0
    """Of the answer, but from another gateway."""
    cached_tokens: int = 0
    queue_s: float = 0.0
    handoff: Handoff | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    ended_s: float | None = None
    finish_reason: str | None = None
    """None after the end: the stream failed or was cancelled."""
    taken_over: bool = False
    """Another pod had begun it: its first token here is not the stream's first."""
    moved: bool = False
    """Another pod ends it."""
    route: Route = field(default_factory=Route)
    _described: bool = False

    def observe(self, event: GenerateEvent, now_s: float) -> None:
        if event.prompt_tokens and not self._described:
            # Later attempts describe their own share; the user asked for one stream.
            self._described = True
            self.cached_tokens = event.cached_tokens
            self.queue_s = event.queue_s
        if event.handoff is not None:
            self.handoff = event.handoff
        if event.token_ids:
            self.completion_tokens += len(event.token_ids)
            self.last_token_s = now_s
            if self.first_token_s is None:
                self.first_token_s = now_s

    def replay(self, event: GenerateEvent) -> None:
        """What another gateway has told the client already."""
        self.observe(msgspec.structs.replace(event, token_ids=()), 0.0)
        self.replayed_tokens += len(event.token_ids)

    @property
    def ttft_s(self) -> float | None:
        if self.first_token_s is None or self.taken_over:
            return None
        return self.first_token_s - self.arrived_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time of the tokens after the first one."""
        if self.first_token_s is None or self.last_token_s is None or self.completion_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.completion_tokens - 1)

    def trace(self) -> dict[str, object]:
        """The `tandem` object of a traced answer."""
        handoff = self.handoff
        return {
            "prefill_pod": handoff.prefill_pod if handoff else self.route.prefill_pod,
            "decode_pod": self.route.decode_pod,
            "ttft_ms": _milliseconds(self.ttft_s),
            "tpot_ms": _milliseconds(self.tpot_s),
            "queue_ms": _milliseconds(self.queue_s),
            "handoff_bytes": handoff.bytes if handoff else 0,
            "handoff_ms": _milliseconds(handoff.duration_s if handoff else 0.0),
            "handoff_tokens": handoff.tokens if handoff else 0,
            "cached_tokens": self.cached_tokens,
            "attempts": self.route.attempts,
        }


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
