"""Leases: who has not been heard of for too long. Pure; times are the holder's own clock."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K")


@dataclass(frozen=True)
class Timing:
    """Durations of the handoff; both ends use the same."""

    lease_s: float = 30.0
    """A stream of which nothing was heard for so long is given up."""
    heartbeat_s: float = 5.0
    connect_s: float = 2.0
    grant_s: float = 60.0
    """How long a stream waits for the decode pod's blocks."""

    @property
    def silence_s(self) -> float:
        """A connection on which nothing came for so long is dead."""
        return 3 * self.heartbeat_s


class Leases(Generic[K]):
    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._deadlines: dict[K, float] = {}

    def __contains__(self, key: K) -> bool:
        return key in self._deadlines

    def begin(self, key: K, now_s: float) -> None:
        self._deadlines[key] = now_s + self._lease_s

    def extend(self, keys: Iterable[K], now_s: float) -> None:
        """Names that hold no lease are ignored: their streams have ended."""
        for key in keys:
            if key in self._deadlines:
                self._deadlines[key] = now_s + self._lease_s

    def end(self, key: K) -> None:
        self._deadlines.pop(key, None)

    def expired(self, now_s: float) -> list[K]:
        return [key for key, deadline in self._deadlines.items() if deadline <= now_s]
