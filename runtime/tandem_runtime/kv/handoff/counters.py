"""What one end of the handoff counts since its start, for the metrics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

REASONS: Final = (
    # The error codes of `protocol.GenerateEvent`.
    "draining",
    "prefill_lost",
    "overloaded",
    "lease_expired",
    "bad_request",
    "not_finite",
    "internal",
    # No connection: nobody answered, or one end refused the handshake (secret, layout, other pod).
    "unreachable",
    "refused",
    # The receiving pod went away, as the sending one sees it.
    "connection_lost",
    # A running stream that another pod was to take over ended first, or goes on where it is.
    "not_moved",
    # The client left, or a pod is shutting down.
    "ended_early",
)
"""Why a stream was not handed over: all values of the metric's label."""


@dataclass
class Counters:
    bytes: int = 0
    streams: int = 0
    failures: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))

    def fail(self, reason: str) -> None:
        """A reason that only a peer of another version knows counts as `internal`."""
        self.failures[reason if reason in self.failures else "internal"] += 1
