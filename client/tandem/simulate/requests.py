"""The requests of a run: what they ask for, and what became of them. Lists by request number."""

from __future__ import annotations

from enum import IntEnum

from tandem.traces.trace import Trace


class Fate(IntEnum):
    """How a request ended; each ends once."""

    OPEN = 0
    FINISHED = 1
    EXPIRED = 2
    """It waited for longer than the gateway keeps a request."""
    REFUSED = 3
    """Its context fits no replica."""


class Requests:
    """State of every request of a trace."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        count = len(trace.arrival_s)
        self.arrival_s = trace.arrival_s
        self.context = list(trace.prompt_tokens)
        """Tokens whose KV a stream needs: its prompt and what it generated before its last move."""
        self.left = list(trace.output_tokens)
        """Output tokens still to be generated."""
        self.cached = [0] * count
        """Of the context, found on the replica that computes it."""
        self.first_token_s = [-1.0] * count
        """Since arrival; negative: not yet."""
        self.finished_s = [-1.0] * count
        """Absolute."""
        self.fate = [Fate.OPEN] * count
        self.moves = [0] * count
        """Times that it lost its replica."""

    def uncached(self, request: int) -> int:
        """Prompt tokens that have to be computed: at least one, whose logits give a token."""
        return self.context[request] - self.cached[request]

    def expired(self, request: int, now_s: float, after_s: float) -> bool:
        """Whether it waited for too long; what the user already reads goes on."""
        return self.first_token_s[request] < 0 and now_s - self.arrival_s[request] > after_s

    def generated(self, request: int, tokens: int) -> None:
        """Tokens that a stream got where it can no longer run."""
        self.context[request] += tokens
        self.left[request] -= tokens

    def end(self, request: int, fate: Fate, now_s: float) -> None:
        """Once for each request."""
        if self.fate[request] is not Fate.OPEN:
            raise AssertionError(f"request {request} ended twice")
        self.fate[request] = fate
        self.finished_s[request] = now_s
