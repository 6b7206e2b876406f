"""When not to ask a store that does not answer. Pure: the caller says what time it is."""

from __future__ import annotations

from typing import Final

FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 30.0


class Breaker:
    """A circuit breaker: after a failure nothing is asked for a while, each time for twice as long
    until something succeeds. The first call after a pause is the one that finds out."""

    def __init__(self) -> None:
        self._pause_s = 0.0
        self._until_s = 0.0

    @property
    def failing(self) -> bool:
        """Whether the last call failed."""
        return self._pause_s > 0

    def allows(self, now_s: float) -> bool:
        """Whether to ask now."""
        return now_s >= self._until_s

    def succeeded(self) -> None:
        self._pause_s = self._until_s = 0.0

    def failed(self, now_s: float) -> None:
        self._pause_s = min(max(FIRST_PAUSE_S, 2 * self._pause_s), LONGEST_PAUSE_S)
        self._until_s = now_s + self._pause_s
